"""Scores that are NaN or infinite are no prediction, wherever an attack comes across them."""

import pytest
import torch
from torch import Tensor, nn

from common.attacks.autoattack import AutoAttack
from common.attacks.gama import GAMAPGD
from common.attacks.losses import cross_entropy
from common.attacks.minimum_norm import CarliniWagner, DeepFool
from common.attacks.pgd import FGSM, MIM, PGD
from common.evaluation import Evaluation, SuiteEntry, evaluate
from common.evaluation.models import Victim
from common.objectives import OnLogits

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def failing(around):
    """``failing(fails)``: the linear network, whose scores are NaN for images that fail."""

    def made(fails) -> nn.Module:
        return around(
            lambda m, x: torch.where(fails(x)[:, None], torch.full((1, 4), torch.nan), m.net(x))
        )

    return made


def evaluated(model: nn.Module, data: object, attack: object, eps: float, **given) -> Evaluation:
    return evaluate(model, data, {"a": SuiteEntry(attack)}, eps=eps, progress=False, **given)


def of_autoattack(name: str, eps: float, **settings) -> AutoAttack:
    return AutoAttack(eps, version="custom", attacks=[name], **settings)


@pytest.mark.parametrize(
    ("attack", "value"),
    [
        (of_autoattack("apgd-ce", 0.12, steps=10), torch.nan),
        (of_autoattack("apgd-ce", 0.12, steps=10), torch.inf),
        (FGSM(0.12), torch.inf),
        (MIM(0.12), -torch.inf),
        (PGD(0.12, steps=5, restarts=3), torch.nan),
    ],
    ids=str,
)
def test_an_image_without_finite_scores_is_never_right(around, attack, value: float) -> None:
    """The quarter with the most light, by scores that are NaN for dark images.

    No perturbation of 0.12 makes another quarter the brightest; darkening by 0.12 makes them NaN.
    """

    def forward(_, x: Tensor) -> Tensor:
        z = nn.functional.avg_pool2d(x, 4).flatten(1)
        light = x.flatten(1).mean(1, keepdim=True) - 0.36
        z = 40.0 * z * light.clamp_min(1e-4).sqrt()
        return torch.where(light < 0, torch.full_like(z, value), z)

    y = torch.arange(12) % 4
    quarters = nn.functional.one_hot(y, 4).view(-1, 1, 2, 2).repeat_interleave(4, 2)
    x = 0.35 + 0.3 * quarters.repeat_interleave(4, 3)
    x = x + 0.02 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    found = evaluated(around(forward), (x, y), attack, 0.12)
    assert found.clean_acc == 1.0
    assert found.robust_acc == 0.0
    assert sum(entry["nonfinite"] for entry in found.result["attacks"].values()) == 12
    assert "NaN or infinite" in found.warnings[-1]


@pytest.mark.parametrize(
    "attack",
    [
        of_autoattack("fab-t", 0.1, steps=10),
        of_autoattack("square", 0.1, square_queries=50),
        DeepFool(0.1),
        GAMAPGD(0.1, steps=10),
        CarliniWagner(2.0, steps=10),
    ],
    ids=repr,
)
def test_other_attacks_get_over_scores_that_are_not_finite(failing, data, attack) -> None:
    def distance(x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1).abs().mean(1)

    limit = distance(data[0]).max() + 1e-3
    found = evaluated(failing(lambda x: distance(x) > limit), data, attack, 0.1)
    assert found.clean_acc == 1.0
    (name,) = found.result["attacks"]
    assert found.metrics[name] < 0.1
    assert torch.isfinite(found.outcomes.columns[name]["x_adv"]).all()


def test_clean_images_without_finite_scores_are_counted_and_drawn(failing, data, tmp_path) -> None:
    def is_dark(x: Tensor) -> Tensor:
        return x.mean((1, 2, 3)) < 0.47

    x = data[0] - 0.03
    model, attack = failing(is_dark), PGD(0.03, steps=10)
    found = evaluated(model, (x, data[1]), attack, 0.03, output=tmp_path)
    dark = int(is_dark(x).sum())
    assert 0 < dark < 40
    assert found.result["clean"]["nonfinite"] == dark
    assert found.clean_acc <= 1.0 - dark / 40
    assert f"{dark} (clean)" in found.warnings[-1]
    assert {"per_class", "confusion", "examples"} == set(found.pictures)


def test_a_passing_image_without_finite_scores_is_kept(failing, data) -> None:
    """The ascent leaves the ring at once; an attack that looks only at its end never sees it."""

    def in_ring(x: Tensor) -> Tensor:
        moved = (x - 0.5).flatten(1).abs().amax(1)
        return (moved > 0.1501) & (moved < 0.17)

    found = evaluated(failing(in_ring), data, PGD(0.05, 0.01, 5, "zero"), 0.05)
    on_the_way = (data[0] - 0.5).flatten(1).abs().amax(1) > 0.14
    assert not found.robust[on_the_way].any()


@pytest.mark.parametrize(
    ("attack", "has_logits"),
    [
        (PGD(0.05, 0.01, 5, "zero"), False),
        (of_autoattack("apgd-ce", 0.05, steps=10), False),
        (of_autoattack("apgd-ce", 0.05, steps=10), True),
        (of_autoattack("square", 0.05, square_queries=50), True),
    ],
    ids=repr,
)
def test_images_without_finite_scores_are_kept_from_passes_past_forward(
    failing, data, attack, has_logits, past_forward
) -> None:
    def in_ring(x: Tensor) -> Tensor:
        moved = (x - 0.5).flatten(1).abs().amax(1)
        return (moved > 0.1501) & (moved < 0.17)

    victim = Victim(failing(in_ring), 4).eval()
    plain = evaluated(victim, data, attack, 0.05)
    victim.adaptive_losses = lambda: {
        "ce_f": OnLogits(cross_entropy),
        "own": past_forward(has_logits),
    }
    found = evaluate(victim, data, {"a": SuiteEntry(attack, ["own"])}, eps=0.05, progress=False)
    assert found.robust_acc <= plain.robust_acc < 1.0


def test_a_random_model_leaves_the_callers_generator(failing, data) -> None:
    before = torch.get_rng_state()
    weak = PGD(0.001, steps=5)  # leaves some whose scores were NaN once
    found = evaluated(failing(lambda x: torch.rand(len(x)) < 0.2), data, weak, 0.001)
    assert found.result["attacks"]["a/ce_f"]["nonfinite"] > 0
    assert torch.equal(torch.get_rng_state(), before)
