"""The paper's figures and claims, from checkpoints: ``python -m paper_cifs.analysis``.

F1 shows what each channel of the penultimate feature does on natural and on adversarial images,
beside its relevance to the class; F2 how robust each class is and whether its channels are aligned;
F4 what the masks of CIFS change. The numbers behind them go to ``analysis.json`` together with the
verdict on five expectations, whichever way it turns out. Whatever is missing is named there, and
the rest is done without it.

Relevance has a row per class: class c's is W[c, :] at the penultimate feature. Tags as in
``method.py``.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from common.analysis.report import (
    BySeed,
    Expectation,
    Load,
    by_seed,
    combined,
    conclude,
    load_last,
    load_runs,
    load_test_split,
    mean,
    plain_values,
    read_metrics,
    run_analysis,
)
from common.attacks.geometry import parse_radius
from common.attacks.losses import classify
from common.attacks.pgd import PGD
from common.errors import ConfigurationError, UserError
from common.evaluation.drawing import (
    BLUE,
    FONT,
    GREEN,
    GREY,
    blank_figure,
    draw_per_class_bars,
    put_legend_above,
    save_figure,
    tidy_axes,
)
from common.files import write_sealed_json
from common.modes import network_of
from paper_cifs.method import CIFS, AdaptiveLoss, global_average, joint_logits

NETWORKS = {"digits": "resnet", "fashion_mnist": "resnet10"}  # what a data set alone stands for
USUAL_NETWORK = "resnet18"
EPS: dict[str, float | str] = {"digits": 0.2}
USUAL_EPS = "8/255"
BETA = 2.0  # of the joint loss that PGD-20 climbs
SHOWN = {"cifar10": ("automobile", "cat")}  # a robust and a non-robust class, as published [R0]

MODELS = {"plain_natural": "natural training", "plain": "adversarial training", "cifs": "CIFS"}
"""What the checkpoints are needed of, and what the figures call it."""

METRICS = {
    "plain": ("pgd20/ce_f", "pgd20"),
    "cifs": ("pgd20/ce_f", "pgd20"),
    "aux": ("pgd20/ce_f", "pgd20"),
    "cas": ("pgd20/ce_f", "pgd20/ce_p1"),
}
"""What the result files are needed of, and which of their metrics."""


# -------------------------------------------------------------------------- numbers per class


def class_means(feature: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Mean of ``feature`` ``(N, C)`` over the images of each class, ``(K, C)`` in float64.

    Raises:
        ValueError: If a class has no image.
    """
    counts = torch.bincount(y, minlength=num_classes)
    if (counts == 0).any():
        raise ValueError(
            f"no image of class {int(counts.argmin())} among {len(y)}; analyse them all"
        )
    sums = feature.new_zeros(num_classes, feature.shape[1], dtype=torch.float64)
    return sums.index_add(0, y, feature.double()) / counts[:, None]


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of each row of ``a`` with that of ``b``; NaN where one is constant."""
    a = a.double() - a.double().mean(dim=-1, keepdim=True)
    b = b.double() - b.double().mean(dim=-1, keepdim=True)
    return (a * b).sum(-1) / ((a * a).sum(-1) * (b * b).sum(-1)).sqrt()


@dataclass(frozen=True)
class Channels:
    """One feature, averaged over the images of each class, and the relevance of its channels.

    Attributes:
        natural: a_nat, ``(K, C)``, non-negative.
        adversarial: a_adv, the same for the attacked images.
        relevance: Row c is the relevance of the channels to class c, ``(K, C)``.
    """

    natural: Tensor
    adversarial: Tensor
    relevance: Tensor

    def cosine(self) -> Tensor:
        """Cosine of a_nat and a_adv, ``(K,)``: 1 where the attack only rescales."""
        return F.cosine_similarity(self.natural, self.adversarial, dim=1)

    def over_activation(self) -> Tensor:
        r"""Excess on the negatively relevant channels, ``(K,)``.

        :math:`\sum_{i \in R} (a_{adv} - a_{nat})_i / \sum_i (a_{nat})_i`, with R the quarter of the
        channels that has the lowest relevance.
        """
        count = max(1, self.relevance.shape[1] // 4)
        lowest = self.relevance.argsort(dim=1, stable=True)[:, :count]
        excess = (self.adversarial - self.natural).gather(1, lowest).sum(1)
        return excess / self.natural.sum(1)

    def alignment(self) -> Tensor:
        """Pearson correlation of a_nat with the relevance, ``(K,)``."""
        return correlation(self.natural, self.relevance)

    def negative_share(self, activation: Tensor) -> Tensor:
        """Share of an activation ``(K, C)`` on channels of negative relevance, ``(K,)``."""
        return (activation * (self.relevance < 0)).sum(1) / activation.sum(1)

    def numbers(self) -> dict[str, Tensor]:
        """Everything above by name, each ``(K,)``."""
        return {
            "cosine": self.cosine(),
            "over_activation": self.over_activation(),
            "alignment": self.alignment(),
            "negative_share_natural": self.negative_share(self.natural),
            "negative_share_adversarial": self.negative_share(self.adversarial),
        }


# --------------------------------------------------------------------- from a network to them


@dataclass
class Recording:
    """What a network computes on the way to its logits.

    Attributes:
        logits: f, ``(N, K)``.
        features: Pooled features ``(N, C)``: ``penultimate``, and for the s-th CIFS module
            ``module<s>_unmasked`` and ``module<s>_masked``.
        relevance: For ``module<s>``, g of its own selection in eval mode, and for
            ``module<s>_by_class`` the relevance to the label's class, both ``(N, C)``.
    """

    logits: Tensor
    features: dict[str, Tensor]
    relevance: dict[str, Tensor]


def final_linear(model: nn.Module) -> nn.Linear:
    """The layer that turns the penultimate feature into the logits."""
    head = cast(nn.Module, network_of(model).head)
    return [module for module in head.modules() if isinstance(module, nn.Linear)][-1]


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def record(model: nn.Module, x: Tensor, y: Tensor) -> Recording:
    """Runs a network in eval mode on images ``(N, C, H, W)`` and keeps what the figures need.

    Args:
        model: A network of this paper or a plain one, or a classifier that holds one as ``net``.
        x: Images in [0, 1].
        y: Labels, ``(N,)``; they decide which class's relevance is recorded, never a mask.
    """
    features: dict[str, Tensor] = {}
    relevance: dict[str, Tensor] = {}

    def keep_input(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        features["penultimate"] = inputs[0]

    def keep_masking(s: int) -> Callable[..., None]:
        def keep(module: CIFS, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
            z, (z_bar, p) = inputs[0], output
            features[f"module{s}_unmasked"] = global_average(z)
            features[f"module{s}_masked"] = global_average(z_bar)
            relevance[f"module{s}"] = module.relevance(z, p).sum(dim=1)  # g
            relevance[f"module{s}_by_class"] = module.probe.relevance(z, y[:, None])[:, 0]

        return keep

    hooks: dict[nn.Module, Callable[..., None]] = {final_linear(model): keep_input}
    modules = [module for module in model.modules() if isinstance(module, CIFS)]
    hooks |= {module: keep_masking(s) for s, module in enumerate(modules, start=1)}
    model.eval()
    with _hooked(hooks):
        logits, _ = joint_logits(model, x)
    return Recording(logits, features, relevance)


def _joined(parts: Sequence[Recording]) -> Recording:
    def join(pick: Callable[[Recording], dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([pick(part)[name] for part in parts]) for name in pick(parts[0])}

    logits = torch.cat([part.logits for part in parts])
    return Recording(logits, join(lambda part: part.features), join(lambda part: part.relevance))


@dataclass(frozen=True)
class Measurement:
    """One checkpoint.

    Attributes:
        clean: Accuracy on the natural images of each class, ``(K,)``.
        robust: The same under PGD-20; an image that was wrong before stays wrong.
        channels: By feature. The relevance is W of the final layer for ``penultimate``, the mean g
            of the class's natural images for ``module<s>_unmasked`` and ``_masked`` [C], and the
            probe's relevance to the class (W[c, :] if it is linear) for those two with
            ``_by_class`` appended.
    """

    clean: Tensor
    robust: Tensor
    channels: dict[str, Channels]

    def summary(self) -> dict[str, Any]:
        """The numbers, means over classes first; accuracies in [0, 1]."""
        return {
            "clean_acc_per_class": self.clean,
            "pgd20_acc_per_class": self.robust,
            # F2's link: are the classes whose channels are aligned the robust ones?
            "correlation_of_robustness_and_alignment": correlation(
                self.robust, self.channels["penultimate"].alignment()
            ),
            "features": {
                name: {
                    **{key: value.mean() for key, value in channels.numbers().items()},
                    "per_class": channels.numbers(),
                }
                for name, channels in self.channels.items()
            },
        }


def measure(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    num_classes: int,
    eps: float | str,
    batch_size: int = 350,
) -> Measurement:
    """Attacks a network with PGD-20 and compares its channels on natural and adversarial images.

    PGD-20 takes steps of eps / 10 from the image itself and climbs cross-entropy, joint with
    beta = 2 where the network has probes.

    Args:
        model: As in :func:`record`.
        x: Images in [0, 1], ``(N, C, H, W)``, on any device.
        y: Labels, ``(N,)``, with every class among them.
        num_classes: Number of classes K.
        eps: Radius, pixels in [0, 1].
        batch_size: Images at a time.
    """
    radius = parse_radius(eps)
    attack = PGD(eps=radius, step_size=radius / 10, steps=20, start="zero")
    device = next(model.parameters()).device
    model.eval()
    natural, adversarial = [], []
    for start in range(0, len(x), batch_size):
        part_x, part_y = (part[start : start + batch_size].to(device) for part in (x, y))
        x_adv = attack(AdaptiveLoss(beta=BETA)(model, {"x": part_x, "y": part_y}), part_x)
        natural.append(record(model, part_x, part_y))
        adversarial.append(record(model, x_adv, part_y))
    nat, adv, y = _joined(natural), _joined(adversarial), y.to(device)

    def channels(feature: str, relevance: Tensor) -> Channels:
        a_nat, a_adv = (class_means(part.features[feature], y, num_classes) for part in (nat, adv))
        return Channels(a_nat.cpu(), a_adv.cpu(), relevance.detach().double().cpu())

    found = {"penultimate": channels("penultimate", final_linear(model).weight)}
    for name, values in nat.relevance.items():
        module, _, kind = name.partition("_")
        for side in ("unmasked", "masked"):
            key = f"{module}_{side}"
            found[f"{key}_{kind}" if kind else key] = channels(
                key, class_means(values, y, num_classes)
            )
    is_clean = classify(nat.logits) == y
    is_robust = is_clean & (classify(adv.logits) == y)
    clean, robust = (
        class_means(right[:, None], y, num_classes)[:, 0].cpu() for right in (is_clean, is_robust)
    )
    return Measurement(clean, robust, found)


# ---------------------------------------------------------------------------------- the figures


def smoothed(curve: Tensor) -> Tensor:
    """Mean of each channel and its two neighbours; the published curves look like it [C]."""
    padded = F.pad(curve[None, None], (1, 1), mode="replicate")
    return F.avg_pool1d(padded, 3, stride=1)[0, 0]


def draw_channels(top: Axes, bottom: Axes, channels: Channels, c: int) -> None:
    """F1 for one class: activations above, relevance below, channels by descending relevance.

    Activations are divided by their common maximum, the relevance by its largest magnitude. A
    dotted line separates positive from negative relevance.
    """
    relevance = channels.relevance[c]
    order = relevance.argsort(descending=True, stable=True)
    curves = [smoothed(a[c][order]) for a in (channels.natural, channels.adversarial)]
    highest = max(float(curve.max()) for curve in curves) or 1.0
    index = np.arange(len(order))
    looks = (("natural", BLUE, 0.85), ("adversarial (PGD-20)", "salmon", 0.65))
    for curve, (label, colour, alpha) in zip(curves, looks, strict=True):
        height = (curve / highest).numpy()
        top.fill_between(index, height, color=colour, alpha=alpha, linewidth=0, label=label)
    largest = float(relevance.abs().max()) or 1.0
    bottom.fill_between(
        index, (relevance[order] / largest).numpy(), color=GREEN, linewidth=0, label="relevance"
    )
    boundary = float((relevance >= 0).sum()) - 0.5
    for ax in (top, bottom):
        ax.axvline(boundary, color=GREY, linewidth=0.8, linestyle=":")
        ax.set_xlim(0, len(order) - 1)
        tidy_axes(ax, grid=False)
    top.set(ylim=(0, 1), yticks=[0, 1])
    top.tick_params(labelbottom=False)
    bottom.set(ylim=(-1, 1), yticks=[-1, 0, 1])


def channel_figure(panels: Sequence[Sequence[tuple[str, Channels, int]]]) -> Figure:
    """A grid of F1 panels.

    Titles give the cosine of the two curves, and the share of each on channels of negative
    relevance (NR), first natural, then adversarial.

    Args:
        panels: Rows of (title, channels, class).
    """
    rows, columns = len(panels), len(panels[0])
    fig = blank_figure(0.5 + (3.3 if columns < 3 else 2.45) * columns, 0.5 + 2.45 * rows)
    axes = fig.subplots(2 * rows, columns, squeeze=False, height_ratios=[1.7, 1.0] * rows)
    for i, row in enumerate(panels):
        for j, (title, channels, c) in enumerate(row):
            top, bottom = axes[2 * i, j], axes[2 * i + 1, j]
            draw_channels(top, bottom, channels, c)
            numbers = {key: float(value[c]) for key, value in channels.numbers().items()}
            shares = (numbers[f"negative_share_{kind}"] for kind in ("natural", "adversarial"))
            note = f"cosine {numbers['cosine']:.2f}, NR share " + " → ".join(
                f"{share:.2f}" for share in shares
            )
            top.set_title(f"{title}\n{note}", fontsize=FONT - 1)
        axes[2 * i, 0].set_ylabel("activation", fontsize=FONT - 1)
        axes[2 * i + 1, 0].set_ylabel("relevance", fontsize=FONT - 1)
    for ax in axes[-1]:
        ax.set_xlabel("channels by relevance", fontsize=FONT - 1)
    put_legend_above(fig, axes[0, 0])
    return fig


def shown_classes(dataset: str, robust: Tensor, class_names: Sequence[str]) -> tuple[int, int]:
    """A robust and a non-robust class: the published ones, or else those of extreme accuracy."""
    names = SHOWN.get(dataset, ())
    if names and all(name in class_names for name in names):
        first, second = (list(class_names).index(name) for name in names)
        return first, second
    return int(robust.argmax()), int(robust.argmin())


def figure_f1(
    models: Mapping[str, Measurement], classes: Sequence[int], class_names: Sequence[str]
) -> Figure:
    """F1: natural beside adversarial training, a row per class."""
    return channel_figure(
        [
            [
                (f"{MODELS[name]}, class {class_names[c]}", found.channels["penultimate"], c)
                for name, found in models.items()
            ]
            for c in classes
        ]
    )


def figure_f2(found: Sequence[Measurement], class_names: Sequence[str]) -> Figure:
    """F2: accuracy of each class, and below it how well its channels are aligned.

    Classes come in the order of robust accuracy; with several seeds bars are means, dots seeds.
    """
    clean, robust = (torch.stack([getattr(m, key) for m in found]) for key in ("clean", "robust"))
    alignment = torch.stack([m.channels["penultimate"].alignment() for m in found])
    order = robust.mean(0).argsort(descending=True, stable=True)
    names = [class_names[c] for c in order.tolist()]
    fig = blank_figure(max(5.0, 0.55 * len(names) + 1.5), 4.4)
    top, bottom = fig.subplots(2, 1, height_ratios=[1.5, 1.0])
    draw_per_class_bars(
        top,
        {
            "natural": 100 * clean[:, order].numpy(),
            "PGD-20": 100 * robust[:, order].numpy(),
        },
        names,
    )
    draw_per_class_bars(bottom, {"corr(a_nat, W[c, :])": alignment[:, order].numpy()}, names)
    for bar in bottom.patches:
        bar.set_color(GREEN)
    bottom.axhline(0, color=GREY, linewidth=0.8)
    links = correlation(robust, alignment)
    top.set(ylim=(0, 100))
    top.set_ylabel("accuracy (%)", fontsize=FONT)
    bottom.set_ylabel("corr($a_{nat}$, W[c, :])", fontsize=FONT)
    bottom.set_title(
        "correlation with PGD-20 accuracy across classes: "
        + ", ".join(f"{float(link):+.2f}" for link in links),
        fontsize=FONT - 1,
    )
    bottom.set_xlabel("class", fontsize=FONT)
    put_legend_above(fig, top)
    return fig


def figure_f4(found: Measurement, classes: Sequence[int], class_names: Sequence[str]) -> Figure:
    """F4: the four features around the two masks of CIFS, a row per class.

    The relevance is each module's g, and W of the final layer for the last masked feature, which is
    the penultimate one.
    """
    last = max(name for name in found.channels if name.endswith("_masked"))
    features = [name for name in found.channels if name.endswith("masked") and name != last]
    titles = {name: name.replace("_", ", ").replace("module", "module ") for name in features}
    titles["penultimate"] = f"{last.replace('_', ', ').replace('module', 'module ')} (W)"
    return channel_figure(
        [
            [
                (f"{title}, class {class_names[c]}", found.channels[n], c)
                for n, title in titles.items()
            ]
            for c in classes
        ]
    )


# ------------------------------------------------------------------------------ the expectations


def evaluate_expectations(
    metrics: Mapping[tuple[str, int], Mapping[str, float]],
    summaries: Mapping[tuple[str, int], Mapping[str, Any]],
    seeds: Sequence[int],
) -> list[Expectation]:
    """The five expectations of the small-scale run, from what there is.

    Nothing is expected of single seeds, nor of the worst loss: those figures stand beside.

    Args:
        metrics: (method, seed) -> metrics of its result file, accuracies in [0, 1].
        summaries: (method, seed) -> :meth:`Measurement.summary`.
        seeds: All that a verdict needs.
    """

    def gain(first: str, second: str, metric: str) -> BySeed:
        one, other = by_seed(metrics, first, metric), by_seed(metrics, second, metric)
        return combined(one, other, lambda a, b: 100 * (a - b))

    def channels(method: str, number: str, feature: str = "penultimate") -> BySeed:
        return by_seed(summaries, method, "features", feature, number)

    f, worst = "pgd20/ce_f", "pgd20"
    a = conclude(
        "a",
        "PGD-20 on f: accuracy of CIFS minus that of the plain network is positive, in points. "
        "Beside it: the same with each network's worst loss, and aux, which has the probes and "
        "the joint loss but no mask: a gain it shares is not the mask's",
        gain("cifs", "plain", f),
        seeds,
        lambda value: value > 0,
        0.0,
        {
            f"{first} - {second}, {title}": gain(first, second, metric)
            for first, second in (("cifs", "plain"), ("aux", "plain"), ("cifs", "aux"))
            for metric, title in ((f, "on f"), (worst, "worst loss"))
        },
    )
    after_at, after_natural = channels("plain", "cosine"), channels("plain_natural", "cosine")
    both = combined(after_at, after_natural, lambda at, natural: at)
    b = conclude(
        "b",
        "cosine(a_nat, a_adv), mean over classes: above 0.9 after adversarial training, below "
        "after natural training",
        both,
        seeds,
        lambda value: value > 0.9 > cast(float, mean(after_natural)),
        0.9,
        {"natural training": after_natural},
    )
    excess, excess_natural = (
        channels(method, "over_activation") for method in ("plain", "plain_natural")
    )
    c = conclude(
        "c",
        "over-activation of the quarter of lowest relevance, mean over classes: natural minus "
        "adversarial training is positive",
        combined(excess_natural, excess, lambda natural, at: natural - at),
        seeds,
        lambda value: value > 0,
        0.0,
        {"natural training": excess_natural, "adversarial training": excess},
    )
    through_probes: BySeed = {}
    for (method, seed), found in metrics.items():
        attacks = [value for name, value in found.items() if name.startswith("pgd20/ce_p")]
        if method == "cas" and attacks:
            through_probes[seed] = min(attacks)
    on_f = by_seed(metrics, "cas", f)
    d = conclude(
        "d",
        "CAS under PGD-20: accuracy when f alone is attacked minus that when a probe is (the "
        "worse one) is at least 15 points",
        combined(on_f, through_probes, lambda looks, truth: 100 * (looks - truth)),
        seeds,
        lambda value: value >= 15,
        15.0,
    )
    share = "negative_share_adversarial"
    before = channels("cifs", share, "module2_unmasked_by_class")
    after = channels("cifs", share, "module2_masked_by_class")
    e = conclude(
        "e",
        "adversarial images: the share of activation on channels of negative relevance to the "
        "class (second probe) falls by more than a third across the mask of CIFS module 2",
        combined(before, after, lambda unmasked, masked: 1 - masked / unmasked),
        seeds,
        lambda value: value > 1 / 3,
        1 / 3,
        {"share before the mask": before, "share after the mask": after},
    )
    return [a, b, c, d, e]


# ------------------------------------------------------------------------------------ the command


def experiment_of(on: str) -> tuple[str, str]:
    """Data set and network, with which stems begin, of a data set, such a pair or a whole stem."""
    found = re.match(r"(.+?)_((?:resnet|wrn)\d*(?:_\d+)?)(?:_|$)", on)
    return (found[1], found[2]) if found else (on, NETWORKS.get(on, USUAL_NETWORK))


@dataclass
class Gathered:
    """What could be had of an experiment's runs and results, and what could not.

    Attributes:
        dataset: Of the stems ``<dataset>_<network>_<method>``.
        network: Of the stems.
        seeds: Those asked for.
        measurements: By (method, seed).
        metrics: The same from the result files, accuracies in [0, 1].
        class_names: In the order of the labels.
        missing: In words.
    """

    dataset: str
    network: str
    seeds: Sequence[int]
    measurements: dict[tuple[str, int], Measurement] = field(default_factory=dict)
    metrics: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    missing: list[str] = field(default_factory=list)

    @property
    def base(self) -> str:
        """With what the stems begin."""
        return f"{self.dataset}_{self.network}"

    def of(self, method: str) -> dict[int, Measurement]:
        """The measurements of a method by seed."""
        found = {seed: self.measurements.get((method, seed)) for seed in self.seeds}
        return {seed: one for seed, one in found.items() if one is not None}

    def measure_runs(self, runs: Path, device: str, load: Load) -> None:
        """Measures every checkpoint there is."""
        eps = EPS.get(self.dataset, USUAL_EPS)
        found, missing = load_runs(runs, list(MODELS), self.base, self.seeds, load)
        self.missing += missing
        for (method, seed), (classifier, data) in found.items():
            try:
                x, y = load_test_split(data)
            except (UserError, RuntimeError, OSError) as error:
                self.missing.append(f"data of {self.base}_{method}, seed {seed}: {error}")
                continue
            self.class_names = tuple(data.class_names)
            model = classifier.to(device)
            self.measurements[method, seed] = measure(model, x, y, data.num_classes, eps)

    def read_results(self, folder: Path) -> None:
        """Reads the last checkpoint's metrics from every result file there is."""
        self.metrics, missing = read_metrics(folder, METRICS, self.base, self.seeds)
        self.missing += missing


