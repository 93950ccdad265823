r"""Official checkpoints of Robust WRN as checkpoints of ours.

``python -m paper_robustwrn convert official.pth out.ckpt`` writes ``out.ckpt`` and ``out.yaml``;

    python -m paper_robustwrn test --config paper-robustwrn --config out.yaml --ckpt_path out.ckpt

attacks it as the paper did.

The file tells depths, channels, classes and image channels. It does not tell the stride of the stem
(taken to be 1), strides where the width changes as well (taken to be 1 in the first stage and 2 in
the others, as in every published network) nor activations (taken to be ReLU). The first two can be
given. Networks that differ in them have the same shapes, so give images and the logits of the
official network for them, ``--check logits.pt``, to see that it is the same network. Tags as in
:mod:`paper_robustwrn.method`.
"""

import argparse
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

import common
from common.checkpoints import read_content
from common.errors import CheckpointError, ConfigurationError, RunDirectoryError
from common.files import write_sealed, write_text_atomically
from common.results.identity import SETTINGS
from common.weights import check_weights_fit
from paper_robustwrn.method import RobustWideResNet

WRAPPERS = ("model_state_dict", "state_dict")
PROFILER = ("total_ops", "total_params")  # buffers the official FLOP counter leaves behind [C]
DATA = {10: "cifar10", 100: "cifar100", 200: "tiny_imagenet"}  # by the number of classes
BLOCK = re.compile(r"blocks\.(\d+)\.layer\.(\d+)\..+")
NAMES = (
    (r"^stages\.(\d+)\.(\d+)\.", r"blocks.\1.layer.\2."),
    (r"^stem\.conv\.", "stem_conv.0."),
    (r"^stem\.bn\.", "stem_conv.1."),
    (r"^stem\.", "stem_conv."),
    (r"^head\.norm\.", "bn1."),
    (r"^head\.linear\.", "fc."),
    (r"\.shortcut\.", ".convShortcut."),
)
"""From names in our state dict to the official ones."""

Arguments = dict[str, Any]
"""Of :class:`RobustWideResNet`, as plain values."""


