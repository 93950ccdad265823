"""Weight files as people have them: every layout loads the right weights or is named correctly."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from common.checkpoints import load_weights
from common.errors import CheckpointError
from common.networks.normalize import Normalize

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Net(nn.Module):
    def __init__(self, normalize: nn.Module | None = None, width: int = 4) -> None:
        super().__init__()
        self.normalize = normalize or nn.Identity()
        self.conv, self.bn = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 4)
        for tensor in (self.bn.weight, self.bn.bias, self.bn.running_mean):
            nn.init.normal_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.bn(self.conv(self.normalize(x))).mean((2, 3)))
        return y


@pytest.fixture
def plain() -> dict[str, Tensor]:
    torch.manual_seed(7)
    return OrderedDict(Net().state_dict())


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., nn.Module]:
    """``load(content, net=Net(), key=None)``: saved, loaded, and the network it was loaded into."""

    def call(content: Any, net: nn.Module | None = None, key: str | None = None) -> nn.Module:
        torch.save(content, tmp_path / "w.pt")
        net = Net() if net is None else net
        load_weights(net, tmp_path / "w.pt", key)
        return net

    return call


def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def halved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v / 2 if v.is_floating_point() else v for k, v in weights.items()}


def assert_is(net: nn.Module, weights: dict[str, Tensor]) -> None:
    found = net.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "net.", "model.", "net._orig_mod.", "model.module.",
     "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module.net.",
     "model.module._orig_mod.net.", "backbone.", "module.model.1."],
)  # fmt: skip
@pytest.mark.parametrize("place", [(), ("state_dict",), ("checkpoint", "model")])
def test_prefixes_and_places_in_any_combination(plain, load, prefix, place) -> None:
    content: Any = under(prefix, plain)
    for key in reversed(place):
        content = {
            key: content,
            "epoch": 3,
            "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
        }
    assert_is(load(content), plain)


def test_wrappers_within_the_network_and_around_it(plain, load) -> None:
    inside = {n.replace("fc.", "fc._orig_mod.").replace("conv.", "conv.module."): v
              for n, v in plain.items()}  # fmt: skip
    assert_is(load(under("net.", inside)), plain)
    assert_is(load(plain, nn.DataParallel(Net())).module, plain)
    holder = nn.Module()
    holder.net = Net()
    assert_is(load(under("module.", plain), holder).net, plain)
    old = {n: v for n, v in plain.items() if not n.endswith("num_batches_tracked")}
    assert_is(load(under("module.", old)), plain)


@pytest.mark.parametrize("key", ["state_dict_ema", "ema", "params"])
def test_a_single_set_under_any_key(plain, load, key) -> None:
    assert_is(load({key: plain, "epoch": 3, "arch": "net"}), plain)


def test_counters_and_metrics_are_left_out(plain, load) -> None:
    more = {"net.conv.total_ops": torch.zeros(1), "net.total_params": torch.zeros(1),
            "train_acc.tp": torch.zeros(4), "train_acc.fp": torch.zeros(4),
            "val_acc.total": torch.tensor(3), "val_acc.correct": torch.tensor(2),
            "loss.mean_value": torch.zeros(()), "loss.weight": torch.zeros(()),
            "matrix.confmat": torch.zeros(4, 4)}  # fmt: skip
    assert_is(load({"state_dict": under("net.", plain) | more}), plain)
    torch.manual_seed(7)
    assert_is(load(AveragedModel(Net()).state_dict()), plain)


def test_any_precision_is_cast_to_that_of_the_network(plain, load) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cast = {n: v.to(dtype) if v.is_floating_point() else v for n, v in plain.items()}
        assert_is(load(cast), {n: cast[n].to(v.dtype) for n, v in plain.items()})
    quantized = plain | {"fc.weight": (plain["fc.weight"] * 100).to(torch.int8)}
    assert "fc.weight is (4, 4) int8" in refused(lambda: load(quantized))


# -------------------------------------------------------------------------------- several sets


def test_two_different_sets_are_named_and_one_is_chosen(plain, load) -> None:
    other = halved(plain)
    content = {"model_state_dict": under("module.", plain), "unaveraged": under("module.", other)}
    message = refused(lambda: load(content))
    for word in ("'model_state_dict'", "'unaveraged'", "--weights_key"):
        assert word in message
    assert_is(load(content, key="unaveraged"), other)
    assert_is(load(content, key="model_state_dict"), plain)
    assert "has no weights 'ema'" in refused(lambda: load(content, key="ema"))


def test_two_networks_in_one_module(plain, load) -> None:
    other = halved(plain)
    content = {"state_dict": under("student.", plain) | under("teacher.", other)}
    message = refused(lambda: load(content))
    assert "'state_dict.student', 'state_dict.teacher'" in message
    for key in ("student", "state_dict.student"):
        assert_is(load(content, key=key), plain)
    assert_is(load(content, key="teacher"), other)


def test_equal_sets_need_no_choice_and_of_lightnings_the_one_in_use_is_taken(plain, load) -> None:
    assert_is(load({"state_dict": under("module.", plain), "ema": plain}), plain)
    assert_is(load(under("model.", plain) | under("attacker.model.", plain)), plain)
    content = {"state_dict": under("net.", plain), "current_model_state": halved(plain),
               "callbacks": {"EMA": {"weights": halved(plain)}}}  # fmt: skip
    assert_is(load(content), plain)


# ------------------------------------------------------------------- normalisation of the input


def sequence(plain: dict[str, Tensor], mean: Any, std: Any) -> dict[str, Tensor]:
    statistics = {"0.mean": torch.tensor(mean), "0.std": torch.tensor(std)}
    return statistics | under("1.", plain)


def test_a_normaliser_that_does_nothing_is_left_out(plain, load) -> None:
    assert_is(load(sequence(plain, [0.0], [1.0])), plain)
    assert_is(load(sequence(plain, [[[0.0]]] * 3, [[[1.0]]] * 3)), plain)


def test_a_normaliser_that_the_network_lacks_is_refused(plain, load) -> None:
    content = sequence(plain, MEAN, STD)
    for net in (Net(), Net(Normalize(3, (0.5,) * 3, STD))):
        message = refused(lambda net=net: load(content, net))
        assert "its own normalisation of the input (0.mean=[0.4914" in message
        assert "nn.Sequential" in message
    robustbench = {"normalize.mean": torch.tensor(MEAN), "normalize.std": torch.tensor(STD)}
    assert "normalisation" in refused(lambda: load(robustbench | under("model.", plain)))
    inside = under("model.", plain) | under("model.", robustbench)
    assert "normalisation" in refused(lambda: load(inside))
    assert_is(load(content, key="1"), plain)  # by name
    place = {"model": robustbench | under("model.", plain)}
    assert "normalisation" in refused(lambda: load(place, key="model"))
    assert_is(load(place, key="model.model"), plain)


@pytest.mark.parametrize("shape", [(3,), (1, 3, 1, 1)])
def test_a_normaliser_that_the_network_has_too_is_taken_as_its_own(plain, load, shape) -> None:
    content = sequence(plain, torch.tensor(MEAN).view(shape).tolist(), STD)
    net = load(content, Net(Normalize(3, MEAN, STD)))
    mine = {n: v for n, v in net.state_dict().items() if not n.startswith("normalize.")}
    assert all(torch.equal(mine[n], plain[n]) for n in plain)
    assert net.normalize.mean.flatten().tolist() == pytest.approx(MEAN)


def test_two_normalisers_in_a_row_are_not_one(plain, load) -> None:
    own = Net(Normalize(3, MEAN, STD))
    content = sequence(own.state_dict(), MEAN, STD)
    assert "its own normalisation" in refused(lambda: load(content, Net(Normalize(3, MEAN, STD))))


def test_a_normaliser_is_not_made_up(plain, load) -> None:
    for net in (Net(Normalize(3, MEAN, STD)), nn.Sequential(Normalize(3, MEAN, STD), Net())):
        message = refused(lambda net=net: load({"state_dict": under("model.", plain)}, net))
        assert "lacks the statistics of this network's normalisation" in message
        assert "mean, " in message


# -------------------------------------------------------------------------------- other networks


def test_weights_that_do_not_determine_the_network(plain, load) -> None:
    part = {n: v for n, v in plain.items() if n != "fc.bias"}
    assert "1 missing (first: fc.bias)" in refused(lambda: load(under("net.", part)))
    part = {n: v for n, v in plain.items() if n != "bn.running_var"}
    assert "1 missing (first: bn.running_var)" in refused(lambda: load(part))
    assert "1 unknown (first: fc2.bias)" in refused(
        lambda: load(plain | {"fc2.bias": torch.ones(4)})
    )
    message = refused(lambda: load(under("net.", plain), Net(width=5)))
    assert "conv.weight is (4, 3, 3, 3), expected (5, 3, 3, 3)" in message


def test_a_part_of_a_larger_model_has_to_be_named(plain, load) -> None:
    content = under("net.", plain) | {"head.weight": torch.ones(4, 4)}
    message = refused(lambda: load(content))
    assert "1 unknown (first: head.weight)" in message
    assert "--weights_key net" in message
    assert_is(load(content, key="net"), plain)


@pytest.mark.parametrize("content", [{}, [1], {"a": 3}, {"state_dict": {}}, torch.ones(2)])
def test_no_weights_at_all(load, content) -> None:
    assert "holds no state dict" in refused(lambda: load(content))
