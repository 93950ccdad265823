"""AW-Net and OAT on the common backbones: counts, static equivalence, routes; teachers."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from common.errors import CheckpointError, ConfigurationError
from common.networks.mobilenet_v2 import MobileNetV2
from common.networks.preact_resnet import PreActResNet
from common.networks.resnet import ResNet, ResNet18
from common.networks.vgg import VGG
from common.networks.wide_resnet import WideResNet
from paper_awnet.method import Detector, DynamicConv2d, MixBatchNorm2d, Router
from paper_awnet.networks import (
    LAMBDAS,
    AWNet,
    DigitsStudent,
    OATNet,
    ResNet34,
    ResNet56,
)
from paper_awnet.objectives import MTARD
from paper_awnet.teachers import Teacher

SMALL = partial(Router, widths=(4, 6, 8), type_hidden=5)
WILD = partial(SMALL, init="normal")
STATIC = {
    "resnet": partial(ResNet, depths=(1, 2), widths=(4, 6), strides=(1, 2)),
    "wide": partial(WideResNet, depths=(1, 2), widths=(4, 6), strides=(1, 2), stem_width=4),
    "preact": partial(PreActResNet, depths=(1, 2), widths=(4, 6), strides=(1, 2)),
    "mobile": partial(MobileNetV2, stages=((1, 4, 1, 1), (2, 6, 2, 2)), stem_width=4, head_width=8),
}


def small(name: str = "resnet", router=SMALL, **settings) -> AWNet:
    return AWNet(STATIC[name](in_channels=1), router, **settings)


def test_parameters() -> None:
    """Invariant 2; other sizes stand in the headers of the configurations."""
    with torch.device("meta"):
        nets = (ResNet56(), ResNet34(), AWNet(ResNet18()), AWNet(ResNet18(), Detector))
    found = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert found == [855_770, 21_282_122, 11_780_780, 11_287_340]


def test_signals_of_resnet18_by_block() -> None:
    with torch.device("meta"):
        net, last = AWNet(ResNet18()), AWNet(ResNet18(), scope="last_conv")
    assert [sum(w) for w in net.widths] == [128, 128, 256, 256, 512, 512, 1024, 1024]
    assert [sum(w) for w in last.widths] == [64, 64, 128, 128, 256, 256, 512, 512]
    dynamic = {n for n, m in last.arch.named_modules() if isinstance(m, DynamicConv2d)}
    assert dynamic == {f"stages.{i}.{j}.conv2" for i in range(4) for j in range(2)}


@pytest.mark.parametrize("name", STATIC)
def test_outputs_and_with_static_weights_those_of_the_static_network(name, shake) -> None:
    """Invariants 1 and 4."""
    static, x = shake(STATIC[name](in_channels=1)).eval(), torch.rand(5, 1, 8, 8)
    net = AWNet(copy.deepcopy(static), SMALL).eval()
    for p in (None, torch.tensor([1.0, 0.0]), torch.tensor([0.2, 0.8])):
        found = net.outputs(x, p=p).logits
        torch.testing.assert_close(found, static(x), atol=1e-5, rtol=1e-4)
    net = small(name, WILD).eval()
    out = net.outputs(x)
    assert out.logits.shape == (5, 10)
    assert out.type_logits.shape == out.p.shape == (5, 2)
    assert torch.allclose(out.p.sum(1), torch.ones(5))
    assert [s.shape[1] for s in out.signals] == [sum(w) for w in net.widths]
    assert torch.equal(out.logits, net(x))
    single = {n for n, m in net.arch.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {n.rpartition(".")[2] for n in single} == {"clean", "adv"}, "every one is two"


@pytest.mark.parametrize("mixbn", [True, False])
@pytest.mark.parametrize("kind", [Router, Detector])
def test_the_four_combinations_train(kind, mixbn) -> None:
    make = partial(kind, widths=(4, 6, 8), type_hidden=5, init="normal")
    net = small(router=make, mixbn=mixbn)
    assert any(isinstance(m, MixBatchNorm2d) for m in net.modules()) == mixbn
    assert small(router=make).has_mixbn == (kind is Router), "the default"
    static = small(router=make, mixbn=mixbn, dynamic=False)
    assert len(static.router.signal_heads) == 0
    assert not any(isinstance(m, DynamicConv2d) for m in static.modules())
    assert static.eval().outputs(torch.rand(2, 1, 8, 8)).signals == []
    types = torch.tensor([0, 0, 0, 1, 1, 1])
    out = net.outputs(torch.rand(6, 1, 8, 8), types)
    (out.logits.square().sum() + out.type_logits.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.arch.parameters())
    assert all(p.grad is not None for p in net.router.parameters())


def test_given_p_and_signals_reproduce_what_was_not_given(shake) -> None:
    """Invariant 15, and that they matter."""
    net, x, adv = shake(small(router=WILD)).eval(), torch.rand(5, 1, 8, 8), torch.tensor([0.0, 1.0])
    own = net.outputs(x)
    again = net.outputs(x, p=own.p, signals=own.signals)
    torch.testing.assert_close(again.logits, own.logits)
    still = [torch.ones_like(s) for s in own.signals]
    for given in ({"p": adv}, {"signals": still}):
        assert (net.outputs(x, **given).logits - own.logits).abs().max() > 1e-3
    for kind, moves in ((Router, False), (Detector, True)):
        net = small(router=partial(kind, **WILD.keywords)).eval()
        own, forced = net.outputs(x), net.outputs(x, p=adv)
        same = all(torch.equal(a, b) for a, b in zip(own.signals, forced.signals, strict=True))
        assert same != moves, "a forced type moves a detector's signals and not a router's"


def test_mixing_modes(shake) -> None:
    net, x = shake(small(router=WILD)).eval(), torch.rand(6, 1, 8, 8, requires_grad=True)
    p = net.outputs(x).p.detach()
    hard = nn.functional.one_hot(p.argmax(1), 2).float()
    expected = {"soft": p, "hard": hard}
    expected |= {"clean": torch.tensor([1.0, 0.0]), "adv": torch.tensor([0.0, 1.0])}
    for mixing, mixture in expected.items():
        net.mixing = mixing
        live, cut = net(x), net.outputs(x, p=mixture).logits
        torch.testing.assert_close(live, cut)
        if mixing in ("soft", "hard"):  # attacks follow P_type, by the soft one's gradient
            (a,), (b,) = (torch.autograd.grad(z.square().sum(), x) for z in (live, cut))
            assert (a - b).abs().max() > 1e-6


def test_nothing_is_kept_from_a_pass_and_copies_are_independent(shake) -> None:
    net, x = shake(small(router=WILD)).eval(), torch.rand(3, 1, 8, 8)
    before = net(x)
    twin = copy.deepcopy(net)
    route = net.route
    assert (route.signals, route.mixture, route.rows, route.maps) == ((), None, None, ())
    assert twin.route is not net.route
    assert all(m.route is twin.route for m in twin.modules() if isinstance(m, DynamicConv2d))
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(net(x), before)
    assert set(twin.state_dict()) == set(net.state_dict())
    net.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(net(x), before)
    torch._dynamo.reset()


def test_scale_cancellation(shake) -> None:
    """Invariant 7: a scale by type and filter is inert in training mode, not in evaluation."""
    net = shake(small()).double()
    x = torch.rand(8, 1, 8, 8, dtype=torch.float64)
    types = torch.arange(2).repeat_interleave(4)
    own = [torch.ones(8, sum(w), dtype=torch.float64) for w in net.widths]
    scaled = []
    for omega in own:
        by_type = torch.empty(2, omega.shape[1], dtype=torch.float64).uniform_(0.5, 2.0)
        scaled.append(omega * by_type[types])
    with torch.no_grad():
        a = net.outputs(x, types, signals=own).logits
        b = net.outputs(x, types, signals=scaled).logits
        net.eval()
        c, d = (net.outputs(x, signals=s).logits for s in (own, scaled))
    assert (a - b).abs().max() < 1e-3
    assert (c - d).abs().max() > 1e-2


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"VGG.*dynamic: false"):
        AWNet(VGG(), SMALL)
    with pytest.raises(ConfigurationError, match=r"block, last_conv.*all"):
        small(scope="all")
    with pytest.raises(ConfigurationError, match=r"soft, hard, clean, adv.*mean"):
        small(mixing="mean")
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(ConfigurationError, match=r"signals.*\(2, 3\)"):
        small().eval().outputs(x, signals=[torch.ones(2, 3)])
    with pytest.raises(ConfigurationError, match=r"types=.*adversary.mode: eval"):
        small()(x)
    assert small(mixbn=False)(x).shape == (2, 10), "one batch-norm asks for no types"


def test_each_image_has_its_lambda_and_the_knob_sets_that_of_deployment(shake) -> None:
    static = shake(DigitsStudent(widths=(4, 6, 8))).eval()
    net, x = OATNet(copy.deepcopy(static), 0.4, hidden=3).eval(), torch.rand(3, 1, 8, 8)
    for lam in LAMBDAS:  # starts as a network with two batch-norms
        torch.testing.assert_close(net.at(x, lam), static(x))
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    lam = torch.tensor([0.0, 0.4, 1.0])
    found = net.at(x, lam)
    for i in range(3):
        torch.testing.assert_close(found[i : i + 1], net.at(x[i : i + 1], lam[i : i + 1]))
    torch.testing.assert_close(net(x)[1], found[1])
    assert not torch.allclose(net(x)[0], found[0])
    assert net.route.condition is None
    with pytest.raises(ConfigurationError, match=r"OATNet.*types="):
        net.train()(x)
    with pytest.raises(ConfigurationError, match=r"knob.*1\.5"):
        OATNet(DigitsStudent(), 1.5)


SHAPE = (1, 8, 8)


def save(path, net: nn.Module) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {f"net.{k}": v for k, v in net.state_dict().items()}}, path)


def test_found_beside_the_students_run_by_seed(tmp_path) -> None:
    wanted = DigitsStudent()
    path = tmp_path / "runs/paper/teach/seed3/checkpoints/last.ckpt"
    save(path, wanted)
    teacher = Teacher(DigitsStudent(), experiment="teach")
    x = torch.rand(2, *SHAPE)
    assert not torch.allclose(teacher(x), wanted.eval()(x))
    teacher.load(tmp_path / "runs/paper/student/seed3-v2", SHAPE, 10)
    assert torch.equal(teacher(x), wanted(x))
    Teacher(DigitsStudent(), "nowhere", path=str(path)).load(tmp_path, SHAPE, 10)
    with pytest.raises(CheckpointError, match=r"teach.*seed4.*--seed_every"):
        teacher.load(tmp_path / "runs/paper/student/seed4", SHAPE, 10)
    with pytest.raises(CheckpointError, match=r"selected\.ckpt"):
        Teacher(DigitsStudent(), "teach", "selected").load(
            tmp_path / "runs/paper/student/seed3", SHAPE, 10
        )


def test_a_teacher_is_frozen_and_who_holds_it_neither_trains_nor_saves_nor_switches_it() -> None:
    teacher, student = Teacher(DigitsStudent(), as_it_is=True), DigitsStudent()
    assert not teacher(torch.rand(2, *SHAPE, requires_grad=True)).requires_grad
    assert teacher(torch.rand(2, *SHAPE, dtype=torch.float64)).dtype == torch.float64
    holder = nn.ModuleDict({"net": student})
    holder.objective = MTARD(teacher, teacher)
    holder.train()
    assert not teacher.net.training
    assert not any(p.requires_grad for p in teacher.net.parameters())
    assert {id(p) for p in holder.parameters()} == {id(p) for p in student.parameters()}
    state = holder.state_dict()
    assert sum(v.numel() for k, v in state.items() if k.startswith("objective")) == 4
    assert copy.deepcopy(holder).objective.teachers["clean"] is teacher


def test_a_teacher_with_other_classes_or_for_other_images(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match=r"\(7,\).*10"):
        Teacher(DigitsStudent(num_classes=7), as_it_is=True).load(tmp_path, SHAPE, 10)
    with pytest.raises(ConfigurationError, match="3x8x8"):
        Teacher(DigitsStudent(), as_it_is=True).load(tmp_path, (3, 8, 8), 10)
    save(tmp_path / "seven.ckpt", DigitsStudent(num_classes=7))
    with pytest.raises(CheckpointError, match="another network"):
        Teacher(DigitsStudent(), path=str(tmp_path / "seven.ckpt")).load(tmp_path, SHAPE, 10)
    with pytest.raises(ConfigurationError, match="as_it_is"):
        Teacher(DigitsStudent())
