"""Command line: attack anybody's model.

``python -m common.evaluation --model package.module:factory --weights file --data cifar10``
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from common.attacks.engine.network import AttackEngine
from common.attacks.geometry import Norm
from common.checkpoints import load_weights
from common.data.images import ImageDataModule
from common.errors import ConfigurationError, UserError
from common.evaluation.evaluate import evaluate
from common.evaluation.presets import CONFIGS, ready_suites
from common.evaluation.runner import Team
from common.limits import read_yaml
from common.parsing import ArgumentParser, check_named
from common.settings import explain


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a model and print the table; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        torch.manual_seed(arguments.seed)  # of weights that no file gives
        model = build_model(arguments.model, arguments.model_args)
        if arguments.weights:
            load_weights(model, arguments.weights, arguments.weights_key)
        data = load_data(arguments.data, arguments.data_root)
        test = data._dataset("test", None, None)
        batch = test.__getitems__(list(range(len(test))))
        evaluation = evaluate(
            model.eval(),
            (batch["x"].float() / 255.0, batch["y"]),
            arguments.suite,
            eps=arguments.eps,
            norm=arguments.norm,
            audit=arguments.audit,
            engine=_engine(arguments.engine),
            num_classes=data.num_classes,
            examples=arguments.examples,
            class_names=data.class_names,
            output=arguments.output,
            name=arguments.name or arguments.model.partition(":")[2],
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            device=arguments.device,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if Team.of_processes().rank == 0:
        print(evaluation)
        if arguments.output:
            print(f"written to {arguments.output}: results.json, figures")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m common.evaluation",
        description="Attack a model: accuracy of every example in the worst case over a suite.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="PACKAGE.MODULE:FACTORY",
        help="what makes the network: images in [0, 1] to logits, normalisation inside",
    )
    parser.add_argument("--model_args", metavar="JSON", default="{}", help="for the factory")
    parser.add_argument("--weights", metavar="FILE", help="state dict or checkpoint to load")
    parser.add_argument(
        "--weights_key",
        metavar="KEY",
        help="which weights, if the file holds several sets, such as ema_state_dict",
    )
    parser.add_argument(
        "--data",
        default="cifar10",
        help="test split of a data section of common/configs (cifar10, svhn, digits, ...), or a "
        "YAML file of one",
    )
    parser.add_argument("--data_root", metavar="FOLDER", help="where its files are or go")
    parser.add_argument(
        "--suite",
        default="quick",
        help=f"{', '.join(ready_suites())}, or a YAML file with evaluation: {{suite: ...}}",
    )
    parser.add_argument("--audit", action="store_true", help="check for gradient masking too")
    parser.add_argument(
        "--engine",
        choices=("fp32", "bf16"),
        help="attack a network with batch-norm folded, in float32 or bfloat16; the plain float32 "
        "network judges",
    )
    parser.add_argument(
        "--eps", help="radius of the threat model; by default the suite's own, else 8/255"
    )
    parser.add_argument(
        "--norm", choices=get_args(Norm), help="by default the suite's own, else linf"
    )
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="only so many of the test split, of all classes in proportion",
    )
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="results.json, pictures, and outcomes from which a killed evaluation goes on",
    )
    parser.add_argument("--name", help="under which results are filed")
    return parser


def _engine(precision: str | None) -> AttackEngine | None:
    if precision is None:
        return None
    return AttackEngine(precision="bf16" if precision == "bf16" else "32")


def build_model(path: str, arguments: str = "{}") -> nn.Module:
    """Call a factory named ``package.module:factory``.

    Raises:
        ConfigurationError: If there is no such factory, or it does not make a module.
    """
    module_name, _, name = path.partition(":")
    sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"--model is {path!r}, expected package.module:factory ({error})"
        ) from error
    finally:
        sys.path.remove("")
    try:
        given = json.loads(arguments)
        model = factory(**given)
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
        DataUnavailableError: If the files cannot be had.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    known = [p.stem for p in sorted(CONFIGS.glob("*.yaml")) if p.read_text().find("source:") >= 0]
    if not path.exists() or (path.parent == CONFIGS and path.stem not in known):
        raise ConfigurationError(
            f"there are no data {name!r}; there are {', '.join(known)}, and any YAML file with a "
            "source"
        )
    data = _build_data(path, root)
    data.prepare_data()
    data.setup("test")
    return data


def _build_data(path: Path, root: str | None) -> ImageDataModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageDataModule, "data")
    section = read_yaml(path)
    try:
        if not isinstance(section, dict):
            raise ValueError("it holds no settings by name")
        config: Any = parser.parse_object({"data": section})
        check_named(config)
        if root is not None:
            if "root" not in config.data.source.init_args:
                raise ConfigurationError(
                    f"--data_root is {root}, and the data {str(path)!r} have no files; drop "
                    "--data_root"
                )
            config.data.source.init_args.root = root
        data: ImageDataModule = parser.instantiate(config).data
    except UserError:
        raise
    except Exception as error:  # jsonargparse has no common type for what classes refuse
        raise ConfigurationError(f"{path}: {explain(str(error))}") from error
    return data


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
