"""Attacks as values: made again with one setting changed, and written down completely."""

import inspect
from collections.abc import Mapping
from typing import Any, Self


class Settings:
    """Remembers what it was made with.

    A sweep needs the same attack at another radius, with everything that follows from the radius
    (a default step size) worked out anew; a journal of outcomes needs to know when an attack is
    the same as yesterday's.
    """

    _given: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the arguments; copies and unpickled objects get theirs with their other state."""
        self = super().__new__(cls)
        self._given = dict(inspect.signature(cls).bind_partial(*args, **kwargs).arguments)
        return self

    def but(self, **changes: Any) -> Self:
        """The same with some arguments of the constructor changed."""
        return type(self)(**{**self._given, **changes})

    def settings(self) -> dict[str, Any]:
        """Class and all arguments, defaults included, as plain values."""
        parameters = inspect.signature(type(self)).parameters
        arguments = {
            name: self._given.get(name, parameter.default) for name, parameter in parameters.items()
        }
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"class": name} | {key: _plain(value) for key, value in arguments.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.settings()
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
