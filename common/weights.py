"""Finds the weights of a network in a file, under any names that wrappers give them.

A file may hold several sets of weights (raw, averaged), each under a prefix (the attribute of a
LightningModule, ``module.`` of DataParallel, ``_orig_mod.`` of a compiled part), beside counters
and states of metrics. A set is taken if it determines the network completely and is the only one.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import CheckpointError

Weights = Mapping[str, Tensor]

# Segments of names that wrappers insert at any depth.
_TRANSPARENT = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_DEPTH = 3  # of dictionaries in a file
_COUNTERS = {"total_ops", "total_params", "n_averaged"}  # of thop and of torch's AveragedModel
_METRIC_STATES = {"tp", "fp", "tn", "fn", "total", "correct", "confmat"} | {
    f"{kind}_value" for kind in ("mean", "sum", "max", "min")
}  # as torchmetrics names them
_STATISTIC = re.compile(r"(?!running_)\w*?(?:(mean|mu)|std|stddev|sigma|sd)s?")
_MOST_CHANNELS = 16  # of an input that is normalised


@dataclass
class _Match:
    """A set of weights that has all of the network's under a prefix."""

    place: str  # keys of the dictionaries around the set
    prefix: str
    weights: dict[str, Tensor]  # by the network's own names
    rest: dict[str, Tensor]  # tensors of the same set that are not the network's
    statistics: tuple[Tensor, Tensor]  # how the network would normalise beside the set's own

    @property
    def key(self) -> str:
        return ".".join(part for part in (self.place, self.prefix) if part)

    def equals(self, other: "_Match") -> bool:
        return all(torch.equal(value, other.weights[k]) for k, value in self.weights.items())


def find_weights(own: Weights, content: Any, origin: str, key: str | None = None) -> Weights:
    """The tensors for a network, by the network's own names.

    Args:
        own: The network's state dict.
        content: What the file holds.
        origin: What to call the file in messages.
        key: Which set to take if several fit: its place in the file, its prefix, or both, such as
            ``ema_state_dict``, ``student`` or ``state_dict.student``. With a prefix, tensors
            outside it are left out.

    Raises:
        CheckpointError: If no set fits, if several different ones do, or if the one that fits is a
            part of a larger model, such as one that normalises its input in another way.
    """
    sets = dict(_sets(content))
    if not sets:
        raise CheckpointError(
            f"{origin} holds no state dict (names to tensors); save model.state_dict()"
        )
    matches = [match for place, found in sets.items() for match in _matches(own, place, found)]
    if key is not None:
        chosen = [m for m in matches if key == m.key or (key and key in (m.place, m.prefix))]
        if not chosen and key not in sets:
            known = [m.key for m in matches] or list(sets)
            raise CheckpointError(
                f"{origin} has no weights {key!r}; it has {', '.join(map(repr, known))}"
            )
        matches, sets = chosen, {key: sets[key]} if key in sets else sets
    if not matches:
        raise _misfit(own, sets, origin)
    match = min(matches, key=lambda m: len(m.rest))
    if not all(map(match.equals, matches)):
        raise CheckpointError(
            f"{origin} holds {len(matches)} different sets of weights for this network, "
            f"{', '.join(repr(m.key) for m in matches)}: choose one, for example "
            f"key={match.key!r} (--weights_key {match.key})"
        )
    is_named = key == match.key or (key == match.prefix and key not in sets)
    if not (match.prefix and is_named):
        copies = [f"{m.prefix}." for m in matches if m.place == match.place and m is not match]
        rest = {n: t for n, t in match.rest.items() if not n.startswith(tuple(copies))}
        _check_rest(match, rest, origin)
    return match.weights


