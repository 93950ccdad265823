"""Settings: their names and digests, and one line for what a parser says of them."""

import difflib
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from common.errors import ConfigurationError, UserError
from common.parsing import MUST_NOT, ArgumentParser, load_named


def plain_digest(values: Any) -> str:
    """Short digest of plain values."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def type_name(class_path: str) -> str:
    """The last part of an import path."""
    return class_path.rpartition(".")[2]


def nodes(value: Any, name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All mappings among settings, plain or parsed, with their names as on the command line."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        yield name, value
        for key, part in value.items():
            inner = name if key == "init_args" else f"{name}.{key}" if name else str(key)
            yield from nodes(part, inner)
    elif isinstance(value, list | tuple):
        for place, part in enumerate(value):
            yield from nodes(part, f"{name}.{place}" if name else str(place))


def class_paths(settings: Any) -> set[str]:
    """All import paths of classes named anywhere in plain settings."""
    named = (node.get("class_path") for _, node in nodes(settings))
    return {path for path in named if isinstance(path, str)}


def explain(message: str, options: Iterable[str] = ()) -> str:
    """One line for a message of jsonargparse, which tells everything that it tried.

    Args:
        message: Nested ``Parser key``, ``Problem with given class_path``, reason.
        options: Names of all options, for suggestions.
    """
    key, class_path, reason = _deepest(message)
    if found := re.search(r"Importing '([^']*)' is not allowed", message):
        reason = f"{found[1]} {MUST_NOT}"
    if not reason and (found := _NO_CLASS.search(message)):
        reason = _other_class(*found.groups())
    where = key or "the configuration"
    if found := re.match(
        r"(?:Option|Key|Group key) '([^']*)' is not (?:accepted|expected)", reason
    ):
        names = parameters_of(class_path) if class_path else options
        prefix = f"{key}." if class_path or not key else ""
        return f"unknown option {prefix}{found[1]}{nearest(found[1], names)}"
    if found := re.match(
        r"(?:Subcommand '\w+' does not accept option '|unrecognized arguments?: (--))([^ =']+)",
        reason,
    ):
        return f"unknown option {found[1] or ''}{found[2]}{nearest(found[2], options)}"
    if found := re.match(r"module '([^']*)' has no attribute '([^']*)'", reason):
        names = [name for name in dir(sys.modules.get(found[1])) if name[0] != "_"]
        return f"{where}: there is no {found[1]}.{found[2]}{nearest(found[2], names)}"
    reason = re.sub(r"<class '([^']*)'>", r"\1", reason).replace("typing.Literal", "one of ")
    reason = re.sub(r"^Expected an? (.*)\. Got value: (.*)$", r"expected \1, got \2", reason)
    return f"{where}: {reason or 'it cannot be read'}" if key else reason or message


def _other_class(path: str | None, kind: str | None, short: str) -> str:
    """What is wrong with the name of a class, which is of another kind or unknown."""
    if path is not None:
        return f"{path} is no {kind}; name a class derived from it, or a function that makes one"
    known = {
        f"{name}.{one}"
        for name, module in list(sys.modules.items())
        if _HOMES.match(name)
        for one, made in vars(module).items()
        if inspect.isclass(made) and made.__module__ == name
    }
    near = nearest(short, known) or "; give its import path, such as common.networks.resnet.ResNet"
    return f"there is no class {short!r}{near}"


@contextmanager
def explained(place: str | Path) -> Iterator[None]:
    """Turn errors of a parser or a class into a ConfigurationError that begins with the place."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # jsonargparse has no common type for what classes refuse
        raise ConfigurationError(f"{place}: {explain(str(error))}") from error


def _deepest(message: str) -> tuple[str, str, str]:
    """The key, class and reason of the innermost problem of a message."""
    key, class_path, reason, given, depth = "", "", "", "", -1
    expected: list[str] = []  # by the alternatives that failed
    for line in _CALLABLE.sub("", message).splitlines():
        text = line.strip().removeprefix("- ")
        if found := re.match(r'Parser key "([^"]*)":\s*(.*)', text):
            key = f"{key}.{found[1]}" if key and not found[1].startswith(key) else found[1]
            text = found[2]
        indent = len(line) - len(line.lstrip())
        if found := re.match(r"Problem with given class_path '([^']*)':", text):
            class_path = found[1]
        elif found := re.match(r"Given value: (.*?)(?:\. Got value: .*)?$", text):
            given = given or found[1]
        elif text and not _BOILERPLATE.match(text):
            if indent > depth:
                reason, depth, expected, given = text, indent, [], ""
            if indent == depth and (found := _EXPECTED.match(text)):
                expected.append(found[1])
    if found := re.search(r"\.* Got value: Namespace\((?:class_path='([^']*)')?.*$", reason):
        class_path, reason = found[1] or class_path, reason[: found.start()]
    if len(expected) > 1 or (expected and "Got value" not in reason):
        reason = f"expected {' or '.join(expected)}" + (f", got {given}" if given else "")
    return key, class_path, reason


_BOILERPLATE = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>"
    r"|Import path .* does not correspond|Expected a path but|Expected a dot import path string"
)
_HOMES = re.compile(r"(?:common|paper_\w+|torch\.optim|torch\.nn\.modules)(?:\.|$)")
_NO_CLASS = re.compile(
    r"Import path (\S+) does not correspond to a subclass of (\S+)"
    r"|Expected a dot import path string: (\S+)"
)
_CALLABLE = re.compile(r"Type typing\.Callable\[.*\] expects a function or a callable class: ")
_EXPECTED = re.compile(r"Expected an? (<class '[^']*'>|[\w.]+(?:\[.*\])?)$")


def parameters_of(class_path: str) -> list[str]:
    """Names of what a class or function can be configured with."""
    parser, made = ArgumentParser(exit_on_error=False), load_named(class_path)
    add = parser.add_class_arguments if inspect.isclass(made) else parser.add_function_arguments
    return [name.removeprefix("made.") for name in add(made, "made", fail_untyped=False)]


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint at the nearest candidates; at all of them where few and none is near."""
    candidates = sorted({*candidates} - {name}, key=lambda c: (c.count("."), c), reverse=True)
    place, _, last = name.lower().rpartition(".")
    others = [c for c in candidates if c.lower().rpartition(".")[0] != place]
    # An option is compared by its last part too, so that a forgotten section is found.
    by_last = {c.rpartition(".")[2].lower(): c for c in candidates}
    here = {c.rpartition(".")[2].lower(): c for c in candidates if c not in others}
    near = [c for c in reversed(candidates) if c.rpartition(".")[2].lower() == last][:2]
    whole = {c.lower(): c for c in others}
    for wanted, known in ((last, here), (name.lower(), whole), (last, by_last)):
        near = near or [known[c] for c in difflib.get_close_matches(wanted, known, 1, 0.6)]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; valid are {', '.join(sorted(candidates))}" if 0 < len(candidates) <= 20 else ""
