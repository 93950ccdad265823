"""The attack-side network: the same function, and nothing of it left behind."""

import copy
import gc
import logging
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.attacks.engine.folding import foldable
from common.attacks.engine.network import AttackEngine
from common.attacks.losses import cross_entropy
from common.attacks.pgd import PGD, input_gradient
from common.errors import ConfigurationError
from common.modes import frozen
from common.networks.alexnet import AlexNet
from common.networks.preact_resnet import PreActResNet
from common.networks.resnet import CifarResNet, DigitsResNet, ResNet
from common.networks.vgg import VGG
from common.networks.vit import ViT
from common.networks.wide_resnet import WideResNet

COLOUR = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "in_channels": 3}
SMALL = {"depths": (1, 2), "widths": (4, 6), "strides": (1, 2), **COLOUR}
NETWORKS = {  # and how many of their batch-norms are folded
    "resnet": (lambda: ResNet(**SMALL), 8),
    "digits_resnet": (lambda: DigitsResNet(in_channels=3), 11),
    "cifar_resnet": (lambda: CifarResNet(8, **COLOUR), 7),
    "preact_resnet": (lambda: PreActResNet(**SMALL), 3),
    "wide_resnet": (lambda: WideResNet(10, 1, drop_rate=0.3, **COLOUR), 3),
    "vgg": (lambda: VGG(hidden=(5,), **SMALL | {"strides": (2, 2)}), 3),
    "vgg_without_norm": (lambda: VGG((1, 1), (4, 6), (2, 2), norm=False, **COLOUR), 0),
    "alexnet": (lambda: AlexNet(widths=(4, 6, 6, 6, 6), hidden=(8,), **COLOUR), 0),
    "vit": (lambda: ViT(16, 4, dim=8, depth=1, heads=2, head_dim=4, mlp_dim=8, **COLOUR), 0),
}


def lived(net: nn.Module) -> nn.Module:
    """In eval mode, with statistics and scales as after some training."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.3, 2.0)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net.eval()


def images(n: int = 3, size: int = 16) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(5))


def both(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the input gradient of a loss that has every logit in it."""
    weights = torch.linspace(-1, 1, net(x[:1]).shape[1], dtype=x.dtype)
    gradient = input_gradient(lambda z: (net(z) * weights).sum(1).tanh(), x)
    return net(x).detach(), gradient


def applied(engine: AttackEngine, net: nn.Module, x: Tensor) -> Tensor:
    with engine.applied(net, x):
        return net(x)


