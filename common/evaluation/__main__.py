"""Command line: attack any model.

``python -m common.evaluation --model package.module:factory --weights file --data cifar10``
"""

import inspect
import itertools
import os
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentError
from torch import nn

from common.attacks.engine.network import AttackEngine
from common.checkpoints import load_weights
from common.data.images import ImageDataModule
from common.errors import ConfigurationError, UserError
from common.evaluation.evaluate import evaluate
from common.evaluation.models import build_sections
from common.evaluation.named import NamedData, Pixels, is_named, named
from common.evaluation.presets import CONFIGS, ready_suites
from common.evaluation.report import Evaluation
from common.evaluation.runner import Team
from common.limits import read_yaml
from common.parsing import ArgumentParser, load_named
from common.settings import explain

SHARED = {"eps", "norm", "examples", "batch_size", "seed", "output"}
"""Arguments of :func:`common.evaluation.evaluate.evaluate` that are options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a model and print the table; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        for word, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
            if word.partition("=")[0] == "--config":  # pipes, devices and bombs are refused here
                read_yaml(word.partition("=")[2] or following)
        given = vars(_parser().parse_args(argv))
        given.pop("config")
        evaluation = attack(**given)
    except (UserError, ArgumentError) as error:
        text = str(error) if isinstance(error, UserError) else explain(str(error))
        print(f"error: {text}", file=sys.stderr)
        return 2
    if Team.of_processes().rank == 0:
        print(evaluation)
        if given["output"]:
            print(f"written to {given['output']}: results.json, figures")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m common.evaluation",
        description="Attack a model and report the accuracy in the worst case over a suite. "
        f"Ready suites: {', '.join(ready_suites())}.",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file with these options")
    parser.add_argument("--audit", action="store_true", help="check for gradient masking too")
    parser.add_argument(
        *("--save-examples", "--save_examples"),
        action="store_true",
        help="write the adversarial images of all examples to the folder adversarial of the output",
    )
    parser.add_function_arguments(attack, as_group=False)
    names = inspect.signature(evaluate).parameters
    others: Any = {name for name in names if name not in SHARED}
    parser.add_function_arguments(evaluate, skip=others, as_group=False)
    return parser


def attack(
    model: str,
    model_args: dict[str, Any] | None = None,
    weights: str | None = None,
    weights_key: str | None = None,
    data: str = "cifar10",
    data_root: str | None = None,
    data_resize: int | None = None,
    data_crop: int | None = None,
    suite: str = "quick",
    engine: Literal["fp32", "bf16"] | None = None,
    device: str | None = None,
    name: str | None = None,
    **settings: Any,
) -> Evaluation:
    """Build a model and its data by name and evaluate it.

    Args:
        model: PACKAGE.MODULE:FACTORY, which makes the network: images in [0, 1] to logits,
            normalisation inside.
        model_args: For the factory, as JSON.
        weights: State dict or checkpoint to load.
        weights_key: Which weights, if the file holds several sets, such as ema_state_dict.
        data: Test split of a data section of common/configs (cifar10, svhn, digits, ...), or a
            YAML file of one; torchvision:CLASS of torchvision.datasets; or a folder with a folder
            of images for each class.
        data_root: Folder of its files.
        data_resize: Resize the shorter side to this, for torchvision's data and folders.
        data_crop: Then cut this square out of the centre.
        suite: A ready suite, or a YAML file with evaluation: {suite: ...}.
        engine: Attack a network with batch-norm folded, in float32 or bfloat16; the plain float32
            network judges.
        device: By default cuda if available, else cpu.
        name: Under which results are filed; by default that of the factory.
        settings: Of :func:`common.evaluation.evaluate.evaluate`.
    """
    torch.manual_seed(settings["seed"])  # of weights that no file gives
    network = build_model(model, model_args)
    if weights:
        load_weights(network, weights, weights_key)
    if is_named(data):
        images = named(data, data_root, data_resize, data_crop)
    else:
        if data_resize is not None or data_crop is not None:
            raise ConfigurationError(
                f"data_resize and data_crop are for torchvision's data and folders, not {data!r}; "
                "drop them"
            )
        section = load_data(data, data_root)
        images = NamedData(Pixels(section), section.num_classes, section.class_names)
    precision: Any = {"fp32": "32", "bf16": "bf16"}.get(engine or "")
    return evaluate(
        network.eval(),
        images.examples,
        suite,
        num_classes=images.num_classes,
        class_names=images.class_names,
        name=name or model.partition(":")[2],
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        engine=AttackEngine(precision=precision) if precision else None,
        **settings,
    )


def build_model(path: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Call a factory named ``package.module:factory``, which has to make a module."""
    sys.path.insert(0, "")
    try:
        if not path.partition(":")[2]:
            raise ValueError("no factory is named behind a colon")
        factory = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"--model is {path!r}, expected package.module:factory ({error})"
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


def load_data(name: str, root: str | None = None) -> ImageDataModule:
    """The data module of a section ``common/configs/NAME.yaml`` or of a file.

    Raises:
        ConfigurationError: If there is none.
        DataUnavailableError: If the files are not there and cannot be fetched.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    known = [p.stem for p in sorted(CONFIGS.glob("*.yaml")) if "source:" in p.read_text()]
    if not path.exists() or (path.parent == CONFIGS and path.stem not in known):
        raise ConfigurationError(
            f"there are no data {name!r}; there are {', '.join(known)}, and any YAML file with a "
            "source"
        )
    section = read_yaml(path)
    if root is not None:
        _set_root(section, root, path)
    data: ImageDataModule = build_sections({"data": section}, path).data
    team, problem = Team.of_processes(), None
    if team.rank == 0:  # fetches the files; all processes raise its error
        try:
            data.prepare_data()
        except UserError as error:
            problem = error
    for found in filter(None, team.gather(problem)):
        raise found
    data.setup("test")
    return data


def _set_root(section: Any, root: str, path: Path) -> None:
    """Put the folder of the files into a data section."""
    source = section.get("source") if isinstance(section, dict) else None
    source = {"class_path": source} if isinstance(source, str) else source
    if not isinstance(source, dict) or not _has_root(source["class_path"]):
        raise ConfigurationError(
            f"--data_root is {root}, and the data {str(path)!r} have no files; drop --data_root"
        )
    section["source"] = source | {"init_args": {**(source.get("init_args") or {}), "root": root}}


def _has_root(class_path: str) -> bool:
    return "root" in inspect.signature(load_named(class_path)).parameters


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started; each takes the GPU of its local rank, if any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("gloo")  # only outcomes travel, on the CPU
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with joined():
        status = main()
    sys.exit(status)
