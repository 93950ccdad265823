"""The method against slow rewrites, closed forms and the invariants that need no training."""

import copy
import math
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
    AdaptiveLoss,
    CIFSDigitsResNet,
    CIFSResNet,
    CIFSResNet10,
    CIFSResNet18,
    CIFSWideResNet,
    JointCrossEntropy,
    JointTRADES,
    LinearProbe,
    MagnitudeMask,
    NaturalJointCrossEntropy,
    NonlinearProbe,
    OnesMask,
    ReluMask,
    SigmoidMask,
    SoftmaxMask,
    SoftplusMask,
    SummedSoftmaxMask,
    adaptive_losses,
    joint_logits,
    joint_loss,
    relevance_by_autograd,
    select_classes,
    training_factor,
    undetached,
)
from paper_cifs.module import CIFSClassifier

DOUBLE = torch.float64
C, K = 6, 5

linear = partial(CIFS, probe="linear")
nonlinear = partial(CIFS, probe="nonlinear", hidden=8)
RESNET = {"depths": (1, 2), "widths": (4, 6), "strides": (1, 2), "num_classes": K}
WRN = {"depths": (1, 1, 2), "widths": (4, 4, 6), "stem_width": 4, "num_classes": K}


def tiny_resnet(**kwargs) -> CIFSResNet:
    return CIFSResNet(**{**RESNET, "hidden": 8, **kwargs})


def tiny_wrn(**kwargs) -> CIFSWideResNet:
    return CIFSWideResNet(**{**WRN, "hidden": 8, **kwargs})


def feature(n: int = 4, side: int = 3, dtype: torch.dtype = DOUBLE) -> torch.Tensor:
    """A post-activation feature: non-negative, with zeros."""
    return torch.randn(n, C, side, side, dtype=dtype).clamp(min=0)


def images(n: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(n, 3, 8, 8, dtype=dtype), torch.randint(K, (n,))


def sharpen(net: nn.Module, factor: float = 5.0) -> nn.Module:
    """Scale probes up, so that masks are far from uniform and classes are well apart."""
    for module in net.modules():
        if isinstance(module, LinearProbe | NonlinearProbe):
            module.output.weight.data *= factor
    return net


def mask_of(module: CIFS, z: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    return module.multiplier(z, module.probe(z), y)


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


# ------------------------------------------------------------------------------------- probes


def test_probes_written_out():
    z = feature()
    v = torch.stack([z[:, c].flatten(1).sum(1) / 9 for c in range(C)], dim=1)
    flat = LinearProbe(C, K).double()
    assert torch.allclose(flat(z), v @ flat.output.weight.T + flat.output.bias)
    deep = NonlinearProbe(C, K, hidden=8).double()
    t = v @ deep.hidden.weight.T + deep.hidden.bias
    s = torch.log(1 + torch.exp(5 * t)) / 5
    assert torch.allclose(deep(z), s @ deep.output.weight.T + deep.output.bias)


def probe_of(kind: str) -> LinearProbe | NonlinearProbe:
    probe = LinearProbe(C, K) if kind == "linear" else NonlinearProbe(C, K, hidden=8)
    return probe.double()


@pytest.mark.parametrize(("kind", "tolerance"), [("linear", 1e-12), ("nonlinear", 1e-7)])
@pytest.mark.parametrize("spread", [1.0, 30.0])  # 30 puts hidden units beyond softplus' threshold
def test_closed_form_relevance_equals_autograd(kind, tolerance, spread):
    """In value and in the gradients of the probe's parameters and of the feature."""
    probe, z = probe_of(kind), (feature() * spread).requires_grad_()
    selected = torch.tensor([[0, 1], [2, 2], [4, 0], [3, 1]])  # [2, 2]: a class counted twice
    closed, reference = (
        probe.relevance(z, selected),
        relevance_by_autograd(probe, z, selected),
    )
    assert closed.shape == (4, 2, C)
    assert (closed - reference).abs().max() < tolerance

    weights = torch.randn_like(closed)
    grads = [
        torch.autograd.grad((weights * g).sum(), [*probe.parameters(), z], allow_unused=True)
        for g in (closed, reference)
    ]
    for one, other in zip(*grads, strict=True):
        zero = torch.zeros(1, dtype=DOUBLE)
        one, other = (zero if g is None else g for g in (one, other))
        assert (one - other).abs().max() < tolerance * spread


# ---------------------------------------------------------------------------------- selection


def test_selected_classes_by_hand():
    p = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])
    y = torch.tensor([1, 2, 0])  # rank 1, rank 2, rank 3
    assert select_classes(p, 2).tolist() == [[1, 2]] * 3
    assert select_classes(p, 2, y).tolist() == [[1, 2], [2, 2], [0, 2]]
    assert select_classes(p, 2, y, dedupe_label=True).tolist() == [[1, 2], [1, 2], [0, 2]]
    assert select_classes(p, 1, y).tolist() == [[1], [2], [0]]
    assert select_classes(p, 1, y, dedupe_label=True).tolist() == [[1], [2], [0]]
    assert select_classes(p, 3, y).tolist() == [[1, 2, 0], [2, 2, 0], [0, 2, 0]]


