"""Attacks a model that is named on the command line."""

import inspect
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jsonargparse import ArgumentError

from common.attacks.engine.network import AttackEngine
from common.checkpoints import load_weights
from common.errors import ConfigurationError, check_choice
from common.evaluation.export import export
from common.evaluation.named_data import find_data, of_module
from common.evaluation.named_models import Normalized, find_model
from common.evaluation.pipeline import evaluate
from common.evaluation.report import Evaluation
from common.evaluation.runner import Team
from common.parsing import ArgumentParser
from common.settings import explain

EngineName = Literal["fp32", "bf16"]
SHARED = {"eps", "norm", "examples", "batch_size", "seed", "output", "claim"}
"""Arguments of :func:`common.evaluation.pipeline.evaluate` that are options."""


def run(words: Sequence[str]) -> int:
    """Evaluate a model and print the table; returns the exit status.

    The words are those that :mod:`common.evaluation.__main__` has checked.
    """
    with joined():
        try:
            given = vars(_parser().parse_args(list(words)))
            given.pop("config")
            evaluation = attack(**given)
        except ArgumentError as error:
            raise ConfigurationError(explain(str(error))) from error
        if Team.of_processes().rank == 0:
            print(evaluation)
            if given["output"]:
                images = ", adversarial" if given["save_examples"] else ""
                print(f"written to {given['output']}: results.json, figures{images}")
    return 0


def run_export(words: Sequence[str]) -> int:
    """Write a network of ours for others; returns the exit status."""
    parser = ArgumentParser(prog="python -m common.evaluation export", exit_on_error=False)
    parser.add_function_arguments(export, as_group=False, as_positional=True)
    try:
        given = vars(parser.parse_args(list(words)))
    except ArgumentError as error:
        raise ConfigurationError(explain(str(error))) from error
    export(**given)
    print(f"written to {given['folder']}")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m common.evaluation",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config")
    parser.add_argument("--audit", action="store_true")
    parser.add_argument("--save_examples", action="store_true")
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
    data: str | None = None,
    data_root: str | None = None,
    data_resize: int | None = None,
    data_crop: int | None = None,
    suite: str = "quick",
    engine: EngineName | None = None,
    device: str | None = None,
    name: str | None = None,
    **settings: Any,
) -> Evaluation:
    """Build a model and its data by name and evaluate it; options are in ``__main__``."""
    if engine is not None:
        check_choice("engine", engine, EngineName)
    torch.manual_seed(settings["seed"])  # of weights that no file gives
    network, its_data = find_model(model, model_args)
    if weights:
        bare = network.net if isinstance(network, Normalized) else network
        load_weights(bare, weights, weights_key)
    if its_data is None or data is not None:
        images = find_data(data or "cifar10", data_root, data_resize, data_crop)
    else:
        _check_alone(model, data_root=data_root, data_resize=data_resize, data_crop=data_crop)
        images = of_module(its_data)
    precision: Any = {"fp32": "32", "bf16": "bf16"}.get(engine or "")
    return evaluate(
        network,
        images.examples,
        suite,
        num_classes=images.num_classes,
        class_names=images.class_names,
        name=name or re.sub(r"[^\w.+-]+", "-", model.partition(":")[2] or model).strip("-."),
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        engine=AttackEngine(precision=precision) if precision else None,
        **settings,
    )


def _check_alone(model: str, **settings: Any) -> None:
    """Refuse settings of data that a run brings itself."""
    for name, value in settings.items():
        if value is not None:
            raise ConfigurationError(
                f"--{name} is {value}, and {model} brings its own data; give --data too"
            )


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
