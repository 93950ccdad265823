"""Parameter counts, places, pairing by seed, frozen maps, groups of the optimiser."""

import pytest
import torch

from common.errors import ConfigurationError
from common.networks.resnet import ResNet, ResNet18
from common.networks.vgg import VGG
from common.networks.wide_resnet import WideResNet
from common.objectives import Natural
from common.optimization import ParameterGroup
from paper_wm.method import box_mean, weight_maps
from paper_wm.module import WeightMapClassifier
from paper_wm.networks import SmallCNN, places, with_weight_maps

DIGITS, MNIST, CIFAR = (1, 16, 16), (1, 28, 28), (3, 32, 32)


def mapped(net, shape, variant="smoothing", **settings):
    return with_weight_maps(net, variant, image_shape=shape, **settings)


def tiny_resnet(**settings) -> ResNet:
    return ResNet(depths=(1, 1), widths=(4, 6), strides=(1, 2), **settings)


# ---------------------------------------------------------------------------------------- places


def test_places_by_placement_and_position() -> None:
    with torch.device("meta"):
        cnn, resnet, wide = SmallCNN(), ResNet18(), WideResNet(16, 4)
    assert places(cnn) == (["blocks.0.conv"], [])
    assert places(cnn, "all", "post") == ([f"blocks.{i}.act" for i in range(3)], [])
    assert places(resnet) == (["stem.conv"], [])
    assert places(resnet, "stem", "post") == (["stem.act"], [])
    assert places(resnet, "stages")[1] == [f"stages.{i}" for i in range(4)]
    assert places(wide) == (["stem"], [])
    assert places(wide, "stages") == (["stem"], [f"stages.{i}" for i in range(3)])


def test_maps_are_where_the_names_say() -> None:
    """Pre: before batch-norm. Post: behind the activation and before pooling."""
    x = torch.rand(2, *DIGITS)
    base = SmallCNN((2, 3, 4), image_shape=DIGITS).eval()
    state = base.state_dict()
    block = base.blocks[0]
    z = block.conv(x)
    expected = {
        "pre": block.pool(block.act(block.bn(9 * box_mean(z, 3)))),
        "post": block.pool(9 * box_mean(block.act(block.bn(z)), 3)),
    }
    for position, inside in expected.items():
        net = mapped(SmallCNN((2, 3, 4), image_shape=DIGITS), DIGITS, position=position).eval()
        net.load_state_dict(state, strict=False)
        torch.testing.assert_close(net.blocks[0](x), inside)


def test_maps_at_stages_start_at_the_mean() -> None:
    net = mapped(tiny_resnet(), (3, 8, 8), placement="stages")
    starts = {name: m.map.detach().flatten()[0].item() for name, m in weight_maps(net).items()}
    assert starts == {
        "stem.conv": 1.0,
        "stages.0.0": pytest.approx(1 / 9),
        "stages.1.0": pytest.approx(1 / 9),
    }
    for settings, start in (
        ({"variant": "smoothing", "kernel_norm": "mean"}, 1.0),
        ({"variant": "unsharp"}, 1.0),
        ({"variant": "smoothing", "stage_init_value": 0.5}, 0.5),
        ({"variant": "smoothing", "kernel_size": 5}, 1 / 25),
    ):
        net = mapped(tiny_resnet(), (3, 8, 8), placement="stages", **settings)
        last = list(weight_maps(net).values())[-1]
        assert last.map.detach().flatten()[0].item() == pytest.approx(start)


def test_places_can_be_named_instead() -> None:
    with torch.device("meta"):
        net = mapped(SmallCNN(), MNIST, after=["blocks.1.bn"])
    assert {name: m.shape for name, m in weight_maps(net).items()} == {"blocks.1.bn": (64, 14, 14)}


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (SmallCNN, {"placement": "stem"}, "no place 'stem'; placement must be first or all"),
        (tiny_resnet, {"placement": "all"}, "no place 'all'; placement must be stem or stages"),
        (SmallCNN, {"position": "behind"}, "position must be one of pre, post, got 'behind'"),
        (lambda: WideResNet(10, 1), {"position": "post"}, "set position: pre"),
        (VGG, {}, "in a VGG is not known"),
        (SmallCNN, {"placement": "first", "after": ["blocks.0.bn"]}, "give one of them"),
        (SmallCNN, {"position": "post", "after": ["blocks.0.bn"]}, "leave position out"),
        (SmallCNN, {"stage_init_value": 0.3, "after": ["blocks.0.bn"]}, "use init_value"),
        (tiny_resnet, {"stage_init_value": 0.3, "placement": "stem"}, "use init_value"),
        (SmallCNN, {"image_shape": None}, "image_shape must be given"),
        (SmallCNN, {"variant": "smoothing", "lam": 1.0}, "drop lam"),
    ],
)
def test_places_that_a_network_does_not_have_are_refused(make, settings, message) -> None:
    given = {"variant": "smoothing", "image_shape": MNIST, **settings}
    with torch.device("meta"), pytest.raises(ConfigurationError, match=message):
        with_weight_maps(make(), **given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": (8, 16)}, r"widths must be three numbers.*got \(8, 16\)"),
        ({"widths": (8, 0, 16)}, "widths must be three"),
        ({"image_shape": (1, 3, 28)}, r"sides of at least 4.*got \(1, 3, 28\)"),
        ({"image_shape": (28, 28)}, r"got \(28, 28\)"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
    ],
)
def test_a_small_network_that_cannot_be_is_refused(settings, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SmallCNN(**settings)


# --------------------------------------------------------------------------------------- pairing


def test_base_and_mapped_networks_have_the_same_weights_and_maps_of_ones_change_no_logit() -> None:
    torch.manual_seed(5)
    base = tiny_resnet().eval()
    x = torch.rand(4, 3, 8, 8)
    before = base(x)
    for variant, settings in (("scale", {}), ("unsharp", {"lam": 0.0})):
        torch.manual_seed(5)
        net = mapped(tiny_resnet(), (3, 8, 8), variant, placement="stages", **settings).eval()
        assert torch.equal(net(x), before)


# ------------------------------------------------------------------------------------- optimiser


def classifier(weight_decay: float = 0.1, **settings) -> WeightMapClassifier:
    net = mapped(SmallCNN((2, 3, 4), image_shape=DIGITS), DIGITS, **settings)
    group = ParameterGroup(["*weight_map*"], weight_decay=0.0, may_be_empty=True)

    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.5, weight_decay=weight_decay)

    return WeightMapClassifier(net, Natural(), optimizer, groups=[group])


def test_a_step_without_gradient_decays_everything_but_the_map() -> None:
    model = classifier()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = model.configure_optimizers()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        is_map = "weight_map" in name
        assert torch.equal(parameter, before[name]) == (is_map or not before[name].any()), name
    assert any("weight_map" in name for name in before)


def test_a_frozen_map_stays_and_a_learned_one_moves() -> None:
    batch = {"x": torch.rand(8, *DIGITS), "y": torch.arange(8)}
    for trainable in (False, True):
        model = classifier(trainable=trainable)
        optimizer = model.configure_optimizers()
        model.objective.outer(model, batch).backward()
        (weight_map,) = weight_maps(model).values()
        before = weight_map.map.detach().clone()
        optimizer.step()
        assert torch.equal(weight_map.map, before) == (not trainable)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert any(p is weight_map.map for p in held) == trainable
