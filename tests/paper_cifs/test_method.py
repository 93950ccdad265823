"""Probes, relevance, masks and channel selection against slow rewrites and closed forms."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from common.errors import ConfigurationError
from paper_cifs.method import (
    CAS,
    CIFS,
    AdaptiveLoss,
    JointCrossEntropy,
    JointTRADES,
    LinearProbe,
    MagnitudeMask,
    NonlinearProbe,
    OnesMask,
    ReluMask,
    SigmoidMask,
    SoftmaxMask,
    SoftplusMask,
    SummedSoftmaxMask,
    relevance_by_autograd,
    select_classes,
    undetached,
)

DOUBLE = torch.float64
C, K = 6, 5
Y = torch.tensor([0, 1, 2, 3])


def feature() -> torch.Tensor:
    """A post-activation feature: non-negative, with zeros."""
    return torch.randn(4, C, 3, 3, dtype=DOUBLE).clamp(min=0)


def same(ours, slow, leaves, tolerance):
    """Values and gradients of two computations agree."""
    weights = [torch.randn_like(t) for t in ours]
    gradients = []
    for pair in (ours, slow):
        total = sum((w * t).sum() for w, t in zip(weights, pair, strict=True))
        gradients.append(
            torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        )
    for one, other in zip((*ours, *gradients[0]), (*slow, *gradients[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


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


@pytest.mark.parametrize("make", [LinearProbe, partial(NonlinearProbe, hidden=8)])
@pytest.mark.parametrize("spread", [1.0, 30.0])  # 30 puts hidden units beyond softplus' threshold
def test_closed_form_relevance_equals_autograd(make, spread):
    """In value and in the gradients of the probe's parameters and of the feature."""
    probe, z = make(C, K).double(), (feature() * spread).requires_grad_()
    selected = torch.tensor([[0, 1], [2, 2], [4, 0], [3, 1]])  # [2, 2]: a class counted twice
    closed = probe.relevance(z, selected)
    assert closed.shape == (4, 2, C)
    slow = relevance_by_autograd(probe, z, selected)
    same([closed], [slow], [*probe.parameters(), z], 1e-7 * spread)


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


@pytest.mark.parametrize("make", [partial(CIFS, hidden=8), CAS])
def test_labels_are_ignored_in_eval_mode_and_where_told(make, sharpen):
    module, z = sharpen(make(C, K)).double(), feature()
    predicted = module.probe(z).argmax(1)
    found = module.eval()(z)[0]
    assert torch.equal(module(z, Y)[0], found)
    module.train()
    assert torch.equal(module(z, predicted)[0], found)
    assert not torch.equal(module(z, Y)[0], found)
    with pytest.raises(ConfigurationError, match="label_free"):
        module(z)
    module.label_free = True
    assert torch.equal(module(z, Y)[0], found)
    assert torch.equal(module(z)[0], found)


# -------------------------------------------------------------------------------------- masks


def slow_softmax(g):
    return torch.exp(g) / torch.exp(g).sum(-1, keepdim=True)


MASKS = [
    (SoftmaxMask(), slow_softmax),
    (SoftmaxMask(2.0, 4.0), lambda g: 2 * slow_softmax(g / 4)),
    (SigmoidMask(), lambda g: 1 / (1 + torch.exp(-g))),
    (SigmoidMask(2.0, 3.0), lambda g: 1 / (1 + torch.exp(-2 * (g - 3)))),
    (SoftplusMask(), lambda g: torch.exp(5 * g).log1p() / 5),
    (SoftplusMask(10.0, 0.5), lambda g: (torch.exp(10 * g).log1p() / 10).sqrt()),
    (SoftplusMask(20.0, 0.25), lambda g: (torch.exp(20 * g).log1p() / 20).sqrt().sqrt()),
    (ReluMask(), lambda g: torch.where(g > 0, g, torch.zeros_like(g))),
    (MagnitudeMask(), lambda g: 2 * slow_softmax(g.abs())),
    (OnesMask(), lambda g: g * 0 + 1),
]


@pytest.mark.parametrize(("mask", "formula"), MASKS, ids=[repr(mask) for mask, _ in MASKS])
def test_masks_written_out_and_finite_everywhere(mask, formula):
    relevance = torch.randn(4, 2, C, dtype=DOUBLE)
    m = mask(relevance)
    assert torch.allclose(m, formula(relevance[:, 0] + relevance[:, 1]), atol=1e-8)
    assert m.shape == (4, C)
    assert m.min() >= 0
    for size in (1e-3, 50.0, 1e4):
        g = (size * torch.tensor([[[-1.0, 0.0, 1.0, -0.5]]])).requires_grad_()
        m = mask(g)
        assert m.isfinite().all()
        if m.requires_grad:
            assert torch.autograd.grad(m.sum(), g)[0].isfinite().all()


def test_one_softmax_for_each_class():
    relevance = torch.randn(4, 3, C, dtype=DOUBLE)
    rows = [SoftmaxMask(1.5, 2.0)(relevance[:, j : j + 1]) for j in range(3)]
    assert torch.allclose(SummedSoftmaxMask(1.5, 2.0)(relevance), sum(rows))


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
        m = scale * slow_softmax(gradient[0].sum((1, 2)))
        masked.append(z[i] * m[:, None, None])
        logits.append(p[0])
    return torch.stack(masked), torch.stack(logits)


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("k", "scale"), [(1, 1.0), (2, 2.0), (3, 3.0)])
def test_cifs_equals_its_slow_rewrite(kind, training, k, scale, sharpen):
    module = CIFS(C, K, kind, hidden=8, mask=SoftmaxMask(scale), top_k=k).double().train(training)
    sharpen(module)
    z = feature().requires_grad_()
    ours = module(z, Y)
    slow = slow_cifs(z, module.probe, Y if training else None, scale, k)
    same(ours, slow, [z, *module.parameters()], 1e-7)
    assert torch.allclose(module(z.contiguous(memory_format=torch.channels_last), Y)[0], ours[0])


def test_cas_equals_its_definition():
    module, z = CAS(C, K).double(), feature().requires_grad_()
    weight = module.probe.output.weight
    p = z.mean((2, 3)) @ weight.T + module.probe.output.bias
    trained, evaluated = module.train()(z, Y), module.eval()(z, Y)
    for (masked, raw), classes in ((trained, Y), (evaluated, p.argmax(1))):
        assert torch.allclose(raw, p)
        assert torch.allclose(masked, z * weight[classes][:, :, None, None])
    (gradient,) = torch.autograd.grad(trained[0].sum(), weight)  # not detached
    assert torch.allclose(gradient[:4], z.sum((2, 3)))


@pytest.mark.parametrize(("kind", "detached_is_true"), [("linear", True), ("nonlinear", False)])
def test_finite_differences_see_the_cut_mask_path(kind, detached_is_true, sharpen):
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
    modules = nn.ModuleList([CIFS(C, K, detach_mask_input=False), CIFS(C, K)])
    with pytest.raises(RuntimeError, match="False, False"), undetached(modules):
        raise RuntimeError([module.detach_mask_input for module in modules])
    assert [module.detach_mask_input for module in modules] == [False, True]


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
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
