"""Models by name: of public collections, of our runs and published results, of any factory."""

import importlib
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from common.errors import ConfigurationError, RunDirectoryError, UserError
from common.evaluation.models import load_run
from common.networks.normalize import Normalize

if TYPE_CHECKING:  # Lightning is imported where a run is loaded, not before
    from common.data.images import ImageDataModule


class Normalized(nn.Module):
    """A network that expects standardised images, for images in [0, 1].

    Args:
        net: Standardised images to logits ``(N, K)``, or to an object with ``logits``.
        mean: Of every channel, in pixel units.
        std: Of every channel.
    """

    def __init__(self, net: nn.Module, mean: Any, std: Any) -> None:
        super().__init__()
        self.normalize = Normalize(len(mean), mean, std)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)``."""
        scores = self.net(self.normalize(x))
        logits: Tensor = getattr(scores, "logits", scores)
        return logits


def find_model(
    name: str, arguments: Mapping[str, Any] | None = None
) -> tuple[nn.Module, "ImageDataModule | None"]:
    """A model by name, in evaluation mode, for images in [0, 1]; the data of a run.

    Args:
        name: ``robustbench:NAME`` (CIFAR-10, Linf) or ``robustbench:DATASET/THREAT/NAME``;
            ``timm:NAME``, ``torchvision:NAME`` or ``hf:NAME`` (a repository or folder of
            transformers), with their pretrained weights; the directory of a run;
            ``PACKAGE:EXPERIMENT[-seedK]``, a published result, of which the run has to be in
            ``runs``; or ``package.module:factory``.
        arguments: For the function of the collection, or the factory.

    Raises:
        ConfigurationError: If a package is missing, or there is no such model.
        RunDirectoryError: If there is no run.
        CheckpointError: If the checkpoint of a run is missing or damaged.
    """
    place, _, rest = name.partition(":")
    if rest and place in ZOOS:
        return _from_zoo(place, rest, arguments or {}).eval(), None
    run = _published_run(place, rest) or Path(name)
    if not run.is_dir():
        return build_model(name, arguments).eval(), None
    if arguments:
        raise ConfigurationError(
            f"{name} is a run, which takes no arguments, got {arguments}; drop --model_args"
        )
    return load_run(run)


def build_model(path: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Call a factory named ``package.module:factory``, which has to make a module."""
    sys.path.insert(0, "")
    try:
        if not path.partition(":")[2]:
            raise ValueError("no factory is named behind a colon, and it is no folder of a run")
        factory = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"--model is {path!r}, expected package.module:factory, a run's folder, or "
            f"{', '.join(f'{zoo}:NAME' for zoo in ZOOS)} ({error})"
        ) from error
    finally:
        sys.path.remove("")
    try:
        model = factory(**(arguments or {}))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{path} cannot be made with --model_args {arguments}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"{path} made a {type(model).__name__}, expected an nn.Module")
    return model


def _published_run(package: str, result: str) -> Path | None:
    """The run behind ``PACKAGE:EXPERIMENT[-seedK]``; ``None`` if that names no experiment."""
    found = re.fullmatch(r"([\w.+-]+?)(?:-seed(\d+))?", result)
    if found is None or not package.isidentifier():
        return None
    experiment, seed = found[1], found[2] or "0"
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # of __main__
        return None
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    if not any(Path(folder, "configs", f"{experiment}.yaml").is_file() for folder in folders):
        return None
    run = Path("runs", package, experiment, f"seed{seed}")
    if not (run / "config.yaml").is_file():
        raise RunDirectoryError(
            f"{package}:{result} needs the weights of its run, and {run} holds none; make it with "
            f'make reproduce-{package.removeprefix("paper_")} ON={experiment} SEEDS="{seed}"'
        )
    return run


def _from_zoo(place: str, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    package, module, load = ZOOS[place]
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"{place}:{name} needs the package {error.name or package} ({error}); "
            f"pip install {package}"
        ) from error
    try:
        return load(library, name, **arguments)
    except UserError:
        raise
    except Exception as error:  # foreign code fails in any way
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ConfigurationError(
            f"{place}:{name} cannot be loaded ({type(error).__name__}: {reason}); check the name "
            "and --model_args, and that its weights can be fetched or are in the package's cache"
        ) from error


def _robustbench(library: Any, name: str, **arguments: Any) -> nn.Module:
    *place, model = name.split("/")
    chosen = dict(zip(("dataset", "threat_model"), place, strict=False))
    net: nn.Module = library.load_model(model_name=model, **{**chosen, **arguments})
    return net


def _timm(library: Any, name: str, pretrained: bool = True, **arguments: Any) -> nn.Module:
    net = library.create_model(name, pretrained=pretrained, **arguments)
    return Normalized(net, net.pretrained_cfg["mean"], net.pretrained_cfg["std"])


def _torchvision(
    library: Any, name: str, weights: str | None = "DEFAULT", **arguments: Any
) -> nn.Module:
    chosen = None if weights is None else library.get_model_weights(name)[weights]
    net: nn.Module = library.get_model(name, weights=chosen, **arguments)
    if chosen is None:
        return net
    preset = chosen.transforms()
    return Normalized(net, preset.mean, preset.std)


def _transformers(library: Any, name: str, **arguments: Any) -> nn.Module:
    net = library.AutoModelForImageClassification.from_pretrained(name, **arguments)
    processor = library.AutoImageProcessor.from_pretrained(name)
    if getattr(processor, "do_flip_channel_order", False):
        raise ConfigurationError(
            f"hf:{name} expects the channels in the order blue, green, red; write a factory that "
            "reverses them, and give --model package.module:factory"
        )
    # The processor multiplies bytes by a factor, and may subtract 1, before it standardises them.
    scale = 255.0
    if getattr(processor, "do_rescale", True):
        scale *= getattr(processor, "rescale_factor", 1 / 255)
    shift = float(bool(getattr(processor, "rescale_offset", False)))
    mean, std = [0.0] * 3, [1.0] * 3
    if getattr(processor, "do_normalize", True):
        mean, std = processor.image_mean, processor.image_std
    if getattr(processor, "include_top", False):  # of EfficientNet: divides by std twice
        std = [s * s for s in std]
    return Normalized(net, [(m + shift) / scale for m in mean], [s / scale for s in std])


ZOOS: dict[str, tuple[str, str, Callable[..., nn.Module]]] = {
    "robustbench": (
        "git+https://github.com/RobustBench/robustbench.git, in an environment of its own (it "
        "needs old versions)",
        "robustbench.utils",
        _robustbench,
    ),
    "timm": ("timm", "timm", _timm),
    "torchvision": ("torchvision", "torchvision.models", _torchvision),
    "hf": ("transformers", "transformers", _transformers),
}
"""By prefix: what to install, the module, and how it loads a model."""
