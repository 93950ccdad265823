from contextlib import nullcontext

import pytest
import torch
from torch import nn

from common.attacks.losses import cross_entropy
from common.attacks.pgd import input_gradient
from common.evaluation.audit.gradients import (
    anchored,
    cosine,
    directional_derivatives,
    gradient_norms,
    in_double,
    straight_through,
    undetached,
)

X = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1


def gradient(function, x=X, context=None):
    x = x.clone().requires_grad_()
    with context or nullcontext():
        y = function(x.clone())
    (found,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), found


def agreement(loss, x, h, own=False):
    signs = torch.randint(0, 2, (16, *x.shape), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return cosine(*directional_derivatives(loss, x, signs, h, own))


# ----------------------------------------------------------------------------------- undetached


def without_grad(x):
    with torch.no_grad():
        return 3 * x


def in_inference(x):
    with torch.inference_mode():
        y = 3 * x
    return y.clone()


def enabled_again(x):
    with torch.no_grad():
        x = 3 * x
        with torch.enable_grad():
            x = x * 1
        return x * 1


CUTS = {
    "detach": lambda x: 3 * x.detach(),
    "detach_": lambda x: (3 * x).detach_(),
    "data": lambda x: 3 * x.data,
    "tensor": lambda x: 3 * x.new_tensor(x),
    "no_grad": without_grad,
    "inference": in_inference,
    "enabled": enabled_again,
    "leaf": lambda x: 3 * x.detach().requires_grad_(),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.filterwarnings("ignore:To copy construct")
def test_undetached_restores_a_gradient_and_no_value(cut):
    with torch.no_grad():
        expected = cut(X.clone())
    y, found = gradient(cut, context=undetached())
    assert torch.equal(y, expected)
    assert torch.equal(found, torch.full_like(X, 3.0))


def clipped(x):
    """Writes into aliases."""
    x = 2 * x
    x.detach().clamp_(max=1.0)
    x.data.clamp_(min=0.5)
    return x


S = torch.sigmoid(X)
USES = {
    "mask": (lambda x: x * torch.sigmoid(x).detach(), S + X * S * (1 - S)),
    "alias": (clipped, 2.0 * ((2 * X >= 0.5) & (2 * X <= 1.0))),
    "number for numpy": (lambda x: x * float(x.detach().numpy().max()), X.max().expand_as(X)),
}


@pytest.mark.parametrize(("function", "expected"), USES.values(), ids=USES)
def test_undetached_what_is_cut_takes_part_and_values_stay(function, expected):
    y, found = gradient(function, context=undetached())
    assert torch.equal(y, function(X.clone()))
    torch.testing.assert_close(found, expected)


@torch.enable_grad()
def stumble():
    raise KeyError


@pytest.mark.parametrize("enabled", [True, False])
def test_undetached_leaves_nothing_behind(enabled):
    inference = torch._C._InferenceMode
    with torch.set_grad_enabled(enabled):
        with pytest.raises(KeyError), undetached():
            stumble()
        assert torch.is_grad_enabled() is enabled
        assert torch._C._InferenceMode is inference
    assert not (3 * X.clone().requires_grad_()).detach().requires_grad


# ------------------------------------------------------------------------------ straight_through


class Zeroed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, g):
        return torch.zeros_like(g)


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g / 2


class Codec(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.detach().numpy().round(1))


zeroed = Zeroed.apply  # under a name of its own, as is customary


class Calling(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.tensor(3.0), requires_grad=False)

    def forward(self, x):
        return self.weight * self.function(x)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


STEPS = {
    "round": (lambda x: (4 * x).round() / 4, 1.0),
    "ceil": (lambda x: x.mul(4).ceil(), 4.0),
    "sign": (lambda x: torch.sign(x - 0.5), 1.0),
    "heaviside": (lambda x: torch.heaviside(x - 0.5, x.new_zeros(())), 1.0),
    "in place": (lambda x: (x * 1).round_(), 1.0),
    "floor_divide": (lambda x: x // 0.25, 4.0),
    "rounding_mode": (lambda x: torch.div(x, 0.25, rounding_mode="floor"), 4.0),
    "uint8": (lambda x: (x * 255).to(torch.uint8) / 255, 1.0),
    "bits": (lambda x: (((x * 255).to(torch.uint8) >> 5) << 5).to(torch.float32), 255.0),
    "comparison": (lambda x: (x > 0.5).float(), 1.0),
    "falling": (lambda x: (x <= 0.5).to(x.dtype), -1.0),
    "where": (lambda x: torch.where(x > 0.5, 3.0, 1.0), 2.0),
}


@pytest.mark.parametrize(("step", "slope"), STEPS.values(), ids=STEPS)
def test_straight_through_has_identity_gradients_and_the_same_values(step, slope):
    y, found = gradient(step, context=straight_through(nn.Identity()))
    assert torch.equal(y, step(X.clone()))
    assert torch.allclose(found, torch.full_like(X, slope))


MODULES = {
    "codec": (Codec(), 1.0),
    "zeroed": (Calling(zeroed), 3.0),
    "halved": (Calling(Halved.apply), 1.5),
    "doubled": (Doubled(), 2.0),
    "relu": (nn.ReLU(), 1.0),
}


@pytest.mark.parametrize(("module", "slope"), MODULES.values(), ids=MODULES)
def test_straight_through_bridges_only_modules_without_a_gradient(module, slope):
    net = nn.Sequential(module)
    y, found = gradient(net, context=straight_through(net))
    assert torch.equal(y, net(X))
    assert torch.equal(found, torch.full_like(X, slope))
    assert not module._forward_hooks


def test_straight_through_leaves_working_gradients_alone():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)).eval()

    def function(x):
        return net(Halved.apply(x))

    plain, smooth = gradient(function), gradient(function, context=straight_through(net))
    assert torch.equal(plain[0], smooth[0])
    assert torch.equal(plain[1], smooth[1])


