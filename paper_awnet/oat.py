"""OAT, a dynamic network steered by the user and not by the image; a baseline, reconstructed [D].

Wang et al. 2020, "Once-for-All Adversarial Training". One network for all trade-offs: a number
lambda, drawn for each image in training and set by hand in testing, modulates the output of every
batch-norm (FiLM), and there are two batch-norms, for lambda = 0 and for the rest. Sizes and start
of the modulating layers are ours. Tags as in :mod:`paper_awnet.method`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.attacks.losses import classify, cross_entropy
from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom, Stream, run_seed
from common.errors import ConfigurationError
from common.evaluation.measures import Measure
from common.evaluation.steps import Columns
from common.modes import network_of
from common.objectives import Batch, InnerLoss, Objective, adversarial_images, differentiable
from paper_awnet.method import MixBatchNorm2d, Route, rows_by_type
from paper_awnet.networks import replace

LAMBDAS = (0.0, 0.1, 0.2, 0.3, 0.4, 1.0)


class Knob(Route):
    """A route that tells the layers lambda as well, ``(N, 1)``."""

    def __init__(self) -> None:
        super().__init__()
        self.condition: Tensor | None = None

    @contextmanager
    def turned(self, condition: Tensor) -> Iterator[None]:
        """Tell the layers, and forget it again even after an exception."""
        self.condition = condition
        try:
            yield
        finally:
            self.condition = None


class FiLMBatchNorm2d(nn.Module):
    r"""Two batch-norms, then :math:`(1 + \gamma(\lambda)) h + \beta(\lambda)` by channel.

    gamma and beta come from two layers whose last one starts at zero, so that the network begins as
    one with two batch-norms [D].

    Args:
        norm: What both batch-norms start as.
        route: Where lambda comes from.
        hidden: Units between the two layers.
    """

    def __init__(self, norm: nn.BatchNorm2d, route: Knob, hidden: int) -> None:
        super().__init__()
        self.norm = MixBatchNorm2d(norm, route)
        last = nn.Linear(hidden, 2 * norm.num_features)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.film = nn.Sequential(nn.Linear(1, hidden), nn.LeakyReLU(), last)
        self.route = route

    def forward(self, x: Tensor) -> Tensor:
        """Normalised and modulated maps, ``(N, C, H, W)``."""
        gamma, beta = torch.chunk(self.film(self.route.condition), 2, dim=1)
        out: Tensor = self.norm(x) * (1 + gamma[:, :, None, None]) + beta[:, :, None, None]
        return out


class OATNet(nn.Module):
    """A backbone all of whose batch-norms depend on lambda.

    Args:
        arch: A backbone of ``common.networks``; it is changed in place.
        knob: lambda of the deployed network, in [0, 1].
        hidden: Hidden units of the modulating layers [D].

    Raises:
        ConfigurationError: If lambda is outside [0, 1].
    """

    def __init__(self, arch: nn.Module, knob: float = 0.2, hidden: int = 64) -> None:
        super().__init__()
        if not 0.0 <= knob <= 1.0:
            raise ConfigurationError(
                f"knob is OAT's lambda in [0, 1], got {knob}; 0 asks for clean accuracy alone"
            )
        self.knob = knob
        self.route = Knob()
        self.arch = arch
        norms = [(name, m) for name, m in arch.named_modules() if isinstance(m, nn.BatchNorm2d)]
        for name, norm in norms:
            replace(arch, name, FiLMBatchNorm2d(norm, self.route, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)`` at the deployed lambda, in evaluation mode."""
        return self.at(x, x.new_full((len(x),), self.knob))

    def at(self, x: Tensor, lam: Tensor, types: Tensor | None = None) -> Tensor:
        """Logits ``(N, K)`` at any lambda.

        Args:
            x: Images, ``(N, C, H, W)``.
            lam: lambda of each, ``(N,)``.
            types: 0 clean or 1 adversarial, ``(N,)``, which decides the batch-norm in training
                mode; in evaluation mode lambda decides.

        Raises:
            ConfigurationError: If types are missing in training mode.
        """
        rows = None
        if self.training:
            if types is None:
                raise ConfigurationError(
                    "in training mode OAT needs types beside lambda: train it with "
                    "paper_awnet.oat.OAT and adversary.mode: eval"
                )
            rows = rows_by_type(types)
        is_adversarial = (lam > 0).to(x)
        mixture = torch.stack([1 - is_adversarial, is_adversarial], dim=1)
        with self.route.told((), mixture, rows), self.route.turned(lam[:, None].to(x)):
            logits: Tensor = self.arch(x)
        return logits


