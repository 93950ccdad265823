"""Methods of the papers nested in one network, and trained by any objective."""

import itertools
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel

from common.attacks.engine.network import AttackEngine
from common.attacks.pgd import PGD, input_gradient
from common.callbacks.weight_perturbation import AdversarialWeightPerturbation
from common.classifier import RobustClassifier
from common.cli.start import main
from common.errors import ConfigurationError
from common.evaluation.models import Victim, load_run
from common.modes import frozen
from common.networks.parts import declared_losses
from common.networks.preact_resnet import PreActResNet
from common.networks.resnet import CifarResNet, DigitsResNet, ResNet
from common.networks.wide_resnet import WideResNet
from common.objectives import ALP, AT, MART, TRADES, Natural
from paper_awnet.method import Router
from paper_awnet.networks import DigitsStudent, OATNet, with_router
from paper_awnet.objectives import HybridCE, RoutedTRADES
from paper_cifs.method import (
    CAS,
    CIFS,
    CIFSDigitsResNet,
    CIFSResNet,
    CIFSWideResNet,
    JointCrossEntropy,
    JointTRADES,
    joint_logits,
)
from paper_cifs.networks import with_cifs
from paper_rcm.method import DigitsNet
from paper_rcm.networks import with_larger_input, with_larger_maps
from paper_rcm.objectives import DAJAT
from paper_robustwrn.method import RobustWideResNet, with_budget_rule
from paper_wm.networks import with_weight_maps

EXAMPLE = Path(__file__).parents[1] / "benchmarks/configs/digits_wrn_cifs_trades_awp.yaml"
SHAPE, K = (1, 8, 8), 5
SIZE = {"depths": (1, 1), "widths": (4, 6), "strides": (1, 2), "num_classes": K, "in_channels": 1}


select = partial(CIFS, hidden=4)


def resnet(**settings) -> ResNet:
    return ResNet(**SIZE | settings)


def wide() -> RobustWideResNet:
    return RobustWideResNet((1, 1), channels=(4, 4, 6), num_classes=K, in_channels=1)


def cifs(net: nn.Module, name: str = "stages.0", make=select, **settings) -> nn.Module:
    return with_cifs(net, {name: make}, image_shape=SHAPE, **settings)


class Small(nn.Module):
    """A network without batch-norm, whose first module has a given name."""

    def __init__(self, first: str = "conv") -> None:
        super().__init__()
        self.add_module(first, nn.Conv2d(1, 4, 3))
        self.pool, self.linear = nn.MaxPool2d(2), nn.Linear(4, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, pool, linear = list(self.children())[:3]
        return linear(pool(first(x)).relu().mean((2, 3)))


TWICE = ("stages.1", "stages_1")
maps = partial(with_weight_maps, variant="smoothing", image_shape=SHAPE)
larger = partial(with_larger_maps, image_shape=SHAPE)
enlarged = partial(with_larger_input, scale_factor=2)
rule = partial(with_budget_rule, image_shape=SHAPE)
router = partial(with_router, router=partial(Router, widths=(4, 4), strides=(1, 2), init="normal"))

NETWORKS = {
    "plain": resnet,
    "cifs": lambda: cifs(resnet()),
    "cifs_wide": lambda: with_cifs(wide(), image_shape=SHAPE),
    "cas_preact": lambda: cifs(PreActResNet(**SIZE), "stages.1", CAS),
    "wm": lambda: maps(resnet()),
    "input": lambda: enlarged(resnet()),
    "strides": lambda: larger(wide()),
    "strides_of_cifs": lambda: larger(cifs(Small(), "pool")),
    "input_of_input": lambda: enlarged(enlarged(resnet())),
    "rule": lambda: rule(resnet(widths=(6, 12))),
    "router": lambda: router(wide()),
    "mixbn": lambda: router(resnet(), dynamic=False),
    "router_of_cifs_of_input": lambda: router(cifs(enlarged(resnet()), "arch.stages.1")),
    "input_of_wm_of_router": lambda: enlarged(maps(router(resnet()), image_shape=(1, 16, 16))),
    "cifs_of_wm_of_strides_of_rule": lambda: cifs(maps(larger(rule(resnet(widths=(6, 12)))))),
}
OBJECTIVES = [Natural(), AT(), TRADES(), MART(), ALP()]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return {"x": torch.rand(6, *SHAPE), "y": torch.arange(6) % K, "index": torch.arange(6)}


def attacked(model, batch, loss) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with frozen(model, "eval"):
        return PGD(0.1, 0.02, 1, "uniform")(loss(model, batch), batch["x"], generator)


def take_step(model: RobustClassifier, batch, perturbation: AdversarialWeightPerturbation) -> None:
    """One step of training, as the callbacks and the trainer take it."""
    trainer = SimpleNamespace(
        current_epoch=0,
        precision_plugin=SimpleNamespace(train_step_context=nullcontext),
        strategy=SimpleNamespace(reduce=lambda gradient, reduce_op: gradient),
    )
    if model.objective.needs_x_adv:
        batch["x_adv"] = attacked(model, batch, model.objective.inner)
    perturbation.on_train_batch_start(trainer, model, batch)
    loss = model.objective.outer(model, batch)
    assert loss.isfinite()
    loss.backward()
    perturbation.on_after_backward(trainer)
    torch.optim.SGD(model.parameters(), 0.01).step()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_objective_trains_every_method_which_is_then_attacked(name, batch) -> None:
    pairs = itertools.product(OBJECTIVES, (0.0, 0.01))
    for objective, gamma in pairs:
        model = RobustClassifier(NETWORKS[name](), objective)
        if {"router", "mixbn"} & {*name.split("_")} and isinstance(objective, Natural):
            with pytest.raises(ConfigurationError, match=r"Natural.*AWNet"):
                objective.check_network(model.net)
            continue
        objective.check_network(model.net)
        take_step(model.train(), dict(batch), AdversarialWeightPerturbation(gamma))
        unreached = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        assert all(n.endswith("bias") for n in unreached), (objective, unreached)
    averaged = AveragedModel(model, use_buffers=True)  # what the callbacks for averages keep
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.module.eval()(batch["x"]), model.eval()(batch["x"]))
    for key, loss in model.adaptive_losses().items():
        x = (batch["x"] + 0.01).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model, batch)(x).sum(), x)
        assert gradient.isfinite().all(), key
        assert (gradient.flatten(1).abs().amax(1) > 0).all(), key
    with frozen(model), AttackEngine(precision="bf16").applied(model, batch["x"]):
        for key, loss in model.adaptive_losses().items():
            assert input_gradient(loss(model, batch), batch["x"]).isfinite().all(), key


