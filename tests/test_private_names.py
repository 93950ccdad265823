"""Private parts of libraries that the product uses or replaces: each with the reason, and checked.

A library may change these without notice. When a test here fails after an update, read what the
library does now, adapt the code that uses the name, and change the entry or the bound in
pyproject.toml.
"""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "benchmarks", *sorted(path.name for path in ROOT.glob("paper_*")))


class Private(NamedTuple):
    """A name of a class or module of a library.

    Attributes:
        reason: What it is used for, and why nothing public serves.
        takes: Names of its parameters, where it is called or overridden.
        is_overridden: Whether a class of ours overrides it: the library must then call it.
    """

    owner: str
    name: str
    reason: str
    takes: str | None = None
    is_overridden: bool = False


def overridden(owner: str, name: str, takes: str, reason: str) -> Private:
    return Private(owner, name, reason, takes, is_overridden=True)


TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
CONNECTORS = "lightning.pytorch.trainer.connectors"
SIGNALS = f"{CONNECTORS}.signal_connector._SignalConnector"
EPOCH = "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop"
CHECKPOINT = "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint"
AVERAGING = "lightning.pytorch.callbacks.weight_averaging.WeightAveraging"
CLI = "lightning.pytorch.cli.LightningCLI"
BATCH_NORM = "torch.nn.modules.batchnorm._BatchNorm"
MODULE = "torch.nn.Module"

