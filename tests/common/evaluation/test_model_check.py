"""What would falsify an evaluation of somebody's model is found at the start and named."""

import warnings
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

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


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (lambda x: (x - 0.5) / 0.2, r"look normalised.*Normalize\(mean="),
        (lambda x: x * 255, "look like bytes: divide them by 255"),
        (lambda x: (x * 255).byte(), "got torch.uint8; divide bytes by 255"),
        (lambda x: x.log(), "finite|NaN"),
        (lambda x: x[0], r"shape \(N, C, H, W\)"),
    ],
)
def test_images_that_are_not_in_the_unit_box(batch, x, match: str) -> None:
    batch["x"][0, 0, 0, 0] = 0.0
    with pytest.raises(ConfigurationError, match=match):
        collect((x(batch["x"]), batch["y"]))


def test_labels_that_are_none(batch) -> None:
    with pytest.raises(ConfigurationError, match="whole numbers"):
        collect((batch["x"], batch["y"] + 0.5))
    with pytest.raises(ConfigurationError, match="count from 0, found -1"):
        collect((batch["x"], batch["y"] * 0 - 1))


def test_layers_in_training_mode_are_named(examples) -> None:
    model = net(nn.BatchNorm2d(3), nn.Dropout(0.5))
    model[0].train()
    refused(examples, model, r"training mode \(0\).*call model.eval\(\)")
    model.train()
    refused(examples, model, r"training mode \(0, 1\)")


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


def test_data_of_every_usual_form(batch) -> None:
    x, y = batch["x"], batch["y"]
    data = TensorDataset(x, y)
    dicts = [{"x": x[:2], "y": y[:2]}, {"x": x[2:], "y": y[2:]}]
    for given in ((x, y), [x, y], data, DataLoader(data, batch_size=4), dicts):
        found = collect(given)
        assert torch.equal(found["x"], x)
        assert torch.equal(found["y"], y)
        assert torch.equal(found["index"], torch.arange(6))
        assert len(collect(given, limit=3)["y"]) == 3
    with pytest.raises(ConfigurationError, match="ToTensor"):
        collect([("image", 3)])
    with pytest.raises(ConfigurationError, match="no examples"):
        collect([])
