"""``python -m paper_x fit|validate|test|predict|reproduce --config experiment``.

Torch and Lightning take seconds to import, so help is printed and most errors are found before.
"""

import importlib
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from common.cli.declared import documented
from common.cli.draft import check, drafted
from common.cli.preconditions import check_checkpoint, check_devices, check_limits, check_seed
from common.errors import ConfigurationError, UserError, output_may_close
from common.packages import (
    CONFIGS,
    data_sections,
    file_named,
    package_folder,
    papers,
    say_shadowed,
    yaml_files,
)

SUBCOMMANDS = {
    "fit": "train; with --ckpt_path last resume an interrupted run",
    "validate": "measure clean and robust accuracy on the validation split",
    "test": "run the attack suite on the test split and file the results",
    "predict": "write the class probabilities of the test split to predictions.csv; with --attack "
    "NAME, an entry of evaluation.suite, those under this attack too",
    "reproduce": "train, or resume a killed run; then test its two checkpoints",
}
FIRST = {
    "--config NAME": "an experiment, an overlay or a YAML file; a later one overrides an earlier",
    "--seed_everything 0": "of weights, order, augmentation and attacks",
    "--ckpt_path last": "a checkpoint: last, selected or a file",
    "--runs FOLDER": "where runs are kept; by default runs",
    "--trainer.max_epochs 100": "length of training",
    "--trainer.devices 2": "how many devices; all with --config ddp",
    "--data cifar10": "other data, by the name of a section or as a YAML file",
    "--data.batch_size 128": "of training, over all devices together",
    "--model.optimizer.lr 0.1": "learning rate",
    "--adversary.attack.eps 8/255": "radius of the attack in training; pixels are in [0, 1]",
}
"""The options that people use first; reproduce takes no checkpoint."""
FLAGS = ("--print_config",)
HELP = ("--help", "-h")
_BEGIN = ("--config", "--model", "--print_config")