LIGHTNING = [
    overridden(
        TRAINER,
        "_run",
        "self model ckpt_path weights_only",
        "checks a checkpoint, and gives signals and lost folders their errors, before and after "
        "everything else; no hook is called that early",
    ),
    Private(TRAINER, "_signal_connector", "replaced by ours; read to stop all ranks together"),
    Private(TRAINER, "_checkpoint_connector", "collects the state that is then saved safely"),
    Private(
        f"{CONNECTORS}.checkpoint_connector._CheckpointConnector",
        "dump_checkpoint",
        "Trainer.save_checkpoint saves at once, and cannot tell all ranks of an error",
        "self weights_only",
    ),
    Private(TRAINER, "_default_root_dir", "set to that of the first rank; the property is fixed"),
    Private(TRAINER, "_accelerator_connector", "tells whether a distributed sampler was asked for"),
    Private(
        f"{CONNECTORS}.accelerator_connector._AcceleratorConnector",
        "use_distributed_sampler",
        "the trainer's argument, which is kept nowhere else",
    ),
    Private("lightning.LightningModule", "_trainer", "asked for without the error that trainer is"),
    Private(CONNECTORS + ".signal_connector", "_SignalConnector", "base of ours", "trainer"),
    overridden(
        SIGNALS, "_sigterm_notifier_fn", "self signum _", "only notes the signal, to stop later"
    ),
    overridden(
        SIGNALS, "_slurm_sigusr_handler_fn", "self signum _", "only notes it, to save and requeue"
    ),
    Private(SIGNALS, "_register_signal", "registers Ctrl-C and the like too", "signum handlers"),
    Private(SIGNALS, "received_sigterm", "set when all ranks agree to stop"),
    Private(TRAINER, "received_sigterm", "the same, read before a checkpoint is saved"),
    Private("lightning.pytorch.loops.fetchers", "_DataFetcher", "the type of an argument"),
    Private(
        "lightning.pytorch.loops.training_epoch_loop",
        "_TrainingEpochLoop",
        "base of ours, which does what was due when a checkpoint was written within an epoch",
        "trainer min_steps max_steps",
    ),
    overridden(EPOCH, "advance", "self data_fetcher", "does not train before a due validation"),
    overridden(EPOCH, "_broadcast_sigterm_tensor", "self", "Resuming does so where all can save"),
    Private(EPOCH, "_should_accumulate", "whether the optimiser steps after this batch", "self"),
    Private(EPOCH, "_num_ready_batches_reached", "whether this batch is the last one", "self"),
    Private(EPOCH, "_should_check_val_fx", "whether validation is due", "self data_fetcher"),
    Private(EPOCH, "_batches_that_stepped", "corrected when reset() has counted a batch twice"),
    Private(EPOCH, "restarted_on_train_batch_end", "whether a checkpoint is from within an epoch"),
    Private(EPOCH, "val_loop", "told that its validation begins anew"),
    Private(
        "lightning.pytorch.loops.fit_loop._FitLoop", "epoch_loop", "replaced by ours, and asked"
    ),
    Private(
        "lightning.pytorch.loops.fit_loop._FitLoop",
        "_should_accumulate",
        "whether the optimiser steps after this batch",
        "self",
    ),
    Private(
        "lightning.pytorch.loops.fit_loop._FitLoop",
        "epoch_progress",
        "read in a checkpoint: how many epochs are finished",
    ),
    overridden(CHECKPOINT, "_save_checkpoint", "self trainer filepath", "refuses weights with NaN"),
    overridden(
        CHECKPOINT, "_should_skip_saving_checkpoint", "self trainer", "selects from an epoch on"
    ),
    overridden(CHECKPOINT, "_monitor_candidates", "self trainer", "adds val/mean_acc"),
    Private(CHECKPOINT, "_last_global_step_saved", "kept by the overridden _save_checkpoint"),
    Private(CHECKPOINT, "_last_checkpoint_saved", "kept by the overridden _save_checkpoint"),
    Private(CHECKPOINT, "best_k_models", "restored without the folder, since a run may be moved"),
    Private(CHECKPOINT, "kth_best_model_path", "restored, as best_k_models"),
    Private(CHECKPOINT, "kth_value", "restored, as best_k_models"),
    Private(
        "lightning.pytorch.strategies.ddp.DDPStrategy",
        "_layer_sync",
        "chooses the batch-norm by device; Trainer knows one for all devices",
    ),
    Private(AVERAGING, "_average_model", "moved to a device, started late, and forgotten"),
    Private(AVERAGING, "_device", "tells whether a device was asked for"),
    overridden(CLI, "_add_subcommands", "self parser kwargs", "adds help and the paper's commands"),
    overridden(CLI, "_set_seed", "self", "refuses what is no seed; Lightning would draw one"),
    overridden(CLI, "_parse_ckpt_path", "self", "files and options win over a checkpoint's"),
    Private(
        CLI, "_prepare_subcommand_parser", "a subcommand's parser", "self klass subcommand kwargs"
    ),
    Private(CLI, "_subcommand_parsers", "filled by the overridden _add_subcommands"),
    Private(CLI, "_parser", "the parser of a subcommand, to dump its settings", "self subcommand"),
    Private(CLI, "_get", "a setting of whichever subcommand runs", "self config key default"),
]
TORCH = [
    Private("torch.nn.modules.batchnorm", "_BatchNorm", "common base of batch-norm layers"),
    overridden(BATCH_NORM, "_check_input_dim", "self input", "any number of dimensions"),
    *(
        Private(MODULE, name, "a layer is replaced without hooks, checks and registration")
        for name in ("_modules", "_parameters")
    ),
    Private(MODULE, "_buffers", "compared, to find a model that changes while it is attacked"),
    *(
        Private(MODULE, name, "a layer with hooks is not folded; there is no public list of them")
        for name in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    ),
    Private(MODULE, "_call_impl", "what Module.compile compiles", "self args kwargs"),
    Private(MODULE, "_compiled_call_impl", "compiled for attacks only; compile() is for good"),
    Private("torch", "_dynamo", "limit of compilations, which is no option of torch.compile"),
    Private("torch._dynamo.config", "recompile_limit", "see _dynamo"),
    Private("torch", "_functorch", "buffers must survive a second backward pass"),
    Private("torch._functorch.config", "donated_buffer", "see _functorch"),
    Private(
        "torch.utils._pytree",
        "tree_map_only",
        "outputs of any nesting",
        "type_or_types_or_pred func tree is_leaf",
    ),
    Private("torch.utils._pytree", "tree_leaves", "outputs of any nesting", "tree is_leaf"),
    Private("torch.utils._pytree", "tree_map", "outputs of any nesting", "func tree rests is_leaf"),
    Private("torch.utils._python_dispatch", "TorchDispatchMode", "sees every allocation"),
    Private("torch._subclasses.fake_tensor", "FakeTensorMode", "memory of a step, not computed"),
    Private("torch.distributed._tools.mem_tracker", "MemTracker", "the same"),
    *(
        Private("torch", name, "hundreds of parameters in one call", takes=None)
        for name in ("_foreach_norm", "_foreach_lerp_", "_foreach_copy_")
    ),
    Private("torch", "_C", "see the next two"),
    Private("torch._C", "_set_grad_enabled", "no_grad is ignored while an audit differentiates"),
    Private("torch._C", "_InferenceMode", "inference_mode is ignored, as no_grad"),
    Private("torch.cuda", "_is_in_bad_fork", "whether a parent used CUDA; nothing public says so"),
]
OTHERS = [
    Private(
        "jsonargparse._loaders_dumpers",
        "get_yaml_default_loader",
        "strings within options are read by this loader, whatever set_loader says",
        "",
    ),
    Private("argparse.ArgumentParser", "_actions", "names of all options, to suggest the nearest"),
    Private("argparse._SubParsersAction", "_name_parser_map", "the same, of subcommands"),
    Private(
        "multiprocessing.forkserver._forkserver",
        "_stop",
        "waits for the server, whose times count as those of children only after that",
        "",
    ),
]
LISTED = [*LIGHTNING, *TORCH, *OTHERS]


