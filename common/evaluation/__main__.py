"""Command line: attack any model.

``python -m common.evaluation --model package.module:factory --weights file --data cifar10``;
``python -m common.evaluation export RUN FOLDER`` writes a network of ours for others.
"""

import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from common.errors import ConfigurationError, UserError, output_may_close
from common.evaluation.names import check_data_name, check_model_name
from common.files import check_torch_file
from common.limits import read_yaml
from common.packages import data_sections, file_named, ready_suites, say_shadowed
from common.settings import nearest

OPTIONS = {
    "config": "a YAML file with these options",
    "model": "PACKAGE.MODULE:FACTORY, which makes the network: images in [0, 1] to logits, "
    "normalisation inside; or robustbench:NAME, timm:NAME, torchvision:NAME, hf:NAME, the folder "
    "of a run, or PACKAGE:EXPERIMENT[-seedK], a published result",
    "model_args": "for the factory or the collection, as JSON",
    "weights": "state dict or checkpoint to load",
    "weights_key": "which weights, if the file holds several sets, such as ema_state_dict",
    "data": "test split of a data section, or of a YAML file of one; torchvision:CLASS of "
    "torchvision.datasets; or a folder with a folder of images for each class; by default those of "
    "the run, else cifar10",
    "data_root": "folder of its files",
    "data_resize": "shorter side of the images of torchvision or a folder after resizing",
    "data_crop": "side of the square that is then cut out of the centre",
    "suite": "a ready suite, by default quick, or a YAML file with evaluation: {suite: ...}",
    "eps": "radius in pixels of [0, 1]; by default that of the suite, else 8/255",
    "norm": "linf, l2 or l1; by default that of the suite, else linf",
    "audit": "check for gradient masking too",
    "examples": "how many, of all classes in proportion; by default all",
    "batch_size": "examples that are attacked together; by default 250",
    "seed": "of the attacks; by default 0",
    "engine": "attack a network with batch-norm folded, in fp32 or bf16; the plain one judges",
    "device": "by default cuda if available, else cpu",
    "claim": "a model_info JSON file of RobustBench, whose accuracies are compared with ours",
    "name": "under which results are filed; by default that of the model",
    "output": "folder of results.json, figures, and what a killed evaluation resumes from",
    "save_examples": "write the adversarial images of all examples to adversarial in the output",
}
FLAGS = ("audit", "save_examples", "print_config")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a model and print the table; returns the exit status."""
    words = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    say_shadowed("common")
    if {"--help", "-h"} & set(words):
        print(_help())
        return 0
    try:
        if words[:1] == ["export"]:
            return int(importlib.import_module("common.evaluation.command").run_export(words[1:]))
        _check(words)
        return int(importlib.import_module("common.evaluation.command").run(words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _help() -> str:
    return "\n".join(
        [
            "usage: python -m common.evaluation --model PACKAGE.MODULE:FACTORY [options]",
            "       python -m common.evaluation export RUN FOLDER [--checkpoint last]\n",
            "Attack a model and report the accuracy in the worst case over a suite.\n",
            *(f"  --{name:<12} {text}" for name, text in OPTIONS.items()),
            f"\nData: {', '.join(data_sections())}",
            f"Suites: {', '.join(ready_suites())}",
        ]
    )


def _underscored(word: str) -> str:
    """The word, with underscores for dashes in the name of an option."""
    name, joint, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{joint}{value}" if name.startswith("--") else word


def _check(words: Sequence[str]) -> None:
    """Find what is wrong before torch is imported, which takes seconds."""
    given = dict(_options(words))
    if "config" in given:  # pipes, devices and bombs are refused here
        stated = read_yaml(given["config"])
        if not isinstance(stated, dict):
            raise ConfigurationError(f"{given['config']} holds no options by name")
        for name in stated:
            _check_name(str(name))
        given = {**stated, **given}
    if "model" not in given:
        raise ConfigurationError(
            "no model is given; give --model PACKAGE.MODULE:FACTORY (--help shows all options)"
        )
    check_model_name(str(given["model"]))
    if isinstance(given.get("data"), str):
        check_data_name(given["data"])
    if isinstance(given.get("suite"), str):
        file_named(given["suite"], ready_suites(), "suite")
    if "save_examples" in given and "output" not in given:
        raise ConfigurationError("--save_examples needs a folder; give --output FOLDER")
    if isinstance(given.get("weights"), str):
        check_torch_file(Path(given["weights"]))


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    following = iter(words)
    for word in following:
        option, joint, value = word.partition("=")
        name = option.removeprefix("--")
        if name == option:
            raise ConfigurationError(f"{word[:80]!r} belongs to no option; see --help")
        _check_name(name)
        if not joint and name not in FLAGS:
            value = next(following, "--")
            if value.startswith("--"):
                raise ConfigurationError(f"--{name} has no value; give --{name} VALUE")
        yield name, value


def _check_name(name: str) -> None:
    if name in OPTIONS or name in FLAGS or name.startswith("model_args."):
        return
    if name.startswith("data."):
        raise ConfigurationError(
            f"unknown option {name}; data are chosen as a whole: write a YAML file with the source "
            "and its init_args, and give --data FILE"
        )
    raise ConfigurationError(f"unknown option {name}{nearest(name, OPTIONS)}")


def run() -> NoReturn:
    """The whole program."""
    with output_may_close():
        sys.exit(main())


if __name__ == "__main__":
    run()
