"""Reported accuracies, from a ``model_info`` file of RobustBench, compared with ours."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.attacks.geometry import parse_radius
from common.errors import ConfigurationError
from common.limits import read_json
from common.results.lines import Threat
from common.results.schema import CheckpointResult
from common.results.statistics import wilson_interval

FIELDS = {
    "clean_acc": "clean_acc",
    "reported": "worst",
    "autoattack_acc": "worst",
    "external": "worst",
    "corruptions_acc": "corruptions",
}
"""Accuracies of a ``model_info`` file and our metrics: ``reported`` is the authors' robust
accuracy, ``external`` that of a stronger attack than AutoAttack, ``corruptions_acc`` the mean over
common corruptions."""


@dataclass(frozen=True)
class Comparison:
    """A reported accuracy beside ours, in [0, 1].

    Args:
        name: In the ``model_info`` file.
        reported: What it says.
        ours: What we measured.
        interval: The 95 % interval of ours.
    """

    name: str
    reported: float
    ours: float
    interval: tuple[float, float]

    @property
    def difference(self) -> float:
        """Ours minus the reported accuracy."""
        return self.ours - self.reported

    @property
    def is_inside(self) -> bool:
        """Whether the reported accuracy is inside the interval of ours."""
        return self.interval[0] <= self.reported <= self.interval[1]


def read_claim(path: str | Path, threat: Threat | None) -> dict[str, float]:
    """Reported accuracies in [0, 1], by the names in :data:`FIELDS`.

    Texts are percent, also with a sign; those without digits (``N/A``) state nothing. Numbers of at
    most 1 are shares, which RobustBench wrote once. In a file about corruptions ``reported`` is no
    robust accuracy, and is left out. The norm is that of the key ``threat_model``, or of the folder
    ``Linf`` or ``L2`` that holds the file.

    Raises:
        ConfigurationError: If the file is no claim, or one about another threat model.
    """
    path = Path(path)
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(f"the claim {path} cannot be read: {reason}") from error
    if not isinstance(found, dict):
        raise ConfigurationError(f"the claim {path} is no object; give a model_info JSON file")
    claim = {name: _share(path, name, found[name]) for name in FIELDS if _is_given(found, name)}
    if "corruptions_acc" in claim:
        claim = {name: claim[name] for name in claim if FIELDS[name] != "worst"}
    if not claim:
        raise ConfigurationError(
            f"the claim {path} has none of {', '.join(FIELDS)}; give a model_info JSON file"
        )
    if threat is not None and any(FIELDS[name] == "worst" for name in claim):
        _check_threat(path, found, threat)
    return claim


def compare(claim: dict[str, float], result: CheckpointResult) -> list[Comparison]:
    """The reported accuracies that the result has counterparts of."""
    corrupted = {
        key.partition("/")[0]
        for key, step in result["attacks"].items()
        if step["kind"] == "corruption"
    }
    compared = []
    for name, reported in claim.items():
        ours = FIELDS[name]
        if ours == "corruptions" and len(corrupted) == 1:
            (ours,) = corrupted
        if ours in result["metrics"]:
            value, n = result["metrics"][ours], result["sizes"].get(ours, result["examples"])
            # A mean over corruptions has no interval; one corruption per image gives a wider one.
            low, high = result["intervals"].get(ours) or wilson_interval(round(value * n), n)
            compared.append(Comparison(name, reported, value, (low, high)))
    return compared


def _is_given(found: dict[str, Any], name: str) -> bool:
    value = found.get(name)
    if isinstance(value, str):
        return any(character.isdigit() for character in value)
    return value is not None


def _share(path: Path, name: str, value: Any) -> float:
    try:
        number = float(value.strip().removesuffix("%") if isinstance(value, str) else value)
    except (TypeError, ValueError):
        number = -1.0
    is_share = not isinstance(value, str) and number <= 1.0
    percent = 100.0 * number if is_share else number
    if isinstance(value, bool) or not 0.0 <= percent <= 100.0:
        raise ConfigurationError(
            f"{name} in the claim {path} is {value!r:.80}, expected percent from 0 to 100"
        )
    return percent / 100.0


def _check_threat(path: Path, found: dict[str, Any], threat: Threat) -> None:
    norm = str(found.get("threat_model") or path.absolute().parent.name).lower()
    if norm in ("linf", "l2", "l1") and norm != threat.norm:
        raise ConfigurationError(
            f"the claim {path} is about {norm}, the evaluation about {threat.norm}; give --norm "
            f"{norm}"
        )
    if not _is_given(found, "eps"):
        return
    radius = parse_radius(found["eps"], "l2", f"eps in the claim {path}")
    if abs(radius - threat.radius) > 1e-5 * radius:
        raise ConfigurationError(
            f"the claim {path} is about eps {found['eps']}, the evaluation about "
            f"{threat.radius:.5g}; give --eps {found['eps']}"
        )