def main(
    args: Sequence[str] | None = None,
    package: str = "common",
    commands: Mapping[str, str] | None = None,
) -> None:
    """Run one subcommand; a user's error is one line and exit status 2.

    Args:
        args: Words of the command line; by default those of the process.
        package: The paper.
        commands: More subcommands by name: modules with a docstring, whose first line is the help,
            and ``main(argv)``, which may return an exit status.
    """
    words = [str(word) for word in (sys.argv[1:] if args is None else args)]
    more = commands or {}
    say_shadowed("common", package)
    if args is None and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # modules of the user, which python -m finds too
    if text := help_of(words, package, more):
        with output_may_close():
            print(text)
        return
    try:
        if words and words[0] in more:
            status = importlib.import_module(more[words[0]]).main(words[1:])
        else:
            words = checked(words, package, more)
            status = importlib.import_module("common.cli.main").run(words, package)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        line = str(error)
        if not isinstance(error, UserError):
            line = importlib.import_module("common.cli.messages").one_line(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from (None if isinstance(error, UserError) else error)
    if status:
        raise SystemExit(status)


def help_of(words: Sequence[str], package: str, more: Mapping[str, str]) -> str:
    """The text that a command asks for, unless it asks for the help on everything."""
    is_asked = any(word in HELP for word in words) and words[-1] != "all"
    if is_asked and words[0].startswith("-"):
        texts = dict(SUBCOMMANDS)
        texts |= {name: documented(module).replace("``", "") for name, module in more.items()}
        return "\n".join(
            [
                f"usage: python -m {package} SUBCOMMAND --config NAME [options]\n",
                *(f"  {name:<12} {text}" for name, text in texts.items()),
                f"\nOptions of a subcommand: python -m {package} fit --help",
            ]
        )
    if not is_asked or words[0] not in SUBCOMMANDS:
        return ""
    shown = {k: v for k, v in FIRST.items() if words[0] != "reproduce" or "ckpt" not in k}
    return "\n".join(
        [
            f"usage: python -m {package} {words[0]} --config NAME [--config OVERLAY] [options]\n",
            f"{SUBCOMMANDS[words[0]]}\n",
            *(f"  {name:<31} {text}" for name, text in shown.items()),
            f"\nExperiments: {_few(experiments(package))}",
            f"Overlays: {', '.join(_overlays())}",
            "Every setting of a file is an option too; --print_config shows them all.",
            f"All options: python -m {package} {words[0]} --help all",
        ]
    )


def experiments(package: str) -> dict[str, Path]:
    """The configurations of a paper, by name."""
    try:
        return yaml_files(package_folder(package) / "configs")
    except UserError:
        return {}


def _overlays() -> dict[str, Path]:
    data = data_sections()
    return {k: path for k, path in yaml_files(CONFIGS).items() if k != "base" and k not in data}


def _few(known: Mapping[str, Path]) -> str:
    """Some experiments, first those on the embedded digits, and where the others are."""
    shown = sorted(known, key=lambda name: not name.startswith("digits"))[:3]
    where = f" and others, {len(known)} in {known[shown[0]].parent}" if shown else "none here"
    return f"{', '.join(shown)}{where}"


def checked(words: Sequence[str], package: str, more: Mapping[str, str]) -> list[str]:
    """The words for the parser, with paths for names, after what can be checked without it.

    Raises:
        ConfigurationError: If the subcommand, a file, an option or a plain value is wrong.
    """
    known = [*SUBCOMMANDS, *more]
    if not words or words[0] not in known:
        found = f"got {words[0]!r}; " if words else ""
        raise ConfigurationError(
            f"the first word is a subcommand, {found}give one of {', '.join(known)} "
            f"(python -m {package} --help)"
        )
    if any(word in HELP for word in words):
        return ["--help" if word in HELP else word for word in words if word != "all"]
    options = list(_options(words[1:], package))
    if not any(name.startswith(_BEGIN) for name, _ in options):
        raise ConfigurationError(
            f"{words[0]} needs an experiment; give --config NAME, there are "
            f"{_few(experiments(package))}"
        )
    files = [Path(value) for name, value in options if name == "--config"]
    given = [(n.lstrip("-"), v) for n, v in options if n not in ("--config", *FLAGS)]
    settings = drafted([CONFIGS / "base.yaml", *files], given)
    check(settings)
    check_seed(settings["seed_everything"])
    if words[0] in ("fit", "reproduce"):
        check_limits(settings["trainer"])
    check_checkpoint(settings, package, files)
    check_devices(settings)
    bare = {name for name, value in options if name in FLAGS and not value}
    return [words[0], *(name if name in bare else f"{name}={value}" for name, value in options)]


def _options(words: Sequence[str], package: str) -> Iterator[tuple[str, str]]:
    """Options and their values, with paths for names."""
    following = iter(words)
    for word in following:
        name, joint, value = word.partition("=")
        name = "--config" if name == "-c" else name
        if not name.startswith("--"):
            raise ConfigurationError(
                f"{word[:80]!r} belongs to no option; an experiment is given as --config NAME"
            )
        if not joint and name not in FLAGS:
            value = next(following, "--")
            if value.startswith("--"):
                raise ConfigurationError(f"{name} has no value; give {name} VALUE")
        if re.fullmatch(r"[-+]?\d{19,}", value):
            raise ConfigurationError(f"{name}: {value[:20]}... is too large a number")
        if name == "--config":
            value = str(_config(value, package))
        elif name == "--data" and not value.startswith("{"):
            value = str(file_named(value, data_sections(), "data section"))
        yield name, value


def _config(name: str, package: str) -> Path:
    """The file of an experiment, of an overlay, or by its path."""
    its = experiments(package)
    known = {**its, **_overlays(), **its}  # experiments come first and win
    is_known = name in known or Path(name).exists()
    for other in [] if is_known else papers():
        if name in experiments(other):
            raise ConfigurationError(
                f"{name} is an experiment of {other}; run python -m {other} with it"
            )
    return file_named(name, known, "experiment or overlay")