@pytest.mark.parametrize("make", [partial(nonlinear, C, K), partial(CAS, C, K)])
def test_label_and_prediction_agree_when_the_label_is_the_prediction(make):
    module, z = sharpen(make()).double(), feature()
    y = module.probe(z).argmax(1)
    trained = module.train()(z, y)
    for ours, other in zip(trained, module.eval()(z), strict=True):
        assert torch.equal(ours, other)


def test_labels_are_ignored_in_eval_mode_and_where_told():
    z, y = feature(), torch.tensor([0, 1, 2, 3])
    for module in (sharpen(nonlinear(C, K)).double(), CAS(C, K).double()):
        module.eval()
        assert torch.equal(module(z, y)[0], module(z)[0])
        free = copy.deepcopy(module).train()
        with pytest.raises(ConfigurationError, match="label_free"):
            free(z)
        assert not torch.equal(free(z, y)[0], module(z)[0])
        free.label_free = True
        assert torch.equal(free(z, y)[0], module(z)[0])
        assert torch.equal(free(z)[0], module(z)[0])


# -------------------------------------------------------------------------------------- masks

MASKS = [
    (SoftmaxMask(), lambda g: torch.exp(g) / torch.exp(g).sum(-1, keepdim=True)),
    (
        SoftmaxMask(2.0, 4.0),
        lambda g: 2 * torch.exp(g / 4) / torch.exp(g / 4).sum(-1, keepdim=True),
    ),
    (SigmoidMask(), lambda g: 1 / (1 + torch.exp(-g))),
    (SigmoidMask(2.0, 3.0), lambda g: 1 / (1 + torch.exp(-2 * (g - 3)))),
    (SoftplusMask(), lambda g: torch.exp(5 * g).log1p() / 5),
    (SoftplusMask(10.0, 0.5), lambda g: (torch.exp(10 * g).log1p() / 10).sqrt()),
    (SoftplusMask(20.0, 0.25), lambda g: (torch.exp(20 * g).log1p() / 20).sqrt().sqrt()),
    (ReluMask(), lambda g: torch.where(g > 0, g, torch.zeros_like(g))),
    (
        MagnitudeMask(),
        lambda g: 2 * torch.exp(g.abs()) / torch.exp(g.abs()).sum(-1, keepdim=True),
    ),
    (OnesMask(), lambda g: g * 0 + 1),
]


@pytest.mark.parametrize(
    ("mask", "formula"), MASKS, ids=lambda m: repr(m) if isinstance(m, nn.Module) else ""
)
def test_masks_written_out(mask, formula):
    relevance = torch.randn(4, 2, C, dtype=DOUBLE)
    m = mask(relevance)
    assert torch.allclose(m, formula(relevance[:, 0] + relevance[:, 1]), atol=1e-8)
    assert m.shape == (4, C)
    assert m.min() >= 0


def test_one_softmax_for_each_class():
    relevance = torch.randn(4, 3, C, dtype=DOUBLE)
    rows = [SoftmaxMask(1.5, 2.0)(relevance[:, j : j + 1]) for j in range(3)]
    assert torch.allclose(SummedSoftmaxMask(1.5, 2.0)(relevance), sum(rows))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_sums_and_limits_of_masks(scale):
    relevance = 3 * torch.randn(20, 2, C, dtype=DOUBLE)
    m = SoftmaxMask(scale)(relevance)
    assert m.min() > 0
    assert torch.allclose(m.sum(1), torch.full((20,), scale, dtype=DOUBLE))
    both = SummedSoftmaxMask(scale)(relevance).sum(1)
    assert torch.allclose(both, torch.full((20,), 2 * scale, dtype=DOUBLE))
    flat = SoftmaxMask(scale, 1e9)(relevance)
    assert torch.allclose(flat, torch.full_like(flat, scale / C))
    assert torch.allclose(SigmoidMask(1e-9)(relevance), torch.full_like(flat, 0.5))


@pytest.mark.parametrize(
    ("mask", "formula"), MASKS, ids=lambda m: repr(m) if isinstance(m, nn.Module) else ""
)
@pytest.mark.parametrize("size", [1e-3, 50.0, 1e4])
def test_masks_and_their_gradients_stay_finite(mask, formula, size):
    g = (size * torch.tensor([[[-1.0, 0.0, 1.0, -0.5]]])).requires_grad_()
    m = mask(g)
    assert m.isfinite().all()
    if m.requires_grad:
        (gradient,) = torch.autograd.grad(m.sum(), g)
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "mask", [SoftmaxMask(2.0), SigmoidMask(), SoftplusMask(), SoftplusMask(10.0, 0.5), ReluMask()]
)
def test_increasing_masks_shift_activation_to_relevant_channels(mask):
    v, g = torch.rand(40, 12, dtype=DOUBLE), torch.randn(40, 12, dtype=DOUBLE)
    weighted = v * mask(g[:, None])
    mean_after = (weighted * g).sum(1) / weighted.sum(1)
    assert (mean_after >= (v * g).sum(1) / v.sum(1) - 1e-12).all()
    order = g.argsort(dim=1)
    share = [t.gather(1, order).cumsum(1) / t.sum(1, keepdim=True) for t in (v, weighted)]
    assert (share[1] <= share[0] + 1e-12).all()  # of the q least relevant channels, for every q


