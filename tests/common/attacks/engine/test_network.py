"""The attack-side network: the same function, and nothing of it left behind."""

import copy
import gc
import logging
import pickle
import weakref

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

SMALL = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "in_channels": 3}
# What is built, and how many of its batch-norms come straight behind a convolution of their own.
NETWORKS = {
    "resnet": (lambda: ResNet(depths=(1, 2), widths=(4, 6), strides=(1, 2), **SMALL), 8),
    "digits_resnet": (lambda: DigitsResNet(in_channels=3), 11),
    "cifar_resnet": (lambda: CifarResNet(8, **SMALL), 7),
    "preact_resnet": (
        lambda: PreActResNet(depths=(1, 2), widths=(4, 6), strides=(1, 2), **SMALL),
        3,
    ),
    "wide_resnet": (lambda: WideResNet(10, 1, drop_rate=0.3, **SMALL), 3),
    "vgg": (lambda: VGG(depths=(1, 2), widths=(4, 6), strides=(2, 2), hidden=(5,), **SMALL), 3),
    "vgg_without_norm": (lambda: VGG((1, 1), (4, 6), (2, 2), norm=False, **SMALL), 0),
    "alexnet": (lambda: AlexNet(widths=(4, 6, 6, 6, 6), hidden=(8,), **SMALL), 0),
    "vit": (lambda: ViT(16, 4, dim=8, depth=1, heads=2, head_dim=4, mlp_dim=8, **SMALL), 0),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def lived(net: nn.Module) -> nn.Module:
    """In eval mode, with statistics and scales as after some training."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.3, 2.0)
            if module.affine:
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


@every_network
@pytest.mark.parametrize("channels_last", [False, True])
def test_logits_and_input_gradients_are_those_of_the_network(name: str, channels_last) -> None:
    build, folds = NETWORKS[name]
    net = lived(build()).double()
    x = images().double()
    engine = AttackEngine(channels_last=channels_last)
    with frozen(net):
        wanted = both(net, x)
        with engine.applied(net, x):
            found = both(net, x)
    assert engine.folded(net, x) == folds
    for one, other in zip(wanted, found, strict=True):
        assert one.abs().max() > 1e-6, "nothing to compare"
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)


@every_network
def test_afterwards_the_network_is_what_it_was(name: str) -> None:
    net = lived(NETWORKS[name][0]())
    modules, state = dict(net.named_modules()), copy.deepcopy(net.state_dict())
    parameters = [id(parameter) for parameter in net.parameters()]
    logits = net(images())
    engine = AttackEngine(precision="bf16")

    def interrupted() -> None:
        with engine.applied(net, images()):
            assert not torch.equal(net(images()).float(), logits) or name.endswith("vit")
            raise RuntimeError("in the middle of an attack")

    with pytest.raises(RuntimeError, match="in the middle"):
        interrupted()
    assert all(module is modules[key] for key, module in net.named_modules())
    assert [id(parameter) for parameter in net.parameters()] == parameters
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert torch.equal(net(images()), logits)
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("how", ["optimiser", "data", "statistics", "loaded"])
def test_weights_are_brought_up_to_date(how: str) -> None:
    net = lived(DigitsResNet(in_channels=3)).double()
    x, engine = images().double(), AttackEngine()
    with engine.applied(net, x):
        before = net(x)
    if how == "optimiser":
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net(x).square().sum().backward()
        optimizer.step()
    elif how == "data":  # leaves no trace in the version of a tensor
        net.stem.conv.weight.data.mul_(1.5)
    elif how == "statistics":
        net.train()(x)
        net.eval()
    else:
        net.load_state_dict(lived(DigitsResNet(in_channels=3)).double().state_dict())
    wanted = net(x)
    with engine.applied(net, x):
        found = net(x)
    assert (found - before).abs().max() > 1e-4
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_weights_of_its_own_are_there_during_attacks_alone() -> None:
    net = lived(DigitsResNet(in_channels=3))
    engine, made = AttackEngine(), []
    for _ in range(2):
        with engine.applied(net, images()):
            weights = [m.weight for m in net.modules() if type(m) is nn.Conv2d]
            made += [weakref.ref(weight) for weight in weights]
        del weights
    gc.collect()
    assert len(made) == 22
    assert all(ref() is None for ref in made)


def test_compiled_ones_stay_where_they_are() -> None:
    net = lived(DigitsResNet(in_channels=3))
    engine, seen = AttackEngine(compile="default"), []
    for _ in range(2):
        with engine.applied(net, images()):
            seen.append([m.weight.data_ptr() for m in net.modules() if type(m) is nn.Conv2d])
    assert seen[0] == seen[1]
    assert not set(seen[0]) & {parameter.data_ptr() for parameter in net.parameters()}


def test_a_network_that_was_rebuilt_gets_new_stand_ins() -> None:
    net = lived(DigitsResNet(in_channels=3))
    x, engine = images(), AttackEngine()
    with engine.applied(net, x):
        pass
    net.stem.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    wanted = net(x)
    with engine.applied(net, x):
        found = net(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with engine.applied(net.double(), x.double()):  # nor does another type confuse it
        assert net(x.double()).dtype == torch.float64


def test_does_not_keep_a_network_alive() -> None:
    net = lived(DigitsResNet(in_channels=3))
    engine = AttackEngine()
    with engine.applied(net, images()):
        pass
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


def test_copies_and_files_of_an_engine_take_no_network_along() -> None:
    net = lived(DigitsResNet(in_channels=3))
    engine = AttackEngine(channels_last=False)
    with engine.applied(net, images()):
        pass
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert other.settings() == engine.settings()
        assert len(other._plans.of) == 0


# -------------------------------------------------------------------------- what is not folded


class Odd(nn.Module):
    """One convolution and one norm, put together in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.maps(x).mean(dim=(2, 3)))


