"""Attacks a model that is named on the command line."""

import inspect
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jsonargparse import ArgumentError

from common.attacks.engine.network import AttackEngine
from common.checkpoints import load_weights
from common.errors import ConfigurationError, UserError, check_choice
from common.evaluation.export import export
from common.evaluation.models import build_sections
from common.evaluation.named_models import Normalized, find_model
from common.evaluation.pipeline import evaluate
from common.evaluation.report import Evaluation
from common.evaluation.runner import Team
from common.limits import read_yaml
from common.packages import data_sections, file_named
from common.parsing import ArgumentParser, load_named
from common.settings import explain

if TYPE_CHECKING:
    from common.data.images import ImageDataModule

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
                print(f"written to {given['output']}: results.json, figures")
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
    network, images = find_model(model, model_args)
    if weights:
        bare = network.net if isinstance(network, Normalized) else network
        load_weights(bare, weights, weights_key)
    if images is None or data is not None:
        images = load_data(data or "cifar10", data_root)
    elif data_root is not None:
        raise ConfigurationError(
            f"--data_root is {data_root}, and {model} brings its own data; give --data too"
        )
    else:
        _prepare(images)
    test = images._dataset("test", None, None)
    batch = test.__getitems__(list(range(len(test))))
    precision: Any = {"fp32": "32", "bf16": "bf16"}.get(engine or "")
    return evaluate(
        network,
        (batch["x"].float() / 255.0, batch["y"]),
        suite,
        num_classes=images.num_classes,
        class_names=images.class_names,
        name=name or re.sub(r"[^\w.+-]+", "-", model.partition(":")[2] or model).strip("-."),
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        engine=AttackEngine(precision=precision) if precision else None,
        **settings,
    )


def load_data(name: str, root: str | None = None) -> "ImageDataModule":
    """The data module of a section ``common/configs/NAME.yaml`` or of a file.

    Raises:
        ConfigurationError: If there is none.
        DataUnavailableError: If the files are not there and cannot be fetched.
    """
    path = file_named(name, data_sections(), "data section")
    section = read_yaml(path)
    if root is not None:
        _set_root(section, root, path)
    data: ImageDataModule = build_sections({"data": section}, path).data
    _prepare(data)
    return data


def _prepare(data: "ImageDataModule") -> None:
    """Fetch the files of the test split and load it."""
    team, problem = Team.of_processes(), None
    if team.rank == 0:  # fetches the files; all processes raise its error
        try:
            data.prepare_data()
        except UserError as error:
            problem = error
    for found in filter(None, team.gather(problem)):
        raise found
    data.setup("test")


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
