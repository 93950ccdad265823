"""Robust accuracy as a metric of torchmetrics, for the validation loop of any LightningModule."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from common.attacks.geometry import Norm
from common.errors import ConfigurationError
from common.evaluation.images import sums_of
from common.evaluation.inputs import as_labels, check_examples
from common.evaluation.models import as_module, as_victim
from common.evaluation.presets import Suite, chosen_threat, load_suite
from common.evaluation.runner import Team, run_steps
from common.evaluation.suite import SuiteEntry, ball_of, check_suite, steps_of
from common.modes import frozen


class RobustAccuracy(Metric):
    """Accuracy on clean images, under each attack, and in the worst case, batch by batch.

    ``update(model, x, y)`` attacks a batch; ``compute()`` gives ``clean``, one value for each
    entry of the suite (correct under all of its losses) and ``worst``, all in [0, 1]. States are
    counts, which add up over batches and processes. Random starts belong to the image: batches and
    processes do not change them, but for AutoAttack's, which belong to the batch as in the official
    code. For a checked and audited figure use :func:`common.evaluation.pipeline.evaluate`.

    Args:
        suite: Attacks by name, a ready suite such as ``quick``, or a YAML file.
        eps: Radius of the threat model; by default that of the suite.
        norm: Norm of the threat model; by default that of the suite.
        seed: Of the attacks.

    Raises:
        ConfigurationError: If the suite is wrong, or has entries for a part of the examples.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(
        self,
        suite: str | Path | Mapping[str, SuiteEntry] = "quick",
        eps: float | str | None = None,
        norm: Norm | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(suite, Mapping):
            self.suite = Suite(suite, chosen_threat(ball_of(suite), eps, norm))
        else:
            self.suite = load_suite(suite, eps, norm)
        self.seed = seed
        for name, entry in self.suite.entries.items():
            for setting in ("examples", "checkpoints", "sweep"):
                if getattr(entry, setting) is not None:
                    raise ConfigurationError(
                        f"the suite entry {name!r} has {setting} {getattr(entry, setting)}, and a "
                        f"metric attacks every example of every batch in one way; drop {setting}"
                    )
        self.names = ["clean", *self.suite.entries, "worst"]
        self.add_state("correct", torch.zeros(len(self.names), dtype=torch.int64), "sum")
        self.add_state("total", torch.tensor(0), "sum")

    def update(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        """Attack a batch, in float32 and evaluation mode.

        Args:
            model: Images to logits ``(N, K)``; its modes and parameters are restored.
            x: Images in [0, 1], ``(N, C, H, W)``.
            y: Labels, ``(N,)``.
        """
        with torch.inference_mode(False), torch.autocast(x.device.type, enabled=False):
            x, y = check_examples(x.detach().clone(), y), as_labels(y.clone())
            net = as_module(model)
            with torch.no_grad(), frozen(net, "eval"):
                classes = net(x[:1]).shape[1]
            victim = as_victim(net, classes)
            check_suite(self.suite.entries, victim)
            keys = torch.tensor(sums_of(x.cpu()))
            outcomes = run_steps(
                victim,
                {"x": x, "y": y, "index": torch.arange(len(y)), "key": keys},
                steps_of(self.suite.entries, victim, classes, self.seed),
                seed=self.seed,
                batch_size=len(y),
                threat=self.suite.threat,
                team=Team(),
            )
        worst = outcomes.correct["clean"].clone()
        found = {"clean": worst.clone()}
        for key, line in outcomes.lines.items():
            right = outcomes.correct[key]
            found[line.entry] = found.get(line.entry, torch.ones_like(right)) & right
            worst &= right | torch.tensor(not line.counts)
        found["worst"] = worst
        counts = torch.stack([found[name].sum() for name in self.names])
        self.correct: Tensor = self.correct + counts.to(self.correct.device)
        self.total: Tensor = self.total + len(y)

    def compute(self) -> dict[str, Tensor]:
        """The accuracies by name."""
        return dict(zip(self.names, (self.correct / self.total).unbind(), strict=True))
