"""Any model in the form that attacks need, and the models of finished runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from common.attacks.losses import cross_entropy, dlr, hinge_margin
from common.checkpoints import load_checkpoint
from common.errors import CheckpointError, ConfigurationError, RunDirectoryError
from common.files import yaml_damage_of
from common.limits import read_yaml
from common.networks.parts import declared_losses
from common.objectives import InnerLoss, OnLogits
from common.parsing import ArgumentParser, check_named
from common.results.identity import check_evaluated, check_package, decisive, settings_in
from common.settings import class_paths, explained

if TYPE_CHECKING:  # Lightning is imported where a run is loaded, not before
    from common.classifier import RobustClassifier
    from common.data.images import ImageDataModule


class Victim(nn.Module):
    """A network with the losses that an attacker with its logits can climb.

    Anything with a method ``adaptive_losses`` (name to (model, batch) -> (x' -> loss)) declares
    what an attacker who knows it would climb; the model passed to them is the network.

    Args:
        net: Images in [0, 1], ``(N, C, H, W)``, to logits ``(N, K)``.
        num_classes: K; the loss ``dlr_f`` exists from three classes on.
    """

    def __init__(self, net: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.net = net
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, K)``."""
        logits: Tensor = self.net(x)
        return logits

    def adaptive_losses(self) -> dict[str, InnerLoss]:
        """Cross-entropy, margin and difference of logits ratio, and those of parts."""
        losses: dict[str, InnerLoss] = {
            "ce_f": OnLogits(cross_entropy),
            "cw_f": OnLogits(hinge_margin),
        }
        if self.num_classes >= 3:
            losses["dlr_f"] = OnLogits(dlr)
        return declared_losses(self.net, losses)


def as_victim(model: nn.Module, num_classes: int) -> nn.Module:
    """The model itself if it declares its losses, otherwise a :class:`Victim` around it."""
    return model if hasattr(model, "adaptive_losses") else Victim(model, num_classes)


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters of a model are; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def as_module(model: Any) -> nn.Module:
    """The model itself, or a module without parameters around a function."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return cast(nn.Module, model.module)  # its passes would wait for other processes
    if isinstance(model, nn.Module):
        return model
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module) and model.__name__ in ("forward", "__call__"):
        return owner
    if isinstance(model, type) or not callable(model):
        what = f"the class {model.__name__}" if isinstance(model, type) else repr(model)[:80]
        raise ConfigurationError(
            f"the model must be an nn.Module or a function from images (N, C, H, W) to logits "
            f"(N, K), got {what}; make the network first"
        )
    module = nn.Module()
    module.forward = model
    return module


@contextmanager
def adapted(model: nn.Module, *, has_gradient: bool = True) -> Iterator[None]:
    """Within the block, the model gets copies of its images and its scores become float32.

    Without a gradient, images are detached and scores copied, so that models which use numpy or
    inference mode can be called.
    """

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0] if has_gradient else args[0].detach()
        return (x.clone(), *args[1:])

    def after(_: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        if logits.ndim != 2 or len(logits) != len(args[0]):
            raise ConfigurationError(
                f"the model returned scores of shape {tuple(logits.shape)} for {len(args[0])} "
                "images; every call has to answer about its own images"
            )
        # The audit measures derivatives in float64.
        if args[0].dtype == logits.dtype == torch.float64:
            return logits if has_gradient else logits.clone()
        return logits.to(torch.float32, copy=not has_gradient)

    with (
        model.register_forward_pre_hook(before, prepend=True),
        model.register_forward_hook(after, prepend=True),
    ):
        yield


def load_run(
    run: str | Path, checkpoint: str = "last"
) -> tuple["RobustClassifier", "ImageDataModule"]:
    """The classifier of a finished run in evaluation mode, and its data module.

    Args:
        run: A directory with ``config.yaml`` and ``checkpoints``.
        checkpoint: ``last`` or ``selected``.

    Raises:
        RunDirectoryError: If there is no run, or its configuration is damaged.
        CheckpointError: If the checkpoint is missing, damaged or of other settings.
        ConfigurationError: If the configuration names something forbidden.
    """
    file = Path(run) / "config.yaml"
    if not file.is_file():
        raise RunDirectoryError(f"{run} holds no run (no config.yaml); train it first")
    if damage := yaml_damage_of(file):
        raise RunDirectoryError(f"{file} is damaged: {damage}; make the run again")
    path = Path(run) / "checkpoints" / f"{checkpoint}.ckpt"
    found = load_checkpoint(path)
    made, config = settings_in(found, path), read_yaml(file)
    if not isinstance(config, dict):
        raise RunDirectoryError(f"{file} holds no settings; make the run again")
    if not isinstance(made.get("package"), str):
        raise CheckpointError(f"the settings in the checkpoint {path} name no package")
    check_named(config)
    check_package(made["package"], class_paths(config), [str(file)])
    given = {"package": made["package"], "experiment": config.get("experiment")}
    check_evaluated(made, given | decisive(config), path)
    # Initial weights are drawn and then replaced; the random state stays.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        built = build_sections({name: config[name] for name in ("model", "data")}, file)
    built.model.load_state_dict(found["state_dict"])
    return built.model.eval(), built.data


def build_sections(sections: Mapping[str, Any], file: Path) -> Any:
    """The classifier ``model`` and the data module ``data``, or one of them, of a file."""
    from common.classifier import RobustClassifier
    from common.data.images import ImageDataModule

    parser = ArgumentParser(exit_on_error=False)
    if "data" in sections:
        parser.add_class_arguments(ImageDataModule, "data")
    if "model" in sections:
        parser.add_subclass_arguments(RobustClassifier, "model", required=True)
    with explained(file):
        check_named(sections)
        if not all(isinstance(section, dict) for section in sections.values()):
            raise ValueError("it holds no settings by name")
        return parser.instantiate(parser.parse_object(dict(sections)))
