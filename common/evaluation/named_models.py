"""Models by name: of public collections, of our runs and published results, of any factory."""

import pkgutil
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from common.errors import ConfigurationError, UserError
from common.evaluation.models import load_run
from common.evaluation.names import COLLECTIONS, library_of, no_model, run_of
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
    if rest and place in COLLECTIONS:
        return _from_collection(name, arguments or {}).eval(), None
    run = run_of(name)
    if run is None:
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
        raise no_model(path, error) from error
    finally:
        sys.path.remove("")
    try:
        model = factory(**(arguments or {}))
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{path} cannot be made with --model_args {arguments}: {error}; name what builds the "
            "network, and give all its arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"{path} made a {type(model).__name__}, expected an nn.Module; "
            "name what builds the network"
        )
    return model


def _from_collection(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    place, _, model = name.partition(":")
    library = library_of(name)
    try:
        return LOADERS[place](library, model, **arguments)
    except UserError:
        raise
    except Exception as error:  # foreign code fails in any way
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ConfigurationError(
            f"{name} cannot be loaded ({type(error).__name__}: {reason}); check the name "
            "and --model_args, and that its weights can be fetched or are in the package's cache"
        ) from error


def _robustbench(library: Any, name: str, **arguments: Any) -> nn.Module:
    *place, model = name.split("/")
    if len(place) > 2:
        raise ConfigurationError(
            f"robustbench:{name} has {len(place) + 1} parts; expected NAME or DATASET/THREAT/NAME"
        )
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


LOADERS: dict[str, Callable[..., nn.Module]] = {
    "robustbench": _robustbench,
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _transformers,
}
"""Of the collections: the library and a name to a model."""