def test_losses_of_nested_methods_add_up() -> None:
    def names(make) -> set[str]:
        return set(RobustClassifier(make(), AT()).adaptive_losses())

    alone = {name: names(NETWORKS[name]) for name in ("plain", "cifs", "wm", "input", "router")}
    assert alone["plain"] == {"ce_f", "cw_f"} < alone["wm"] < {"ce_f", "cw_f", "ce_bypass", "any"}
    assert names(NETWORKS["router_of_cifs_of_input"]) >= alone["router"] | alone["cifs"]
    nested = names(NETWORKS["input_of_wm_of_router"])
    assert nested == alone["router"] | alone["wm"] | {"feature"}
    whole = names(lambda: maps(cifs(enlarged(resnet()), "arch.stages.0")))
    assert whole == alone["cifs"] | alone["input"] - {"ce_strides"} | alone["wm"]
    victim = Victim(NETWORKS["input_of_wm_of_router"](), K)
    assert set(victim.adaptive_losses()) == nested | {"dlr_f"}, "evaluate() knows them too"


def test_attacks_on_a_nested_router_pass_through_the_whole_network(batch) -> None:
    net = NETWORKS["input_of_wm_of_router"]().eval()
    losses, inner = declared_losses(net, {}), net.arch
    alone = declared_losses(inner, {})
    seen = batch | {"x": net.enlarged(batch["x"])}
    for name in ("ce_routerdetached", "ce_routerfrozen", "ce_branchadv", "joint_adv_1", "misroute"):
        found = losses[name](net, batch)(batch["x"])
        torch.testing.assert_close(found, alone[name](inner, seen)(seen["x"]))
    assert net.arch.given == {}


# ------------------------------------------------------------- the papers' own are special cases


def in_double(net: nn.Module, batch):
    return net.double(), {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@pytest.mark.parametrize(
    ("make", "general", "own"),
    [
        (lambda: CIFSResNet(**SIZE, hidden=4), AT(), JointCrossEntropy(2.0, rescale=False)),
        (
            lambda: cifs(resnet(), make=partial(select, label_free=True), beta=3.0),
            TRADES(5.0),
            JointTRADES(beta=3.0, lam=5.0),
        ),
        (NETWORKS["router"], AT(), HybridCE()),
        (NETWORKS["router"], TRADES(5.0), RoutedTRADES(5.0)),
    ],
    ids=["at_cifs", "trades_cifs", "at_router", "trades_router"],
)
def test_a_general_objective_equals_the_method_s_own(make, general, own, batch) -> None:
    net, batch = in_double(make(), batch | {"x_adv": torch.rand(6, *SHAPE)})
    weights = [p for p in net.parameters() if p.requires_grad]
    found, expected = (one.outer(net.train(), batch) for one in (general, own))
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(v, weights, allow_unused=True) for v in (found, expected))
    torch.testing.assert_close(*gradients)
    inner = (one.inner(net.eval(), batch)(batch["x_adv"]) for one in (general, own))
    torch.testing.assert_close(*inner)