def source_of(owner: Any) -> str:
    """The files that define a class and its bases, or a module."""
    classes = owner.__mro__[:-1] if inspect.isclass(owner) else [owner]
    files = {inspect.getsourcefile(one) for one in classes}
    return "\n".join(Path(file).read_text(encoding="utf-8") for file in files if file)


@pytest.mark.parametrize("entry", LISTED, ids=lambda entry: f"{entry.owner}.{entry.name}")
def test_a_listed_name_is_as_it_was(entry: Private) -> None:
    owner = resolve_name(entry.owner)
    is_there = hasattr(owner, entry.name) or (
        inspect.isclass(owner) and re.search(rf"\.{entry.name}\b.*[=:]", source_of(owner))
    )
    assert is_there, f"{entry.owner} has no {entry.name} any more: {entry.reason}"
    if entry.takes is not None:
        taken = [*inspect.signature(getattr(owner, entry.name)).parameters]
        assert taken == entry.takes.split(), f"{entry.name} takes other arguments: {entry.reason}"
    if entry.is_overridden:
        calls = re.findall(rf"(?:self|super\(\))\.{entry.name}\b", source_of(owner))
        assert calls, f"{entry.owner} does not call {entry.name} any more: {entry.reason}"


# ------------------------------------------------------------------------------ is the list whole?

PUBLIC = {"_replace", "_asdict", "_fields", "_make"}
"""Of named tuples; documented."""
OURS = {"_dataset", "_paths"}
"""Private names of ours that another file uses."""


def is_private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def is_of_self(node: ast.AST) -> bool:
    """Whether it is ``self.something``."""
    value = node.value if isinstance(node, ast.Attribute) else None
    return isinstance(value, ast.Name) and value.id == "self"


def imported(tree: ast.AST) -> Iterator[str]:
    """What is imported from private modules of libraries, and their private names."""
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            before = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            parts = f"{before}{alias.name}".split(".")
            known = parts[0] in sys.stdlib_module_names or parts[0] in PACKAGES
            if not known and any(map(is_private, parts)):
                yield parts[-1] if before else next(filter(is_private, parts))


def accessed(tree: ast.AST) -> Iterator[str]:
    """Private attributes that the file itself does not define, also in ``getattr``."""
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif is_of_self(node) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
    for node in ast.walk(tree):
        name: Any = node.attr if isinstance(node, ast.Attribute) else None
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            name = getattr(node.args[1], "value", None)
        if is_private(name) and name not in own:
            yield name


def inherited(path: Path, tree: ast.Module) -> Iterator[str]:
    """Private methods and attributes of our classes that a base of a library has, too."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or not node.bases:
            continue
        names = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
        names |= {part.attr for part in ast.walk(node) if is_of_self(part)}
        if not (names := set(filter(is_private, names))):
            continue
        made = getattr(importlib.import_module(".".join(path.with_suffix("").parts)), node.name)
        bases = [b for b in made.__mro__ if b.__module__.partition(".")[0] not in PACKAGES]
        for base in bases[:-1]:
            if base.__module__ not in ("builtins", "typing", "abc", "enum"):
                text = source_of(base)
                yield from (name for name in names if re.search(rf"(?:self\.|def ){name}\b", text))


def test_the_list_is_whole_and_nothing_in_it_is_unused() -> None:
    found: dict[str, set[str]] = {}
    text = ""
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        place = path.relative_to(ROOT)
        if "skeleton" in place.parts:
            continue
        text += (content := path.read_text(encoding="utf-8"))
        tree = ast.parse(content)
        for name in {*imported(tree), *accessed(tree), *inherited(place, tree)} - PUBLIC - OURS:
            found.setdefault(name, set()).add(str(place))
    listed = {entry.name for entry in LISTED}
    missing = {name: sorted(files) for name, files in found.items() if name not in listed}
    assert not missing, "list these with a reason, or do without them"
    assert not [name for name in listed | OURS if not re.search(rf"\b{name}\b", text)], "unused"