def test_the_magnitude_control_is_not_increasing():
    m = MagnitudeMask()(torch.tensor([[[-3.0, 0.0, 1.0]]]))
    assert m[0, 0] > m[0, 2] > m[0, 1]


# ---------------------------------------------------------------------------- channel selection


def slow_cifs(z, probe, y, scale, k=2):
    """CIFS as the official code runs it, one example at a time, mask by inner autograd."""
    masked, logits = [], []
    for i in range(len(z)):
        p = probe(z[i : i + 1])
        copied = z[i : i + 1].detach().clone().requires_grad_()
        with torch.enable_grad():
            raw = probe(copied)
            ranked = raw[0].argsort(descending=True).tolist()
            chosen = ranked[:k] if y is None else [int(y[i]), *ranked[1:k]]
            total = sum(raw[0, j] for j in chosen)
            (gradient,) = torch.autograd.grad(total, copied, create_graph=True)
        g = gradient[0].sum((1, 2))
        m = scale * torch.exp(g) / torch.exp(g).sum()
        masked.append(z[i] * m[:, None, None])
        logits.append(p[0])
    return torch.stack(masked), torch.stack(logits)


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("k", "scale"), [(1, 1.0), (2, 2.0), (3, 3.0)])
def test_cifs_equals_its_slow_rewrite(kind, training, k, scale):
    module = CIFS(C, K, kind, hidden=8, mask=SoftmaxMask(scale), top_k=k).double().train(training)
    sharpen(module)
    z, y = feature().requires_grad_(), torch.tensor([0, 1, 2, 3])
    ours = module(z, y)
    slow = slow_cifs(z, module.probe, y if training else None, scale, k)
    for one, other in zip(ours, slow, strict=True):
        assert torch.allclose(one, other, atol=1e-8)
    leaves = [z, *module.parameters()]
    weights = [torch.randn_like(t) for t in ours]
    gradients = [
        torch.autograd.grad(sum((w * t).sum() for w, t in zip(weights, pair, strict=True)), leaves)
        for pair in (ours, slow)
    ]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-7)


def test_cas_equals_its_definition():
    module, z, y = CAS(C, K).double(), feature().requires_grad_(), torch.tensor([0, 1, 2, 3])
    weight = module.probe.output.weight
    v = z.mean((2, 3))
    p = v @ weight.T + module.probe.output.bias
    trained, evaluated = module.train()(z, y), module.eval()(z, y)
    for (masked, raw), classes in ((trained, y), (evaluated, p.argmax(1))):
        assert torch.allclose(raw, p)
        assert torch.allclose(masked, z * weight[classes][:, :, None, None])
    (gradient,) = torch.autograd.grad(trained[0].sum(), weight)  # not detached
    assert torch.allclose(gradient[:4], z.sum((2, 3)))


def test_examples_do_not_see_each_other():
    module, z = sharpen(nonlinear(C, K)).double().eval(), feature()
    other = torch.cat([z[:1], feature(3) * 7])
    assert torch.allclose(mask_of(module, z)[0], mask_of(module, other)[0], atol=1e-14)
    assert not torch.allclose(mask_of(module, z)[1], mask_of(module, other)[1])


def test_resolution_and_memory_format_do_not_matter():
    module, z = sharpen(nonlinear(C, K)).double().eval(), feature()
    wide = z.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(mask_of(module, wide), mask_of(module, z), atol=1e-12)
    assert torch.allclose(module(z.contiguous(memory_format=torch.channels_last))[0], module(z)[0])


def test_gradient_of_the_masked_feature_is_the_mask():
    module, z = sharpen(nonlinear(C, K)).double().eval(), feature().requires_grad_()
    (gradient,) = torch.autograd.grad(module(z)[0].sum(), z)
    assert torch.equal(gradient, mask_of(module, z)[:, :, None, None].expand_as(z))


@pytest.mark.parametrize(("kind", "detached_is_true"), [("linear", True), ("nonlinear", False)])
def test_finite_differences_see_the_cut_mask_path(kind, detached_is_true):
    module = sharpen(CIFS(C, K, kind, hidden=8), 20.0).double().eval()
    z = feature() + 0.1
    weights, direction = torch.randn_like(z), torch.randn_like(z)

    def value(t):
        return (weights * module(t)[0]).sum()

    numeric = (value(z + 1e-6 * direction) - value(z - 1e-6 * direction)) / 2e-6

    def analytic():
        t = z.clone().requires_grad_()
        return (torch.autograd.grad(value(t), t)[0] * direction).sum()

    with undetached(module):
        assert analytic().item() == pytest.approx(numeric.item(), rel=1e-5)
    error = abs(analytic() - numeric) / abs(numeric)
    assert (error < 1e-5) == detached_is_true