class Plain(Odd):
    def maps(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class UsedTwice(Odd):
    def maps(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return self.bn(z) + z.relu()


class TwoNorms(Odd):
    """As batch-norms mixed by a router are."""

    def maps(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return 0.3 * self.bn(z) + 0.7 * self.other(z)


class Between(Odd):
    def maps(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x) * 1.5)


class CalledTwice(Odd):
    def maps(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn(self.conv(x.flip(3)))


class DataDependent(Odd):
    """A branch on values cannot be read off the code."""

    def maps(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) if x.mean() > 0.1 else self.other(self.conv(x))


class OwnConvolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


class Subclassed(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.conv = OwnConvolution(3, 4, 3)


class Batchwise(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4, track_running_stats=False)


class WeightRead(Odd):
    """Convolves with its layer's weight beside calling it."""

    def maps(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=1)


class Inside(Odd):
    """Reaches past a child's forward method, to what comes between its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))

    def maps(self, x: Tensor) -> Tensor:
        if len(x) > 10**6:  # not to be read
            return self.part(x)
        z = self.part[0](x)
        return self.part[1](z * torch.sigmoid(z))


def hooked() -> Plain:
    net = Plain()
    net.conv.register_forward_hook(lambda module, args, out: out * 1.0)
    return net


def shared() -> nn.Module:
    first, second = Plain(), Plain()
    second.conv = first.conv
    net = nn.ModuleDict({"first": first, "second": second})
    net.forward = lambda x: first(x) + second(x)
    return net


@pytest.mark.parametrize(
    "build",
    [
        *(UsedTwice, TwoNorms, Between, CalledTwice, DataDependent, Subclassed, WeightRead),
        *(Inside, hooked, shared),
    ],
)
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_what_cannot_be_folded_keeps_its_exact_path(build, precision) -> None:
    net = lived(build())
    if hasattr(net, "other"):
        lived(net.other)
    x = images(size=8)
    engine = AttackEngine(channels_last=False, precision=precision)
    assert engine.folded(net, x) == 0
    with frozen(net):
        wanted = both(net, x)
        with engine.applied(net, x):
            found = both(net, x)
    if precision == "32":
        assert all(torch.equal(*pair) for pair in zip(wanted, found, strict=True))
    else:
        torch.testing.assert_close(found[0].float(), wanted[0], rtol=0.05, atol=0.05)


def test_the_same_parts_in_the_usual_way_are_folded() -> None:
    assert AttackEngine().folded(lived(Plain()), images(size=8)) == 1
    assert AttackEngine(fold=False).folded(lived(Plain()), images(size=8)) == 0
    assert foldable(Batchwise()) == []


def test_a_branch_at_the_top_does_not_spoil_the_blocks_below() -> None:
    class Top(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = DigitsResNet(in_channels=3)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.amax() > 0 else self.net(-x)

    assert AttackEngine().folded(lived(Top()), images(size=8)) == 11


@pytest.mark.parametrize(
    "build", [Inside, lambda: Structured("tuple", offset=1.0)], ids=["logits", "features"]
)
def test_a_network_that_folding_would_change_is_named_and_used_as_it_is(build, caplog) -> None:
    net, x = lived(build()), images(size=8)
    with caplog.at_level(logging.WARNING), AttackEngine().applied(net, x):
        pass
    assert AttackEngine().folded(net, x) == 0
    assert f"attacks use {type(net).__name__} as it is" in caplog.text


@pytest.mark.parametrize("is_known", [False, True])
def test_training_mode_is_refused(is_known: bool) -> None:
    net = lived(DigitsResNet(in_channels=3))
    engine = AttackEngine()
    if is_known:
        with engine.applied(net, images()):
            pass
    net.train()
    with pytest.raises(ValueError, match="training mode"), engine.applied(net, images()):
        pass
    assert type(net.stem.bn) is nn.BatchNorm2d
    net.eval()
    assert engine.folded(net, images()) == 11


class Switched(Odd):
    """Two branches, and a flag between them, as auxiliary batch-norms have."""

    which = "bn"

    def __init__(self) -> None:
        super().__init__()
        self.which = "bn"

    def maps(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return self.bn(z) if self.which == "bn" else self.other(z)


def with_late_hook(net: nn.Module) -> None:
    net.bn.register_forward_hook(lambda module, args, out: out * 1.5)


def with_other_padding(net: nn.Module) -> None:
    net.conv.padding_mode = "circular"
    net.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


def with_other_branch(net: nn.Module) -> None:
    net.which = "other"


def with_a_tuple_of_tensors(net: nn.Module) -> None:
    net.kept = (torch.zeros(3), 1)
    net.which = "other"


def with_weight_norm(net: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(net.conv)


@pytest.mark.parametrize(
    "change",
    [
        *(with_late_hook, with_other_padding, with_other_branch, with_weight_norm),
        with_a_tuple_of_tensors,
    ],
)
def test_what_changes_in_a_network_is_noticed(change) -> None:
    net, x, engine = lived(Switched()), images(size=8), AttackEngine()
    before = net(x)
    assert engine.folded(net, x) == 1
    net.kept = (torch.ones(3), 1)
    plan = engine._plan(net, x)
    net.kept = (torch.ones(3), 1)
    assert engine._plan(net, x) is plan  # planning takes longer than an attack
    change(net)
    wanted = net(x)
    with frozen(net), engine.applied(net, x):
        found = net(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    if change is not with_weight_norm:
        assert (wanted - before).abs().max() > 1e-3


class Traces(Plain):
    """Counts its calls, keeps what it saw, and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return super().forward(x + 0.0 * torch.rand(()))


def test_planning_leaves_no_trace() -> None:
    net, x = lived(Traces()), images(size=8)
    state = torch.get_rng_state()
    assert AttackEngine().folded(net, x) in (0, 1)
    assert net.seen == []
    assert torch.equal(torch.get_rng_state(), state)


def test_an_engine_works_in_inference_mode() -> None:
    net, x, engine = lived(Plain()), images(size=8), AttackEngine()
    attack, y = PGD(0.05, 0.02, 3, "zero"), torch.zeros(3, dtype=torch.long)
    with frozen(net):
        wanted = attack(lambda z: cross_entropy(net(z), y), x)
        with torch.inference_mode(), engine.applied(net, x):
            found = attack(lambda z: cross_entropy(net(z), y.clone()), x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_folded_norm_can_still_be_read() -> None:
    net, x = lived(Plain()), images(size=8)
    norm = net.bn
    with AttackEngine().applied(net, x):
        assert net.bn is not norm
        assert net.bn.weight is norm.weight
        assert net.bn.running_var is norm.running_var
        with pytest.raises(AttributeError, match="nothing"):
            _ = net.bn.nothing


def test_in_float32_the_autocast_around_it_stays() -> None:
    net, x = lived(Plain()), images(size=8)
    for engine in (AttackEngine(), AttackEngine(precision="bf16")):
        with torch.autocast("cpu", torch.bfloat16), engine.applied(net, x):
            assert net(x).dtype == torch.bfloat16
    with AttackEngine().applied(net, x):
        assert net(x).dtype == torch.float32


# -------------------------------------------------------------------------------- bf16, compiled


def test_reduced_precision_is_close_and_pixels_stay_float32() -> None:
    net = lived(ResNet(depths=(1, 1), widths=(8, 16), strides=(1, 2), **SMALL))
    x, seen = images(8), []
    engine = AttackEngine(precision="bf16")
    hook = net.stem.act.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    with frozen(net):
        wanted, exact = both(net, x)
        with engine.applied(net, x):
            found, gradient = both(net, x)
    hook.remove()
    assert torch.bfloat16 in seen
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)
    assert (gradient.sign() == exact.sign()).float().mean() > 0.9
    assert not torch.equal(gradient, exact)


def test_wrapped_functions_work_where_autocast_is_off() -> None:
    net = lived(DigitsResNet(in_channels=3))
    x, engine = images(), AttackEngine(precision="bf16")
    with engine.applied(net, x), torch.autocast("cpu", enabled=False):
        logits, pair = engine.wrap(net)(x), engine.wrap(lambda z: (net(z), z))(x)
    assert logits.dtype == pair[0].dtype == torch.float32
    assert torch.equal(pair[1], x)
    plain = AttackEngine()
    assert plain.wrap(net) is net


def test_float32_twin() -> None:
    engine = AttackEngine(precision="bf16", channels_last=False)
    twin = engine.in_float32()
    assert twin.settings() == AttackEngine(channels_last=False).settings()
    assert twin is engine.in_float32()
    assert twin.in_float32() is twin


@pytest.mark.slow
def test_compiled_passes_give_the_same_images() -> None:
    net = lived(ResNet(depths=(1,), widths=(4,), strides=(1,), **SMALL))
    x, y = images(4, 8), torch.tensor([0, 1, 2, 3])
    attack, engine = PGD(0.05, 0.02, 3, "zero"), AttackEngine(compile="default")
    loss = lambda z: F.cross_entropy(net(z), y, reduction="none")  # noqa: E731
    with frozen(net):
        wanted = attack(loss, x)
        for _ in range(2):
            with engine.applied(net, x):
                assert net._compiled_call_impl is not None
                found = attack(loss, x)
    assert net._compiled_call_impl is None
    assert (found - wanted).abs().gt(1e-6).float().mean() < 0.01


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="one of 32, bf16, got 'fp16'"):
        AttackEngine(precision="fp16")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="compile must be one of"):
        AttackEngine(compile="fast")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_the_loop_never_waits_for_the_device(precision) -> None:
    net = lived(ResNet(depths=(1, 1), widths=(8, 16), strides=(1, 2))).cuda()
    x, y = images(8).cuda(), torch.zeros(8, dtype=torch.long, device="cuda")
    attack, engine = PGD(0.05, 0.02, 3, "zero"), AttackEngine(precision=precision)
    loss = lambda z: F.cross_entropy(net(z).float(), y, reduction="none")  # noqa: E731
    with frozen(net):
        with engine.applied(net, x):
            attack(loss, x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with engine.applied(net, x):
                x_adv = attack(loss, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert (x_adv - x).abs().max() > 0.04


class Structured(nn.Module):
    """Returns its logits with features, as many networks do."""

    def __init__(self, kind: str, offset: float = 0.0) -> None:
        super().__init__()
        self.net = lived(ResNet(depths=(1,), widths=(4,), strides=(1,), **SMALL))
        self.kind, self.offset = kind, offset

    def forward(self, x: Tensor):
        z = self.net.stages(self.net.stem(self.net.normalize(x)))
        logits = self.net.head(z)
        # What breaks folding here is in the features alone.
        seen = self.net.stem.conv(self.net.normalize(x)) if self.offset else z
        found = {"logits": logits, "features": seen, "count": torch.tensor(3), "none": None}
        return {"dict": found, "list": list(found.values()), "tuple": tuple(found.values())}[
            self.kind
        ]


@pytest.mark.parametrize(
    ("kind", "precision"), [("tuple", "32"), ("list", "32"), ("dict", "32"), ("dict", "bf16")]
)
def test_a_network_may_return_more_than_logits(kind: str, precision: str) -> None:
    net, x = Structured(kind).eval(), images()
    engine = AttackEngine(precision=precision)
    wanted = net(x)
    with engine.applied(net, x):
        got = net(x)
    assert engine.folded(net, x) == 3
    name = "logits" if kind == "dict" else 0
    torch.testing.assert_close(
        got[name].float(), wanted[name], rtol=1e-4, atol=0.05 if precision == "bf16" else 1e-4
    )