def check_weights_fit(
    own: Weights,
    other: Weights,
    origin: str,
    remedy: str = "Give the config it was trained with (config.yaml in its run directory)",
) -> None:
    """Compare names, shapes and kinds of numbers of weights.

    Raises:
        CheckpointError: Naming the first tensors that are missing, unknown or of another shape.
    """
    found = {
        "missing": [name for name in own if name not in other],
        "unknown": [name for name in other if name not in own],
        "misshapen": [
            f"{name} is {_form(other[name])}, expected {_form(own[name])}"
            for name in own
            if name in other and not _is_alike(own[name], other[name])
        ],
    }
    problems = [f"{len(n)} {what} (first: {n[0]})" for what, n in found.items() if n]
    if problems:
        raise CheckpointError(
            f"{origin} holds the weights of another network: {'; '.join(problems)}. {remedy}"
        )


def _is_alike(a: Tensor, b: Tensor) -> bool:
    """Whether one can be loaded into the other: floats of any precision, but not whole numbers."""
    return a.shape == b.shape and a.is_floating_point() == b.is_floating_point()


def _form(tensor: Tensor) -> str:
    whole = "" if tensor.is_floating_point() else f" {tensor.dtype}".replace("torch.", "")
    return f"{tuple(tensor.shape)}{whole}"