def test_undetached_restores_each_module_even_after_an_error():
    net = tiny_resnet(
        selections={"stages_1_0": partial(nonlinear, detach_mask_input=False), "stages_1_1": CIFS}
    )

    def fail_inside():
        with undetached(net):
            assert [s.detach_mask_input for s in net.selections.values()] == [False, False]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert [s.detach_mask_input for s in net.selections.values()] == [False, True]


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
def test_permuting_channels_permutes_the_mask(kind):
    module, z = sharpen(CIFS(C, K, kind, hidden=8)).double().eval(), feature()
    order = torch.randperm(C)
    permuted = copy.deepcopy(module)
    first = permuted.probe.output if kind == "linear" else permuted.probe.hidden
    first.weight.data = first.weight.data[:, order]
    assert torch.allclose(mask_of(permuted, z[:, order]), mask_of(module, z)[:, order])


def test_the_last_bias_matters_only_through_the_selection():
    module, z = sharpen(nonlinear(C, K)).double().eval(), feature()
    before = mask_of(module, z)
    module.probe.output.bias.data += 2.0  # all alike: the ranking stays
    assert torch.equal(mask_of(module, z), before)
    module.probe.output.bias.data[0] -= 1e3  # class 0 can no longer be selected, nor rank before
    module.probe.output.bias.data[1] += 1e3
    assert not torch.allclose(mask_of(module, z), before)
    module.probe.hidden.bias.data += 0.5
    assert not torch.allclose(mask_of(module, z), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(CIFS, C, K, top_k=0), rf"\[1, {K}\].*0"),
        (partial(CIFS, C, K, top_k=K + 1), rf"\[1, {K}\].*{K + 1}"),
        (partial(CIFS, C, K, hidden=0), r"hidden.*0"),
        (partial(SoftmaxMask, 0.0), r"scale.*0\.0"),
        (partial(SoftmaxMask, 1.0, -1.0), r"temperature.*-1\.0"),
        (partial(SigmoidMask, 0.0), r"alpha.*0\.0"),
        (partial(SoftplusMask, 5.0, 0.0), r"power.*0\.0"),
        (partial(SoftplusMask, math.nan), r"alpha.*nan"),
        (partial(JointCrossEntropy, -1.0), r"beta.*-1\.0"),
        (partial(JointCrossEntropy, 2.0, -1.0), r"attack_beta.*-1\.0"),
        (partial(JointTRADES, beta=-1.0), r"beta.*-1\.0"),
        (partial(JointTRADES, lam=math.inf), r"lam.*inf"),
        (partial(AdaptiveLoss, probe=0), r"probe.*0"),
        (
            partial(tiny_resnet, selections={"stages_9_0": CAS}),
            r"stages_9_0.*stages_0_0, stages_1_0",
        ),
        (partial(tiny_wrn, selections={"stages_2_1": CAS}), "head_act"),
        (partial(CIFSResNet, depths=(1,), widths=(4,), strides=(1,)), "selections"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


# ----------------------------------------------------------------------------------- networks

BOTH = ("stages_3_0", "stages_3_1")


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (CIFSResNet18, 11_246_046),
        (partial(CIFSResNet18, selections={}), 11_173_962),
        (partial(CIFSResNet18, selections=dict.fromkeys(BOTH, CAS)), 11_184_222),
        (partial(CIFSResNet18, selections=dict.fromkeys(BOTH, linear)), 11_184_222),
        (partial(CIFSResNet18, selections=dict.fromkeys(BOTH, CIFS)), 11_307_870),
        (partial(CIFSResNet18, selections={"stages_3_0": CIFS}), 11_240_916),
        (partial(CIFSResNet18, selections={"stages_3_1": CIFS}), 11_240_916),
        (partial(CIFSResNet18, selections={"stages_3_0": linear}), 11_179_092),
        (CIFSResNet10, 4_941_406),
        (
            partial(CIFSResNet10, selections=dict.fromkeys(("stages_2_0", "stages_3_0"), CAS)),
            4_909_790,
        ),
        (CIFSWideResNet, 36_641_854),
        (
            partial(CIFSWideResNet, selections=dict.fromkeys(("stages_2_3_act1", "head_act"), CAS)),
            36_492_014,
        ),
        (partial(LinearProbe, 512, 10), 5_130),
        (partial(NonlinearProbe, 512, 10), 66_954),
        (partial(NonlinearProbe, 256, 10), 34_186),
    ],
)
def test_parameters_as_published(make, parameters):
    with torch.device("meta"):
        assert size(make()) == parameters


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
        f, probes = net.eval()(torch.rand(2, *shape))
        assert [t.shape for t in (f, *probes)] == [(2, 10)] * 3
    first, second = (s.probe for s in net.selections.values())
    assert (type(first), type(second)) == (NonlinearProbe, LinearProbe)
    assert first.hidden.out_features == hidden
    assert all(s.mask.scale == 1.0 and s.top_k == 2 for s in net.selections.values())


