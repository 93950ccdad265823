import pytest
import torch

from common.errors import ConfigurationError
from common.networks.normalize import Normalize


def test_standardises_each_channel():
    x = torch.rand(4, 2, 3, 3)
    z = Normalize(2, mean=[0.1, 0.5], std=[0.2, 4.0])(x)
    assert torch.allclose(z[:, 0], (x[:, 0] - 0.1) / 0.2)
    assert torch.allclose(z[:, 1], (x[:, 1] - 0.5) / 4.0)


def test_without_statistics_pixels_pass_and_nothing_is_stored():
    x = torch.rand(2, 3, 4, 4)
    normalize = Normalize(3)
    assert normalize(x) is x
    assert not normalize.state_dict()


def test_checkpoint_brings_its_own_statistics_and_misses_are_loud():
    trained, fresh = Normalize(1, [0.3], [0.4]), Normalize(1, [0.0], [1.0])
    fresh.load_state_dict(trained.state_dict())
    assert fresh.mean is not None
    assert fresh.mean.item() == pytest.approx(0.3)
    with pytest.raises(RuntimeError, match="mean"):
        Normalize(1).load_state_dict(trained.state_dict())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mean": [0.5]}, "go together"),
        ({"std": [0.5]}, "go together"),
        ({"mean": [0.5, 0.5], "std": [1.0]}, "mean needs one value"),
        ({"mean": [0.5], "std": [1.0, 1.0]}, "std needs one value"),
        ({"mean": [0.5], "std": [0.0]}, "positive"),
        ({"in_channels": 0}, "in_channels"),
    ],
)
def test_refuses_statistics_that_do_not_fit(kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        Normalize(**{"in_channels": 1, **kwargs})


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 8, 8), (2, 1)])
def test_names_the_images_it_was_built_for(shape):
    with pytest.raises(ValueError, match=r"\(N, 1, H, W\).*in_channels"):
        Normalize(1)(torch.rand(shape))
