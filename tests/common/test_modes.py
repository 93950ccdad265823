import pytest
import torch
from torch import nn

from common.modes import batch_statistics_kept, frozen


def network() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.ReLU())
    net.train()
    net[2].eval()  # a part the user has put to rest
    net[0].bias.requires_grad_(False)
    return net


@pytest.mark.parametrize("mode", ["eval", "train", "train_frozen"])
def test_every_flag_comes_back_even_after_an_exception(mode) -> None:
    net = network()

    def flags() -> list[tuple[bool, list[bool]]]:
        return [(m.training, [p.requires_grad for p in m.parameters()]) for m in net.modules()]

    before = flags()

    def attack_that_fails() -> None:
        with frozen(net, mode):
            assert not any(p.requires_grad for p in net.parameters())
            assert any(m.training for m in net.modules()) == (mode != "eval")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attack_that_fails()
    assert flags() == before


@pytest.mark.parametrize("mode", ["eval", "train", "train_frozen"])
def test_only_train_mode_moves_the_running_statistics(mode) -> None:
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with frozen(net, mode):
        output = net(torch.randn(4, 1, 5, 5) + 3)
    changed = [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])]
    moved = ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert changed == (moved if mode == "train" else [])
    assert not output.requires_grad
    assert net[1].momentum == 0.1


def test_kept_statistics_still_normalise_by_the_batch() -> None:
    norm = nn.BatchNorm2d(2)
    x = torch.randn(8, 2, 3, 3) * 5 + 7
    with batch_statistics_kept(norm):
        kept = norm(x)
    torch.testing.assert_close(kept, norm(x))
    assert kept.mean().abs() < 1e-5
