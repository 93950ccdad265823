"""What is filled in, checked and explained in configurations."""

import inspect
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from common.cli.draft import check_channels
from common.errors import ConfigurationError
from common.parsing import ArgumentParser, load_named
from common.settings import explain, nodes, plain_digest, type_name

TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"

PROTOCOL_SECTIONS = ("suite", "threat", "audit", "measures", "engine")


def protocol_digest(config: Mapping[str, Any]) -> str:
    """Digest of the settings that decide what ``test`` measures on given weights."""
    evaluation, data = config.get("evaluation") or {}, config.get("data") or {}
    protocol = {key: evaluation.get(key) for key in PROTOCOL_SECTIONS}
    protocol["test_limit"] = data.get("test_limit")
    for name in ("limit_test_batches", "fast_dev_run"):
        protocol[name] = (config.get("trainer") or {}).get(name)
    return plain_digest(protocol)


def fill_from_data(config: Namespace) -> None:
    """Give every network of the model the class and channel counts of the data.

    A network is a class that takes both ``num_classes`` and ``in_channels``, or an ``image_shape``
    (channels, height, width), or one of torchvision. A ``mean`` or ``std`` of ``data`` becomes that
    of the data set.

    Raises:
        ConfigurationError: If a network is explicitly given other counts or another shape.
    """
    source = config.data.source
    spec = load_named(source.class_path)(**(source.get("init_args") or {})).spec
    known = {"num_classes": spec.num_classes, "in_channels": spec.shape[0]}
    shape = {"image_shape": list(spec.shape)}
    for path, node in nodes(config.model, "model"):
        arguments = node.get("init_args") if "class_path" in node else None
        names = set(vars(arguments or Namespace()))  # type: ignore[no-untyped-call]
        is_torchvisions = node.get("class_path", "").startswith("torchvision.models.")
        check_channels(path, node.get("class_path", ""), source.class_path, spec.shape[0])
        is_network = known.keys() <= names or shape.keys() <= names or is_torchvisions
        if arguments is None or not is_network:
            continue
        defaults = _defaults(node["class_path"])
        for name, value in ((k, v) for k, v in (known | shape).items() if k in names):
            given, default = (
                list(one) if isinstance(one, tuple) else one
                for one in (arguments[name], defaults.get(name))
            )
            if given not in (None, default, value):
                raise ConfigurationError(
                    f"{path}.{name} is {given} and {type_name(source.class_path)} has {value}; "
                    f"drop {path}.{name} (it is filled in from the data) or choose other data"
                )
            arguments[name] = value
        for name in ("mean", "std"):
            if arguments.get(name) == "data":
                arguments[name] = list(getattr(spec, name))


@cache
def _defaults(class_path: str) -> dict[str, Any]:
    """Default arguments of a class or function, those it passes on as keywords included."""
    parser, made = ArgumentParser(exit_on_error=False), load_named(class_path)
    add = parser.add_class_arguments if inspect.isclass(made) else parser.add_function_arguments
    add(made, "made", fail_untyped=False)
    return dict(vars(parser.get_defaults().made))


def tensorboard_in(run: Path) -> Namespace:
    """Configuration of a TensorBoard logger that writes into ``run``, not into a folder in it."""
    folder = {"save_dir": str(run), "name": "", "version": "", "default_hp_metric": False}
    logger = {"class_path": TENSORBOARD, "init_args": Namespace(folder)}  # type: ignore[no-untyped-call]
    return Namespace(logger)  # type: ignore[no-untyped-call]


def refusal(error: Exception, text: str) -> str:
    """One line for an error of a class about its arguments, with the place if no ValueError."""
    if type(error) is ValueError or error.__traceback__ is None:
        return text
    *_, (frame, number) = traceback.walk_tb(error.__traceback__)
    place = "/".join(Path(frame.f_code.co_filename).parts[-3:])
    return f"{text or 'no reason given'} ({type(error).__name__}, {place}:{number})"


class UserFriendlyParser(LightningArgumentParser):
    """Says in one line which setting is wrong, and which valid one is nearest."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the explanation and exit with status 2."""
        if not self.exit_on_error:  # jsonargparse tries alternatives and catches what they raise
            super().error(message, ex)
        parsers = [self]
        for action in self._actions:
            parsers += getattr(action, "_name_parser_map", {}).values()
        options = {
            name.lstrip("-") for p in parsers for a in p._actions for name in a.option_strings
        }
        self.exit(2, f"error: {explain(message, options)[:500]}\n")
