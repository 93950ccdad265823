"""AutoAttack (Croce & Hein 2020) by its official package, one attack at a time.

The package's side effects (random state, trace function, parameter gradients, log lines) are
undone.
"""

import logging
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pyautoattack
import torch
from pyautoattack import checks
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor, nn

from common.attacks.geometry import Norm, check_count, finite, parse_radius
from common.attacks.losses import Predict
from common.attacks.malt import CANDIDATES, malt_targets
from common.attacks.settings import Budget, Settings
from common.attacks.square import AnyShapeSquare, SteeredPredict, finite_scores
from common.errors import ConfigurationError, check_choice

AttackName = Literal["apgd-ce", "apgd-dlr", "apgd-t", "apgd-malt", "fab", "fab-t", "square"]
Version = Literal["standard", "plus", "rand", "custom"]

_OFFICIAL_NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}
# The targeted DLR loss needs the fourth largest logit, the untargeted one the third.
_LEAST_CLASSES = {"apgd-t": 4, "apgd-dlr": 3}


class AutoAttack(Settings):
    """The official ensemble of attacks on a fixed eval-mode float32 network.

    Args:
        eps: Radius of the ball, pixels in [0, 1]; a number or a fraction such as ``8/255``.
        norm: Of the ball.
        version: ``standard`` is APGD-CE, targeted APGD-DLR, targeted FAB and Square; ``plus`` adds
            untargeted ones and restarts; ``rand`` averages gradients of randomised networks;
            ``custom`` runs ``attacks`` with the settings they have in ``standard``.
        attacks: The attacks of ``custom``, in this order. ``apgd-malt`` is ``apgd-t`` with its
            targets in the order of :func:`~common.attacks.malt.malt_targets`, with any number of
            classes.
        batch_size: Examples attacked together; ``None`` takes that of the evaluation. It decides
            random starts, since the package reseeds for every batch.
        square_queries: Square's queries per example; ``None`` keeps the version's 5,000.
        apgd_restarts: Of untargeted APGD; ``None`` keeps the version's.
        steps: Iterations of APGD and FAB; ``None`` keeps the official 100.

    Raises:
        ConfigurationError: If a setting is out of range or contradicts another.
    """

    def __init__(
        self,
        eps: float | str,
        norm: Norm = "linf",
        version: Version = "standard",
        attacks: list[AttackName] | None = None,
        batch_size: int | None = None,
        square_queries: int | None = None,
        apgd_restarts: int | None = None,
        steps: int | None = None,
    ) -> None:
        self.eps = parse_radius(eps, norm)
        check_choice("version", version, Version)
        for attack in attacks or []:
            check_choice("each of attacks", attack, AttackName)
        if (version == "custom") != bool(attacks):
            raise ConfigurationError(
                f"attacks are listed with version custom and only then, got version {version!r} "
                f"and attacks {attacks}"
            )
        if len(set(attacks or [])) < len(attacks or []):
            raise ConfigurationError(f"attacks must be different ones, got {attacks}")
        self.norm = norm
        self.version = version
        self.attacks = attacks
        self.batch_size = _count("batch_size", batch_size)
        self.square_queries = _count("square_queries", square_queries)
        self.apgd_restarts = _count("apgd_restarts", apgd_restarts)
        self.steps = _count("steps", steps)

    def planned(self, num_classes: int) -> list[str]:
        """The attacks of this version that can run with this many classes, in their order."""
        wanted = self.attacks
        if wanted is None:
            wanted = self._official(nn.Identity()).attacks_to_run
        return [name for name in wanted if num_classes >= _LEAST_CLASSES.get(name, 2)]

    def step(
        self,
        name: str,
        predict: Predict,
        x: Tensor,
        y: Tensor,
        seed: int = 0,
        steered: SteeredPredict | None = None,
        skips_repeats: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One attack of the ensemble on one batch of correctly classified examples.

        Running :meth:`planned` attack after attack on the examples that are still correct gives the
        package's verdicts. Its warnings become warnings of Python.

        Args:
            name: One of :meth:`planned`.
            predict: Images to logits ``(N, K)`` (not probabilities), in eval mode and float32,
                deterministic unless the version is ``rand``.
            x: Images in [0, 1], ``(N, C, H, W)``.
            y: Labels, ``(N,)``.
            seed: Of the random starts.
            steered: Replaces the loss of ``apgd-ce`` and ``square`` (an adaptive attack);
                ``predict`` alone decides about success.
            skips_repeats: Square does not evaluate images that its proposal left unchanged.

        Returns:
            x' ``(N, C, H, W)``, and whether each example is still correct, bool ``(N,)``.

        Raises:
            ConfigurationError: If no attack can run with this many classes.
        """
        if len(x) == 0:
            return x.detach().float(), torch.zeros(0, dtype=torch.bool, device=x.device)
        with _isolated(x.device) as messages:
            x = x.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            y = y.detach().clone()
            official = self._prepared(predict, x, seed, steered, skips_repeats)
            official.attacks_to_run = ["apgd-t" if name == "apgd-malt" else name]
            if name == "apgd-malt":
                official.apgd_targeted = _MaltAPGD(official.apgd_targeted, self.norm)
            # Global counters of the package, which would carry findings from model to model.
            checks.funcs.update(dict.fromkeys(checks.funcs, 0))
            x_adv, y_adv = official.run_standard_evaluation(x, y, batch_size=len(x))
        for message in dict.fromkeys(messages):
            warnings.warn(f"AutoAttack: {message}", stacklevel=2)
        return x_adv, y_adv == y

    def budget(self, name: str, num_classes: int) -> Budget:
        """Passes per image of one of :meth:`planned`, at most; counted in the package's loops."""
        official = self._configured(self._official(nn.Identity()), num_classes)
        apgd, aimed, fab, square = (
            getattr(official, part) for part in ("apgd", "apgd_targeted", "fab", "square")
        )
        # Before the attack its checks of the model and the clean images; after it the result.
        around = Budget(4 if self.version == "rand" else 9)
        starts = 3 if apgd.use_largereps else 1  # one per radius
        climb = Budget(apgd.n_iter + starts, apgd.n_iter + starts).times(apgd.eot_iter)
        if name in ("apgd-ce", "apgd-dlr"):
            own = climb.times(apgd.n_restarts)
        elif name == "apgd-t":
            own = climb.plus(Budget(1)).times(aimed.n_target_classes * aimed.n_restarts)
        elif name == "apgd-malt":
            ranked = Budget(1, min(CANDIDATES, num_classes - 1))
            own = climb.times(aimed.n_target_classes).plus(ranked)
        elif name == "fab":
            own = Budget(2 * fab.n_iter + 2, num_classes * fab.n_iter).times(fab.n_restarts)
        elif name == "fab-t":
            own = Budget(2 * fab.n_iter + 3, fab.n_iter).times(fab.n_target_classes)
        else:
            own = Budget(square.n_queries + 2)  # the start, and the result
        return own.plus(around).plus(Budget(1))  # each begins with the clean images

    def _official(self, predict: Predict, seed: int = 0, device: Any = "cpu") -> Any:
        """The package's object of this version."""
        return pyautoattack.AutoAttack(
            predict,
            norm=_OFFICIAL_NORM[self.norm],
            eps=self.eps,
            # The package's custom version runs 5 restarts of every attack.
            version="standard" if self.version == "custom" else self.version,
            seed=seed,
            device=device,
        )

    def _configured(self, official: Any, classes: int) -> Any:
        """The package's object with our settings."""
        for targeted in (official.apgd_targeted, official.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
        if self.square_queries is not None:
            official.square.n_queries = self.square_queries
        if self.apgd_restarts is not None:
            official.apgd.n_restarts = self.apgd_restarts
        if self.steps is not None:
            for apgd in (official.apgd, official.apgd_targeted):
                apgd.n_iter = apgd.n_iter_orig = self.steps
                # Its checkpoints for halving the step: constants of the paper, Section 3.
                apgd.n_iter_2 = max(int(0.22 * self.steps), 1)
                apgd.n_iter_min = max(int(0.06 * self.steps), 1)
                apgd.size_decr = max(int(0.03 * self.steps), 1)
            official.fab.n_iter = self.steps
        return official

    def _prepared(
        self,
        predict: Predict,
        x: Tensor,
        seed: int,
        steered: SteeredPredict | None,
        skips_repeats: bool,
    ) -> Any:
        """The package's object for this model, with our settings and losses."""
        official = self._official(_reaching_images_only(predict), seed, x.device)
        with torch.no_grad():
            classes = predict(x[:1]).shape[1]
        if not self.planned(classes):
            wanted = ", ".join(self.attacks or official.attacks_to_run)
            raise ConfigurationError(
                f"{wanted} cannot run with {classes} classes (apgd-dlr needs 3, apgd-t "
                "4); choose apgd-ce, fab-t or square"
            )
        self._configured(official, classes)
        if steered is not None:
            official.apgd = _SteeredAPGD(official.apgd, steered)
        official.square = AnyShapeSquare(official.square, steered, skips_repeats)
        return official


def _count(name: str, value: int | None) -> int | None:
    return None if value is None else check_count(name, value, 1)


class _SteeredAPGD(APGDAttack):  # type: ignore[misc]
    """APGD on the loss that ``steered`` returns, with the settings of ``official``."""

    def __init__(self, official: APGDAttack, steered: SteeredPredict) -> None:
        self.__dict__.update(vars(official))
        self._predict = official.model
        self._steered = steered
        self._y: Tensor | None = None
        self.model = self._forward

    def perturb(self, x: Tensor, y: Tensor | None = None) -> Any:
        self.loss = "dlr"  # the driver has just asked for "ce", whose loss cannot be replaced
        return super().perturb(x, y)

    def attack_single_run(self, x: Tensor, y: Tensor, x_init: Tensor | None = None) -> Any:
        self._y = y
        try:
            return super().attack_single_run(x, y, x_init)
        finally:
            self._y = None

    def _forward(self, x: Tensor) -> Tensor:
        if self._y is None:
            logits: Tensor = self._predict(x)
            return logits
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(finite)  # type: ignore[no-untyped-call]
        logits, loss = self._steered(x, self._y)
        self._loss = finite(loss)
        return finite_scores(logits)

    def dlr_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of the latest forward pass."""
        return self._loss


class _MaltAPGD(APGDAttack_targeted):  # type: ignore[misc]
    """Targeted APGD with targets by MALT; with fewer than four classes it climbs z_t - z_y."""

    def __init__(self, official: APGDAttack_targeted, norm: Norm) -> None:
        self.__dict__.update(vars(official))
        self._order = norm

    def perturb(self, x: Tensor, y: Tensor, x_init: Tensor | None = None) -> Tensor:
        self.init_hyperparam(x)
        torch.manual_seed(self.seed)
        targets = malt_targets(self.model, x, y, self.n_target_classes, self._order)
        x_adv, is_right = x.clone(), self.model(x).argmax(dim=1) == y
        for rank in range(targets.shape[1]):
            rows = is_right.nonzero().flatten()
            if len(rows) == 0:
                break
            self.y_target = targets[rows, rank]
            _, is_standing, _, found = self._run(x[rows].clone(), y[rows].clone())
            fell = ~is_standing.bool()
            is_right[rows[fell]] = False
            x_adv[rows[fell]] = found[fell]
        return x_adv

    def _run(self, x: Tensor, y: Tensor) -> Any:
        """One run for one target each; in l1 with the package's three radii."""
        if not self.use_largereps:
            return self.attack_single_run(x, y)
        first = math.ceil(0.3 * self.n_iter_orig)
        radii = [3.0 * self.eps_orig, 2.0 * self.eps_orig, self.eps_orig]
        return self.decr_eps_pgd(x, y, radii, [first, first, self.n_iter_orig - 2 * first])

    def dlr_loss_targeted(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[1] >= 4:
            loss: Tensor = super().dlr_loss_targeted(x, y)
            return loss
        return (x.gather(1, self.y_target.unsqueeze(1)) - x.gather(1, y.unsqueeze(1))).squeeze(1)


class _ImageGradient(torch.autograd.Function):
    """The logits, with a backward pass that ends at the images: FAB calls ``backward()``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, predict: Predict) -> Tensor:
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.logits = predict(ctx.x)
        return finite_scores(ctx.logits.detach()).clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        # FAB differentiates one forward pass once per class.
        (gradient,) = torch.autograd.grad(ctx.logits, ctx.x, grad_outputs, retain_graph=True)
        return finite(gradient).contiguous(), None  # the package flattens with view


def _reaching_images_only(predict: Predict) -> Predict:
    def logits_of(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            logits: Tensor = _ImageGradient.apply(x, predict)
            return logits
        return finite_scores(predict(x)).clone()  # Square writes into what it gets

    return logits_of


@contextmanager
def _isolated(device: torch.device) -> Iterator[list[str]]:
    """Differentiable float32 arithmetic; the package prints nothing and changes no global state.

    The list receives its warnings. Its check for dynamic models removes the trace function.
    """
    messages: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            messages.append(record.getMessage())
        return False

    logger, trace = logging.getLogger("auto-attack"), sys.gettrace()
    level = logger.level
    logger.addFilter(collect)
    logger.setLevel(logging.WARNING)
    # The package seeds every device; reading the state of an unused one would initialise it.
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    try:
        with (
            torch.random.fork_rng(devices=range(torch.cuda.device_count()) if in_use else ()),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield messages
    finally:
        logger.removeFilter(collect)
        logger.setLevel(level)
        sys.settrace(trace)