@pytest.mark.parametrize(
    ("make", "plain", "settings"),
    [(tiny_resnet, ResNet, RESNET), (tiny_wrn, WideResNet, WRN)],
    ids=["resnet", "wrn"],
)
def test_masks_of_ones_leave_the_plain_network(make, plain, settings):
    plain = plain(**settings).double()
    net = make().double()
    keys = net.load_state_dict(plain.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert all(key.startswith("selections.") for key in keys.missing_keys)
    for selection in net.selections.values():
        selection.mask = OnesMask()
    x, y = images(dtype=DOUBLE)
    for net_mode in (True, False):
        f, probes = net.train(net_mode)(x, y)
        assert (f - plain.train(net_mode)(x)).abs().max() == 0
        assert len(probes) == 2


def replay(net, x, y, positions):
    """The plain layers one after another, selections applied where the positions say."""
    z, raw = net.stem(net.normalize(x)), []
    for i, stage in enumerate(net.stages):
        for j, block in enumerate(stage):
            z = block(z)
            if f"stages_{i}_{j}" in positions:
                z, p = net.selections[f"stages_{i}_{j}"](z, y)
                raw.append(p)
    return net.head.linear(z.mean((2, 3))), raw


@pytest.mark.parametrize("positions", [("stages_0_0",), ("stages_1_0", "stages_1_1")])
def test_resnet_positions(positions):
    net = sharpen(tiny_resnet(selections=dict.fromkeys(positions, nonlinear))).double()
    x, y = images(dtype=DOUBLE)
    net.eval()
    f, raw = net(x, y)
    slow_f, slow_raw = replay(net, x, y, positions)
    assert torch.allclose(f, slow_f)
    for one, other in zip(raw, slow_raw, strict=True):
        assert torch.allclose(one, other)


def test_wrn_masks_the_residual_branch_only():
    net = sharpen(tiny_wrn()).double().eval()
    assert list(net.selections) == ["stages_2_1_act1", "head_act"]
    linears = [m for m in tiny_wrn().selections.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 3
    assert all(not layer.bias.any() for layer in linears)
    x, y = images(dtype=DOUBLE)
    z = net.stem(x)
    for block in (net.stages[0][0], net.stages[1][0], net.stages[2][0]):
        z = block(z)
    last = net.stages[2][1]
    a = F.relu(last.bn1(z))
    a_bar, p1 = net.selections["stages_2_1_act1"](a, y)
    z = z + last.conv2(F.relu(last.bn2(last.conv1(a_bar))))
    z_bar, p2 = net.selections["head_act"](F.relu(net.head.norm(z)), y)
    f, raw = net(x, y)
    assert torch.allclose(f, net.head.linear(z_bar.mean((2, 3))))
    assert torch.allclose(raw[0], p1)
    assert torch.allclose(raw[1], p2)


def test_positions_may_be_written_with_dots_and_come_in_any_order():
    net = tiny_resnet(selections={"stages.1.1": linear, "stages.0.0": CAS})
    assert list(net.selections) == ["stages_0_0", "stages_1_1"]
    x, y = images()
    _, raw = net(x, y)
    z = net.stages[0](net.stem(x))
    assert net.selections["stages_0_0"].probe(z).shape == raw[0].shape
    assert isinstance(net.selections["stages_0_0"], CAS)


@pytest.mark.parametrize("make", [tiny_resnet, tiny_wrn])
def test_gradients_of_the_losses(make):
    net, (x, y) = make(), images(8)
    f, probes = net(x, y)
    last = {f"selections.{s}.probe.output.bias" for s in net.selections}
    names = [name for name, _ in net.named_parameters()]
    gradients = torch.autograd.grad(
        F.cross_entropy(f, y), list(net.parameters()), retain_graph=True, allow_unused=True
    )
    unused = {name for name, g in zip(names, gradients, strict=True) if g is None}
    assert unused == last  # the mask carries gradients to all of the probes but this
    assert all(g.abs().sum() > 0 for g in gradients if g is not None)
    joint_loss(f, probes, y, beta=2.0).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("make", [tiny_resnet, tiny_wrn])
def test_works_in_inference_mode_compiled_copied_and_pickled(make):
    net = sharpen(make()).eval()
    x, y = images()
    f, _ = net(x)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    with torch.inference_mode():
        assert torch.equal(copied(x)[0], f)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with torch.inference_mode():
        assert torch.equal(compiled(x, y)[0], f)
    with undetached(net):  # the flag is part of the graph's guards
        gradients = []
        for run in (net, compiled):
            t = x.clone().requires_grad_()
            gradients.append(torch.autograd.grad(run(t)[0].sum(), t)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("make", [tiny_resnet, tiny_wrn])
def test_what_reads_a_masked_feature_leaves_mixed_precision(make):
    net = make().eval()
    seen = {}

    def watch(name):
        def hook(module, args, output):
            seen[name] = (args[0].dtype, output.dtype)

        return hook

    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.register_forward_hook(watch(name))
    x, _ = images()
    with torch.autocast("cpu", torch.bfloat16):
        f, raw = net(x)
    assert {t.dtype for t in (f, *raw)} == {torch.float32}
    single = {name for name, dtypes in seen.items() if dtypes == (torch.float32, torch.float32)}
    if make is tiny_resnet:  # masks follow both blocks of the last stage
        block = "stages.1.1"
        first = "stages.1.0.conv1"
    else:  # masks sit inside the last block, and after the head's norm
        block = "stages.2.1"
        first = "stages.2.0.conv1"
        single.add(f"{block}.bn1")  # before the mask
    guarded = {n for n in seen if n.startswith((block, "head.linear", "selections"))}
    assert guarded <= single
    assert seen[first][1] == torch.bfloat16  # elsewhere autocast works


# ------------------------------------------------------------------------------------- losses


def logits_of(s: int) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    f, *probes = (torch.randn(4, K, dtype=DOUBLE) for _ in range(s + 1))
    return f, probes, torch.tensor([0, 1, 2, 3])


def slow_cross_entropy(z, y):
    return torch.stack([-torch.log(z[i].exp()[y[i]] / z[i].exp().sum()) for i in range(len(z))])


@pytest.mark.parametrize("s", [1, 2, 3])
@pytest.mark.parametrize("beta", [0.0, 0.1, 2.0])
def test_joint_loss_written_out(s, beta):
    f, probes, y = logits_of(s)
    expected = slow_cross_entropy(f, y)
    for p in probes:
        expected = expected + beta / s * slow_cross_entropy(p, y)
    loss = joint_loss(f, probes, y, beta)
    assert loss.shape == (4,)
    assert torch.allclose(loss, expected)


def test_joint_loss_identities():
    f, probes, y = logits_of(2)
    assert torch.equal(joint_loss(f, [], y, 7.0), F.cross_entropy(f, y, reduction="none"))
    low, middle, high = (joint_loss(f, probes, y, beta) for beta in (0.0, 1.5, 3.0))
    assert torch.allclose(low, joint_loss(f, [], y, 0.0))
    assert torch.allclose(middle, (low + high) / 2)  # affine in beta
    assert training_factor(2.0) == 1.0
    assert training_factor(0.0) == 3.0
    assert all(training_factor(b) * (1 + b) == pytest.approx(3.0) for b in (0.1, 10.0, 100.0))


class Classifier(nn.Module):
    """What the objectives are given while training: holds the network as ``net``."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return joint_logits(self.net, x)[0]


def test_joint_logits_of_anything():
    x, y = images()
    net, plain = tiny_resnet().eval(), ResNet(**RESNET).eval()
    for model in (net, Classifier(net)):
        f, raw = joint_logits(model, x, y)
        assert torch.equal(f, net(x)[0])
        assert len(raw) == 2
    for model in (plain, Classifier(plain), plain.forward):
        f, raw = joint_logits(model, x, y)
        assert torch.equal(f, plain(x))
        assert raw == []


def batch_of(x_adv=True):
    x, y = images(6)
    return {"x": x, "y": y} | ({"x_adv": (x + 0.1).clamp(max=1)} if x_adv else {})


@pytest.mark.parametrize(
    ("kind", "image"), [(JointCrossEntropy, "x_adv"), (NaturalJointCrossEntropy, "x")]
)
@pytest.mark.parametrize(
    ("beta", "rescale", "factor"), [(2.0, True, 1.0), (0.5, True, 2.0), (0.5, False, 1.0)]
)
def test_joint_cross_entropy_sees_images_of_one_kind(kind, image, beta, rescale, factor):
    batch = {key: value for key, value in batch_of().items() if key in (image, "y")}
    assert kind.needs_x_adv == (image == "x_adv")
    model = Classifier(tiny_resnet())
    expected_f, expected_raw = copy.deepcopy(model.net)(batch[image], batch["y"])
    loss = kind(beta, rescale=rescale).outer(model, batch)
    expected = F.cross_entropy(expected_f, batch["y"])
    expected = expected + beta / 2 * sum(F.cross_entropy(p, batch["y"]) for p in expected_raw)
    assert loss.item() == pytest.approx(factor * expected.item(), rel=1e-5)
    plain = Classifier(ResNet(**RESNET).eval())
    loss = kind(beta, rescale=rescale).outer(plain, batch)
    expected = F.cross_entropy(plain(batch[image]), batch["y"])
    assert loss.item() == pytest.approx(factor * expected.item(), rel=1e-6)


def test_attack_beta_is_its_own_number():
    model, batch = Classifier(tiny_resnet().eval()), batch_of()
    f, raw = model.net(batch["x_adv"])
    for objective, beta in (
        (JointCrossEntropy(2.0), 2.0),
        (JointCrossEntropy(2.0, attack_beta=10.0), 10.0),
        (JointCrossEntropy(2.0, attack_beta=0.0), 0.0),
        (NaturalJointCrossEntropy(2.0), 2.0),
    ):
        loss = objective.inner(model, batch)(batch["x_adv"])
        assert torch.allclose(loss, joint_loss(f, raw, batch["y"], beta))


def test_missing_adversarial_images_name_the_callback():
    for objective in (JointCrossEntropy(), JointTRADES()):
        with pytest.raises(ConfigurationError, match="AdversarialTraining"):
            objective.outer(Classifier(tiny_resnet()), batch_of(x_adv=False))


def slow_kl(p, q):
    p, q = (t.exp() / t.exp().sum(1, keepdim=True) for t in (p, q))
    return (p * torch.log(p / q)).sum(1)


def label_free_net() -> CIFSResNet:
    free = partial(nonlinear, label_free=True)
    return sharpen(tiny_resnet(selections={"stages_1_0": free, "stages_1_1": free}))


def test_joint_trades_written_out():
    model, batch = Classifier(label_free_net().double().eval()), batch_of()
    batch = {k: v.double() if k != "y" else v for k, v in batch.items()}
    batch["x_adv"] = torch.rand_like(batch["x"])
    model.net.head.linear.weight.data *= 1e4  # predictions apart: KL is not symmetric
    objective = JointTRADES(beta=4.0, lam=3.0)
    (f, raw), (f_adv, raw_adv) = model.net(batch["x"]), model.net(batch["x_adv"])
    divergence = slow_kl(f, f_adv)
    assert not torch.allclose(divergence, slow_kl(f_adv, f), rtol=0.01)
    clean = slow_cross_entropy(f, batch["y"])
    for p, p_adv in zip(raw, raw_adv, strict=True):
        divergence = divergence + 2.0 * slow_kl(p, p_adv)
        clean = clean + 2.0 * slow_cross_entropy(p, batch["y"])
    assert torch.allclose(objective.inner(model, batch)(batch["x_adv"]), divergence)
    expected = (clean + 3.0 * divergence).mean()
    loss = objective.outer(model, batch)
    assert torch.allclose(loss, expected)
    gradients = [
        torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        for value in (loss, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


def test_joint_trades_identities():
    model, batch = Classifier(label_free_net().eval()), batch_of()
    same = {**batch, "x_adv": batch["x"]}
    natural = NaturalJointCrossEntropy(4.0, rescale=False).outer(model, batch)
    assert torch.allclose(JointTRADES(4.0, 5.0).outer(model, same), natural, atol=1e-6)
    assert torch.allclose(JointTRADES(4.0, 0.0).outer(model, batch), natural, atol=1e-6)
    inner = JointTRADES().inner(model, batch)
    assert inner(batch["x"]).abs().max() < 1e-6
    x = batch["x_adv"].clone().requires_grad_()
    assert torch.autograd.grad(inner(x).sum(), x)[0].abs().sum() > 0
    plain = Classifier(ResNet(**RESNET).eval())
    assert JointTRADES().inner(plain, batch)(batch["x_adv"]).shape == (6,)


def test_joint_trades_asks_for_label_free_selections():
    with pytest.raises(ConfigurationError, match="label_free"):
        JointTRADES().outer(Classifier(tiny_resnet()), batch_of())
    assert JointTRADES().outer(Classifier(label_free_net()), batch_of()).isfinite()


# --------------------------------------------------------------------------- adaptive attacks

BETAS = ("0.1", "1", "2", "10", "100", "1000")


def test_names_of_adaptive_losses():
    both = {f"{b}_{n}" for b in ("ce", "cw") for n in ("f", *(f"joint{v}" for v in BETAS))}
    probes = {f"{b}_p{s}" for b in ("ce", "cw") for s in (1, 2)}
    assert set(adaptive_losses(Classifier(tiny_resnet()))) == both | probes | {"ce_undetached"}
    one = tiny_resnet(selections={"stages_1_1": CIFS})
    assert "ce_p1" in adaptive_losses(one)
    assert "ce_p2" not in adaptive_losses(one)
    cas = tiny_resnet(selections={"stages_1_0": CAS, "stages_1_1": CAS})
    assert set(adaptive_losses(cas)) == both | probes
    assert set(adaptive_losses(ResNet(**RESNET))) == {"ce_f", "cw_f"}


def slow_hinge(z, y):
    out = []
    for i in range(len(z)):
        others = max(float(z[i, j]) for j in range(K) if j != y[i])
        out.append(-max(float(z[i, y[i]]) - others + 50.0, 0.0))
    return torch.tensor(out)


def test_values_of_adaptive_losses():
    net, batch = sharpen(tiny_resnet()).eval(), batch_of()
    y, x = batch["y"], batch["x_adv"]
    net.head.linear.weight.data *= 1e6  # far enough for the hinge to close on some examples
    with torch.no_grad():
        f, raw = net(x)
    assert (slow_hinge(f, y) == 0).any()
    bases = {
        "ce": lambda z: F.cross_entropy(z, y, reduction="none"),
        "cw": lambda z: slow_hinge(z, y),
    }
    values = {name: make(net, batch)(x) for name, make in adaptive_losses(net).items()}
    for name, base in bases.items():
        expected = {"f": base(f), "p1": base(raw[0]), "p2": base(raw[1])}
        for beta in BETAS:
            expected[f"joint{beta}"] = base(f) + float(beta) / 2 * (base(raw[0]) + base(raw[1]))
        for kind, value in expected.items():
            assert torch.allclose(values[f"{name}_{kind}"], value, rtol=1e-4), (name, kind)
    assert torch.equal(values["ce_undetached"], values["ce_joint2"])


def test_undetached_loss_has_another_gradient_and_leaves_the_network_as_it_was():
    net, batch = sharpen(tiny_resnet()).eval(), batch_of()
    losses, x = adaptive_losses(net), batch["x"].clone().requires_grad_()
    cut, full = (
        torch.autograd.grad(losses[name](net, batch)(x).sum(), x)[0]
        for name in ("ce_joint2", "ce_undetached")
    )
    assert not torch.allclose(cut, full, rtol=1e-3)
    assert all(s.detach_mask_input for s in net.selections.values())


def test_adaptive_losses_accept_labels_made_in_inference_mode():
    net = sharpen(tiny_resnet()).eval()
    with torch.inference_mode():
        batch = batch_of()
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
        x = batch["x"].clone().requires_grad_()
        for make in (
            *adaptive_losses(net).values(),
            JointCrossEntropy().inner,
            JointTRADES().inner,
        ):
            torch.autograd.grad(make(net, batch)(x).sum(), x)


def test_a_probe_that_a_network_lacks_is_refused():
    net, batch = sharpen(tiny_resnet()).eval(), batch_of()
    probes = net(batch["x"])[1]
    for s, p in enumerate(probes, start=1):
        expected = F.cross_entropy(p, batch["y"], reduction="none")
        torch.testing.assert_close(AdaptiveLoss(probe=s)(net, batch)(batch["x"]), expected)
    with pytest.raises(ConfigurationError, match="probe 3 is to be attacked and the network has 2"):
        AdaptiveLoss(probe=3)(net, batch)(batch["x"])


def test_the_mask_of_a_channel_that_is_0_is_shown_as_it_is():
    net = sharpen(tiny_resnet()).eval()
    net.stages[-1][-1].register_forward_hook(
        lambda _, __, z: z * (torch.arange(z.shape[1]) != 1)[:, None, None]
    )
    seen = {}
    for selection in net.selections.values():
        selection.register_forward_hook(
            lambda s, args, out: seen.update({s: s.multiplier(args[0], out[1], None)})
        )
    shown = {}
    model, batch = CIFSClassifier(net, JointCrossEntropy()), batch_of()
    model.eval().log_histograms(lambda name, mask: shown.update({name: mask}), {"x": batch["x"]})
    assert len(shown) == len(seen) == 2
    for mask, expected in zip(shown.values(), seen.values(), strict=True):
        torch.testing.assert_close(mask, expected)
        assert (mask > 0).all()


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
    pickle.dumps(net)
    prefix = "--net.init_args.selections.stages_1_0.init_args"
    changed = (
        f"{prefix}.mask.init_args.scale=3.5",
        f"{prefix}.probe=nonlinear",
        f"{prefix}.hidden=9",
    )
    net = instantiate(tmp_path, YAML, *changed, "--net.num_classes=7")
    first, second = net.selections.values()
    assert first.mask.scale == 3.5
    assert first.probe.hidden.out_features == 9
    assert second.probe.output.out_features == 7


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("CIFSResNet18", []),
        ("CIFSResNet10", []),
        ("CIFSDigitsResNet", []),
        ("CIFSWideResNet", ["--net.depth=10", "--net.widen_factor=1"]),
    ],
)
def test_networks_take_their_sizes_from_the_data(tmp_path, name, arguments):
    text = f"net:\n  class_path: paper_cifs.method.{name}\n"
    arguments = [*arguments, "--net.num_classes=4", "--net.in_channels=2", "--net.hidden=3"]
    with torch.device("meta"):
        net = instantiate(tmp_path, text, *arguments).eval()
        f, raw = net(torch.rand(2, 2, 16, 16))
    assert [t.shape for t in (f, *raw)] == [(2, 4)] * 3
    assert next(iter(net.selections.values())).probe.hidden.out_features == 3
