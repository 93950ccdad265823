"""What classes and functions take, read from their source: importing them takes seconds.

An answer is given only where the source alone is enough; the parser knows the rest.
"""

import ast
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

Arguments = dict[str, str]
"""Names of arguments and their annotations, empty where there is none."""

_PLAIN: dict[str, tuple[type, ...]] = {
    "int": (int, float),  # 1.0 is for the parser to decide
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "None": (type(None),),
}
_MOST_LINKS = 8
_LONG = 80
"""Characters of what is no number."""
_CLASS = re.compile(r"^class (\w+)", re.MULTILINE)
_ALIAS = re.compile(r"^([A-Z]\w*) = ", re.MULTILINE)
_Definition = ast.ClassDef | ast.FunctionDef


def _file(module: str) -> Path | None:
    """The file of a module, whose parents are not imported."""
    top, _, inner = module.partition(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin)
    if inner:
        path = path.parent.joinpath(*inner.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path


@cache
def _source(module: str) -> str | None:
    """The source of a module; ``None`` if there is none."""
    path = _file(module)
    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


@cache
def _body(module: str) -> list[ast.stmt]:
    try:
        return ast.parse(_source(module) or "").body
    except (SyntaxError, ValueError):
        return []


def _find(path: str, links: int = 0) -> tuple[str, _Definition] | None:
    """The module that defines a class or function, and the definition; imports are followed."""
    module, _, name = path.rpartition(".")
    for node in _body(module):
        if isinstance(node, _Definition) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and links < _MOST_LINKS:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return _find(f"{_origin(node, module)}.{alias.name}", links + 1)
    return None


def _origin(node: ast.ImportFrom, module: str) -> str:
    """The module that a statement of another one imports from."""
    if not node.level:
        return str(node.module)
    file, parts = _file(module), module.split(".")
    is_package = file is not None and file.name == "__init__.py"
    parents = parts[: len(parts) + is_package - node.level]
    return ".".join([*parents, *([node.module] if node.module else [])])


def documented(module: str) -> str:
    """The first line of a module's docstring."""
    text = ast.get_docstring(ast.Module(_body(module), []))
    return (text or "").partition("\n")[0]


def offered_instead(path: str) -> list[str] | None:
    """What a module offers that certainly lacks a class or function; ``None`` otherwise."""
    module, _, name = path.rpartition(".")
    source = _source(module)
    if source is None or re.search(rf"\b{re.escape(name)}\b|import \*|__getattr__|globals", source):
        return None
    imported = [node for node in _body(module) if isinstance(node, ast.ImportFrom)]
    defined = [node.name for node in _body(module) if isinstance(node, _Definition)]
    return defined + [alias.asname or alias.name for node in imported for alias in node.names]


@cache
def arguments_of(path: str) -> Arguments | None:
    """What a class or function takes; ``None`` if its source alone does not say."""
    found = _find(path)
    if found is None:
        return None
    module, node = found
    if isinstance(node, ast.FunctionDef):
        return _through(node, module, [])
    if any("dataclass" in ast.unparse(one) for one in node.decorator_list):
        return _fields(path)
    parents = [f"{module}.{ast.unparse(base)}" for base in node.bases]
    made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    if not made:
        return arguments_of(parents[0]) if len(parents) == 1 else None
    names = _through(made[-1], module, parents)
    return names and {name: kind for name, kind in names.items() if name != "self"}


def _through(function: ast.FunctionDef, module: str, parents: Sequence[str]) -> Arguments | None:
    """What a function takes, with what it passes on as keywords, their only use, if it does.

    Args:
        function: Whose source is read.
        module: That defines it.
        parents: Of ``super().__init__``, if it is a method.
    """
    own, keywords = _named(function.args), function.args.kwarg
    if keywords is None:
        return own
    uses = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == keywords.arg]
    for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
        last = call.keywords[-1] if call.keywords else None
        if last is None or last.arg is not None or last.value not in uses or len(uses) > 1:
            continue
        called = ast.unparse(call.func)
        is_super = called == "super().__init__"
        theirs = [arguments_of(one) for one in (parents if is_super else [f"{module}.{called}"])]
        if None in theirs or (call.args and not is_super):
            return None
        given = {one.arg for one in call.keywords}
        return {k: v for one in theirs for k, v in (one or {}).items() if k not in given} | own
    return None


def _named(arguments: ast.arguments) -> Arguments:
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    return {one.arg: ast.unparse(one.annotation) if one.annotation else "" for one in every}


def _fields(path: str) -> Arguments:
    """Fields of a data class and of those it derives from."""
    module, node = _find(path) or ("", None)
    names: Arguments = {}
    if not isinstance(node, ast.ClassDef):
        return names
    for base in node.bases:
        names |= _fields(f"{module}.{base.id}") if isinstance(base, ast.Name) else {}
    if any("dataclass" in ast.unparse(one) for one in node.decorator_list):
        for one in node.body:
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
                is_argument = "init=False" not in (ast.unparse(one.value) if one.value else "")
                annotation = ast.unparse(one.annotation)
                if is_argument and "ClassVar" not in annotation:
                    names[one.target.id] = annotation
    return names


def is_module(path: str) -> bool:
    """Whether a class may be a torch module; only its source is read."""
    module, node = _find(path) or ("", None)
    if not isinstance(node, ast.ClassDef) or module == "torch.nn.modules.module":
        return True
    return any(is_module(f"{module}.{ast.unparse(base)}") for base in node.bases)


def channels_of(path: str) -> int | None:
    """Channels of the images of a source of data, ``None`` if its source does not say."""
    _, node = _find(path) or ("", None)
    for made in ast.walk(node) if node else ():
        if isinstance(made, ast.Assign) and ast.unparse(made.targets[0]) in ("spec", "self.spec"):
            match made.value:
                case ast.Call(
                    args=[_, ast.Tuple(elts=[ast.Constant(value=int(channels)), _, _]), *_]
                ):
                    return channels
    return None


def classes_in(folders: Iterable[Path]) -> dict[str, str]:
    """Classes that the modules of packages define: short name -> path.

    Without names that stand for something else in another module, such as a type of text.
    """
    found: dict[str, str] = {}
    aliases: set[str] = set()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            parts = (folder.name, *file.relative_to(folder).with_suffix("").parts)
            module = ".".join(parts).removesuffix(".__init__")
            text = file.read_text(encoding="utf-8", errors="replace")
            found |= {name: f"{module}.{name}" for name in _CLASS.findall(text)}
            aliases.update(_ALIAS.findall(text))
    return {name: path for name, path in found.items() if name not in aliases}


def misfit(value: Any, annotation: str) -> str:
    """The types that are expected if a value certainly has none of them; empty otherwise.

    Args:
        value: A plain value; text is read as YAML, as on the command line.
        annotation: As written in the source.
    """
    words = re.findall(r"[\w.]+", annotation)
    kinds = [word for word in words if word not in ("Optional", "Union")]
    kinds += ["None"] * ("Optional" in words and "None" not in kinds)
    if not kinds or not all(kind in _PLAIN for kind in kinds) or "str" in kinds:
        return ""
    if isinstance(value, str) and len(value) < _LONG:
        try:
            value = yaml.safe_load(value)
            value = float(value) if isinstance(value, str) else value  # such as 1e-4
        except (ValueError, yaml.YAMLError):
            pass
    if any(type(value) in _PLAIN[kind] for kind in kinds):
        return ""
    return " or ".join("null" if kind == "None" else kind for kind in kinds)
