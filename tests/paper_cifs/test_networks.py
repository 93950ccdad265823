"""Sizes, positions and precision of the networks with channel selections, and their YAML."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import nn

from common.errors import ConfigurationError
from common.networks.resnet import DigitsResNet, ResNet, ResNet10, ResNet18
from common.networks.wide_resnet import WideResNet
from paper_cifs.method import (
    CAS,
    CIFS,
    CIFSDigitsResNet,
    CIFSResNet,
    CIFSResNet10,
    CIFSResNet18,
    CIFSWideResNet,
    LinearProbe,
    NonlinearProbe,
    OnesMask,
    joint_logits,
    joint_loss,
    undetached,
)

DOUBLE = torch.float64
K = 5

linear = partial(CIFS, probe="linear")
nonlinear = partial(CIFS, hidden=8)
RESNET = {"depths": (1, 2), "widths": (4, 6), "strides": (1, 2), "num_classes": K}
WRN = {"depths": (1, 1, 2), "widths": (4, 4, 6), "stem_width": 4, "num_classes": K}
tiny_resnet = partial(CIFSResNet, **RESNET, hidden=8)
tiny_wrn = partial(CIFSWideResNet, **WRN, hidden=8)
both_kinds = pytest.mark.parametrize("make", [tiny_resnet, tiny_wrn], ids=["resnet", "wrn"])


def images(n: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, 3, 8, 8, dtype=dtype), torch.randint(K, (n,))


def on18(make) -> CIFSResNet18:
    return CIFSResNet18(selections=dict.fromkeys(("stages_3_0", "stages_3_1"), make))


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (CIFSResNet18, 11_246_046),
        (partial(CIFSResNet18, selections={}), 11_173_962),
        (lambda: on18(CAS), 11_184_222),
        (lambda: on18(linear), 11_184_222),
        (lambda: on18(CIFS), 11_307_870),
        (lambda: CIFSResNet18(selections={"stages_3_0": CIFS}), 11_240_916),
        (lambda: CIFSResNet18(selections={"stages_3_1": CIFS}), 11_240_916),
        (lambda: CIFSResNet18(selections={"stages_3_0": linear}), 11_179_092),
        (CIFSResNet10, 4_941_406),
        (lambda: CIFSResNet10(selections={"stages_2_0": CAS, "stages_3_0": CAS}), 4_909_790),
        (CIFSWideResNet, 36_641_854),
        (
            lambda: CIFSWideResNet(selections={"stages_2_3_act1": CAS, "head_act": CAS}),
            36_492_014,
        ),
        (partial(LinearProbe, 512, 10), 5_130),
        (partial(NonlinearProbe, 512, 10), 66_954),
        (partial(NonlinearProbe, 256, 10), 34_186),
    ],
)
def test_parameters_as_published(make, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == parameters


@pytest.mark.parametrize(
    ("make", "plain", "buffers", "shape", "hidden"),
    [
        (CIFSResNet18, ResNet18, 9_620, (3, 32, 32), 128),
        (CIFSResNet10, partial(ResNet10, in_channels=1), 5_772, (1, 28, 28), 128),
        (CIFSDigitsResNet, DigitsResNet, 939, (1, 8, 8), 32),
        (CIFSWideResNet, WideResNet, 17_977, (3, 32, 32), 240),
    ],
)
def test_networks_are_their_backbones_and_two_selections(make, plain, buffers, shape, hidden):
    with torch.device("meta"):
        net, backbone = make(), plain()
        assert sum(b.numel() for b in net.buffers()) == buffers
        added = set(net.state_dict()) - set(backbone.state_dict())
        assert set(backbone.state_dict()) <= set(net.state_dict())
        assert {name.split(".")[0] for name in added} == {"selections"}
        f, probes = joint_logits(net.eval(), torch.rand(2, *shape))
        assert [t.shape for t in (f, *probes)] == [(2, 10)] * 3
    first, second = (s.probe for s in net.selections.values())
    assert (type(first), type(second)) == (NonlinearProbe, LinearProbe)
    assert first.hidden.out_features == hidden
    assert all(s.mask.scale == 1.0 and s.top_k == 2 for s in net.selections.values())


@pytest.mark.parametrize(
    ("make", "plain"),
    [(tiny_resnet, partial(ResNet, **RESNET)), (tiny_wrn, partial(WideResNet, **WRN))],
    ids=["resnet", "wrn"],
)
def test_masks_of_ones_leave_the_plain_network(make, plain):
    plain, net = plain().double(), make().double()
    keys = net.load_state_dict(plain.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert all(key.startswith("selections.") for key in keys.missing_keys)
    for selection in net.selections.values():
        selection.mask = OnesMask()
    x, y = images(dtype=DOUBLE)
    for mode in (True, False):
        f, probes = joint_logits(net.train(mode), x, y)
        assert (f - plain.train(mode)(x)).abs().max() == 0
        assert len(probes) == 2


def plain_of(net: nn.Module, plain: nn.Module) -> nn.Module:
    """The backbone with the weights of a network with selections."""
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if k[:10] != "selections"})
    return plain.double().eval()


@pytest.mark.parametrize("positions", [("stages_0_0",), ("stages_1_0", "stages_1_1")])
def test_resnet_masks_what_both_branches_of_the_next_block_read(positions, sharpen):
    net = sharpen(tiny_resnet(selections=dict.fromkeys(positions, nonlinear))).double().eval()
    plain = plain_of(net, ResNet(**RESNET))
    x, y = images(dtype=DOUBLE)
    z, slow = plain.stem(x), []
    for i, stage in enumerate(plain.stages):
        for j, block in enumerate(stage):
            z = block(z)
            if f"stages_{i}_{j}" in positions:
                z, p = net.selections[f"stages_{i}_{j}"](z, y)
                slow.append(p)
    f, raw = joint_logits(net, x, y)
    torch.testing.assert_close([f, *raw], [net.head.linear(z.mean((2, 3))), *slow])


def test_wrn_masks_the_residual_branch_only(sharpen):
    net = tiny_wrn().double().eval()
    assert list(net.selections) == ["stages_2_1_act1", "head_act"]
    linears = [m for m in net.selections.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 3
    assert all(not layer.bias.any() for layer in linears)
    sharpen(net)
    x, y = images(dtype=DOUBLE)
    plain = plain_of(net, WideResNet(**WRN))
    z = plain.stem(x)
    for block in (plain.stages[0][0], plain.stages[1][0], plain.stages[2][0]):
        z = block(z)
    last = plain.stages[2][1]
    a_bar, p1 = net.selections["stages_2_1_act1"](F.relu(last.bn1(z)), y)
    z = z + last.conv2(F.relu(last.bn2(last.conv1(a_bar))))
    z_bar, p2 = net.selections["head_act"](F.relu(net.head.norm(z)), y)
    f, raw = joint_logits(net, x, y)
    torch.testing.assert_close([f, *raw], [net.head.linear(z_bar.mean((2, 3))), p1, p2])


def test_positions_may_be_written_with_dots_and_come_in_any_order():
    net = tiny_resnet(selections={"stages.1.1": linear, "stages.0.0": CAS})
    assert {name: type(one) for name, one in net.selections.items()} == {
        "stages_0_0": CAS,
        "stages_1_1": CIFS,
    }
    assert list(net.selections) == ["stages_0_0", "stages_1_1"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(tiny_resnet, selections={"stages_9_0": CAS}), "stages_9_0.*stages_0_0, stages_1_"),
        (partial(tiny_wrn, selections={"stages_2_1": CAS}), "head_act"),
        (partial(CIFSResNet, depths=(1,), widths=(4,), strides=(1,)), "selections"),
    ],
)
def test_refused_positions(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


@both_kinds
def test_gradients_of_the_losses(make):
    net, (x, y) = make(), images(8)
    f, probes = joint_logits(net, x, y)
    names, parameters = zip(*net.named_parameters(), strict=True)
    gradients = torch.autograd.grad(
        F.cross_entropy(f, y), parameters, retain_graph=True, allow_unused=True
    )
    unused = {name for name, g in zip(names, gradients, strict=True) if g is None}
    # The mask carries gradients to all of the probes but the last biases.
    assert unused == {f"selections.{s}.probe.output.bias" for s in net.selections}
    assert all(g.abs().sum() > 0 for g in gradients if g is not None)
    joint_loss(f, probes, y, beta=2.0).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


@both_kinds
def test_works_in_inference_mode_compiled_copied_and_pickled(make, sharpen):
    net = sharpen(make()).eval()
    x, _ = images()
    f = net(x)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with torch.inference_mode():
        assert torch.equal(copied(x), f)
        assert torch.equal(compiled(x), f)
        assert torch.equal(joint_logits(compiled, x)[1][1], joint_logits(net, x)[1][1])
    with undetached(net):  # the flag is part of the graph's guards
        gradients = []
        for run in (net, compiled):
            t = x.clone().requires_grad_()
            gradients.append(torch.autograd.grad(run(t).sum(), t)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("make", "guarded", "before", "first"),
    [  # masks follow both blocks of the last stage; or sit inside the last block and in the head
        (tiny_resnet, "stages.1.1", set(), "stages.1.0.conv1"),
        (tiny_wrn, "stages.2.1", {"stages.2.1.bn1"}, "stages.2.0.conv1"),
    ],
    ids=["resnet", "wrn"],
)
def test_what_reads_a_masked_feature_leaves_mixed_precision(make, guarded, before, first):
    net, seen = make().eval(), {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.register_forward_hook(
                lambda _, args, out, name=name: seen.update({name: {args[0].dtype, out.dtype}})
            )
    with torch.autocast("cpu", torch.bfloat16):
        f, raw = joint_logits(net, images()[0])
        assert torch.is_autocast_enabled("cpu")
    assert {t.dtype for t in (f, *raw)} == {torch.float32}
    readers = {n for n in seen if n.startswith((guarded, "head.linear", "selections"))} - before
    assert len(readers) > 5
    assert all(seen[name] == {torch.float32} for name in readers)
    assert torch.bfloat16 in seen[first]  # elsewhere autocast works


# ------------------------------------------------------------------------------ configuration


def instantiate(tmp_path, text, *arguments):
    config = tmp_path / "net.yaml"
    config.write_text(text)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(nn.Module, "net")
    return parser.instantiate(parser.parse_args([f"--config={config}", *arguments])).net


YAML = """
net:
  class_path: paper_cifs.method.CIFSResNet
  init_args:
    depths: [1, 2]
    widths: [4, 6]
    strides: [1, 2]
    selections:
      stages_1_0:
        class_path: paper_cifs.method.CIFS
        init_args:
          probe: linear
          top_k: 1
          mask: {class_path: paper_cifs.method.SoftmaxMask, init_args: {scale: 2.0}}
      stages_1_1: {class_path: paper_cifs.method.CAS}
"""


def test_yaml_describes_selections_and_the_command_line_overrides_them(tmp_path):
    net = instantiate(tmp_path, YAML)
    first, second = net.selections.values()
    assert isinstance(first.probe, LinearProbe)
    assert (first.top_k, first.mask.scale) == (1, 2.0)
    assert isinstance(second, CAS)
    prefix = "--net.init_args.selections.stages_1_0.init_args"
    changed = ("mask.init_args.scale=3.5", "probe=nonlinear", "hidden=9")
    changed = [f"{prefix}.{change}" for change in changed]
    net = instantiate(tmp_path, YAML, *changed, "--net.num_classes=7")
    first, second = net.selections.values()
    assert first.mask.scale == 3.5
    assert first.probe.hidden.out_features == 9
    assert second.probe.output.out_features == 7