class OAT(Objective):
    """(1 - lambda) CE(f(x), y) + lambda CE(f(x_adv), y), lambda drawn for each image and epoch.

    Args:
        lambdas: What it is drawn from.

    Raises:
        ConfigurationError: If one is outside [0, 1] or there is none.
    """

    def __init__(self, lambdas: Sequence[float] = LAMBDAS) -> None:
        if not lambdas or min(lambdas) < 0 or max(lambdas) > 1:
            raise ConfigurationError(
                f"lambdas are numbers in [0, 1], got {list(lambdas)}; the paper's are "
                f"{list(LAMBDAS)}"
            )
        self.lambdas = tuple(lambdas)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw anew in every epoch."""
        self.epoch = epoch

    def drawn(self, index: Tensor) -> Tensor:
        """Lambda of images by their positions ``(N,)``, the same in attack and loss."""
        random = ExampleRandom(run_seed(), self.epoch, index, Stream.CONDITION)
        which = random.integers(len(self.lambdas), ())
        return torch.tensor(self.lambdas, device=index.device)[which]

    def inner(self, model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
        """Cross-entropy at the drawn lambda."""
        y, lam = differentiable(batch["y"]), self.drawn(batch["index"])
        return lambda x: cross_entropy(network(model).at(x, lam), y)

    def outer(self, model: Any, batch: Batch) -> Tensor:
        """Both cross-entropies by lambda, from one pass; batch mean."""
        x_adv, x, y = adversarial_images(batch), batch["x"], batch["y"]
        lam = self.drawn(batch["index"])
        types = torch.arange(2, device=x.device).repeat_interleave(len(x))
        both = network(model).at(torch.cat([x, x_adv]), torch.cat([lam, lam]), types)
        clean, adv = torch.split(both, len(x))
        loss: Tensor = ((1 - lam) * cross_entropy(clean, y) + lam * cross_entropy(adv, y)).mean()
        return loss


def network(model: Any) -> OATNet:
    """The OATNet that a classifier holds or that the model is.

    Raises:
        ConfigurationError: If it is another network.
    """
    net = network_of(model)
    if not isinstance(net, OATNet):
        raise ConfigurationError(
            f"OAT trains a paper_awnet.oat.OATNet, got {type(net).__name__}; wrap the backbone"
        )
    return net


def adaptive_losses() -> dict[str, InnerLoss]:
    """``ce_knob_<lambda>``: cross-entropy of the same network at another lambda."""
    return {f"ce_knob_{lam:g}": partial(_at_knob, lam) for lam in LAMBDAS}


def _at_knob(lam: float, model: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
    y = differentiable(batch["y"])
    return lambda x: cross_entropy(network(model).at(x, x.new_full((len(x),), lam)), y)


class KnobAccuracy(Measure):
    """Accuracy at every lambda, of which OAT may report its best.

    ``knob_<lambda>_clean`` and ``knob_<lambda>_pgd``, the attack made at that lambda.

    Args:
        attack: Climbs cross-entropy.
    """

    def __init__(self, attack: PGD) -> None:
        self.attack = attack

    def __call__(self, model: Any, batch: Batch, random: ExampleRandom) -> Columns:
        """Both of each lambda, 0 or 1 for each image."""
        columns = {}
        for lam in LAMBDAS:
            loss = _at_knob(lam, model, batch)
            x_adv = self.attack(loss, batch["x"], random)
            fixed = batch["x"].new_full((len(batch["x"]),), lam)
            for kind, x in (("clean", batch["x"]), ("pgd", x_adv)):
                with torch.no_grad():
                    is_right = classify(network(model).at(x, fixed)) == batch["y"]
                columns[f"knob_{lam:g}_{kind}"] = is_right.float()
        return columns
