"""What the claims need beside the results: measures of maps, audits, and transferred images."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from common.analysis.report import Found
from common.attacks.pgd import PGD
from common.attacks.randomness import ExampleRandom
from common.data.subset import subset
from common.errors import check_choice
from common.evaluation.transfer import Transfer
from common.modes import frozen
from common.networks.alexnet import AlexNet
from common.networks.preact_resnet import PreActResNet18
from common.networks.resnet import ResNet18
from common.networks.vgg import VGG
from common.networks.wide_resnet import WideResNet
from common.results.bases import bases, comparable
from common.results.outcomes import positions
from common.results.schema import CheckpointResult
from paper_wm.measures import measure_layer, shuffled, summarise, white_noise_check
from paper_wm.method import Variant, insert_weight_maps, weight_maps
from paper_wm.networks import SmallCNN

LABELS = {
    "base": "base",
    "wide": "wide",
    "scale": "scale",
    "smoothing": "smoothing",
    "smoothing_frozen": "smoothing, frozen",
    "smoothing_post": "smoothing, post",
    "smoothing_all": "smoothing, all",
    "smoothing_all_post": "smoothing, all, post",
    "smoothing_stages": "smoothing, stages",
    "unsharp": "unsharp",
    "unsharp_frozen": "unsharp, frozen",
    "unsharp_post": "unsharp, post",
    "unsharp_all": "unsharp, all",
    "unsharp_lam-0.5": "unsharp, lam -0.5",
    "highpass": "highpass",
    "subtract_summed": "summed map subtracted",
}
"""What methods are called: what stands behind data set and network in the stems."""

NETWORKS = ("cnn3", "resnet18", "wrn16_4", "wrn28_10")
RADIUS = {"digits": 0.05, "mnist": 0.1, "fashion_mnist": 0.1}  # of the transferred images
LIMIT = 1000  # test images that gains are measured on
WHITE_BOX = "bypass/ce_f"
CHECKS = ("bypass/ce_bypass", "pgd100", "aa", "deepfool")  # what it is compared with


@dataclass
class Gathered:
    """Measures and checks of a data set and network, by (method, seed) unless stated otherwise.

    Attributes:
        by_base: Metrics, of every data set and network in the results.
        audits: Failed checks for gradient masking.
        attacked: The test images that PGD-20 attacked beside the other checks.
        summaries: Numbers of the first map, ``<method>_shuffled`` too.
        layers: Numbers of every map by stem, seed and module.
        transferred: Accuracy under images made on base.
        maps: First maps.
    """

    by_base: dict[str, dict[tuple[str, int], dict[str, float]]] = field(default_factory=dict)
    audits: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    attacked: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    summaries: dict[tuple[str, int], dict[str, float | None]] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    transferred: dict[tuple[str, int], float] = field(default_factory=dict)
    maps: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def read(self, found: Found) -> None:
        """Metrics of all data sets and networks, and failed checks."""
        last: dict[str, dict[tuple[str, int], CheckpointResult]] = {}
        for result in found.everything:
            base, method = split_stem(result["experiment"])
            if "last" not in result["checkpoints"]:
                continue
            checkpoint = result["checkpoints"]["last"]
            last.setdefault(base, {})[method, result["seed"]] = checkpoint
            if base == found.on and WHITE_BOX in checkpoint["metrics"]:
                self.attacked[method, result["seed"]] = positions(checkpoint, WHITE_BOX)
            if base == found.on and "audit" in checkpoint:
                self.audits[method, result["seed"]] = [
                    check["id"]
                    for check in checkpoint["audit"]["checks"]
                    if check["verdict"] == "fail"
                ]
        for base, checkpoints in last.items():
            self.by_base[base], _ = comparable(checkpoints)
            for key, checkpoint in checkpoints.items():
                of = bases(checkpoint)
                for name in CHECKS:  # which verdicts hold against the white box
                    if WHITE_BOX in of and of.get(name, of[WHITE_BOX]) != of[WHITE_BOX]:
                        self.by_base[base][key].pop(name, None)
                        if base == found.on:
                            what = f"{name} of {key[0]} seed {key[1]}: on other images"
                            found.missing.append(what)
        found.metrics = self.by_base.get(found.on, {})

    def measure(self, found: Found) -> None:
        """Gains of every map, and what images of the base network do to every other."""
        surrogates = {seed: model for (_, seed), (model, _) in found.load_runs(["base"]).items()}
        for method in methods_of(found):
            if method.partition("_")[0] in ("base", "wide"):
                continue
            for (_, seed), (model, data) in found.load_runs([method]).items():
                if (images := found.test_split(data)) is None:
                    continue
                x, y = images
                some = subset(y, LIMIT)
                self._measure(found.on, method, seed, model, x[some], y[some])
                if seed in surrogates and (rows := self.attacked.get((method, seed))):
                    eps = RADIUS.get(found.on.partition("_cnn3")[0], 2 / 255)
                    accuracy = transfer(surrogates[seed], model, x[rows], y[rows], eps)
                    self.transferred[method, seed] = accuracy

    def _measure(
        self, base: str, method: str, seed: int, model: nn.Module, x: Tensor, y: Tensor
    ) -> None:
        """Numbers of every map of a network; the first one stands for the method in tables."""
        twins = {method: model}
        maps = weight_maps(model)
        if any(m.map.requires_grad for m in maps.values()):
            twins[f"{method}_shuffled"] = shuffled(model)
        with frozen(model, "eval"):
            for name, twin in twins.items():
                for i, (place, layer) in enumerate(weight_maps(twin.eval()).items()):
                    units = measure_layer(twin, layer, x, y)
                    numbers = summarise(units, border=layer.kernel_size)
                    if twin is model and not layer.variant.startswith("subtract"):
                        checked = white_noise_check(layer)
                        numbers |= {f"white_noise_{key}": v for key, v in checked.items()}
                    stem = self.layers.setdefault(f"{base}_{name}", {})
                    stem.setdefault(f"seed{seed}", {})[place] = numbers
                    if i == 0:
                        self.summaries[name, seed] = numbers
        if maps:
            self.maps[method, seed] = next(iter(maps.values())).map.detach().cpu()


def gather(found: Found) -> None:
    """Everything above, kept for claims and figures."""
    got = Gathered()
    got.read(found)
    got.measure(found)
    found.kept["gathered"] = got
    found.measured["amplification"] = got.layers


def methods_of(found: Found) -> dict[str, str]:
    """Methods with results and what they are called, the known ones first."""
    having = sorted({method for method, _ in found.metrics})
    known = {method: label for method, label in LABELS.items() if method in having}
    return known | {method: label_of(method) for method in having if method not in known}


def label_of(method: str) -> str:
    """What a method is called."""
    return LABELS.get(method, method.replace("_", ", "))


def split_stem(stem: str) -> tuple[str, str]:
    """``mnist_cnn3_smoothing_post`` -> ``mnist_cnn3`` and ``smoothing_post``."""
    for network in NETWORKS:
        before, found, after = stem.partition(f"_{network}_")
        if found:
            return f"{before}_{network}", after
    return stem, ""


def base_of(on: str) -> str:
    """Data set and network of a data set (its small network), of such a pair or of a whole stem."""
    base, _ = split_stem(f"{on.rstrip('_')}_")
    return base if base.endswith(NETWORKS) else f"{on.rstrip('_')}_cnn3"


def transfer(source: nn.Module, victim: nn.Module, x: Tensor, y: Tensor, eps: float) -> float:
    """Accuracy of ``victim`` under PGD-20 images made on ``source``."""
    part = {"x": x, "y": y, "index": torch.arange(len(x))}
    attack = Transfer(PGD(eps, eps / 8, 20, "uniform"), source)
    found = attack.run(victim, part, ExampleRandom(0, 0, part["index"]))
    return float(found["correct"].float().mean())


ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "small CNN": (SmallCNN, (1, 28, 28)),
    "ResNet-18": (ResNet18, (3, 32, 32)),
    "PreActResNet-18": (PreActResNet18, (3, 32, 32)),
    "WRN-16-4": (lambda: WideResNet(16, 4), (3, 32, 32)),
    "VGG-16": (VGG, (3, 32, 32)),
    "AlexNet": (AlexNet, (3, 32, 32)),
    "torchvision ResNet-18": (lambda: torchvision.models.resnet18(), (3, 224, 224)),
    "torchvision MobileNetV2": (lambda: torchvision.models.mobilenet_v2(), (3, 224, 224)),
}


def try_insertions(variant: Variant) -> dict[str, bool]:
    """Whether one call puts a map behind the first convolution of each kind of network.

    It has worked if the logits keep their shape and no key of the base network's state dict is
    lost. On the meta device: shapes need no weights.
    """
    check_choice("variant", variant, Variant)
    found = {}
    for name, (make, shape) in ZOO.items():
        with torch.device("meta"):
            net, images = make().eval(), torch.empty(2, *shape)
            keys, before = set(net.state_dict()), net(images).shape
            convolutions = (n for n, m in net.named_modules() if isinstance(m, nn.Conv2d))
            insert_weight_maps(net, [next(convolutions)], shape, variant)
            added = set(net.state_dict()) - keys
            kept = keys <= set(net.state_dict()) and len(added) == 1
            found[name] = kept and net(images).shape == before
    return found