def _sets(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary in a file that has tensors by name, with its place."""
    if not isinstance(content, Mapping) or depth > _DEPTH:
        return
    named = {key: value for key, value in content.items() if isinstance(key, str)}
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    if tensors:
        yield place, tensors
    for key, value in named.items():
        # In Lightning's checkpoints state_dict holds what is to be used, the others what is not.
        if key not in ("callbacks", "current_model_state"):
            yield from _sets(value, f"{place}.{key}" if place else key, depth + 1)


def _plain(names: Iterable[str]) -> dict[str, str]:
    """Names without the segments of wrappers, and what they were; as they are if two coincide."""
    names = list(names)
    plain = {".".join(s for s in n.split(".") if s not in _TRANSPARENT): n for n in names}
    return plain if len(plain) == len(names) else {name: name for name in names}


def _without_counters(tensors: Weights, own: Weights) -> dict[str, Tensor]:
    """A set without what only counts: operations, averaged models, outcomes of a metric."""
    needed = {name.rpartition(".")[2] for name in own}
    states, counters = _METRIC_STATES - needed, _COUNTERS - needed
    parts = {name: name.rpartition(".") for name in tensors}
    metrics = {parent for parent, _, last in parts.values() if last in states} - {""}
    return {
        name: tensors[name]
        for name, (parent, _, last) in parts.items()
        if parent not in metrics and last not in counters
    }


def _matches(own: Weights, place: str, weights: Weights) -> list[_Match]:
    """The prefixes under which a set has the whole network."""
    weights = _without_counters(weights, own)
    mine = _plain(own)
    theirs = {plain: weights[name] for plain, name in _plain(weights).items()}
    for wrapper in ("", "net.", "model."):  # around the network, where the file has none
        names = {name.removeprefix(wrapper): full for name, full in mine.items()}
        if not all(name.startswith(wrapper) for name in mine):
            continue
        tried = (_match(own, names, place, p, theirs) for p in _prefixes(names, theirs))
        if found := [match for match in tried if match is not None]:
            return found
    return []


def _prefixes(names: Iterable[str], theirs: Iterable[str]) -> list[str]:
    """What stands before the network's first weight."""
    first = next((name for name in names if not _is_optional(name)), None)
    return [n.removesuffix(first) for n in theirs if first and f".{n}".endswith(f".{first}")]


def _match(
    own: Weights, names: Mapping[str, str], place: str, prefix: str, weights: Weights
) -> _Match | None:
    found = {}
    for name, full in names.items():
        value = weights.get(prefix + name)
        if value is not None and _is_alike(own[full], value):
            found[full] = value
        elif value is not None or not _is_optional(name):
            return None
    used = {prefix + name for name in names}
    rest = {name: value for name, value in weights.items() if name not in used}
    if prefix and any(name.startswith(prefix) and not _statistic(name) for name in rest):
        return None
    left_out = {full: own[full] for full in names.values() if full not in found}
    statistics = _statistics(left_out)
    if any(map(_statistic, left_out)) and (statistics is None or _statistics(rest) is None):
        return None
    identity = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return _Match(place, prefix.rstrip("."), found | left_out, rest, statistics or identity)


# ------------------------------------------------------------------- normalisation of the input


def _is_optional(name: str) -> bool:
    """What may be missing: counters that old batch-norm lacks, and statistics kept elsewhere."""
    return name.endswith("num_batches_tracked") or bool(_statistic(name))


def _statistic(name: str) -> str:
    """``mean`` or ``std`` for a tensor named as those of a normaliser, else empty."""
    match = _STATISTIC.fullmatch(name.rpartition(".")[2])
    return "" if match is None else "mean" if match[1] else "std"


def _statistics(tensors: Weights) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of the one normaliser among tensors, ``(C,)`` each."""
    found = [
        (kind, value.flatten().double())
        for name, value in tensors.items()
        if (kind := _statistic(name)) and value.is_floating_point()
    ]
    by_kind = dict(found)
    if len(found) != 2 or len(by_kind) != 2 or max(map(len, by_kind.values())) > _MOST_CHANNELS:
        return None
    return by_kind["mean"], by_kind["std"]


def _check_rest(match: _Match, rest: Weights, origin: str) -> None:
    """Refuse a set that belongs to a larger model, which may compute another function."""
    theirs = _statistics(rest)
    if not rest:
        return
    if len(rest) == 2 and theirs is not None:
        pairs = list(zip(theirs, match.statistics, strict=True))
        is_broadcast = all(len({1, len(a), len(b)}) <= 2 for a, b in pairs)
        # Up to the rounding of half precision.
        if is_broadcast and all(torch.allclose(a, b, rtol=0, atol=2e-4) for a, b in pairs):
            return
    choice = ""
    if match.prefix:
        choice = f"; if only the network is meant, choose it, --weights_key {match.key}"
    others = [name for name in rest if not _statistic(name)]
    if others:
        raise CheckpointError(
            f"{origin} holds the weights of another network: {len(others)} unknown (first: "
            f"{others[0]}); give the model that they belong to{choice}"
        )
    values = ", ".join(
        f"{name}={[round(v, 4) for v in value.flatten()[:_MOST_CHANNELS].tolist()]}"
        for name, value in rest.items()
    )
    raise CheckpointError(
        f"{origin} brings its own normalisation of the input ({values}), which is not that of this "
        "network: build the network with this mean and std, or give the model as "
        f"nn.Sequential(a module with these buffers, the network){choice}"
    )


def _misfit(own: Weights, sets: Mapping[str, Weights], origin: str) -> CheckpointError:
    """What is wrong with the set that has most of the network's names."""
    # Missing statistics of a normaliser are not taken from the network: it could have been trained
    # without one, or with others.
    statistics = [name for name in own if _statistic(name)]
    inner = {name: value for name, value in own.items() if name not in statistics}
    if len({name.partition(".")[0] for name in inner}) == 1:
        inner = {name.partition(".")[2]: value for name, value in inner.items()}
    if statistics and any(_matches(inner, place, found) for place, found in sets.items()):
        return CheckpointError(
            f"{origin} lacks the statistics of this network's normalisation of the input "
            f"({', '.join(statistics)}): have the function that builds the network load the file "
            "into the network inside before it adds the normalisation, and give no weights here; "
            "or build it without mean and std if it was trained without"
        )
    mine = _plain(own)
    nearest: dict[str, Tensor] = {}
    for weights in sets.values():
        theirs = _plain(_without_counters(weights, own))
        for prefix in _prefixes(mine, theirs) or [""]:
            renamed = {
                mine.get(name.removeprefix(prefix), full): weights[full]
                for name, full in theirs.items()
            }
            if not nearest or len(own.keys() & renamed) > len(own.keys() & nearest):
                nearest = renamed
    try:
        check_weights_fit(own, nearest, origin)
    except CheckpointError as error:
        return error
    return CheckpointError(f"{origin} holds only a part of the weights of this network")
