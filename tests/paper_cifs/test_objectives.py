"""Joint losses, TRADES on all logits and adaptive attacks against slow rewrites."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from common.errors import ConfigurationError
from common.networks.parts import declared_losses
from paper_cifs.method import (
    CAS,
    CIFS,
    AdaptiveLoss,
    JointCrossEntropy,
    JointTRADES,
    NaturalJointCrossEntropy,
    joint_logits,
    joint_loss,
    training_factor,
)
from paper_cifs.module import CIFSClassifier

K, BETAS = 3, ("0.1", "1", "2", "10", "100", "1000")


def slow_cross_entropy(z, y):
    return torch.stack([-torch.log(z[i].exp()[y[i]] / z[i].exp().sum()) for i in range(len(z))])


def slow_kl(p, q):
    p, q = (t.exp() / t.exp().sum(1, keepdim=True) for t in (p, q))
    return (p * torch.log(p / q)).sum(1)


def slow_hinge(z, y):
    out = []
    for i in range(len(z)):
        others = max(float(z[i, j]) for j in range(K) if j != y[i])
        out.append(-max(float(z[i, y[i]]) - others + 50.0, 0.0))
    return torch.tensor(out)


@pytest.fixture
def batch(images):
    x, y = images(6)
    return {"x": x, "y": y, "x_adv": (x + 0.1).clamp(max=1)}


@pytest.fixture
def model(cifs_network, sharpen):
    """A classifier whose network has CIFS at both blocks."""
    return CIFSClassifier(sharpen(cifs_network()), JointCrossEntropy()).eval()


@pytest.fixture
def plain(plain_network):
    return CIFSClassifier(plain_network(), JointCrossEntropy()).eval()


@pytest.fixture
def label_free(cifs_network, sharpen):
    free = partial(CIFS, hidden=5, label_free=True)
    net = sharpen(cifs_network(selections={"stages_0_0": free, "stages_1_0": free}))
    return CIFSClassifier(net, JointTRADES()).eval()


# ------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("s", [0, 1, 2, 3])
@pytest.mark.parametrize("beta", [0.0, 0.1, 2.0])
def test_joint_loss_written_out(s, beta):
    f, *probes = (torch.randn(4, K, dtype=torch.float64) for _ in range(s + 1))
    y = torch.arange(4) % K
    expected = slow_cross_entropy(f, y)
    for p in probes:
        expected = expected + beta / s * slow_cross_entropy(p, y)
    torch.testing.assert_close(joint_loss(f, probes, y, beta), expected)


def test_the_training_factor_keeps_the_total_weight():
    assert training_factor(2.0) == 1.0
    assert training_factor(0.0) == 3.0
    assert training_factor(10.0) == pytest.approx(3 / 11)


def test_joint_logits_of_anything(model, plain, batch):
    x, y = batch["x"], batch["y"]
    for given in (model, model.net):
        f, raw = joint_logits(given, x, y)
        assert torch.equal(f, model(x))
        assert len(raw) == 2
    for given in (plain, plain.net, plain.net.forward):
        f, raw = joint_logits(given, x, y)
        assert torch.equal(f, plain(x))
        assert raw == []


@pytest.mark.parametrize(
    ("kind", "image"), [(JointCrossEntropy, "x_adv"), (NaturalJointCrossEntropy, "x")]
)
@pytest.mark.parametrize(
    ("beta", "rescale", "factor"), [(2.0, True, 1.0), (0.5, True, 2.0), (0.5, False, 1.0)]
)
def test_joint_cross_entropy_sees_images_of_one_kind(
    kind, image, beta, rescale, factor, model, plain, batch
):
    assert kind.needs_x_adv == (image == "x_adv")
    y, objective = batch["y"], kind(beta, rescale=rescale)
    f, raw = joint_logits(copy.deepcopy(model.net.train()), batch[image], y)
    expected = F.cross_entropy(f, y) + beta / 2 * sum(F.cross_entropy(p, y) for p in raw)
    loss = objective.outer(model, {image: batch[image], "y": y})
    assert loss.item() == pytest.approx(factor * expected.item(), rel=1e-5)
    loss = objective.outer(plain, {image: batch[image], "y": y})
    expected = F.cross_entropy(plain(batch[image]), y)
    assert loss.item() == pytest.approx(factor * expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("objective", "beta"),
    [
        (JointCrossEntropy(2.0), 2.0),
        (JointCrossEntropy(2.0, attack_beta=10.0), 10.0),
        (JointCrossEntropy(2.0, attack_beta=0.0), 0.0),
        (NaturalJointCrossEntropy(2.0), 2.0),
    ],
)
def test_attack_beta_is_its_own_number(objective, beta, model, batch):
    f, raw = joint_logits(model, batch["x_adv"])
    loss = objective.inner(model, batch)(batch["x_adv"])
    torch.testing.assert_close(loss, joint_loss(f, raw, batch["y"], beta))


@pytest.mark.parametrize("objective", [JointCrossEntropy(), JointTRADES()])
def test_missing_adversarial_images_name_the_callback(objective, model, batch):
    del batch["x_adv"]
    with pytest.raises(ConfigurationError, match="AdversarialTraining"):
        objective.outer(model, batch)


def test_joint_trades_written_out(label_free, batch):
    model = label_free.double()
    batch = {k: v.double() if k != "y" else v for k, v in batch.items()}
    batch["x_adv"] = torch.rand_like(batch["x"])
    model.net.head.linear.weight.data *= 1e4  # predictions apart: KL is not symmetric
    objective = JointTRADES(beta=4.0, lam=3.0)
    (f, raw), (f_adv, raw_adv) = (joint_logits(model, batch[kind]) for kind in ("x", "x_adv"))
    divergence = slow_kl(f, f_adv)
    assert not torch.allclose(divergence, slow_kl(f_adv, f), rtol=0.01)
    clean = slow_cross_entropy(f, batch["y"])
    for p, p_adv in zip(raw, raw_adv, strict=True):
        divergence = divergence + 2.0 * slow_kl(p, p_adv)
        clean = clean + 2.0 * slow_cross_entropy(p, batch["y"])
    torch.testing.assert_close(objective.inner(model, batch)(batch["x_adv"]), divergence)
    expected, loss = (clean + 3.0 * divergence).mean(), objective.outer(model, batch)
    torch.testing.assert_close(loss, expected)
    ours, slow = (
        torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)
        for value in (loss, expected)
    )
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-10)


def test_joint_trades_identities(label_free, plain, batch):
    natural = NaturalJointCrossEntropy(4.0, rescale=False).outer(label_free, batch)
    nothing = JointTRADES(4.0, 5.0).outer(label_free, {**batch, "x_adv": batch["x"]})
    torch.testing.assert_close(nothing, natural)
    inner = JointTRADES().inner(label_free, batch)
    assert inner(batch["x"]).abs().max() < 1e-6
    x = batch["x_adv"].clone().requires_grad_()
    assert torch.autograd.grad(inner(x).sum(), x)[0].abs().sum() > 0
    assert JointTRADES().inner(plain, batch)(batch["x_adv"]).shape == (6,)


def test_joint_trades_asks_for_label_free_selections(model, label_free, batch):
    with pytest.raises(ConfigurationError, match="label_free"):
        JointTRADES().outer(model.train(), batch)
    assert JointTRADES().outer(label_free.train(), batch).isfinite()


# --------------------------------------------------------------------------- adaptive attacks


def test_names_of_adaptive_losses(model, plain, cifs_network):
    both = {f"{b}_{n}" for b in ("ce", "cw") for n in ("f", *(f"joint{v}" for v in BETAS))}
    probes = {f"{b}_p{s}" for b in ("ce", "cw") for s in (1, 2)}
    assert set(model.adaptive_losses()) == both | probes | {"ce_undetached"}
    one = declared_losses(cifs_network(selections={"stages_1_0": CIFS}), {})
    assert "ce_p1" in one
    assert "ce_p2" not in one
    cas = cifs_network(selections={"stages_0_0": CAS, "stages_1_0": CAS})
    assert set(declared_losses(cas, {})) == both | probes
    assert set(plain.adaptive_losses()) == {"ce_f", "cw_f"}


def test_values_of_adaptive_losses(model, batch):
    y, x = batch["y"], batch["x_adv"]
    model.net.head.linear.weight.data *= 1e6  # far enough for the hinge to close on some examples
    with torch.no_grad():
        f, raw = joint_logits(model, x)
    assert (slow_hinge(f, y) == 0).any()
    bases = {"ce": partial(F.cross_entropy, reduction="none"), "cw": slow_hinge}
    values = {name: make(model, batch)(x) for name, make in model.adaptive_losses().items()}
    for name, base in bases.items():
        expected = {"f": base(f, y), "p1": base(raw[0], y), "p2": base(raw[1], y)}
        total = expected["p1"] + expected["p2"]
        expected |= {f"joint{beta}": expected["f"] + float(beta) / 2 * total for beta in BETAS}
        for kind, value in expected.items():
            assert torch.allclose(values[f"{name}_{kind}"], value, rtol=1e-4), (name, kind)
    assert torch.equal(values["ce_undetached"], values["ce_joint2"])


def test_adaptive_losses_have_the_models_logits_in_their_pass(model, batch):
    with torch.no_grad():
        wanted = model(batch["x_adv"])
        for name, inner in model.adaptive_losses().items():
            logits, loss = inner.with_logits(model, batch)(batch["x_adv"])
            assert torch.equal(logits, wanted), name
            assert torch.equal(loss, inner(model, batch)(batch["x_adv"])), name


def test_undetached_loss_has_another_gradient_and_leaves_the_network_as_it_was(model, batch):
    losses, x = model.adaptive_losses(), batch["x"].clone().requires_grad_()
    cut, full = (
        torch.autograd.grad(losses[name](model, batch)(x).sum(), x)[0]
        for name in ("ce_joint2", "ce_undetached")
    )
    assert not torch.allclose(cut, full, rtol=1e-3)
    assert all(s.detach_mask_input for s in model.net.selections.values())


def test_losses_accept_labels_made_in_inference_mode(model, images):
    with torch.inference_mode():
        x, y = images(6)
        batch = {"x": x + 0, "y": y + 0}
    makers = (*model.adaptive_losses().values(), JointCrossEntropy().inner, JointTRADES().inner)
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
        x = batch["x"].clone().requires_grad_()
        for make in makers:
            torch.autograd.grad(make(model, batch)(x).sum(), x)


def test_a_probe_that_a_network_lacks_is_refused(model, batch):
    with pytest.raises(ConfigurationError, match=r"probe 3 .* has 2"):
        AdaptiveLoss(probe=3)(model, batch)(batch["x"])


def test_the_mask_of_a_channel_that_is_0_is_shown_as_it_is(model, batch):
    model.net.stages[-1][-1].register_forward_hook(
        lambda _, __, z: z * (torch.arange(z.shape[1]) != 1)[:, None, None]
    )
    seen, shown = [], {}
    for selection in model.net.selections.values():
        selection.register_forward_hook(
            lambda s, args, out: seen.append(s.multiplier(args[0], out[1], None))
        )
    model.log_histograms(lambda name, mask: shown.update({name: mask}), batch)
    assert list(shown) == [
        f"masks/selections.{position}/{kind}"
        for kind in ("x", "x_adv")
        for position in ("stages_0_0", "stages_1_0")
    ]
    torch.testing.assert_close(list(shown.values()), seen)
    assert all((mask > 0).all() for mask in seen)
