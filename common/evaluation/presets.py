"""Ready suites: ``quick``, ``autoattack``, ``audit`` and the protocols of papers, from YAML.

The files in ``common/configs`` are overlays for the command line of a paper and suites for any
other model. A length written ``threat``, ``threat/10`` or ``threat*2`` follows the threat model; a
number is used as written.
"""

import inspect
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from common.attacks.geometry import Norm
from common.errors import ConfigurationError, check_choice
from common.evaluation.audit.checks import Audit
from common.evaluation.saved import SavedExamples
from common.evaluation.suite import SuiteEntry
from common.limits import read_yaml
from common.packages import CONFIGS, file_named, ready_suites
from common.parsing import build, check_named, load_named
from common.results.lines import Threat
from common.settings import explained, type_name

_WORD = re.compile(r"threat(?:\s*([*/])\s*(\d+(?:\.\d+)?))?")


@dataclass
class Suite:
    """The attacks, the adversary of the worst case, and the audit if there is one."""

    entries: Mapping[str, SuiteEntry]
    threat: Threat
    audit: Audit | None = None


def load_suite(name: str | Path, eps: float | str | None = None, norm: Norm | None = None) -> Suite:
    """A suite by name or from a YAML file with a section ``evaluation``.

    By default ``eps`` and ``norm`` are those of the file's own threat model: its ``threat``, or the
    ball of its first attack where all radii are numbers, else 8/255 in ``linf``.

    Raises:
        ConfigurationError: If there is no such suite, or a setting in it is wrong or has no use
        here.
    """
    if norm is not None:
        check_choice("norm", norm, Norm)
    path = file_named(str(name), ready_suites(), "suite")
    section = _section(path)
    check_named(section, "evaluation")
    wanted: dict[str, Any] = {key: section[key] for key in ("suite", "audit") if key in section}
    if not wanted:
        raise ConfigurationError(f"{path} has no evaluation.suite and no evaluation.audit")
    if unused := set(section) - {"suite", "audit", "threat"}:
        raise ConfigurationError(
            f"{path} sets evaluation.{min(map(str, unused))}, which has no use for a model that is "
            "passed in (suite, audit and threat have); remove it or pass it as an argument"
        )
    with explained(path):
        is_own = section.get("threat") or not _has_word(section.get("suite"))
        own = threat_of(section) if is_own else None
        if own is not None and norm is not None and norm != own.norm:
            raise ConfigurationError(
                f"the suite {str(name)!r} attacks in {own.norm}, got norm {norm!r}; choose another "
                "suite, such as quick or autoattack, or leave norm out"
            )
        threat = chosen_threat(own, eps, norm)
        fill_threat(wanted, threat)
        made = build({"suite": dict[str, SuiteEntry], "audit": Audit | None}, wanted)
    return Suite(made.suite or {}, threat, made.audit)


