"""Attacks that know their settings and passes; settings are changed one at a time and written."""

import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Self


class Budget(NamedTuple):
    """The most forward and backward passes that an attack makes per image."""

    forward: float = 0
    backward: float = 0

    def plus(self, other: "Budget") -> "Budget":
        """Both together."""
        return Budget(self.forward + other.forward, self.backward + other.backward)

    def times(self, factor: float) -> "Budget":
        """So many times these passes."""
        return Budget(self.forward * factor, self.backward * factor)


class Settings:
    """Keeps the arguments of its constructor: sweeps change one, the journal compares them all."""

    _given: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keep the arguments; copies and unpickled objects get them with their other state."""
        self = super().__new__(cls)
        self._given = dict(inspect.signature(cls).bind_partial(*args, **kwargs).arguments)
        return self

    def but(self, **changes: Any) -> Self:
        """A new object with some arguments changed; defaults that follow from them change too."""
        return type(self)(**{**self._given, **changes})

    def __repr__(self) -> str:
        """Class and given arguments."""
        given = ", ".join(f"{name}={value!r}" for name, value in self._given.items())
        return f"{type(self).__name__}({given})"

    def recipe(self) -> str:
        """Class, steps and what else differs from the defaults, for a reader of results.

        The ball is told elsewhere. Numbers are those in use: the step size of ``eps/10`` is a
        number. Files and networks are left out.
        """
        parameters = inspect.signature(type(self)).parameters
        words = [type(self).__name__]
        for name in parameters.keys() - {"eps", "norm"}:
            value = getattr(self, name, self._given.get(name))
            is_told = name == "steps" or value != parameters[name].default
            if is_told and (text := _short(value)):
                words.append(f"{name} {text}")
        return ", ".join(words[:1] + sorted(words[1:]))

    def settings(self) -> dict[str, Any]:
        """Class and all arguments, defaults included, as plain values."""
        parameters = inspect.signature(type(self)).parameters
        arguments = {
            name: self._given.get(name, parameter.default) for name, parameter in parameters.items()
        }
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        return {"class": name} | {key: _plain(value) for key, value in arguments.items()}


def _short(value: Any) -> str:
    """A number, a word or a list of them; empty for anything else, such as a path."""
    if isinstance(value, list | tuple):
        parts = [_short(part) for part in value]
        return " ".join(parts) if all(parts) else ""
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w-]+", value) else ""
    return f"{value:.6g}" if isinstance(value, int | float) else ""


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.settings()
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
