"""Ready suites: ``quick``, ``autoattack``, ``audit`` and the protocols of papers, from YAML.

The files in ``common/configs`` are overlays for the command line of a paper and serve any other
model too. Where a radius is the word ``threat``, or ``threat/10``, ``threat*2``, it follows the
adversary that the evaluation is about.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from common.attacks.pgd import Norm
from common.errors import ConfigurationError
from common.evaluation.audit import Audit
from common.evaluation.steps import Threat
from common.evaluation.suite import SuiteEntry
from common.limits import read_yaml
from common.parsing import build, check_named, load_named

CONFIGS = Path(__file__).parent.parent / "configs"
_WORD = re.compile(r"threat(?:\s*([*/])\s*(\d+(?:\.\d+)?))?")


@dataclass
class Suite:
    """The attacks, and the checks for gradient masking if there are any."""

    entries: dict[str, SuiteEntry]
    audit: Audit | None = None


def ready_suites() -> list[str]:
    """The names of all overlays that bring attacks or an audit."""
    return sorted(
        path.stem
        for path in CONFIGS.glob("*.yaml")
        if {"suite", "audit"} & set((read_yaml(path) or {}).get("evaluation", ()))
    )


def load_suite(name: str | Path, threat: Threat) -> Suite:
    """A suite by name or from a file with a section ``evaluation``.

    Args:
        name: One of :func:`ready_suites`, or the path of a YAML file.
        threat: What ``threat`` means in it.

    Raises:
        ConfigurationError: If there is no such suite, or a setting in it is wrong.
    """
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not path.exists():
        raise ConfigurationError(
            f"there is no suite {str(name)!r}; there are {', '.join(ready_suites())}, and any YAML "
            "file with a section evaluation: {suite: ...}"
        )
    content = read_yaml(path)
    section = (content.get("evaluation") if isinstance(content, dict) else None) or {}
    if not isinstance(section, dict):
        raise ConfigurationError(f"{path}: evaluation is {str(section)[:80]!r}, not a section")
    check_named(section, f"{path}: evaluation")
    fill_threat(section, threat)
    wanted = {key: section[key] for key in ("suite", "audit") if key in section}
    if not wanted:
        raise ConfigurationError(f"{path} has no evaluation.suite and no evaluation.audit")
    try:
        made = build({"suite": dict[str, SuiteEntry], "audit": Audit | None}, wanted)
    except Exception as error:  # jsonargparse has no common type for what classes refuse
        from common.config import explain  # it needs Lightning, which takes a while to import

        raise ConfigurationError(f"{path}: {explain(str(error))}") from error
    return Suite(made.suite or {}, made.audit)


def fill_threat(node: Any, threat: Threat | None) -> None:
    """Put numbers where a configuration says ``threat``, in place.

    Raises:
        ConfigurationError: If it does and there is no threat model.
    """
    items: Any = ()
    if isinstance(node, Namespace | Mapping):
        items = list(vars(node).items() if isinstance(node, Namespace) else node.items())
    elif isinstance(node, list):
        items = list(enumerate(node))
    for key, value in items:
        if isinstance(value, str) and (found := _WORD.fullmatch(value.strip())):
            if threat is None:
                raise ConfigurationError(
                    f"{key} is {value!r} and nothing says what the threat model is; add "
                    "--evaluation.threat.norm linf --evaluation.threat.eps 8/255"
                )
            factor = float(found[2] or 1)
            radius = threat.radius * factor if found[1] == "*" else threat.radius / factor
            node[key] = min(radius, 1.0) if threat.norm == "linf" else radius
        else:
            if threat is not None and key == "init_args" and _follows(value):
                _take_norm(node["class_path"], value, threat)
            fill_threat(value, threat)


def _follows(arguments: Any) -> bool:
    """Whether the radius is that of the threat model."""
    return bool(arguments) and _WORD.fullmatch(str(arguments.get("eps"))) is not None


def _take_norm(class_path: str, arguments: Any, threat: Threat) -> None:
    """An attack in the ball of the threat model is in its norm too."""
    parameters = inspect.signature(load_named(class_path)).parameters
    if "norm" in parameters:
        arguments["norm"] = threat.norm
    elif threat.norm != "linf":
        raise ConfigurationError(
            f"{class_path.rpartition('.')[2]} attacks in linf alone and the threat model is "
            f"{threat.norm}; take it out of the suite"
        )


def threat_of(evaluation: Any, adversary: Any = None) -> Threat | None:
    """What a configuration is about: its threat, its suite's first ball, or its adversary's.

    Args:
        evaluation: The section of that name.
        adversary: The section of that name.
    """
    given = evaluation.get("threat")
    if given:
        return Threat(given["norm"], given["eps"])
    entries = [entry for entry in (evaluation.get("suite") or {}).values() if entry]
    for attack in [*(entry.get("attack") for entry in entries), (adversary or {}).get("attack")]:
        arguments = (attack or {}).get("init_args") or {}
        eps = arguments.get("eps")
        if eps is not None and not _WORD.fullmatch(str(eps)):
            norm: Norm = arguments.get("norm") or "linf"
            return Threat(norm, eps)
    return None
