"""What holds of the defences whatever they are trained on (the specification's invariants)."""

import copy

import pytest
import torch
from torch import Tensor, nn

from common.attacks.pgd import PGD, FriendlyPGD, input_gradient
from common.attacks.randomness import ExampleRandom
from common.modes import frozen
from common.objectives import ALP, AT, MART, TRADES, Objective
from paper_rcm.dajat import DAJAT
from paper_rcm.method import DigitsNet, EnlargedNetwork

DEFENCES = [AT(), ALP(), TRADES(), MART(), MART(variant="released"), DAJAT()]


def make(dtype: torch.dtype = torch.float64) -> tuple[EnlargedNetwork, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = EnlargedNetwork(DigitsNet((1, 2, 2)), 2, mean=[0.3], std=[0.37]).to(dtype)
    x = torch.rand(16, 1, 8, 8, dtype=dtype)
    net.train()(x)
    return net.eval(), {"x": x, "y": torch.arange(16) % 10, "index": torch.arange(16)}


def test_the_divergence_of_trades_has_no_slope_at_the_image_itself() -> None:
    """Which is why it starts beside it; the sign step would blow rounding up to a full one."""
    net, batch = make()
    loss = TRADES().inner(net, batch)
    at_x = input_gradient(loss, batch["x"]).abs().max().item()
    beside = batch["x"] + 0.001 * torch.randn_like(batch["x"])
    beside_x = input_gradient(loss, beside).abs().max().item()
    assert at_x < 1e-14 < 1e-6 < beside_x


@pytest.mark.parametrize("objective", DEFENCES[:-1], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("attack", [
    PGD(0.1, 0.025, 3),
    PGD(0.1, 0.025, 3, "gaussian", project_start=False),
    FriendlyPGD(0.1, 0.025, 3, tau=1, noise=0.001),
    FriendlyPGD(0.1, 0.025, 3, tau=1, noise=0.001, noise_form="scaled"),
], ids=["pgd", "kl", "friendly", "friendly_scaled"])  # fmt: skip
def test_attacks_leave_the_network_alone_and_stay_where_they_may(
    objective: Objective, attack: PGD
) -> None:
    net, batch = make(torch.float32)
    net.train()
    before = copy.deepcopy(net.state_dict())
    with frozen(net):
        x_adv = attack(
            objective.inner(net, batch),
            batch["x"],
            ExampleRandom(0, 0, batch["index"]),
            is_adversarial=lambda x: net(x).argmax(1) != batch["y"],
        )
    assert net.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert x_adv.min() >= 0.0
    assert x_adv.max() <= 1.0
    assert (x_adv - batch["x"]).abs().max() <= 0.1 + 1e-7


def test_patience_for_all_steps_is_the_plain_attack() -> None:
    net, batch = make()
    loss = AT().inner(net, batch)
    arguments = {"is_adversarial": lambda x: net(x).argmax(1) != batch["y"]}
    plain = PGD(0.1, 0.02, 5)(loss, batch["x"], ExampleRandom(0, 0, batch["index"]))
    friendly = FriendlyPGD(0.1, 0.02, 5, tau=5)
    assert torch.equal(
        friendly(loss, batch["x"], ExampleRandom(0, 0, batch["index"]), **arguments), plain
    )
    friendly = FriendlyPGD(0.1, 0.02, 5, tau=0)
    stopped = friendly(loss, batch["x"], ExampleRandom(0, 0, batch["index"]), **arguments)
    start = PGD(0.1, 0.02, 0)(loss, batch["x"], ExampleRandom(0, 0, batch["index"]))
    wrong = net(start).argmax(1) != batch["y"]
    assert wrong.any()
    assert torch.equal(stopped[wrong], start[wrong])


@pytest.mark.parametrize("seed", range(5))
def test_robustness_is_between_its_bounds_for_one_set_of_adversarial_images(seed: int) -> None:
    net, batch = make()
    torch.manual_seed(seed)
    with torch.no_grad():
        clean = net(batch["x"]).argmax(1)
        moved = net((batch["x"] + 0.3 * torch.randn_like(batch["x"])).clamp(0, 1)).argmax(1)
    y = torch.where(torch.rand(16) < 0.7, clean, batch["y"])
    natural, consistent = (clean == y).double().mean(), (moved == clean).double().mean()
    robust = ((clean == y) & (moved == clean)).double().mean()
    assert 0 < consistent < 1
    assert natural + consistent - 1 - 1e-12 <= robust <= torch.minimum(natural, consistent)


def test_the_gradient_of_the_attack_goes_through_the_interpolation() -> None:
    """And the ball is that of the small image: each pixel moves by at most eps."""
    net, batch = make()
    x_adv = PGD(0.1, 0.05, 4)(AT().inner(net, batch), batch["x"])
    assert x_adv.shape == batch["x"].shape
    gradient = input_gradient(AT().inner(net, batch), batch["x"])
    enlarged = net.enlarged(batch["x"]).detach().requires_grad_()
    loss = nn.functional.cross_entropy(net.arch(enlarged), batch["y"], reduction="sum")
    (large,) = torch.autograd.grad(loss, enlarged)
    blocks = large.unfold(2, 2, 2).unfold(3, 2, 2).sum((-1, -2)) / 0.37
    torch.testing.assert_close(gradient, blocks, rtol=1e-5, atol=1e-12)