def folds(engine: AttackEngine, net: nn.Module, x: Tensor) -> int:
    return len(engine._plan(net, x).pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_input_gradients_are_those_of_the_network(name: str) -> None:
    build, folded = NETWORKS[name]
    net, x = lived(build()).double(), images().double()
    with frozen(net):
        wanted = both(net, x)
    for engine in (AttackEngine(), AttackEngine(channels_last=False)):
        with frozen(net), engine.applied(net, x):
            found = both(net, x)
        assert folds(engine, net, x) == folded
        for one, other in zip(wanted, found, strict=True):
            assert one.abs().max() > 1e-6, "nothing to compare"
            torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_afterwards_the_network_is_what_it_was(name: str) -> None:
    net = lived(NETWORKS[name][0]())
    modules, state = dict(net.named_modules()), copy.deepcopy(net.state_dict())
    parameters = [id(parameter) for parameter in net.parameters()]
    logits = net(images())

    def interrupted() -> None:
        with AttackEngine(precision="bf16").applied(net, images()):
            assert not torch.equal(net(images()).float(), logits) or name == "vit"
            raise RuntimeError("in the middle of an attack")

    with pytest.raises(RuntimeError, match="in the middle"):
        interrupted()
    assert all(module is modules[key] for key, module in net.named_modules())
    assert [id(parameter) for parameter in net.parameters()] == parameters
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert torch.equal(net(images()), logits)
    assert all(parameter.requires_grad for parameter in net.parameters())


def optimised(net: nn.Module) -> None:
    net(images().double()).square().sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()


CHANGES = {
    "optimiser": optimised,
    "data": lambda net: net.stem.conv.weight.data.mul_(1.5),  # no new version of the tensor
    "statistics": lambda net: net.train()(images().double()),
    "loaded": lambda net: net.load_state_dict(lived(DigitsResNet(in_channels=3)).state_dict()),
    "rebuilt": lambda net: setattr(
        net.stem, "conv", nn.Conv2d(3, 16, 3, padding=1, bias=False).double()
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_are_brought_up_to_date(change: Callable[[nn.Module], object]) -> None:
    net, x, engine = lived(DigitsResNet(in_channels=3)).double(), images().double(), AttackEngine()
    before = applied(engine, net, x)
    change(net)
    wanted = net.eval()(x)
    found = applied(engine, net, x)
    assert (found - before).abs().max() > 1e-4
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert applied(engine, net.float(), x.float()).dtype == torch.float32


def test_weights_of_stand_ins_and_the_network_are_not_kept_alive() -> None:
    net, engine, made = lived(DigitsResNet(in_channels=3)), AttackEngine(), []
    for _ in range(2):
        with engine.applied(net, images()):
            convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
            held = [
                part for conv in convs for part in conv._parameters.values() if part is not None
            ]
            made += [weakref.ref(part) for part in held]
        del convs, held
    gc.collect()
    assert len(made) > 2 * 2 * 11  # weights and biases, and what products have
    assert all(ref() is None for ref in made)
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert other.settings() == engine.settings()
        assert len(other._plans.of) == 0
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("is_run", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_weights_stay_where_they_are_and_images_are_the_same(is_run: bool) -> None:
    net = lived(ResNet(depths=(1,), widths=(4,), strides=(1,), **COLOUR))
    x, y = images(4, 8), torch.tensor([0, 1, 2, 3])
    attack, engine, seen = PGD(0.05, 0.02, 3, "zero"), AttackEngine(compile="default"), []
    with frozen(net):
        wanted = attack(lambda z: cross_entropy(net(z), y), x)
        for _ in range(2):
            with engine.applied(net, x):
                seen.append([m.weight.data_ptr() for m in net.modules() if type(m) is nn.Conv2d])
                assert net._compiled_call_impl is not None
                if is_run:
                    found = attack(lambda z: cross_entropy(net(z), y), x)
                    assert (found - wanted).abs().gt(1e-6).float().mean() < 0.01
    assert net._compiled_call_impl is None
    assert seen[0] == seen[1]
    assert not set(seen[0]) & {parameter.data_ptr() for parameter in net.parameters()}


# -------------------------------------------------------------------------- what is not folded


class Odd(nn.Module):
    """A convolution and a norm, put together by a function (network, images) -> maps."""

    def __init__(self, maps: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.other, self.head = nn.BatchNorm2d(4), nn.Linear(4, 10)
        self.maps, self.which = maps, "bn"

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.maps(self, x).mean(dim=(2, 3)))


def usual(n: nn.Module, x: Tensor) -> Tensor:
    return n.bn(n.conv(x))


def inside(n: nn.Module, x: Tensor) -> Tensor:
    """Reaches past a child's forward method, to what comes between its parts."""
    if len(x) > 10**6:  # not to be traced
        return n.part(x)
    z = n.part[0](x)
    return n.part[1](z * torch.sigmoid(z))


def switched(n: nn.Module, x: Tensor) -> Tensor:
    z = n.conv(x)
    return n.bn(z) if n.which == "bn" else n.other(z)


class OwnConvolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


def reached() -> nn.Module:
    net = Odd(inside)
    net.part = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    return net


def subclassed() -> nn.Module:
    net = Odd(usual)
    net.conv = OwnConvolution(3, 4, 3)
    return net


def hooked() -> nn.Module:
    net = Odd(usual)
    net.conv.register_forward_hook(lambda module, args, out: out * 1.0)
    return net


def shared() -> nn.Module:
    first, second = Odd(usual), Odd(usual)
    second.conv = first.conv
    net = nn.ModuleDict({"first": first, "second": second})
    net.forward = lambda x: first(x) + second(x)
    return net


ODD = {
    "used twice": lambda n, x: n.bn(z := n.conv(x)) + z.relu(),
    "two norms": lambda n, x: 0.3 * n.bn(z := n.conv(x)) + 0.7 * n.other(z),
    "between": lambda n, x: n.bn(n.conv(x) * 1.5),
    "called twice": lambda n, x: n.bn(n.conv(x)) + n.bn(n.conv(x.flip(3))),
    "data": lambda n, x: n.bn(n.conv(x)) if x.mean() > 0.1 else n.other(n.conv(x)),
    "weight read": lambda n, x: n.bn(n.conv(x)) + F.conv2d(x, n.conv.weight, padding=1),
}
UNFOLDED = {name: lambda maps=maps: Odd(maps) for name, maps in ODD.items()}
UNFOLDED |= {"inside": reached, "subclassed": subclassed, "hooked": hooked, "shared": shared}


@pytest.mark.parametrize("build", UNFOLDED.values(), ids=UNFOLDED)
def test_what_cannot_be_folded_keeps_its_exact_path(build) -> None:
    net, x = lived(build()), images(size=8)
    engine = AttackEngine(channels_last=False)
    assert folds(engine, net, x) == 0
    with frozen(net):
        wanted = both(net, x)
        with engine.applied(net, x):
            found = both(net, x)
        reduced = applied(engine.but(precision="bf16"), net, x).float()
    assert all(torch.equal(*pair) for pair in zip(wanted, found, strict=True))
    torch.testing.assert_close(reduced, wanted[0], rtol=0.05, atol=0.05)


def test_the_same_parts_in_the_usual_way_are_folded() -> None:
    x = images(size=8)
    assert folds(AttackEngine(), lived(Odd(usual)), x) == 1
    assert folds(AttackEngine(fold=False), lived(Odd(usual)), x) == 0
    branched = Odd(lambda n, x: n.net(x)[..., None, None] if x.amax() > 0 else n.net(-x))
    branched.net, branched.head = DigitsResNet(in_channels=3), nn.Identity()
    assert folds(AttackEngine(), lived(branched), x) == 11
    batchwise = Odd(usual)
    batchwise.bn = nn.BatchNorm2d(4, track_running_stats=False)
    assert foldable(batchwise) == []


class Structured(nn.Module):
    """Returns its logits with features, as many networks do."""

    def __init__(self, kind: type, offset: float = 0.0) -> None:
        super().__init__()
        self.net = lived(ResNet(depths=(1,), widths=(4,), strides=(1,), **COLOUR))
        self.kind, self.offset = kind, offset

    def forward(self, x: Tensor):
        z = self.net.stages(self.net.stem(self.net.normalize(x)))
        # What breaks folding here is in the features alone.
        seen = self.net.stem.conv(self.net.normalize(x)) if self.offset else z
        logits, rest = self.net.head(z), {"count": torch.tensor(3), "none": None}
        found = {"logits": logits, "features": seen, **rest}
        return found if self.kind is dict else self.kind(found.values())


@pytest.mark.parametrize(("kind", "precision"), [(tuple, "32"), (dict, "bf16")])
def test_a_network_may_return_more_than_logits(kind: type, precision: str) -> None:
    net, x = Structured(kind).eval(), images()
    engine = AttackEngine(precision=precision)
    name = "logits" if kind is dict else 0
    wanted, got = net(x)[name], applied(engine, net, x)[name]
    assert folds(engine, net, x) == 3
    torch.testing.assert_close(
        got.float(), wanted, rtol=1e-4, atol=0.05 if precision == "bf16" else 1e-4
    )


class Detached(nn.Module):
    """Normalises only where no gradient is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return (z if torch.is_grad_enabled() else self.bn(z)).mean((2, 3))


@pytest.mark.parametrize(
    "build",
    [reached, lambda: Structured(tuple, offset=1.0), Detached],
    ids=["logits", "features", "with gradients"],
)
def test_a_network_that_folding_would_change_is_named_and_used_as_it_is(build, caplog) -> None:
    net, x = lived(build()), images(size=8)
    with caplog.at_level(logging.WARNING):
        assert folds(AttackEngine(), net, x) == 0
    assert f"attacks use {type(net).__name__} as it is" in caplog.text


class Clipped(nn.Module):
    """Changes its images in place."""

    def __init__(self) -> None:
        super().__init__()
        self.net = DigitsResNet(in_channels=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.clamp_(0.0, 1.0))


def test_images_may_be_changed_in_place() -> None:
    assert folds(AttackEngine(), lived(Clipped()), images()) == 11


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_networks_stay_as_they_are() -> None:
    net, x = lived(DigitsResNet(in_channels=3)), images(size=8)
    for scripted in (torch.jit.script(net.stem), torch.jit.trace(net, x)):
        wanted = scripted(x)
        torch.testing.assert_close(applied(AttackEngine(), scripted, x), wanted)


def test_reduced_precision_takes_no_images_in_float64() -> None:
    net, x = lived(DigitsResNet(in_channels=3)).double(), images().double()
    with pytest.raises(ConfigurationError, match="got float64; use precision 32"):
        applied(AttackEngine(precision="bf16"), net, x)


def test_training_mode_is_refused() -> None:
    net, engine = lived(DigitsResNet(in_channels=3)), AttackEngine()
    for _ in range(2):  # before and after the network is known
        with pytest.raises(ValueError, match="training mode"):
            applied(engine, net.train(), images())
        assert type(net.stem.bn) is nn.BatchNorm2d
        assert folds(engine, net.eval(), images()) == 11


def other_padding(net: nn.Module) -> None:
    net.conv.padding_mode = "circular"
    net.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


NOTICED = {
    "hook": lambda net: net.bn.register_forward_hook(lambda module, args, out: out * 1.5),
    "padding": other_padding,
    "branch": lambda net: setattr(net, "which", "other"),
    "method": lambda net: setattr(
        net.bn, "forward", lambda x: 2.0 * type(net.bn).forward(net.bn, x)
    ),
    "weight norm": lambda net: torch.nn.utils.parametrizations.weight_norm(net.conv),
}


@pytest.mark.parametrize("name", NOTICED)
def test_what_changes_in_a_network_is_noticed(name: str) -> None:
    net, x, engine = lived(Odd(switched)), images(size=8), AttackEngine()
    before = net(x)
    assert folds(engine, net, x) == 1
    net.kept = (torch.ones(3), 1)
    plan = engine._plan(net, x)
    net.kept = (torch.zeros(3), 1)
    assert engine._plan(net, x) is plan  # planning takes longer than an attack
    NOTICED[name](net)
    wanted = net(x)
    with frozen(net):
        found = applied(engine, net, x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert name == "weight norm" or (wanted - before).abs().max() > 1e-3


def test_planning_leaves_no_trace() -> None:
    seen: list[Tensor] = []

    def counted(n: nn.Module, x: Tensor) -> Tensor:
        n.seen.append(x)
        return usual(n, x + 0.0 * torch.rand(()))

    net, x = lived(Odd(counted)), images(size=8)
    net.seen = seen
    state = torch.get_rng_state()
    assert folds(AttackEngine(), net, x) in (0, 1)
    assert seen == []
    assert torch.equal(torch.get_rng_state(), state)


def test_attacks_in_inference_mode_are_the_same_and_a_folded_norm_can_be_read() -> None:
    net, x, y = lived(Odd(usual)), images(size=8), torch.zeros(3, dtype=torch.long)
    attack, norm = PGD(0.05, 0.02, 3, "zero"), net.bn
    with frozen(net):
        wanted = attack(lambda z: cross_entropy(net(z), y), x)
        with torch.inference_mode(), AttackEngine().applied(net, x):
            found = attack(lambda z: cross_entropy(net(z), y.clone()), x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    with AttackEngine().applied(net, x):
        assert net.bn is not norm
        assert net.bn.weight is norm.weight
        assert net.bn.running_var is norm.running_var
        with pytest.raises(AttributeError, match="nothing"):
            _ = net.bn.nothing


# -------------------------------------------------------------------------------- bf16, compiled


def test_in_float32_the_autocast_around_it_stays() -> None:
    net, x = lived(Odd(usual)), images(size=8)
    assert applied(AttackEngine(), net, x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        for precision in ("32", "bf16"):
            assert applied(AttackEngine(precision=precision), net, x).dtype == torch.bfloat16


def test_wrapped_functions_work_where_autocast_is_off() -> None:
    net, x, engine = lived(DigitsResNet()), images()[:, :1], AttackEngine(precision="bf16")
    with engine.applied(net, x), torch.autocast("cpu", enabled=False):
        logits, pair = engine.wrap(net)(x), engine.wrap(lambda z: (net(z), z))(x)
    assert logits.dtype == pair[0].dtype == torch.float32
    assert torch.equal(pair[1], x)
    assert AttackEngine().wrap(net) is net
    twin = engine.in_float32()
    assert twin.settings() == AttackEngine().settings()
    assert twin is engine.in_float32()
    assert twin.in_float32() is twin


@pytest.mark.parametrize("name", ["precision", "compile"])
def test_settings_that_mean_nothing_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="fp16"):
        AttackEngine(**{name: "fp16"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_the_loop_never_waits_for_the_device(precision) -> None:
    net = lived(ResNet(depths=(1, 1), widths=(8, 16), strides=(1, 2))).cuda()
    x, y = images(8).cuda(), torch.zeros(8, dtype=torch.long, device="cuda")
    attack, engine = PGD(0.05, 0.02, 3, "zero"), AttackEngine(precision=precision)
    with frozen(net):
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            try:
                with engine.applied(net, x):
                    x_adv = attack(lambda z: cross_entropy(net(z), y), x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert (x_adv - x).abs().max() > 0.04


def test_reduced_precision_is_close_and_pixels_stay_float32() -> None:
    net = lived(ResNet(depths=(1, 1), widths=(8, 16), strides=(1, 2), **COLOUR))
    x, seen = images(8), []
    net.stem.act.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    with frozen(net):
        wanted, exact = both(net, x)
        with AttackEngine(precision="bf16").applied(net, x):
            found, gradient = both(net, x)
    assert torch.bfloat16 in seen
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)
    assert (gradient.sign() == exact.sign()).float().mean() > 0.9
    assert not torch.equal(gradient, exact)
