"""The layer against slow rewrites and identities; its way into networks; refusals."""

import copy
import itertools
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from common.errors import ConfigurationError
from paper_wm.method import WeightMap, box_sum, bypassed, insert_weight_maps, weight_maps

SHAPE = (3, 6, 5)
FILTERS = ("smoothing", "unsharp", "highpass", "scale")
VARIANTS = (*FILTERS, "subtract", "subtract_summed")


def layer(variant: str, random: bool = True, **settings) -> WeightMap:
    """A layer in double precision with a random map."""
    made = WeightMap(variant, SHAPE, **settings).double()
    if random:
        made.map.data.normal_()
    return made


def features(n: int = 2) -> torch.Tensor:
    return torch.randn(n, *SHAPE, dtype=torch.float64)


def slow(x: torch.Tensor, made: WeightMap) -> torch.Tensor:
    """The definition in loops: Y = K(M * X), or M * K(X), terms outside the map zero."""
    k, is_last = made.kernel_size, made.order == "reduce_then_weight"
    z, blur = x if is_last else x * made.map, torch.zeros_like(x)
    for i, j in itertools.product(range(SHAPE[1]), range(SHAPE[2])):
        for a, b in itertools.product(range(-(k // 2), k // 2 + 1), repeat=2):
            if 0 <= i + a < SHAPE[1] and 0 <= j + b < SHAPE[2]:
                blur[:, :, i, j] += z[:, :, i + a, j + b]
    mean = blur / k**2
    y = {
        "smoothing": blur if made.kernel_norm == "sum" else mean,
        "unsharp": z + made.lam * (z - mean),
        "highpass": z - mean,
        "scale": z,
    }.get(made.variant, mean)
    y = made.map * y if is_last else y
    if made.variant == "subtract_summed":
        y = torch.stack([sum(y[:, c] for c in range(SHAPE[0]))] * SHAPE[0], dim=1)
    return x - y if made.variant.startswith("subtract") else y


# --------------------------------------------------------------------------------- the operation


@pytest.mark.parametrize("order", ["weight_then_reduce", "reduce_then_weight"])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(
    "settings",
    [
        *({"variant": variant} for variant in VARIANTS),
        {"variant": "smoothing", "kernel_norm": "mean"},
        {"variant": "unsharp", "lam": -0.3},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_the_layer_is_its_definition_in_loops(settings, k, order) -> None:
    for shared in (False, True):
        made, x = layer(**settings, kernel_size=k, shared=shared, order=order), features()
        torch.testing.assert_close(made(x), slow(x, made))


@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_window_sums_and_all_their_derivatives(k) -> None:
    """Windows wider than the map too; first and second, of one or of a batch."""
    z = features().requires_grad_()
    pooled = F.avg_pool2d(z, k, stride=1, padding=k // 2, divisor_override=1)
    torch.testing.assert_close(torch.vmap(lambda one: box_sum(one[None], k)[0])(z), pooled)
    last = z.detach().to(memory_format=torch.channels_last).requires_grad_()
    towards = features()
    for of, layout in ((z, torch.contiguous_format), (last, torch.channels_last)):
        found = box_sum(of, k)
        torch.testing.assert_close(found, pooled)
        assert found.is_contiguous(memory_format=layout)
        (wanted,) = torch.autograd.grad(pooled, z, towards, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(found, of, towards)[0], wanted)
        found.relu_()  # no view
    small = z[:1, :2]
    assert gradcheck(box_sum, (small, k), check_batched_grad=True)
    assert gradgradcheck(lambda z: box_sum(z * z, k), (small,))


@pytest.mark.parametrize("shared", [False, True])
def test_a_feature_of_another_shape_is_refused(shared) -> None:
    """Never resized, never broadcast."""
    made = layer("smoothing", shared=shared)
    for shape in ((2, 3, 6, 6), (2, 1, 6, 5), (3, 6, 5)):
        with pytest.raises(ValueError, match=re.escape(f"(N, 3, 6, 5), got {shape}")):
            made(torch.rand(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "total", "trainable"),
    [({}, 90, 90), ({"shared": True}, 30, 30), ({"trainable": False}, 90, 0)],
)
def test_parameters_are_the_map_alone(settings, total, trainable) -> None:
    made = WeightMap("smoothing", SHAPE, **settings)
    assert sum(p.numel() for p in made.parameters()) == total
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == trainable
    assert list(made.state_dict()) == ["map"]
    assert not list(made.buffers())
    assert made.map.dtype == torch.float32
    assert ("frozen" in repr(made)) == (trainable == 0)
    other = WeightMap("unsharp", SHAPE, lam=0.5, order="reduce_then_weight")
    assert "unsharp, 3x6x5, k=3, lam=0.5, reduce_then_weight" in repr(other)


def test_starts() -> None:
    shape, state = (8, 16, 16), torch.random.get_rng_state()
    assert (WeightMap("smoothing", shape, init_value=0.25).map == 0.25).all()
    assert torch.equal(torch.random.get_rng_state(), state), "no random number is drawn"
    uniform = WeightMap("scale", shape, init="uniform").map
    assert 0.0 <= uniform.min() < 0.01
    assert 0.99 < uniform.max() <= 1.0
    normal = WeightMap("scale", shape, init="normal", init_value=2.0).map.detach()
    assert (normal.mean(), normal.std()) == (
        pytest.approx(2.0, abs=0.02),
        pytest.approx(0.2, abs=0.01),
    )


def test_the_layer_computes_in_float32_under_autocast() -> None:
    made = WeightMap("smoothing", (1, 5, 5))
    x = torch.full((1, 1, 5, 5), 1.0 / 3.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, made(x.float())), "nine terms are summed with all their digits"
    assert made(x).dtype == torch.bfloat16, "a half-precision network stays one"
    assert made(x.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_size": 2}, "must be odd.*got 2; try 1 or 3"),
        ({"kernel_size": -3}, "must be odd.*got -3; try 3"),
        ({"kernel_size": 0}, "must be odd.*got 0"),
        ({"variant": "blur"}, "variant must be one of smoothing, .*got 'blur'"),
        ({"lam": 0.5}, "lam=0.5 applies to variant=unsharp alone, got variant=smoothing; drop"),
        ({"variant": "highpass", "lam": 1.0}, "got variant=highpass; drop lam"),
        ({"variant": "unsharp", "kernel_norm": "mean"}, "variant=smoothing alone.*drop kernel_n"),
        ({"kernel_norm": "l2"}, "kernel_norm must be one of sum, mean, got 'l2'"),
        ({"order": "both"}, "order must be one of"),
        ({"init": "zeros"}, "init must be one of constant, uniform, normal"),
        ({"shape": (3, 6)}, r"\(channels, height, width\).*got \(3, 6\)"),
        ({"shape": (3, 0, 6)}, r"got \(3, 0, 6\)"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        WeightMap(**{"variant": "smoothing", "shape": SHAPE, **settings})


# --------------------------------------------------------------------------------- into networks


class Plain(nn.Module):
    """Convolutions, a shared activation, dropout and batch-norm; nothing of ours in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.tail = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.ReLU())
        self.unused = nn.Conv2d(1, 1, 1)
        self.fc = nn.Linear(6 * 9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.drop(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.relu(self.tail(h)).flatten(1))


def plain(seed: int = 0) -> Plain:
    torch.manual_seed(seed)
    return Plain()


def inserted(*after: str, variant: str = "smoothing", **settings) -> Plain:
    return insert_weight_maps(plain(), after, (1, 8, 8), variant, **settings)


def test_insertion_leaves_weights_keys_modes_buffers_and_generators_alone() -> None:
    before = plain()
    before.bn1.eval()
    after = copy.deepcopy(before)
    state = torch.random.get_rng_state()
    insert_weight_maps(after, ["conv1", "tail"], (1, 8, 8), "smoothing")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in before.modules()] == [
        m.training for m in after.modules() if not isinstance(m, WeightMap)
    ]
    old, new = before.state_dict(), after.state_dict()
    for key, value in old.items():
        assert torch.equal(new[key], value), key
    assert set(new) - set(old) == {"conv1.weight_map.map", "tail.1.weight_map.map"}
    found = after.load_state_dict(old, strict=False)
    assert not found.unexpected_keys
    assert isinstance(after.conv1, nn.Conv2d)


def test_the_map_is_applied_behind_the_named_module_once() -> None:
    """Behind a ``Sequential`` is behind its last module."""
    net, base = inserted("conv1", "tail", init_value=0.5).eval(), plain().eval()
    x = torch.rand(3, 1, 8, 8)
    z = base.relu(base.bn1(0.5 * box_sum(base.conv1(x), 3)))
    z = base.relu(0.5 * box_sum(base.tail(z), 3))
    torch.testing.assert_close(net(x), base.fc(z.flatten(1)))
    shapes = {name: m.shape for name, m in weight_maps(net).items()}
    assert shapes == {"conv1": (4, 8, 8), "tail.1": (6, 3, 3)}


def test_copies_and_pickles_have_maps_of_their_own() -> None:
    net = inserted("conv1").eval()
    x = torch.rand(2, 1, 8, 8)
    before = net(x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net.cpu()))):
        twin.conv1.weight_map.map.data.zero_()
        assert torch.equal(net(x), before)
        assert not torch.allclose(twin(x), before)


def test_past_the_maps_outputs_stay_and_gradients_change() -> None:
    net = inserted("conv1").eval()
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    logits = net(x)
    (exact,) = torch.autograd.grad(logits.sum(), x)
    with bypassed(net):
        through = net(x)
        (passed,) = torch.autograd.grad(through.sum(), x)
    torch.testing.assert_close(through, logits)
    assert not torch.allclose(passed, exact)
    (again,) = torch.autograd.grad(net(x).sum(), x)
    assert torch.equal(again, exact), "afterwards everything is as before"
    # Without anything nonlinear behind the map the gradient is that of the base network.
    with bypassed(net):
        (mapped,) = torch.autograd.grad(net.conv1(x).sum(), x)
    (bare,) = torch.autograd.grad(plain().conv1(x).sum(), x)
    torch.testing.assert_close(mapped, bare)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (["conv7"], "no module 'conv7'.*did you mean 'conv1'"),
        (["backbone.block"], "convolutions are conv1, tail.0, unused"),
        ([""], "no module ''"),
        ([], "no place for a weight map"),
        (["relu"], "'relu' runs 2 times"),
        (["unused"], "'unused' runs never"),
        (["fc"], r"'fc' puts out \(1, 5\), and a weight map needs a feature"),
        (["tail", "tail.1"], "are the same module"),
        (["conv1", "conv1"], "are the same module"),
    ],
)
def test_places_that_do_not_work_are_refused_before_anything_is_changed(after, message) -> None:
    net = plain()
    keys = list(net.state_dict())
    with pytest.raises(ConfigurationError, match=message):
        insert_weight_maps(net, after, (1, 8, 8), "smoothing")
    assert list(net.state_dict()) == keys
    assert not any(module._forward_hooks for module in net.modules())


def test_a_second_map_and_images_that_do_not_fit_are_refused() -> None:
    net = inserted("conv1")
    with pytest.raises(ConfigurationError, match="a weight map after 'conv1' already"):
        insert_weight_maps(net, ["conv1"], (1, 8, 8), "unsharp")
    assert len(net.conv1._forward_hooks) == 1
    with pytest.raises(ConfigurationError, match=r"images of shape 2x8x8.*give the shape"):
        insert_weight_maps(plain(), ["conv1"], (2, 8, 8), "smoothing")
    net.tail = type("Backwards", (nn.Sequential,), {"forward": lambda self, x: x})(nn.ReLU())
    with pytest.raises(ConfigurationError, match="overrides forward"):
        insert_weight_maps(net, ["tail"], (1, 8, 8), "smoothing")


# ----------------------------------------------------------------------------------- on a device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_on_a_gpu_the_layer_is_the_same_and_in_float32_under_autocast(variant, dtype) -> None:
    made, x = WeightMap(variant, SHAPE, init="normal"), torch.randn(4, *SHAPE)
    there = copy.deepcopy(made).cuda()
    torch.testing.assert_close(there(x.cuda()).cpu(), made(x))
    with torch.autocast("cuda", dtype=dtype):
        y = there(x.cuda().to(dtype))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.cpu(), made(x.to(dtype).float()))


def test_a_compiled_network_uses_its_maps() -> None:
    net = inserted("conv1").eval()
    x = torch.rand(2, 1, 8, 8)
    expected = net(x)
    net.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(net(x), expected)