def draw_figures(got: Gathered, folder: Path) -> list[Path]:
    """Draws F1, F2 and F4 as far as checkpoints allow; F1 and F4 show the first complete seed."""
    paths: list[Path] = []

    def save(fig: Figure, name: str) -> None:
        paths.append(save_figure(fig, folder / f"{got.base}_{name}.png"))

    natural, plain, cifs = got.of("plain_natural"), got.of("plain"), got.of("cifs")
    for seed in [*(s for s in plain if s in natural), *plain, *natural][:1]:
        sides = (("plain_natural", natural), ("plain", plain))
        models = {name: found[seed] for name, found in sides if seed in found}
        robust = plain.get(seed, next(iter(models.values()))).robust
        classes = shown_classes(got.dataset, robust, got.class_names)
        save(figure_f1(models, classes, got.class_names), "f1_channels")
    if plain:
        save(figure_f2(list(plain.values()), got.class_names), "f2_classes")
    for seed in [*(s for s in cifs if s in plain), *cifs][:1]:
        # The classes of F1, so that the two can be compared.
        classes = shown_classes(got.dataset, plain.get(seed, cifs[seed]).robust, got.class_names)
        save(figure_f4(cifs[seed], classes, got.class_names), "f4_masks")
    return paths


def analyse(
    runs: Path,
    results: Path,
    on: str,
    seeds: Sequence[int],
    device: str = "cpu",
    load: Load = load_last,
) -> dict[str, Any]:
    """Makes the figures and ``analysis.json`` (off digits ``analysis_<dataset>_<network>.json``).

    Args:
        runs: Where the run directories ``<stem>/seed<k>`` are.
        results: Where the result files are and the output goes.
        on: As in :func:`experiment_of`.
        seeds: Which to average over.
        device: Where the networks run.
        load: How a run is loaded.

    Returns:
        What was written, with ``figures`` and ``path`` added.

    Raises:
        ConfigurationError: If there is neither a checkpoint nor a result to work on.
    """
    got = Gathered(*experiment_of(on), seeds)
    got.measure_runs(runs, device, load)
    got.read_results(results)
    if not got.measurements and not got.metrics:
        raise ConfigurationError(
            f"nothing to analyse: no usable checkpoint {runs}/{got.base}_"
            f"{{{','.join(MODELS)}}}/seed*/checkpoints/last.ckpt and no usable result "
            f"{results}/{got.base}_{{{','.join(METRICS)}}}-seed*.json for seeds "
            f"{', '.join(map(str, seeds))}; run make reproduce-cifs ON={got.base}, or point "
            "--runs, --results, --on and --seeds to what there is"
        )
    summaries = {key: found.summary() for key, found in got.measurements.items()}
    channels: dict[str, dict[str, Any]] = {}
    for (method, seed), summary in summaries.items():
        channels.setdefault(f"{got.base}_{method}", {})[f"seed{seed}"] = summary
    expectations = evaluate_expectations(got.metrics, summaries, seeds)
    report = {
        "on": got.base,
        "seeds": list(seeds),
        "expectations": [plain_values(asdict(expectation)) for expectation in expectations],
        "channels": plain_values(channels),
        "missing": got.missing,
    }
    name = "analysis" if got.dataset == "digits" else f"analysis_{got.base}"
    path = results / f"{name}.json"
    write_sealed_json(path, report)
    figures = draw_figures(got, results / "figures")
    return {**report, "figures": [str(figure) for figure in figures], "path": str(path)}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command; 0 whichever way the expectations turn out, 2 where nothing can be done."""
    return run_analysis("paper_cifs", analyse, args)


if __name__ == "__main__":
    sys.exit(main())