def _section(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    section = content.get("evaluation") if isinstance(content, dict) else None
    suite = section.get("suite") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(suite, dict | None):
        raise ConfigurationError(
            f"{path} has no section evaluation with a suite of attacks by name, such as "
            "evaluation: {suite: {pgd: {attack: {class_path: common.attacks.pgd.PGD}}}}"
        )
    return section


def chosen_threat(own: Threat | None, eps: float | str | None, norm: Norm | None) -> Threat:
    """The threat model of the given values; by default the suite's own.

    A norm other than linf needs a radius.
    """
    if norm is not None:
        check_choice("norm", norm, Norm)
    if eps is None and own is not None and norm in (None, own.norm):
        return own
    chosen: Norm = norm or (own.norm if own is not None else "linf")
    if eps is None and chosen != "linf":
        raise ConfigurationError(
            f"norm is {chosen} and eps is not given; give a radius of that norm, such as eps=0.5"
        )
    return Threat(chosen, "8/255" if eps is None else eps)


def check_overlays(paths: Iterable[str | Path], threat: Threat | None) -> None:
    """Refuse a ready suite among configuration files with another norm than the threat model."""
    for path in map(Path, paths):
        if threat is None or path.resolve().parent != CONFIGS.resolve():
            continue
        stated = ((read_yaml(path) or {}).get("evaluation") or {}).get("threat")
        if stated and stated["norm"] != threat.norm:
            raise ConfigurationError(
                f"{path.name} attacks in {stated['norm']}, got --evaluation.threat.norm "
                f"{threat.norm}; choose another suite, such as autoattack.yaml"
            )


def fill_threat(node: Any, threat: Threat | None, has_defaults: bool = False) -> None:
    """Replace the word ``threat`` in a configuration by numbers, in place.

    With ``has_defaults`` a parser has filled in defaults: then a norm that is the default need not
    have been written, and follows the threat model. An attack in another norm is refused.
    """
    for key, value in _items(node):
        if isinstance(value, str) and (found := _WORD.fullmatch(value.strip())):
            if threat is None:
                raise ConfigurationError(
                    f"{key} is {value!r} and nothing says what the threat model is; add "
                    "--evaluation.threat.norm linf --evaluation.threat.eps 8/255"
                )
            factor = float(found[2] or 1)
            if not 0.0 < factor < math.inf:
                raise ConfigurationError(f"{key} is {value[:80]!r}; scale by a number above 0")
            radius = threat.radius * factor if found[1] == "*" else threat.radius / factor
            node[key] = min(radius, 1.0) if threat.norm == "linf" else radius
        else:
            if threat is not None and key == "init_args" and _follows(value):
                _take_norm(node["class_path"], value, threat, has_defaults)
            fill_threat(value, threat, has_defaults)


def _items(node: Any) -> list[tuple[Any, Any]]:
    """Keys and values of a mapping, or positions and values of a list."""
    if isinstance(node, list):
        return list(enumerate(node))
    node = vars(node) if isinstance(node, Namespace) else node
    return list(node.items()) if isinstance(node, Mapping) else []


def _has_word(node: Any) -> bool:
    if isinstance(node, str):
        return _WORD.fullmatch(node.strip()) is not None
    return any(_has_word(value) for _, value in _items(node))


def _follows(arguments: Any) -> bool:
    return bool(arguments) and _WORD.fullmatch(str(arguments.get("eps"))) is not None


def _take_norm(class_path: str, arguments: Any, threat: Threat, has_defaults: bool) -> None:
    """Set the norm of an attack whose radius is that of the threat model."""
    has_choice, default = _norms_of(class_path)
    given = arguments.get("norm") if has_choice else default
    if given not in (None, threat.norm) and not (has_choice and has_defaults and given == default):
        raise ConfigurationError(
            f"{type_name(class_path)} attacks in {given} with the radius of the threat model, "
            f"which is in {threat.norm}; give norm {given}, or take it out of the suite"
        )
    if has_choice:
        arguments["norm"] = threat.norm


def _norms_of(class_path: str) -> tuple[bool, Norm | None]:
    """Whether an attack takes a norm, and its default or its only one."""
    kind = load_named(class_path)
    parameter = inspect.signature(kind).parameters.get("norm")
    if parameter is None:
        return False, getattr(kind, "norm", None)
    return True, parameter.default


def threat_of(evaluation: Any, adversary: Any = None) -> Threat | None:
    """The threat of the sections: stated, of the suite's first ball, or the adversary's.

    Saved examples have that of their folder.
    """
    given = evaluation.get("threat")
    if given:
        return Threat(given["norm"], given["eps"])
    entries = [entry for entry in (evaluation.get("suite") or {}).values() if entry]
    for attack in [*(entry.get("attack") for entry in entries), (adversary or {}).get("attack")]:
        arguments = (attack or {}).get("init_args") or {}
        eps = arguments.get("eps")
        if arguments.get("folder") and load_named(attack["class_path"]) is SavedExamples:
            saved = SavedExamples(arguments["folder"])
            return Threat(saved.norm, saved.eps)
        if eps is None or _WORD.fullmatch(str(eps)):
            continue
        norm = arguments.get("norm") or _norms_of(attack["class_path"])[1]
        if norm is not None:
            return Threat(norm, eps)
    return None
