"""Common corruptions as entries of a suite: accuracy by corruption and severity, and mCE."""

from collections.abc import Mapping
from functools import cached_property
from itertools import product
from statistics import fmean
from typing import Any

import torch

from common.attacks.randomness import ExampleRandom
from common.attacks.settings import Settings
from common.data.corruptions import SEVERITIES, TESTED, Corrupted, find_corrupted
from common.errors import ConfigurationError
from common.evaluation.images import Examples
from common.evaluation.steps import predict
from common.limits import check_label
from common.objectives import Batch
from common.results.lines import Columns, Outcomes
from common.results.store import read_result

Point = tuple[str, int]
"""A corruption and its severity."""


class Corruptions(Settings):
    r"""Shows the corrupted versions of the test images to the model (Hendrycks & Dietterich 2019).

    The results are accuracies by corruption and severity, their means, and the mean corruption
    error: with a baseline ``<entry>_mce``, the mean over the corruptions of
    :math:`\sum_s E_{s,c} / \sum_s E^{base}_{s,c}` (Section 4.2; 1 is as good as the baseline), else
    ``<entry>_error``, the mean of :math:`E_{s,c}`. They do not count for the worst case.

    Args:
        root: Folder in the layout of CIFAR-10-C (``<corruption>.npy`` and ``labels.npy``) or of
            ImageNet-C (``<corruption>/<severity>/<class>/*.JPEG``), with the images of the whole
            test split in its order.
        corruptions: Names of the files or folders; by default the 15 of the benchmark.
        severities: From 1 to 5; by default all.
        baseline: Errors of another model in (0, 1] by corruption, means over all severities; or
            a result file of an evaluation of these corruptions.

    Raises:
        ConfigurationError: If a setting is out of range, or the baseline lacks a corruption.
    """

    def __init__(
        self,
        root: str,
        corruptions: list[str] | None = None,
        severities: list[int] | None = None,
        baseline: dict[str, float] | str | None = None,
    ) -> None:
        self.root, self.baseline = root, baseline
        self.corruptions = list(TESTED) if corruptions is None else corruptions
        every = list(range(1, SEVERITIES + 1))
        self.severities = every if severities is None else severities
        for name, values in (("corruptions", self.corruptions), ("severities", self.severities)):
            if not values or len(set(values)) < len(values):
                raise ConfigurationError(f"{name} must list at least one and none twice: {values}")
        if outside := set(self.severities) - set(every):
            raise ConfigurationError(f"severities go from 1 to {SEVERITIES}, got {min(outside)}")
        for name in self.corruptions:
            check_label(name, "the name of a corruption")
        if isinstance(baseline, dict):
            _ = self.errors

    @property
    def points(self) -> list[Point]:
        """All corruptions and severities, in their order."""
        return list(product(self.corruptions, self.severities))

    @property
    def cost(self) -> int:
        """Forward passes per example."""
        return len(self.points)

    @cached_property
    def images(self) -> Corrupted:
        """The files."""
        return find_corrupted(self.root)

    def check(self) -> None:
        """Find what is missing or half-copied, and read the baseline; no image is decoded."""
        for name, severity in self.points:
            self.images.labels(name, severity)
        _ = self.errors

    def fit(self, examples: Examples) -> None:
        """Refuse images that are not those of these examples, or have another size."""
        y = torch.from_numpy(self.images.labels(*self.points[0]))
        place = examples.get("position", examples["index"])
        is_same = place < len(y)
        is_same[is_same.clone()] = y[place[is_same]] == examples["y"][is_same]
        if not is_same.all():
            row = int((~is_same).nonzero()[0])
            its = int(place[row])
            raise ConfigurationError(
                f"the labels of {self.root} are not those of the data: image {its} of the data has "
                f"label {int(examples['y'][row])}, and of the {len(y):,} corrupted ones "
                f"{y[its : its + 1].tolist() or 'none'}; give the whole test split in its order "
                "(an entry's examples takes fewer)"
            )
        shape = tuple(examples["x"].shape[1:])
        for point in self.points:
            self.images.read(*point, [int(place[0])], shape)

    def run(self, name: str, severity: int, model: Any, batch: Batch, _: ExampleRandom) -> Columns:
        """Predict the classes of the corrupted images of a batch."""
        x, places = batch["x"], batch.get("position", batch["index"]).tolist()
        pixels = self.images.read(name, severity, places, tuple(x.shape[1:])).to(x.device)
        # A divisor on the device, see common.data.images.
        predicted = predict(model, pixels.float() / torch.full((), 255.0, device=x.device))
        return {"correct": predicted == batch["y"], "predicted": predicted}

    def mean_error(self, entry: str, outcomes: Outcomes) -> dict[str, float]:
        """The mean corruption error of an entry, by the name of the metric."""
        found = {}
        for name, severity in self.points:
            key = f"{entry}/{key_of(name, severity)}"
            found[name, severity] = float(
                (~outcomes.correct[key])[outcomes.attacked[key]].double().mean()
            )
        ours = self._over_severities(found)
        if self.errors is None:
            return {f"{entry}_error": fmean(ours.values())}
        return {f"{entry}_mce": fmean(ours[name] / self.errors[name] for name in ours)}

    @cached_property
    def errors(self) -> dict[str, float] | None:
        """The baseline's, by corruption; means over the severities."""
        if self.baseline is None:
            return None
        is_filed = isinstance(self.baseline, str)
        errors = self._filed(self.baseline) if isinstance(self.baseline, str) else self.baseline
        for name in self.corruptions:
            if not 0.0 < errors.get(name, 0.0) <= 1.0:
                raise ConfigurationError(
                    f"the baseline's error under {name} is {errors.get(name)}, expected a number "
                    "in (0, 1]; give one for each corruption, or drop baseline"
                )
        if not is_filed and len(self.severities) < SEVERITIES:
            raise ConfigurationError(
                f"the baseline's errors are means over {SEVERITIES} severities, got severities "
                f"{self.severities}; take all, or give a result file as baseline"
            )
        return errors

    def _filed(self, path: str) -> dict[str, float]:
        """Errors from a result file, of its checkpoint ``last`` or its only one."""
        checkpoints = read_result(path)["checkpoints"]
        label = "last" if "last" in checkpoints else min(checkpoints)
        found = {
            tuple(key.split("/")[1:]): 1.0 - attack["correct"] / attack["examples"]
            for key, attack in checkpoints[label]["attacks"].items()
            if attack["kind"] == "corruption"
        }
        keys = {point: tuple(key_of(*point).split("/")) for point in self.points}
        if lacking := [key for key in keys.values() if key not in found]:
            raise ConfigurationError(
                f"the baseline {path} has no accuracy under {'/'.join(lacking[0])}, one of "
                f"{len(lacking)} that are missing; evaluate that model on the same corruptions"
            )
        return self._over_severities({point: found[key] for point, key in keys.items()})

    def _over_severities(self, errors: Mapping[Point, float]) -> dict[str, float]:
        return {
            name: fmean(errors[name, severity] for severity in self.severities)
            for name in self.corruptions
        }


def key_of(name: str, severity: int) -> str:
    """How the step of a corruption and severity is called, after its entry."""
    return f"{name}/severity={severity}"


def check_images(suite: Mapping[str, Any], examples: Examples) -> None:
    """Refuse a suite with corrupted images of other examples."""
    for entry in suite.values():
        if isinstance(entry.attack, Corruptions):
            entry.attack.fit(examples)


def mean_errors(suite: Mapping[str, Any], outcomes: Outcomes) -> dict[str, float]:
    """The mean corruption error of every entry of a suite that shows corrupted images."""
    found: dict[str, float] = {}
    for name, entry in suite.items():
        if isinstance(entry.attack, Corruptions):
            found |= entry.attack.mean_error(name, outcomes)
    return found