def test_inserted_selections_are_those_of_the_paper_s_networks(batch) -> None:
    size = {"widths": (4, 6), "depths": (1, 2), "strides": (1, 2), "in_channels": 1}
    paper = CIFSWideResNet(num_classes=K, hidden=128, stem_width=4, **size).eval()
    net = with_cifs(WideResNet(num_classes=K, stem_width=4, **size), image_shape=SHAPE).eval()
    net.load_state_dict(paper.state_dict())
    found, expected = (joint_logits(one, batch["x"]) for one in (net, paper))
    torch.testing.assert_close(found, expected)


def test_larger_maps_are_those_of_smaller_strides() -> None:
    small, x = resnet(), torch.rand(2, *SHAPE)
    large = resnet(strides=(1, 1))
    large.load_state_dict(small.state_dict())
    assert torch.equal(larger(small).eval()(x), large.eval()(x))


def test_the_rule_at_the_budget_of_the_digits() -> None:
    """The widths of ``digits_w19-38-30_sat``, which has the budget of ``digits_w12-24-48_sat``."""
    uniform = RobustWideResNet((1, 1, 1), channels=(4, 12, 24, 48), in_channels=1)
    assert rule(uniform).widths == (19, 38, 30)


def test_larger_maps_are_the_networks_and_not_the_routers() -> None:
    for inner in (resnet(strides=(2, 2)), enlarged(resnet(strides=(2, 2)))):
        net = router(inner)
        before = [m.stride for m in net.router.modules() if isinstance(m, nn.Conv2d)]
        larger(net, times=2)
        assert before == [m.stride for m in net.router.modules() if isinstance(m, nn.Conv2d)]
        assert {m.stride for m in net.arch.modules() if isinstance(m, nn.Conv2d)} == {(1, 1)}
    with pytest.raises(ConfigurationError, match="no convolution or pool left"):
        larger(router(resnet(strides=(1, 1))))


@pytest.mark.parametrize(
    "make", [DigitsResNet, DigitsNet, DigitsStudent, CIFSDigitsResNet, partial(CifarResNet, 8)]
)
def test_the_rule_in_small_networks_of_fixed_depth(make) -> None:
    net = make(in_channels=1)
    made = rule(net).eval()
    assert type(made) is type(net)
    assert made.widths != net.widths
    assert made(torch.rand(2, *SHAPE)).shape == (2, 10)


def test_the_rule_keeps_normalisation_and_activations() -> None:
    class Named(nn.ReLU):
        def extra_repr(self) -> str:
            return hex(id(self))

    net = resnet(mean=[0.3], std=[0.4], activation=Named)
    made = rule(net)
    assert made.widths != net.widths
    assert made.normalize.mean.item() == pytest.approx(0.3)


