"""What would falsify an evaluation of somebody's model is found at the start and named."""

import warnings
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


def refused(examples, model, match: str, **settings) -> None:
    with torch.no_grad(), pytest.raises(ConfigurationError, match=match):
        check_model(model, examples, **settings)


def test_an_ordinary_model_is_let_through(examples) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nn.Sequential(
            Normalize(mean=[0.5] * 3, std=[0.2] * 3), nn.Conv2d(3, 4, 3), nn.ReLU()
        )
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


@pytest.mark.parametrize(
    "scores", [lambda z: z > 0, lambda z: z.to(torch.complex64), lambda z: z.to_sparse()]
)
def test_scores_that_are_no_dense_real_numbers_are_refused(examples, scores) -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return scores(x.flatten(1))

    refused(examples, Other().eval(), "dense tensor of real numbers")


def test_half_precision_is_refused_at_the_start(examples) -> None:
    class Autocast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return nn.functional.linear(x.flatten(1), torch.ones(10, 192))

    for model in (net().half(), net().bfloat16(), Autocast().eval()):
        refused(examples, model, "measured in float32")


def test_batch_statistics_that_couple_examples(examples) -> None:
    model = net(nn.BatchNorm2d(3, track_running_stats=False), nn.Conv2d(3, 8, 3), nn.ReLU())
    refused(examples, model, "depends on the images beside it")


def test_probabilities_instead_of_logits(examples) -> None:
    refused(examples, nn.Sequential(net(), nn.Softmax(dim=1)), "returns probabilities.*take the so")
    assert check_model(nn.Sequential(net(), nn.LogSoftmax(dim=1)), examples) == Checked(10)


def test_class_counts_that_do_not_match(examples) -> None:
    refused(examples, net(classes=7), "7 scores per image and there are labels up to 9")
    refused(examples, net(classes=100), "100 scores.*10 classes", num_classes=10)


def test_outputs_that_are_no_logits(examples) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    refused(examples, Two(), "got tuple; wrap it")
    refused(examples, nn.Identity(), r"got \(6, 3, 8, 8\)")
    model = net()
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    refused(examples, model, "NaN or infinity")
    refused(examples, net(nn.Conv2d(1, 4, 3)), "cannot take images of shape 3x8x8")
    refused(examples, net().double(), "parameters are torch.float64")


def test_a_random_forward_pass_is_told(examples) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    with pytest.warns(UserWarning, match="draws random numbers.*eot"):
        check_model(net(Noisy()), examples)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_model(net(Noisy()), examples, is_random_expected=True)


def test_accuracy_at_chance_is_told() -> None:
    torch.manual_seed(1)
    examples = collect((torch.rand(60, 3, 8, 8), torch.arange(60) % 10))
    with pytest.warns(UserWarning, match="about chance; does the model expect normalised images"):
        check_model(net(), examples)
