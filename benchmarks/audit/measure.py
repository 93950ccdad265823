"""Accuracy claimed, true accuracy under the best attack we know, and the audit's verdict."""

import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.audit.networks import EPS, images, natural
from benchmarks.audit.zoo import Case
from common.attacks.decision import DecisionBased
from common.attacks.losses import cross_entropy, label_loss, margin
from common.attacks.pgd import FGSM, PGD, LossFn
from common.attacks.randomness import ExampleRandom
from common.evaluation import Audit, evaluate
from common.evaluation.audit.gradients import anchored, straight_through
from common.evaluation.steps import in_ball, predict
from common.results.lines import Threat

THREAT = Threat("linf", EPS)
PLAIN = {"FGSM": FGSM(EPS), "PGD-20": PGD(EPS, steps=20), "PGD-100": PGD(EPS, steps=100)}
STARTS = 2
EOT = 10
QUERIES = 3000


def measured(case: Case, examples: int) -> dict[str, Any]:
    """A row of the table."""
    begun = time.process_time()
    torch.manual_seed(0)
    model = case.make()
    x, y = (part[:examples] for part in images("test"))
    attempt = Attempt(case, model, x, y)
    clean = float((attempt.labels(x) == y).float().mean())
    claimed = attempt.plain()
    true, broken_by = attempt.knowing()
    return {
        "name": case.name,
        "is_masked": case.is_masked,
        "half": case.half,
        "examples": examples,
        "clean": clean,
        "claimed": claimed,
        "true": true,
        "broken_by": broken_by,
        "failed": audited(deepcopy(model), x, y),
        "seconds": time.process_time() - begun,
    }


def audited(model: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    """The checks that the audit says the model fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate(model, (x, y), {}, eps=EPS, audit=Audit(len(y)), progress=False)
    checks = found.result["audit"]["checks"]
    return [check["id"] for check in checks if check["verdict"] == "fail"]


class Attempt:
    """Attacks on a network of the zoo."""

    def __init__(self, case: Case, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.case, self.model, self.x, self.y = case, model, x, y
        self.generator = torch.Generator().manual_seed(0)
        self.standing = torch.ones_like(y, dtype=torch.bool)

    def labels(self, x: Tensor, model: nn.Module | None = None) -> Tensor:
        """Classes ``(N,)``, by a fresh copy of the model; the most frequent of several draws."""
        model = model or deepcopy(self.model)
        return torch.stack([predict(model, x) for _ in range(self.case.draws)]).mode(dim=0).values

    def plain(self) -> float:
        """Accuracy under gradient attacks that take the model as it is."""
        model = deepcopy(self.model)
        self.standing &= self.labels(self.x, model) == self.y
        for attack in PLAIN.values():
            x_adv = attack(anchored(label_loss(model, self.y)), self.x, self.generator)
            self.standing &= self.labels(x_adv, model) == self.y
        return float(self.standing.float().mean())

    def knowing(self) -> tuple[float, dict[str, int]]:
        """Accuracy under every attack we know, after :meth:`plain`; how many images each broke."""
        broken_by: dict[str, int] = {}
        for name, x_adv in self._images():
            is_inside = in_ball(x_adv, self.x, THREAT)
            fell = self.standing & is_inside & (self.labels(x_adv) != self.y)
            if bool(fell.any()):
                broken_by[name] = broken_by.get(name, 0) + int(fell.sum())
            self.standing &= ~fell
            if not bool(self.standing.any()):
                break
        return float(self.standing.float().mean()), broken_by

    def _images(self) -> Iterator[tuple[str, Tensor]]:
        """Adversarial candidates for all images, by attack."""
        steps = PGD(EPS, steps=60)
        for _ in range(STARTS):
            for loss in self._losses(getattr(self.model, "climbed", self.model)):
                yield "unmasked", steps(loss, self.x, self.generator)
        for loss in self._losses(natural()):
            yield "transfer", steps(loss, self.x, self.generator)
        model = deepcopy(self.model)
        for loss in self._losses(model):
            yield "bridged", steps(_bridged(model, loss), self.x, self.generator)
        if self.case.draws == 1:
            yield "labels", self._by_labels()

    def _losses(self, model: Any) -> list[LossFn]:
        """Cross-entropy of scores in a fixed range, and margin; averaged over random passes."""
        draws = EOT if self.case.draws > 1 else 1

        def scaled(x: Tensor) -> Tensor:
            scores: Tensor = model(x)
            spread = scores.detach().amax(dim=1) - scores.detach().amin(dim=1)
            return scores * (10.0 / spread.clamp_min(1e-9))[:, None]

        def averaged(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
            return torch.stack([loss(scaled(x), self.y) for _ in range(draws)]).mean(dim=0)

        return [anchored(partial(averaged, loss)) for loss in (margin, cross_entropy)]

    def _by_labels(self) -> Tensor:
        rows = self.standing.nonzero().flatten()
        model = None if self.case.is_stateful else deepcopy(self.model)
        attack = DecisionBased(EPS, queries=QUERIES)
        random = ExampleRandom(0, 0, rows)
        found = attack(lambda x: self.labels(x, model), self.x[rows], self.y[rows], random)
        return self.x.index_copy(0, rows, found)


def _bridged(model: nn.Module, loss: LossFn) -> LossFn:
    def bridged(x: Tensor) -> Tensor:
        with straight_through(model):
            return loss(x.clone())

    return anchored(bridged)