def test_networks_of_other_packages() -> None:
    net = torchvision.models.resnet18(num_classes=K)
    shape = (3, 32, 32)
    net = with_larger_maps(net, times=2, image_shape=shape)
    assert (net.conv1.stride, net.maxpool.stride) == ((1, 1), 1)
    net = with_router(with_cifs(net, {"layer3": select, "layer4": select}, image_shape=shape))
    net = with_weight_maps(net, "smoothing", after=["arch.conv1"], image_shape=shape)
    model = RobustClassifier(net, TRADES())
    data = {"x": torch.rand(2, *shape), "x_adv": torch.rand(2, *shape), "y": torch.arange(2)}
    model.objective.outer(model, data).backward()
    assert {"ce_p2", "ce_bypass", "misroute"} <= set(model.adaptive_losses())
    assert net.arch.layer4[1].conv2.weight.grad.any()


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: cifs(cifs(resnet())), "ResNet"),
        (lambda: cifs(resnet(), "stages.7"), "stages.7"),
        (lambda: with_cifs(resnet()), "image_shape"),
        (lambda: with_cifs(nn.Sequential(nn.Flatten()), image_shape=SHAPE), "selections"),
        (lambda: cifs(nn.Sequential(resnet()), "0.stages.0"), "Sequential"),
        (lambda: cifs(resnet(), beta=-1.0), "-1.0"),
        (lambda: router(router(resnet())), "AWNet"),
        (lambda: router(maps(resnet(), after=["stages.0.0.conv1"])), "stages.0.0.conv1"),
        (lambda: router(with_cifs(wide(), image_shape=SHAPE)), "stages.1.0.conv1"),
        (lambda: larger(resnet(), times=2), "stride"),
        (lambda: larger(maps(wide(), placement="stages")), "weight map"),
        (lambda: larger(resnet(), times=0), "times"),
        (lambda: rule(cifs(resnet())), "ResNet"),
        (lambda: rule(enlarged(resnet())), "EnlargedNetwork"),
        (lambda: rule(larger(resnet())), "changed since it was made"),
        (lambda: rule(larger(DigitsResNet())), "changed since it was made"),
        (lambda: rule(resnet(depths=(1,), widths=(4,), strides=(1,))), "no network of stages"),
        (lambda: larger(resnet(strides=(2, 2)), times=3), "no convolution or pool left"),
        (lambda: rule(resnet(), ratio=0.0), "0.0"),
        (lambda: enlarged(resnet(mean=[0.3], std=[0.4])), "0.3"),
        (lambda: cifs(resnet(), ""), "stem.conv"),
        (lambda: with_cifs(resnet(), dict.fromkeys(TWICE, select), image_shape=SHAPE), "stages_1"),
        (lambda: cifs(Small("keys"), "keys"), "keys"),
        (lambda: cifs(Small("selections"), "pool"), "selections"),
        (lambda: router(Small(), dynamic=False), "Small"),
        (lambda: OATNet(router(resnet())), "AWNet"),
        (lambda: router(OATNet(resnet())), "OATNet"),
        (lambda: larger(maps(Small(), after=["pool"])), "weight map"),
    ],
)
def test_networks_that_make_no_sense(make, named) -> None:
    with pytest.raises(ConfigurationError, match=named) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("router", Natural()),
        ("router", JointCrossEntropy()),
        ("router_of_cifs_of_input", HybridCE()),
        ("cifs", DAJAT()),
    ],
)
def test_objectives_that_do_not_train_a_method(name, objective) -> None:
    model = RobustClassifier(NETWORKS[name](), objective)
    with pytest.raises(ConfigurationError, match=type(objective).__name__):
        model.setup("fit")


def test_a_network_that_only_its_own_objective_trains() -> None:
    with pytest.raises(ConfigurationError, match="OATNet"):
        RobustClassifier(OATNet(resnet()), TRADES()).setup("fit")


# ------------------------------------------------------------------------------- from YAML alone

ALL_FIVE = """
experiment: five
model:
  class_path: common.classifier.RobustClassifier
  init_args:
    net:
      class_path: paper_wm.networks.with_weight_maps
      init_args:
        variant: smoothing
        net:
          class_path: paper_cifs.networks.with_cifs
          init_args:
            selections: {arch.arch.stages.0: {class_path: paper_cifs.method.CAS}}
            net:
              class_path: paper_awnet.networks.with_router
              init_args:
                router: {class_path: paper_awnet.method.Router, init_args: {widths: [4, 4, 4]}}
                net:
                  class_path: paper_rcm.networks.with_larger_input
                  init_args:
                    scale_factor: 2
                    net:
                      class_path: paper_robustwrn.method.with_budget_rule
                      init_args:
                        net:
                          class_path: common.networks.resnet.ResNet
                          init_args: {depths: [1, 1], widths: [4, 6], strides: [1, 2]}
    objective: {class_path: common.objectives.MART}
data: {source: {class_path: common.data.sources.Digits, init_args: {size: 8}}, train_limit: 8}
adversary: {attack: {class_path: common.attacks.pgd.PGD, init_args: {eps: 0.2, steps: 1}}}
evaluation: {validation: null}
checkpoint: {monitor: val/clean_acc}
trainer: {accelerator: cpu, fast_dev_run: true, enable_progress_bar: false}
"""


def test_one_file_nests_all_papers(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("five.yaml").write_text(ALL_FIVE)
    trained, step = [], RobustClassifier.training_step
    monkeypatch.setattr(
        RobustClassifier, "training_step", lambda *given: trained.append(given[0]) or step(*given)
    )
    main(["fit", "--config", "five.yaml"], package="paper_wm")
    (model,) = trained
    assert {"ce_p1", "misroute", "feature", "ce_bypass"} < set(model.adaptive_losses())
    backbone = model.net.arch.arch
    assert backbone.head.linear.out_features == 10
    assert backbone.widths[1] / backbone.widths[0] < 6 / 4


def test_the_example_is_trained_and_rebuilt_from_its_run(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"data.train_limit": 100, "data.val_limit": 20, "trainer.max_epochs": 1}
    options = [part for name, value in small.items() for part in (f"--{name}", str(value))]
    main(["fit", "--config", str(EXAMPLE), *options], package="paper_cifs")
    model, _ = load_run(tmp_path / "runs/paper_cifs" / EXAMPLE.stem / "seed0")
    assert isinstance(model.net, RobustWideResNet)
    assert isinstance(model.objective, TRADES)
    assert {"ce_p1", "ce_p2"} < set(model.adaptive_losses())