def read_official(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The official state dict in a file, and what else it holds; nothing in it is executed."""
    found, rest = read_content(path), {}
    for wrapper in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            rest = {key: value for key, value in found.items() if key != wrapper}
            found = found[wrapper]
            break
    if not isinstance(found, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    ):
        raise CheckpointError(
            f"{path} holds no state dict (names to tensors), neither bare nor under "
            f"{' or '.join(WRAPPERS)}; give a checkpoint of HanxunH/RobustWRN"
        )
    bare = {key.removeprefix("module."): value for key, value in found.items()}
    return {k: v for k, v in bare.items() if not k.endswith(PROFILER)}, rest


def recover(
    weights: Mapping[str, Tensor],
    origin: str,
    strides: Sequence[int] | None = None,
    stem_stride: int = 1,
) -> Arguments:
    """The arguments of the network behind an official state dict."""
    blocks = {(int(m[1]), int(m[2])) for key in weights if (m := BLOCK.fullmatch(key))}
    stages = sorted({stage for stage, _ in blocks})
    imagenet_stem = "stem_conv.0.weight" in weights
    names = ["stem_conv.0.weight" if imagenet_stem else "stem_conv.weight"]
    names += [f"blocks.{stage}.layer.0.conv2.weight" for stage in stages]
    names += ["fc.weight"]
    shapes = [tuple(weights[name].shape) for name in names if name in weights]
    missing = [name for name in names if name not in weights]
    problem = ""
    if missing:
        problem = f"it lacks {missing[0]}"
    elif not stages or stages != list(range(len(stages))):
        problem = f"it has blocks of stages {stages}"
    elif [len(shape) for shape in shapes] != [4] * (len(names) - 1) + [2]:
        problem = f"{names[0]} and its like have shapes {', '.join(map(str, shapes))}"
    if problem:
        first = ", ".join(list(weights)[:3]) or "nothing"
        raise CheckpointError(
            f"{origin} is no checkpoint of the official RobustWideResNet: {problem} (its first "
            f"entries: {first}); give a file of HanxunH/RobustWRN"
        )
    if strides is not None and len(strides) != len(stages):
        raise ConfigurationError(
            f"strides are one for each of the {len(stages)} stages, got {list(strides)}"
        )
    channels = [shape[0] for shape in shapes[:-1]]
    found = []
    for stage, (a, b) in enumerate(itertools.pairwise(channels)):
        shortcut = f"blocks.{stage}.layer.0.convShortcut.weight" in weights
        found.append(2 if (shortcut if a == b else stage) else 1)
    return {
        "depths": [sum(stage == s for s, _ in blocks) for stage in stages],
        "channels": channels,
        "strides": list(strides or found),
        "num_classes": shapes[-1][0],
        "in_channels": shapes[0][1],
        "imagenet_stem": imagenet_stem,
        "stem_stride": stem_stride,
    }


def rename(weights: Mapping[str, Tensor], arguments: Arguments, origin: str) -> dict[str, Tensor]:
    """Our state dict from the official one, entry by entry."""
    with torch.device("meta"):
        own = RobustWideResNet(**arguments).state_dict()
    official = {}
    for name in own:
        theirs = name
        for ours, replacement in NAMES:
            theirs = re.sub(ours, replacement, theirs)
        official[theirs] = name
    read_as = ", ".join(f"{name} {arguments[name]}" for name in ("depths", "channels", "strides"))
    check_weights_fit(
        {theirs: own[name] for theirs, name in official.items()},
        weights,
        f"{origin}, read as {read_as},",
        "Give the file as its authors published it, or its strides with --strides",
    )
    return {name: weights[theirs].detach().clone() for theirs, name in official.items()}


def check_logits(state: Mapping[str, Tensor], arguments: Arguments, stated: str | Path) -> None:
    """Refuse a network that gives other logits than those stated, up to rounding.

    Raises:
        CheckpointError: If the logits differ, or the file ``stated`` does not hold images ``x`` in
            [0, 1], ``(N, C, H, W)``, and ``logits`` ``(N, K)``.
    """
    try:
        found = torch.load(stated, map_location="cpu", weights_only=True)
        x, wanted = found["x"].float(), found["logits"].float()
        net = RobustWideResNet(**arguments)
        net.load_state_dict(dict(state))
        with torch.no_grad():
            got = net.eval()(x)
        off = float((got - wanted).abs().max() / wanted.abs().max()) if len(x) else torch.nan
    except Exception as error:  # of a file of anybody's
        raise CheckpointError(
            f"{stated} cannot be checked ({(str(error).splitlines() or [type(error).__name__])[0]})"
            "; it needs x, images (N, C, H, W) in [0, 1], and logits (N, K), as torch.save writes "
            "{'x': ..., 'logits': ...}"
        ) from error
    if not off < 1e-3:
        raise CheckpointError(
            f"the converted network gives other logits than {stated} (largest difference {off:.2g} "
            f"of the largest logit) with strides {arguments['strides']} and stem stride "
            f"{arguments['stem_stride']}; give those of the official network with --strides and "
            "--stem_stride"
        )


def convert(
    source: str | Path,
    target: str | Path,
    strides: Sequence[int] | None = None,
    stem_stride: int = 1,
    stated: str | Path | None = None,
) -> Arguments:
    """Write ``target`` and, beside it, the YAML file with its model and data sections.

    Args:
        source: An official checkpoint, or its bare or wrapped state dict.
        target: Where the Lightning checkpoint goes; its name ends in ``.ckpt``.
        strides: Of the stages, where they are not the usual ones.
        stem_stride: Of the 3x3 stem.
        stated: See :func:`check_logits`; ``None`` checks nothing.

    Raises:
        UserError: If ``source`` is not what it should be, the logits are others, ``target`` cannot
            be written, or a stride does not fit the network.
    """
    source, target = Path(source), Path(target)
    config = target.with_suffix(".yaml")
    if target.suffix != ".ckpt":
        raise ConfigurationError(f"the converted checkpoint is a .ckpt file, got {target}")
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigurationError(f"{target} is the official file itself; choose another name")
    if config.exists() and not config.read_bytes().startswith(b"# Converted from "):
        raise ConfigurationError(f"{config} is there and was not written by convert; move it away")
    weights, rest = read_official(source)
    arguments = recover(weights, str(source), strides, stem_stride)
    state = rename(weights, arguments, str(source))
    if stated is not None:
        check_logits(state, arguments, stated)
    environment = rest.get("ENV")
    steps = environment.get("global_step") if isinstance(environment, Mapping) else 0
    net = {"class_path": "paper_robustwrn.method.RobustWideResNet", "init_args": arguments}
    model = {"class_path": "common.classifier.RobustClassifier", "init_args": {"net": net}}
    content = io.BytesIO()
    checkpoint = {
        "epoch": _count(rest.get("epoch")),
        "global_step": _count(steps),
        "pytorch-lightning_version": version("lightning"),
        "state_dict": {f"net.{name}": value for name, value in state.items()},
        "callbacks": {},
        SETTINGS: {"package": "paper_robustwrn", "model": model},
    }
    torch.save(checkpoint, content)
    try:
        write_text_atomically(config, describe(net, source.name))
        write_sealed(target, content)
    except RunDirectoryError as error:
        raise ConfigurationError(str(error)) from error
    return arguments


def _count(value: Any) -> int:
    """A number of epochs or steps, 0 where the file has none."""
    return int(value) if isinstance(value, int | np.integer) and value >= 0 else 0


def describe(net: Mapping[str, Any], origin: str) -> str:
    """The YAML file: the model, and the data set where the number of classes tells it."""
    parts = {"net": net, "objective": {"class_path": "common.objectives.AT"}}
    model = {"class_path": "common.classifier.RobustClassifier", "init_args": parts}
    sections: dict[str, Any] = {"model": model}
    note = "# The objective plays no part in evaluation.\n"
    name = DATA.get(net["init_args"]["num_classes"])
    if name and net["init_args"]["in_channels"] == 3:
        sections["data"] = str(Path(common.__file__).resolve().parent / "configs" / f"{name}.yaml")
    else:
        note += "# Which data these classes belong to is not known: give one more --config.\n"
    text = yaml.safe_dump(sections, sort_keys=False, default_flow_style=None)
    return f"# Converted from {origin!a}, trained by other code.\n{note}{text}"


def main(args: list[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        "python -m paper_robustwrn convert",
        description="Turn an official checkpoint into one of ours, with a configuration beside it.",
    )
    add = parser.add_argument
    add("source", help="official .pth file")
    add("target", help="checkpoint to write; out.yaml is written beside out.ckpt")
    add("--strides", type=int, nargs="+", help="stride of each stage, if not 1 2 2 ...")
    add("--stem_stride", type=int, default=1, help="stride of the 3x3 stem")
    add("--check", metavar="FILE", help="x and the official network's logits, by torch.save")
    given = parser.parse_args(args)
    found = convert(given.source, given.target, given.strides, given.stem_stride, given.check)
    if given.check is None:
        print("Its logits were not checked: strides are those given, or the usual ones.")
    described = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.items())
    print(
        f"{given.target}: {described}\nEvaluate it with\n"
        "  python -m paper_robustwrn test --config paper-robustwrn "
        f"--config {Path(given.target).with_suffix('.yaml')} --ckpt_path {given.target}"
    )
