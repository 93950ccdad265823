"""What holds of every network: published sizes, gradients, compiling, configurations, refusals."""

import pickle
from functools import partial

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from common.errors import ConfigurationError
from common.networks.alexnet import AlexNet
from common.networks.mobilenet_v2 import MobileNetV2
from common.networks.preact_resnet import PreActResNet, PreActResNet18
from common.networks.resnet import CifarResNet, ResNet, ResNet10, ResNet18
from common.networks.vgg import VGG, VGG11, VGG13, VGG16, VGG19
from common.networks.vit import ViT, ViTBase, ViTSmall, ViTTiny
from common.networks.wide_resnet import WideResNet

M = "M"
VGG16_CONFIG = [64, 64, M, 128, 128, M, *[256] * 3, M, *[512] * 3, M, *[512] * 3, M]
resnet = partial(ResNet, depths=(1, 2), widths=(4, 6), strides=(1, 2))
preact = partial(PreActResNet, depths=(1, 1, 2), widths=(4, 4, 6), strides=(1, 2, 2))
wide = partial(WideResNet, depths=(1, 1, 2), widths=(4, 4, 6), stem_width=4)
vgg = partial(VGG, depths=(1, 2), widths=(4, 6), strides=(2, 2))
alexnet = partial(AlexNet, widths=(4, 6, 8, 6, 5), hidden=(7, 9), drop_rate=0.0)
vit = partial(ViT, 6, 3, dim=6, depth=2, heads=2, head_dim=4, mlp_dim=5)
mobilenet = partial(MobileNetV2, ((1, 4, 1, 1), (2, 6, 2, 2)), 4, 8)
TINY = {
    "resnet": (resnet, 8),
    "preact": (preact, 8),
    "wide": (wide, 8),
    "vgg": (vgg, 8),
    "alexnet": (alexnet, 16),
    "vit": (vit, 6),
    "vit-small": (partial(vit, shifted=True, local=True), 6),
    "mobilenet": (mobilenet, 8),
}


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (ResNet18, 11_173_962),
        (partial(ResNet18, strides=(1, 1, 2, 2)), 11_173_962),
        (partial(ResNet18, strides=(2, 2, 2, 2)), 11_178_186),
        (partial(ResNet10, in_channels=1), 4_902_090),
        (partial(CifarResNet, 8), 77_850),
        (partial(CifarResNet, 110), 1_730_522),
        (PreActResNet18, 11_172_170),
        (WideResNet, 36_479_194),
        (partial(WideResNet, 34, 1), 466_714),
        (partial(WideResNet, 34, widths=(320, 640, 512)), 68_116_698),
        # equal widths with a stride: the shortcut is a projection all the same
        (partial(WideResNet, 34, widths=(320, 320, 256)), 23_812_570),
        (partial(WideResNet, depths=(5, 3, 5)), 42_471_514),
        (VGG11, 9_231_114),
        (VGG13, 9_416_010),
        (VGG16, 14_728_266),
        (VGG19, 20_040_522),
        (partial(VGG, config=VGG16_CONFIG), 14_728_266),
        (partial(VGG16, widths=(64, 128, 256, 512, 204)), 9_333_646),
        # the classifier of torchvision's kind, two hidden layers
        (partial(VGG16, hidden=(256, 256)), 14_922_826),
        (partial(VGG16, hidden=(256, 256), norm=False), 14_914_378),
        (AlexNet, 2_850_634),
        (ViTBase, 9_523_722),
        (ViTSmall, 9_622_512),
        (ViTTiny, 4_371_438),
        (partial(ViTTiny, image_size=64), 4_469_742),
    ],
)
def test_parameters_as_published(make, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == parameters


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (ResNet18, (512, 4, 4)),
        (partial(ResNet18, strides=(1, 1, 2, 2)), (512, 8, 8)),
        (partial(PreActResNet18, strides=(1, 2, 2, 2)), (512, 4, 4)),
        (partial(WideResNet, 10, 1, strides=(1, 2, 2)), (64, 8, 8)),
        (partial(VGG16, strides=(2, 2, 2, 2, 2)), (512, 1, 1)),
        (partial(VGG16, strides=(1, 1, 1, 1, 2)), (512, 16, 16)),
        (partial(AlexNet, (2, 2, 2, 2)), (256, 2, 2)),
        (partial(AlexNet, (1, 1, 1, 1)), (256, 29, 29)),
        (ViTTiny, (65, 512)),
    ],
)
def test_features_of_images_of_32_pixels(make, shape):
    with torch.device("meta"):
        net, x = make(), torch.rand(2, 3, 32, 32)
        assert net.features(x).shape == (2, *shape)
        assert net(x).shape == (2, 10)
    pools = sum(isinstance(m, nn.MaxPool2d) for m in net.modules())
    if isinstance(net, AlexNet):
        assert pools == 3  # a stride of 1 keeps the pool
    elif isinstance(net, VGG):
        assert pools == make.keywords["strides"].count(2)  # a stride of 1 leaves it out


class Largest(nn.Module):
    def forward(self, x):
        return x.amax((2, 3), keepdim=True)


