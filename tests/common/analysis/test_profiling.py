"""Costs: memory counted without a device, times relative to a base, and what tables read."""

import json
import time

import pytest
import torch
from torch import nn

from common.analysis.profiling import (
    adversarial_training_step,
    peak_memory,
    relative_times,
)
from common.attacks.pgd import PGD
from common.errors import ConfigurationError
from common.results.store import read_costs


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(1000, 10, bias=False))


def test_memory_of_a_linear_layer_is_what_it_can_only_be() -> None:
    """Weights, momentum and gradient of 10,000 numbers each, and the images, are all needed."""
    needed = 4 * (3 * 10_000 + 64 * 1000)
    found = peak_memory(linear, (1, 10, 100), batch_size=64)
    assert needed <= found < 1.5 * needed


def test_memory_of_activations_grows_with_the_batch() -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
        )  # fmt: skip

    small, large = (peak_memory(net, (1, 16, 16), batch_size=n) for n in (8, 64))
    kept = 2 * 4 * 8 * 16 * 16  # per image, what the second convolution and the ReLUs keep
    assert large - small >= 56 * kept

    def huge() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(10**6, 10**6, bias=False))

    assert peak_memory(huge, (1, 1000, 1000), 2) > 3 * 4 * 10**12, "nothing is allocated"


def test_ratios_are_to_the_base_and_the_base_is_one() -> None:
    def busy(seconds: float):
        def step() -> None:
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass

        return step

    found = relative_times({"base": busy(0.002), "triple": busy(0.006)}, "base", 5, 1)
    assert found["base"] == (1.0, 1.0, 1.0)
    ratio = found["triple"]
    assert ratio.lower <= ratio.median <= ratio.upper
    assert 2.0 < ratio.median < 4.5, "each step takes the processor time it asks for"
    with pytest.raises(ConfigurationError, match=r"a base among one; got 5 and 'other'"):
        relative_times({"one": lambda: None}, "other", 5)
    with pytest.raises(ConfigurationError, match="at least 2 rounds"):
        relative_times({"one": lambda: None}, "one", 1)


def test_a_timed_step_attacks_and_updates_a_copy() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    before = [p.clone() for p in net.parameters()]
    calls = []
    net.register_forward_hook(lambda module, x, out: calls.append(module.training))
    step = adversarial_training_step(
        net, PGD(0.1, steps=3), torch.rand(5, 1, 2, 2), torch.zeros(5, dtype=torch.long)
    )
    step()
    assert calls == [False] * 3 + [True], "hooks are copied with the network"
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(p.grad is None for p in net.parameters())


def test_costs_are_read_and_damage_is_named(tmp_path) -> None:
    assert read_costs(tmp_path) == {}
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"experiments": {"a": {"metrics": {"step_time": 2}}}}))
    assert read_costs(tmp_path) == {"a": {"step_time": 2.0}}
    path.write_text('{"experiments": {"a": {}}}')
    with pytest.raises(ConfigurationError, match=r"costs\.json cannot be read .*KeyError"):
        read_costs(tmp_path)