def test_straight_through_puts_everything_back():
    net = Calling(zeroed)
    with pytest.raises(KeyError), straight_through(net):
        raise KeyError
    assert not net._forward_hooks
    _, found = gradient(net)
    assert not found.any()


# ---------------------------------------------------------------------------------- measurements


def test_anchored_losses_without_a_path_have_zero_gradients():
    def loss(x):
        return x.detach().flatten(1).sum(dim=1)

    with pytest.raises(ValueError, match="no gradient"):
        input_gradient(loss, X)
    assert torch.equal(anchored(loss)(X), loss(X))
    assert not input_gradient(anchored(loss), X).any()
    assert torch.equal(gradient_norms(loss, X), torch.zeros(5))


def test_gradient_norms_are_nan_where_a_gradient_is_not_finite():
    x = X.clone()
    x[0, 0, 0, 0] = 0.0
    norms = gradient_norms(lambda x: x.sqrt().flatten(1).sum(dim=1), x)
    assert norms.isnan().tolist() == [True] + 4 * [False]
    assert (norms[1:] > 0).all()


def smooth(x):
    return (3 * x).sin().flatten(1).sum(dim=1)


LOSSES = {
    "smooth": (smooth, 0.999, 1.0),
    "half cut": (lambda x: smooth(x[:, :, :2]) + smooth(x[:, :, 2:].detach()), 0.2, 0.9),
    "cut": (lambda x: smooth(x.detach()), 0.0, 0.0),
    "reversed": (lambda x: smooth(x.detach()) * 2 - smooth(x), -1.0, -0.999),
    "noisy": (lambda x: smooth(x + 0.1 * torch.randn_like(x)), -0.6, 0.6),
}


@pytest.mark.parametrize(("loss", "low", "high"), LOSSES.values(), ids=LOSSES)
def test_agreement(loss, low, high):
    found = agreement(loss, X.double(), 1e-4)
    assert (found > low - 1e-6).float().mean() >= 0.8
    assert (found < high + 1e-6).float().mean() >= 0.8


def test_agreement_on_steps_says_nothing_about_fine_and_something_about_coarse_differences():
    def steps(x):  # a straight-through gradient of its own
        return smooth(x + ((x * 8).round() / 8 - x).detach())

    x = torch.full((2, 1, 4, 4), 0.5, dtype=torch.float64)
    assert agreement(steps, x, 1e-4).isnan().all()
    assert (agreement(steps, x, 0.1, own=True) > 0.5).all()


def test_in_double_is_exact_and_puts_the_very_same_tensors_back():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3))
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in net.state_dict().items()}
    y = torch.zeros(5, dtype=torch.long)
    single = cross_entropy(net.eval()(X), y)
    with in_double(net):
        double = cross_entropy(net(X.double()), y)
    assert double.dtype == torch.float64
    assert torch.allclose(double.float(), single, atol=1e-6)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.data_ptr() == before[name][1]
        assert tensor.dtype == before[name][0].dtype


def test_compiled_networks_run_as_written():
    net = torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), backend="eager")
    net(X)
    with in_double(net):
        assert net(X.double()).dtype == torch.float64
    with undetached(), straight_through(net):
        x = X.clone().requires_grad_()
        assert net(x.clone().detach().round()).requires_grad


def test_differences_are_taken_inside_the_box():
    """A model may look pixels up in a table, which has no row for a negative one."""
    x = torch.tensor([0.0, 1.0]).double().view(2, 1).expand(2, 8)
    seen = []

    def loss(x):
        seen.append(x.detach())
        return x.sum(dim=1)

    signs = torch.tensor([[-1, 1] * 4], dtype=torch.int8).expand(3, 2, 8)
    directional_derivatives(loss, x, signs, 0.05)
    assert float(torch.cat(seen).min()) >= 0.0
    assert float(torch.cat(seen).max()) <= 1.0
