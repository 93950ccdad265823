"""Router and detector, dynamic convolution, MixBN: the invariants of the layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigurationError
from paper_awnet.method import (
    ACTIVATIONS,
    Detector,
    DynamicConv2d,
    MixBatchNorm2d,
    Route,
    Router,
    check_probabilities,
    rows_by_type,
    straight_through,
)

SMALL = {"widths": (4, 6, 8), "type_hidden": 5}


@pytest.mark.parametrize(
    ("kind", "heads"), [(Router, 129 * 3840), (Detector, 3 * 3840)], ids=lambda v: str(v)
)
def test_parameters_of_the_side_network(kind, heads) -> None:
    with torch.device("meta"):
        net = kind(3, [128, 128, 256, 256, 512, 512, 1024, 1024])
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in net.named_children()}
    assert count == {"features": 93_472, "type_head": 8_386, "signal_heads": heads}


@pytest.mark.parametrize("kind", [Router, Detector])
def test_signals_begin_at_one_and_stay_between_zero_and_two(kind) -> None:
    x = torch.rand(5, 1, 8, 8)
    net = kind(1, [6, 4], **SMALL).eval()
    z, u = net.read(x)
    assert z.shape == (5, 8)
    assert u.shape == (5, 2)
    assert [tuple(s.shape) for s in net.signals(z, u.softmax(1))] == [(5, 6), (5, 4)]
    assert all((s == 1).all() for s in net.signals(z, u.softmax(1)))
    wild = kind(1, [6, 4], **SMALL, init="normal", init_std=3.0).eval()
    z, u = wild.read(x)
    for omega in wild.signals(z, u.softmax(1)):
        assert ((omega > 0) & (omega < 2)).all()
        assert omega.std() > 0
    assert all((head.bias == 0).all() for head in wild.signal_heads)


def test_signals_depend_on_features_or_on_probabilities() -> None:
    x, p = torch.rand(4, 1, 8, 8), torch.tensor([[1.0, 0.0]]).expand(4, 2)
    for kind, follows_p in ((Router, False), (Detector, True)):
        net = kind(1, [6], **SMALL, init="normal").eval()
        z, _ = net.read(x)
        (one,), (other,) = net.signals(z, p), net.signals(z, 1 - p)
        assert torch.equal(one, other) != follows_p
        assert (one.std(dim=0).max() > 0) != follows_p, "one p is one point of the curve"


def test_activations() -> None:
    a = torch.linspace(-4, 4, 50)
    twice = 2 / (1 + (-a).exp())
    expected = {"two_sigmoid": twice, "one_plus_tanh": twice, "sigmoid": twice / 2}
    expected |= {"softplus": (1 + a.exp()).log(), "linear": 1 + a}
    for name, values in expected.items():
        torch.testing.assert_close(ACTIVATIONS[name](a), values)
        starts_static = name in ("two_sigmoid", "one_plus_tanh", "linear")
        assert (ACTIVATIONS[name](torch.zeros(1)) == 1) == starts_static


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "relu"}, "two_sigmoid.*relu"),
        ({"init": "ones"}, "zero, normal.*ones"),
        ({"init": "normal", "init_std": 0.0}, "0.0.*init: zero"),
        ({"widths": (4, 0, 4)}, r"widths\[1\].*0"),
        ({"widths": (4, 4)}, r"\[4, 4\].*\[1, 2, 2\]"),
        ({"type_hidden": 0}, "type_hidden.*0"),
    ],
)
def test_bad_settings_of_the_router(settings, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Router(1, [4], **settings)


def grouped_convolution(x: Tensor, conv: nn.Conv2d, omega: Tensor) -> Tensor:
    """The literal form: separate weights for every image, as one grouped pass."""
    n, channels, *size = x.shape
    weight = (omega[:, :, None, None, None] * conv.weight).flatten(0, 1)
    x = x.reshape(1, n * channels, *size)
    out = F.conv2d(x, weight, None, conv.stride, conv.padding, groups=n * conv.groups)
    return out.reshape(n, -1, *out.shape[2:])


@pytest.mark.parametrize(
    ("inside", "outside", "groups", "stride"), [(3, 5, 1, 1), (4, 6, 1, 2), (6, 6, 6, 2)]
)
def test_a_dynamic_convolution_is_the_grouped_one(inside, outside, groups, stride) -> None:
    """Invariant 3, values and all gradients, in float64; depthwise too."""
    route = Route()
    conv = nn.Conv2d(
        inside, outside, 3, stride, padding=1, groups=groups, bias=False, dtype=torch.float64
    )
    x = torch.randn(4, inside, 7, 7, dtype=torch.float64, requires_grad=True)
    omega = torch.rand(4, outside, dtype=torch.float64, requires_grad=True)
    with route.told([torch.zeros(4, 3), omega], None):
        fast = DynamicConv2d(conv, route, 1)(x)
    slow = grouped_convolution(x, conv, omega)
    assert (fast - slow).abs().max() < 1e-12
    weights, inputs = torch.randn_like(fast), (conv.weight, omega, x)
    a, b = (torch.autograd.grad((out * weights).sum(), inputs) for out in (fast, slow))
    assert all((one - other).abs().max() < 1e-11 for one, other in zip(a, b, strict=True))


def test_a_dynamic_convolution_needs_signals_and_no_bias() -> None:
    conv = nn.Conv2d(4, 6, 3, 2, padding=1, bias=False)
    dynamic = DynamicConv2d(conv, Route(), 0)
    assert dynamic.weight is conv.weight
    with pytest.raises(RuntimeError, match="signals"):
        dynamic(torch.rand(2, 4, 8, 8))
    with pytest.raises(ConfigurationError, match="bias=False"):
        DynamicConv2d(nn.Conv2d(4, 6, 3), Route(), 0)


def mixed(channels: int = 5, route: Route | None = None) -> tuple[MixBatchNorm2d, Route]:
    """Two batch-norms that have seen different things."""
    route = route or Route()
    mix = MixBatchNorm2d(nn.BatchNorm2d(channels), route)
    assert mix.clean.weight.data_ptr() != mix.adv.weight.data_ptr()
    for norm in (mix.clean, mix.adv):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 3.0)
    return mix, route


def test_evaluation_is_linear_in_p_and_equals_the_two_batch_norms() -> None:
    """Invariant 5."""
    mix, route = mixed()
    mix.eval()
    x = torch.randn(6, 5, 3, 3)
    p = torch.rand(6, 1)
    p = torch.cat([p, 1 - p], dim=1)

    def out(mixture):
        with route.told((), mixture):
            return mix(x)

    clean, adv = (out(torch.tensor(v).expand(6, 2)) for v in ([1.0, 0.0], [0.0, 1.0]))
    torch.testing.assert_close(clean, mix.clean(x))
    torch.testing.assert_close(adv, mix.adv(x))
    a, b = p[:, :1, None, None], p[:, 1:, None, None]
    torch.testing.assert_close(out(p), a * clean + b * adv)
    with pytest.raises(RuntimeError, match="P_type"):
        mix(x)
    with route.told([torch.ones(1, 1)], p):
        assert mix(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ZeroDivisionError), route.told([torch.ones(1, 1)], p):
        raise ZeroDivisionError
    assert (route.signals, route.mixture, route.rows, route.maps) == ((), None, None, ())


def test_each_of_several_pairs_mixes_its_own_two() -> None:
    route = Route()
    pairs = [mixed(channels, route)[0].eval() for channels in (5, 2, 7)]
    p = torch.rand(6, 2, requires_grad=True)
    for mix in copy.deepcopy(pairs) + pairs:
        x = torch.randn(6, mix.clean.num_features, 3, 3)
        with mix.route.told((), p):
            out = mix(x)
        each = p[:, :, None, None, None] * torch.stack([mix.clean(x), mix.adv(x)], dim=1)
        torch.testing.assert_close(out, each.sum(dim=1))
        found, expected = (torch.autograd.grad(y.square().sum(), p)[0] for y in (out, each.sum(1)))
        torch.testing.assert_close(found, expected)


def test_training_is_two_batch_norms_on_two_batches() -> None:
    """Invariant 6: values, running statistics, any order of the images, no influence of P."""
    mix, route = mixed()
    twins = copy.deepcopy(mix.clean), copy.deepcopy(mix.adv)
    x = torch.randn(8, 5, 3, 3)
    types = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    p = torch.rand(8, 2, requires_grad=True)
    with route.told((), p, rows_by_type(types, 8)):
        out = mix(x)
    expected = torch.empty_like(x)
    for kind, twin in enumerate(twins):
        expected[types == kind] = twin(x[types == kind])
    assert torch.equal(out, expected)
    for norm, twin in zip((mix.clean, mix.adv), twins, strict=True):
        assert torch.equal(norm.running_mean, twin.running_mean)
        assert torch.equal(norm.running_var, twin.running_var)
    assert torch.autograd.grad(out.sum(), p, allow_unused=True) == (None,)
    order = torch.argsort(types, stable=True)
    with route.told((), None, rows_by_type(types[order], 8)):
        torch.testing.assert_close(mix(x[order]), expected[order])


@pytest.mark.parametrize("kind", [0, 1])
def test_images_of_one_type_leave_the_other_batch_norm_as_it_is(kind) -> None:
    mix, route = mixed()
    other = (mix.adv, mix.clean)[kind]
    before = copy.deepcopy(other.state_dict())
    with route.told((), None, rows_by_type(torch.full((4,), kind), 4)):
        mix(torch.randn(4, 5, 3, 3))
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    assert (mix.clean, mix.adv)[kind].num_batches_tracked == 1


def test_rows_by_type() -> None:
    assert rows_by_type(torch.tensor([0, 0, 1]), 3) == rows_by_type(2, 3)
    assert rows_by_type(2, 3) == (slice(0, 2), slice(2, 3))
    clean, adv = rows_by_type(torch.tensor([1, 0, 1]), 3)
    assert clean.tolist() == [1]
    assert adv.tolist() == [0, 2]
    with pytest.raises(ConfigurationError, match=r"\[0, 2\]"):
        rows_by_type(torch.tensor([0, 2]), 2)
    with pytest.raises(ConfigurationError, match="each of 3 images"):
        rows_by_type(torch.tensor([0, 1]), 3)
    with pytest.raises(ConfigurationError, match="4 of 3 images"):
        rows_by_type(4, 3)


def test_straight_through_has_hard_values_and_soft_gradients() -> None:
    u = torch.tensor([[0.3, 0.1], [-1.0, 2.0]], requires_grad=True)
    p = u.softmax(1)
    hard = straight_through(p)
    torch.testing.assert_close(hard, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    weights = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    found = torch.autograd.grad((hard * weights).sum(), u, retain_graph=True)[0]
    soft = torch.autograd.grad((p * weights).sum(), u)[0]
    assert torch.equal(found, soft)
    assert soft.abs().min() > 0


@pytest.mark.parametrize("p", [[0.5, 0.6], [-0.1, 1.1], [[0.5, 0.5]] * 3, [1.0, 0.0, 0.0]], ids=str)
def test_what_is_no_distribution_is_refused(p) -> None:
    with pytest.raises(ConfigurationError, match=r"\(clean, adversarial\)"):
        check_probabilities(torch.tensor(p), 2)
    assert check_probabilities(torch.tensor([0.0, 1.0]), 3).tolist() == [[0.0, 1.0]] * 3