@pytest.mark.parametrize("name", ["resnet", "preact", "wide", "vgg", "alexnet", "mobilenet"])
def test_maximum_over_the_map(name):
    make, size = TINY[name]
    net, x = make(pool="max").eval(), torch.rand(2, 3, size, size)
    assert net.state_dict().keys() == make().state_dict().keys()
    logits = net(x)
    net.head.pool = Largest()
    assert torch.equal(net(x), logits)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        *((partial(wide, drop_rate=0.5), 8), (partial(vit, drop_rate=0.5), 6)),
        *((partial(vgg, hidden=(9,), drop_rate=0.5), 8), (partial(alexnet, drop_rate=0.5), 16)),
    ],
)
def test_dropout_acts_in_training_only(make, size):
    net, x = make().eval(), torch.rand(4, 3, size, size)
    assert torch.equal(net(x), net(x))
    for module in net.modules():
        module.train(isinstance(module, nn.Dropout))
    assert not torch.equal(net(x), net(x))


@pytest.mark.parametrize("name", TINY)
def test_backward_reaches_every_parameter(name):
    make, size = TINY[name]
    net = make()
    net(torch.rand(4, 3, size, size)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    if name != "vgg":  # batch-norm takes a convolution's bias away again
        assert all(p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("name", ["resnet", "wide", "vit-small"])
def test_compiles_in_one_graph_and_pickles(name):
    make, size = TINY[name]
    net = pickle.loads(pickle.dumps(make().eval()))
    x = torch.rand(2, 3, size, size)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with torch.inference_mode():
        assert torch.equal(compiled(x), net(x))


@pytest.mark.parametrize(
    ("name", "settings", "size"),
    [
        ("resnet.DigitsResNet", {"in_channels": 3, "activation": "torch.nn.SiLU"}, 8),
        ("resnet.DigitsResNet", {"in_channels": 3, "init": "common.networks.resnet.kaiming"}, 8),
        ("preact_resnet.PreActResNet", {"depths": [1], "widths": [4], "strides": [1]}, 8),
        ("alexnet.AlexNet", {"strides": [1, 1, 2, 2], "widths": [4] * 5, "pool": "max"}, 16),
        ("vit.ViTTiny", {"image_size": 8, "dim": 4, "head_dim": 2}, 8),
        ("vgg.VGG", {"config": [4, M, 6], "init": "common.networks.vgg.kaiming"}, 8),
    ],
)
def test_is_made_from_a_configuration_file(name, settings, size):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--net", type=nn.Module)
    given = {"class_path": f"common.networks.{name}", "init_args": settings | {"num_classes": 7}}
    net = parser.instantiate(parser.parse_object({"net": given})).net
    assert type(net).__name__ == name.split(".")[1]
    assert net(torch.rand(2, 3, size, size)).shape == (2, 7)
    kinds = {type(module) for module in net.modules()}
    assert (nn.SiLU in kinds) == ("activation" in settings)
    assert (nn.AdaptiveMaxPool2d in kinds) == ("pool" in settings)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        *(
            (make, {"num_classes": 0}, "num_classes")
            for make in (resnet, preact, wide, vgg, alexnet)
        ),
        *((make, {"pool": "mean"}, "'mean'") for make in (resnet, preact, wide, vgg, alexnet)),
        *((make, {"depths": (1,)}, "each stage") for make in (resnet, preact, wide)),
        *((make, {"drop_rate": 1.0}, "drop.rate") for make in (wide, vgg, alexnet, vit)),
        (resnet, {"depths": (), "widths": (), "strides": ()}, "each stage"),
        (resnet, {"widths": (4, 0)}, "at least 1"),
        (resnet, {"in_channels": 0}, "in_channels"),
        (CifarResNet, {"depth": 2}, "depth=2"),
        *((WideResNet, {"depth": depth}, f"depth={depth}") for depth in (4, 3, 29, 33)),
        (wide, {"drop_rates": (0.0, 0.0, -0.1)}, "drop_rate"),
        (wide, {"drop_rates": (0.0, 0.0)}, "drop_rates .* 3 .* 2"),
        (wide, {"activations": [nn.ReLU] * 4}, "activations"),
        (wide, {"stem_width": 0}, "stem_width"),
        (vgg, {"strides": (2, 2, 2)}, "each stage"),
        (vgg, {"depths": (0, 1)}, "depths"),
        (vgg, {"config": [4, "P"]}, "'P'"),
        (vgg, {"config": [4, M, M]}, '"M"'),
        (vgg, {"hidden": (0,)}, r"hidden\[0\]"),
        (alexnet, {"strides": (1, 2, 2)}, "strides .* 4"),
        (alexnet, {"widths": (4, 4, 4, 4)}, "widths .* 5"),
        (vit, {"heads": 0}, "heads"),
        (vit, {"embedding_drop_rate": -0.1}, "embedding_drop_rate"),
        (ViTTiny, {"image_size": 7}, "tile 7"),
        (MobileNetV2, {"head_width": 0}, "head_width"),
        (MobileNetV2, {"stages": ((1, 4, 0, 1),)}, "depth .* got 0"),
    ],
)
def test_refuses_settings_that_do_not_fit(make, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        make(**settings)
