"""Scores that are NaN or infinite are no prediction, wherever an attack comes across them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from common.attacks.autoattack import AutoAttack
from common.attacks.gama import GAMAPGD
from common.attacks.minimum_norm import CarliniWagner, DeepFool
from common.attacks.pgd import FGSM, MIM, PGD
from common.evaluation import SuiteEntry, evaluate

pytestmark = pytest.mark.filterwarnings("ignore")


class Failing(nn.Module):
    """A network whose scores are NaN for some images."""

    def __init__(self, net: nn.Module, fails: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.fails = net, fails

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return torch.where(self.fails(x)[:, None], torch.full_like(z, torch.nan), z)


@pytest.fixture
def data(linear) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = 0.35 + 0.3 * torch.rand(40, 1, 8, 8, generator=generator)
    return x, linear()(x).argmax(1)


class Dim(nn.Module):
    """The quarter with the most light, by scores that are NaN for dark images.

    No perturbation of 0.12 makes another quarter the brightest; darkening by 0.12 makes them NaN.
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        z = nn.functional.avg_pool2d(x, 4).flatten(1)
        light = x.flatten(1).mean(1, keepdim=True) - 0.36
        z = 40.0 * z * light.clamp_min(1e-4).sqrt()
        return torch.where(light < 0, torch.full_like(z, self.value), z)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "attack",
    [
        AutoAttack(0.12, version="custom", attacks=["apgd-ce"], steps=10),
        FGSM(0.12),
        MIM(0.12),
        PGD(0.12, steps=5, restarts=3),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_an_image_without_finite_scores_is_never_right(attack, value: float) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(24) % 4
    quarters = nn.functional.one_hot(y, 4).view(-1, 1, 2, 2).repeat_interleave(4, 2)
    x = 0.35 + 0.3 * quarters.repeat_interleave(4, 3)
    x = x + 0.02 * torch.rand(x.shape, generator=generator)
    suite = {"a": SuiteEntry(attack)}
    found = evaluate(Dim(value).eval(), (x, y), suite, eps=0.12, progress=False)
    assert found.clean_acc == 1.0
    assert found.robust_acc == 0.0
    assert sum(entry["nonfinite"] for entry in found.result["attacks"].values()) == 24
    assert "NaN or infinite" in found.warnings[-1]


@pytest.mark.parametrize(
    "attack",
    [
        AutoAttack(0.1, version="custom", attacks=["fab-t"], steps=10),
        AutoAttack(0.1, version="custom", attacks=["square"], square_queries=50),
        DeepFool(0.1),
        GAMAPGD(0.1, steps=10),
        CarliniWagner(2.0, steps=10),
    ],
    ids=repr,
)
def test_other_attacks_get_over_scores_that_are_not_finite(linear, data, attack) -> None:
    def distance(x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1).abs().mean(1)

    limit = distance(data[0]).max() + 1e-3
    model = Failing(linear(), lambda x: distance(x) > limit).eval()
    found = evaluate(model, data, {"a": SuiteEntry(attack)}, eps=0.1, progress=False)
    assert found.clean_acc == 1.0
    (name,) = found.result["attacks"]
    assert found.metrics[name] < 0.1
    assert torch.isfinite(found.outcomes.columns[name]["x_adv"]).all()


def test_clean_images_without_finite_scores_are_counted(linear, data) -> None:
    def is_dark(x: Tensor) -> Tensor:
        return x.mean((1, 2, 3)) < 0.47

    x = data[0] - 0.03
    suite = {"pgd": SuiteEntry(PGD(0.03, steps=10))}
    found = evaluate(Failing(linear(), is_dark).eval(), (x, data[1]), suite, progress=False)
    dark = int(is_dark(x).sum())
    assert 0 < dark < 40
    assert found.result["clean"]["nonfinite"] == dark
    assert found.clean_acc <= 1.0 - dark / 40
    assert f"{dark} (clean)" in found.warnings[-1]


def test_a_passing_image_without_finite_scores_is_kept(linear, data) -> None:
    """The ascent leaves the ring at once; an attack that looks only at its end never sees it."""

    def in_ring(x: Tensor) -> Tensor:
        moved = (x - 0.5).flatten(1).abs().amax(1)
        return (moved > 0.1501) & (moved < 0.17)

    attack = {"p": SuiteEntry(PGD(0.05, step_size=0.01, steps=5, start="zero"))}
    model = Failing(linear(), in_ring).eval()
    found = evaluate(model, data, attack, eps=0.05, progress=False)
    on_the_way = (data[0] - 0.5).flatten(1).abs().amax(1) > 0.14
    assert not found.robust[on_the_way].any()


def test_a_random_model_leaves_the_callers_generator(linear, data) -> None:
    model = Failing(linear(), lambda x: torch.rand(len(x)) < 0.2).eval()
    before = torch.get_rng_state()
    weak = {"p": SuiteEntry(PGD(0.001, steps=5))}  # leaves some whose scores were NaN once
    found = evaluate(model, data, weak, eps=0.001, progress=False)
    assert found.result["attacks"]["p/ce_f"]["nonfinite"] > 0
    assert torch.equal(torch.get_rng_state(), before)
