"""What the outcomes of an audit mean: a number, a threshold and a verdict for every check.

Accuracies are compared with Wilson's 95 % interval, so that the choice of examples alone raises no
alarm. Thresholds were chosen on honest networks, naturally and adversarially trained, and on
networks whose gradients were masked on purpose.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from common.evaluation.report import FEW
from common.results.lines import Outcomes
from common.results.schema import AuditCheck, AuditResult
from common.results.statistics import wilson_interval

FINE_AGREEMENT, COARSE_AGREEMENT = 0.999, 0.4
ZERO_GRADIENTS = 0.05  # share of examples
MISSED = 0.01  # share of examples that random search may find and gradients miss
LEAST_DROP = 0.03  # accuracy; smaller differences are not worth a warning
MISSED_BY_GRADIENTS = 0.03  # share of examples that may fall to attacks without gradients only
MISSED_IN_CLASS, LEAST_IN_CLASS = 0.25, 3  # the same of one class, as a share and a number
RANDOMNESS, MEMORY = 1e-5, 1e-3  # differences of probabilities
LOSS_TOLERANCE = 0.01  # relative

GRADIENT_FREE = ["audit_square", "audit_transfer", "audit_random"]  # and the decision-based one

VERDICTS: dict[bool | None, Literal["pass", "fail", "not applicable"]] = {
    True: "pass",
    False: "fail",
    None: "not applicable",
}
QUESTIONS = {
    "eps_to_chance": "Accuracy should fall to chance when any perturbation is allowed.",
    "more_steps": "More steps should not weaken the attack, and one step should not beat many.",
    "loss_rises": "With more steps the attack should end at a higher loss.",
    "black_box": "A black-box attack should not beat attacks that follow gradients.",
    "transfer": "Adversarial images of another network should not beat the network's own.",
    "gradient_free": "Attacks without gradients should together find little that gradients missed.",
    "some_success": "Some attack should find an adversarial example at or near the radius.",
    "restarts": "Twice as many random restarts should change little.",
    "gradient_path": "Gradients through what the network detaches or rounds should not attack "
    "better.",
    "finite_differences": "The gradient should predict how the loss changes over a tiny step.",
    "coarse_differences": "The gradient should predict how the loss changes on the scale of the "
    "attack.",
    "zero_gradients": "Hardly any image should have a vanishing gradient.",
    "logit_scale": "Rescaled logits should not make the attack stronger.",
    "random_search": "Random points of the ball should find nothing that gradients missed.",
    "deterministic": "The same image should get the same prediction, alone and in a batch.",
    "stateless": "Answers should not depend on earlier questions.",
}
"""By check, in the order of a report."""


class Finding(NamedTuple):
    """The answer to a question; with ``None`` for ``is_passed`` the check does not apply."""

    detail: str
    value: float | None = None
    threshold: float | None = None
    is_passed: bool | None = None


def report(outcomes: Outcomes, num_classes: int, restarts: int) -> AuditResult:
    """All checks; none if the audit was not run.

    Args:
        outcomes: Of the steps of an audit.
        num_classes: K; chance is 1/K, or what the most frequent label alone gets right.
        restarts: How many the audit was made with.
    """
    if "audit_fgsm" not in outcomes.correct:
        return {"examples": 0, "checks": []}
    reading = _Reading(outcomes, num_classes, restarts)
    checks = zip(QUESTIONS.items(), reading.findings(), strict=True)
    return {"examples": reading.n, "checks": [_check(*asked, found) for asked, found in checks]}


def _check(name: str, question: str, found: Finding) -> AuditCheck:
    return {
        "id": name,
        "question": question,
        "value": _finite(found.value),
        "threshold": _finite(found.threshold),
        "verdict": VERDICTS[found.is_passed],
        "detail": found.detail,
    }


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _at_most(detail: str, value: float, threshold: float) -> Finding:
    """Passed up to the threshold."""
    return Finding(detail, value, threshold, value <= threshold)


def _percent(share: float) -> str:
    return f"{100.0 * share:.1f} %"


def _mostly(label: int | None) -> str:
    return "" if label is None else f", many of them of class {label}"


class _Reading:
    """Accuracies and columns over the examples of the audit."""

    def __init__(self, outcomes: Outcomes, num_classes: int, restarts: int) -> None:
        self.restarts = restarts
        self.classes = num_classes
        self.outcomes = outcomes
        self.within = outcomes.attacked["audit_fgsm"]
        self.n = int(self.within.sum())
        self.clean = outcomes.correct["clean"][self.within]
        labels = outcomes.y[self.within]
        self.chance = max(1.0 / num_classes, float(labels.bincount().max()) / max(self.n, 1))
        self.counts = sorted(
            (key for key in outcomes.correct if key.startswith("audit_steps/steps=")),
            key=lambda key: int(key.rpartition("=")[2]),
        )
        self.default = self.counts[-2] if len(self.counts) > 1 else self.counts[-1]
        self.white = ["audit_fgsm", *self.counts, "audit_steps/targeted", "audit_restarts"]

    def findings(self) -> Iterator[Finding]:
        """One for each of :data:`QUESTIONS`."""
        paths = ["audit_path/undetached", "audit_path/straight_through"]
        scales = ["audit_scale/scale=0.1", "audit_scale/margin=1"]
        yield self.eps_to_chance()
        yield self.more_steps()
        yield self.loss_rises()
        yield self._stronger(self.white, ["audit_square"])
        yield self._stronger(self.white, ["audit_transfer"])
        yield self.gradient_free()
        yield self.some_success()
        yield self.more_restarts()
        yield self._stronger(["audit_path/default"], paths)
        yield self._agreement("fine", FINE_AGREEMENT)
        yield self._agreement("coarse", COARSE_AGREEMENT)
        yield self.zero_gradients()
        yield self._stronger(["audit_scale/scale=1"], scales)
        yield self.random_search()
        yield self.deterministic()
        yield self.stateless()

    def robust(self, *keys: str) -> Tensor:
        """Which examples withstand all of these attacks."""
        return torch.stack([self.outcomes.correct[key][self.within] for key in keys]).all(dim=0)

    def accuracy(self, *keys: str) -> float:
        """Accuracy under all of these attacks together."""
        return float(self.robust(*keys).float().mean())

    def interval(self, *keys: str) -> tuple[float, float]:
        """Wilson's interval of :meth:`accuracy`."""
        return wilson_interval(int(self.robust(*keys).sum()), self.n)

    def column(self, key: str, name: str) -> Tensor:
        """A column of a step."""
        return self.outcomes.columns[key][name][self.within]

    def _allowed(self, right: int) -> float:
        """How far accuracy may drop: to the interval's end, and by half its width near zero."""
        low, high = wilson_interval(right, self.n)
        return max(right / self.n - low, (high - low) / 2.0, LEAST_DROP)

    def _masked_class(self, missed: Tensor) -> int | None:
        """A class of which an attack broke many examples that earlier ones had missed."""
        labels = self.outcomes.y[self.within]
        right = labels[self.clean].bincount(minlength=self.classes)
        found = labels[missed].bincount(minlength=self.classes)
        share = found / right.clamp_min(1) * (found >= LEAST_IN_CLASS)
        return int(share.argmax()) if bool((share > MISSED_IN_CLASS).any()) else None

    def _stronger(self, before: list[str], after: list[str]) -> Finding:
        """Whether any of some attacks leaves less than the interval under others allows."""
        ran = [key for key in after if self._ran(key)]
        if not ran:
            return Finding("This attack could not be run.")
        expected = self.accuracy(*before)
        allowed = self._allowed(int(self.robust(*before).sum()))
        found = {key: self.accuracy(key) for key in ran}
        parts = [f"{key.rpartition('/')[2]} {_percent(found[key])}" for key in found]
        missed = self.robust(*before) & ~self.robust(*ran)
        # A single ascent misses more of one class by chance than all of them together.
        label = self._masked_class(missed) if before == self.white else None
        drop = expected - min(found.values())
        return Finding(
            f"Accuracy is {_percent(expected)} under the usual attack, {', '.join(parts)}; "
            f"{int(missed.sum())} of {self.n} examples fell only now{_mostly(label)}.",
            drop,
            allowed,
            drop <= allowed and label is None,
        )

    def _ran(self, key: str) -> bool:
        if key not in self.outcomes.correct:
            return False
        ran = self.outcomes.columns.get(key, {}).get("ran")
        return ran is None or not bool(self.clean.any()) or bool(ran.any())

    def gradient_free(self) -> Finding:
        """Together they find what gradients or scores hide, even in a few images.

        Examples are compared one by one, which shows smaller differences than accuracies do.
        """
        is_run = ~self.column("audit_decision", "linf").isnan()
        by_labels = is_run & ~self.column("audit_decision", "correct")
        others = [key for key in GRADIENT_FREE if self._ran(key)]
        missed = self.robust(*self.white) & (by_labels | ~self.robust(*others))
        label, value = self._masked_class(missed), int(missed.sum()) / self.n
        threshold = max(MISSED_BY_GRADIENTS, 2.0 / self.n)
        return Finding(
            f"They broke {int(missed.sum())} of {self.n} examples that gradients had not"
            f"{_mostly(label)}; labels alone broke {int(by_labels.sum())} of {int(is_run.sum())} "
            "that had withstood everything else.",
            value,
            threshold,
            value <= threshold and label is None,
        )

    def some_success(self) -> Finding:
        """Attacks without any success are more often broken than the model is perfect."""
        lines = self.outcomes.lines
        within = [key for key, line in lines.items() if line.counts and line.kind == "attack"]
        broken = ~self.robust("clean", *within) & self.clean
        if int(self.clean.sum()) < FEW:
            return Finding("Too few images are right.")
        value, detail = float(broken.sum()) / self.n, f"They broke {int(broken.sum())} examples"
        if value == 0.0:
            radius = self.outcomes.threat.radius if self.outcomes.threat else 0.0
            sweep = [key for key in lines if key.startswith("audit_eps/")]
            larger = [key for key in sweep if lines[key].at["eps"] <= 4.0 * radius]
            value = float((self.clean & ~self.robust("clean", *larger)).sum()) / self.n
            detail = (
                f"No attack broke a single one of {int(self.clean.sum())} examples, which is "
                f"suspicious in itself; up to four times the radius {_percent(value)} fall"
            )
        return Finding(f"{detail}.", value, 0.0, value > 0.0)

    def eps_to_chance(self) -> Finding:
        """Unbounded attacks reach 100 % (Athalye et al. 2018, Section 3)."""
        sweep = [key for key in self.outcomes.correct if key.startswith("audit_eps/")]
        last = sweep[-1]
        value, low = self.accuracy(last), self.interval(last)[0]
        shown = next(i for i, key in enumerate(sweep, 1) if self.accuracy(key) == value)
        points = [(self.accuracy(key), key.rpartition("=")[2]) for key in sweep[:shown]]
        path = ", ".join(f"{_percent(accuracy)} at {eps}" for accuracy, eps in points)
        return Finding(f"Accuracy is {path}.", value, self.chance, low <= self.chance)

    def more_steps(self) -> Finding:
        """Iterative attacks are stronger than one step (Athalye et al. 2018, Section 3)."""
        rises = []
        for fewer, more in [*itertools.pairwise(self.counts), ("audit_fgsm", self.default)]:
            allowed = max(self.interval(fewer)[1] - self.accuracy(fewer), LEAST_DROP)
            rises.append((self.accuracy(more) - self.accuracy(fewer), allowed))
        path = ", ".join(
            f"{_percent(self.accuracy(key))} with {key.rpartition('=')[2]}" for key in self.counts
        )
        detail = f"Accuracy is {_percent(self.accuracy('audit_fgsm'))} under FGSM, {path} steps."
        return _at_most(detail, *max(rises, key=lambda rise: rise[0] - rise[1]))

    def loss_rises(self) -> Finding:
        """A longer ascent ends higher, example by example."""
        losses = [self.column(key, "loss")[self.clean].nan_to_num(0.0, 1e4) for key in self.counts]
        if len(losses) < 2 or len(losses[0]) < 2:
            return Finding("Nothing to compare.")
        falls = []
        for fewer, more in itertools.pairwise(losses):
            fall = (fewer - more).double()
            error = 2.0 * float(fall.std()) / math.sqrt(len(fall))
            falls.append((float(fall.mean()), error + LOSS_TOLERANCE * float(fewer.mean())))
        path = ", ".join(f"{float(loss.mean()):.3g}" for loss in losses)
        steps = ", ".join(key.rpartition("=")[2] for key in self.counts)
        worst = max(falls, key=lambda fall: fall[0] - fall[1])
        return _at_most(f"The mean loss is {path} after {steps} steps.", *worst)

    def more_restarts(self) -> Finding:
        """Restarts have converged: the second half of them finds little (Carlini et al. 2019)."""
        if self.restarts < 2 or "restart" not in self.outcomes.columns["audit_restarts"]:
            return Finding("Nothing to compare.")
        first = self.column("audit_restarts", "restart")
        half = self.restarts // 2
        right = {n: int((self.clean & (first > n)).sum()) for n in sorted({1, half, self.restarts})}
        path = ", ".join(f"{_percent(right[n] / self.n)} after {n}" for n in right)
        value = (right[half] - right[self.restarts]) / self.n
        return _at_most(f"Accuracy is {path} restarts.", value, self._allowed(right[half]))

    def _agreement(self, column: str, least: float) -> Finding:
        """Median over the examples whose loss moves at all."""
        found = self.column("audit_gradients", column)
        moving = found[~found.isnan()] if column == "fine" else found.nan_to_num(0.0)
        value = float(moving.median()) if len(moving) else math.nan
        if 2 * len(moving) <= self.n:
            detail = f"The loss is a step function on {self.n - len(moving)} of {self.n} images."
            return Finding(detail, value, least)
        share = float((moving < least).float().mean())
        detail = f"The median cosine is {value:.3f}; {_percent(share)} of the images are below."
        return Finding(detail, value, least, value >= least)

    def zero_gradients(self) -> Finding:
        """Vanishing and infinite gradients stop an ascent (Carlini et al. 2019, Section 5)."""
        norm = self.column("audit_gradients", "norm")
        zero, bad = int((norm == 0.0).sum()), int(norm.isnan().sum())
        detail = f"{zero} of {self.n} gradients are exactly zero, {bad} are not finite."
        return _at_most(detail, (zero + bad) / self.n, ZERO_GRADIENTS)

    def random_search(self) -> Finding:
        """Random sampling beats no gradient (Athalye et al. 2018, Section 3)."""
        missed = int((self.robust(*self.white) & ~self.robust("audit_random")).sum())
        detail = f"They found {missed} more of {self.n} examples."
        return _at_most(detail, missed / self.n, max(MISSED, 1.0 / self.n))

    def deterministic(self) -> Finding:
        """Predictions do not depend on chance or on the other images of the batch."""
        value = float(self.column("audit_forward", "difference").max())
        return _at_most(f"Probabilities differ by up to {value:.2g}.", value, RANDOMNESS)

    def stateless(self) -> Finding:
        """An attack's queries leave the model as it was."""
        value = float(self.column("audit_memory", "memory").max())
        is_moved = bool(self.column("audit_memory", "moved").any())
        moved = "changes with every query" if is_moved else "stays as it is"
        return Finding(
            f"Probabilities differ from those of a fresh copy by up to {value:.2g}; the state of "
            f"the model {moved}.",
            value,
            MEMORY,
            value <= MEMORY and not is_moved,
        )
