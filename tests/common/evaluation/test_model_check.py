"""What would falsify an evaluation of a foreign model is found at the start and named."""

from contextlib import suppress

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from common.errors import ConfigurationError
from common.evaluation.inputs import collect
from common.evaluation.model_check import Checked, check_model
from common.networks.normalize import Normalize


def net(*layers: nn.Module, classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(classes)).eval()
    with suppress(RuntimeError):  # it is made for other images
        model(torch.zeros(2, 3, 8, 8))
    return model


@pytest.fixture
def examples(batch) -> dict[str, Tensor]:
    return collect((batch["x"], batch["y"]))


def test_an_ordinary_model_is_let_through(examples) -> None:
    model = nn.Sequential(Normalize(mean=[0.5] * 3, std=[0.2] * 3), nn.Conv2d(3, 4, 3), nn.ReLU())
    assert check_model(net(model), examples, num_classes=10) == Checked(10)


class Residual(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.net, self.layer = net(), layer

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.layer(self.net(x))


class OwnNoise(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z + torch.from_numpy(np.random.rand(*z.shape)).float() if self.training else z  # noqa: NPY002


class Functional(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.net(x), 0.5, self.training)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Residual(torchvision.ops.StochasticDepth(0.5, "row")), "layer"),
        (lambda: Residual(OwnNoise()), "layer"),
        (lambda: Functional(nn.Identity()), "Functional"),
        (lambda: net(nn.InstanceNorm2d(3, track_running_stats=True)), "0"),
        (lambda: net(nn.BatchNorm2d(3), nn.Dropout(0.5)), "0, 1"),
    ],
)
def test_whatever_acts_in_training_mode_is_refused(examples, make, name: str) -> None:
    model = make().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match=rf"training mode \({name}\).*model.eval\(\)"):
        check_model(model, examples)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert check_model(make().eval(), examples) == Checked(10)


def test_training_mode_that_changes_nothing_is_left(examples) -> None:
    model = Residual(nn.LayerNorm(10)).train()
    assert check_model(model, examples) == Checked(10)
    assert model.training


def autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return nn.functional.linear(x.flatten(1), torch.ones(10, 192))


def with_nan(_) -> nn.Module:
    model = net()
    model[1].weight.data[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("make", "match", "classes"),
    [
        (lambda of: of(lambda _, x: x.flatten(1) > 0), "real numbers", None),
        (
            lambda of: of(lambda _, x: x.flatten(1).to(torch.complex64)),
            "real numbers",
            None,
        ),
        (lambda of: of(lambda _, x: (x, x)), "got tuple; wrap it", None),
        (lambda _: nn.Identity(), r"got \(6, 3, 8, 8\)", None),
        (lambda _: net().bfloat16(), "float32.*torch.bfloat16", None),
        (lambda of: of(lambda _, x: autocast(x)), "float32.*torch.bfloat16", None),
        (
            lambda _: net(nn.BatchNorm2d(3, track_running_stats=False), nn.Conv2d(3, 8, 3)),
            "images beside it",
            None,
        ),
        (lambda _: nn.Sequential(net(), nn.Softmax(dim=1)), "probabilities", None),
        (lambda _: net(classes=7), "7 scores .* up to 9", None),
        (lambda _: net(classes=100), "100 scores.*10 classes", 10),
        (with_nan, "NaN or infinity", None),
        (lambda _: net(nn.Conv2d(1, 4, 3)), "images of shape 3x8x8", None),
    ],
)
def test_a_model_that_makes_every_figure_wrong_is_refused(
    examples, around, make, match: str, classes
) -> None:
    with torch.no_grad(), pytest.raises(ConfigurationError, match=match):
        check_model(make(around), examples, classes)


def test_log_probabilities_are_logits(examples) -> None:
    assert check_model(nn.Sequential(net(), nn.LogSoftmax(dim=1)), examples) == Checked(10)


def test_a_random_forward_pass_is_told(examples) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    (suspicion,) = check_model(net(Noisy()), examples).suspicions
    assert "eot" in suspicion
    assert check_model(net(Noisy()), examples, is_random_expected=True).suspicions == ()


def test_accuracy_at_chance_is_told() -> None:
    torch.manual_seed(1)
    examples = collect((torch.rand(60, 3, 8, 8), torch.arange(60) % 10))
    (suspicion,) = check_model(net(), examples).suspicions
    assert "Normalize" in suspicion
