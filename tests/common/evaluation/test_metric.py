"""Robust accuracy batch by batch equals that of the whole evaluation."""

import pytest
import torch
from torch import nn

from common.attacks.pgd import FGSM, PGD
from common.errors import ConfigurationError
from common.evaluation import SuiteEntry, evaluate
from common.evaluation.metric import RobustAccuracy

SUITE = {
    "fgsm": SuiteEntry(FGSM(0.02)),
    "pgd": SuiteEntry(PGD(0.02, steps=5), ["ce_f", "cw_f"], survivors_only=True),
    "larger": SuiteEntry(FGSM(0.2)),
}


@pytest.fixture
def task() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    x = torch.rand(50, 1, 8, 8)
    y = net(x).argmax(dim=1)
    y[:5] = (y[:5] + 1) % 10
    return net, x, y


def test_batches_and_processes_add_up_to_the_evaluation(task) -> None:
    net, x, y = task
    net.train()
    parts = [RobustAccuracy(SUITE, eps=0.02) for _ in range(2)]
    with torch.inference_mode():
        for metric, rows in zip(parts, (range(30), range(30, 50)), strict=True):
            for batch in torch.tensor(list(rows)).split(20):
                metric.update(net, x[batch], y[batch])
    assert net.training
    assert net[1].weight.requires_grad
    parts[0].merge_state(parts[1])
    found = parts[0].compute()
    whole = evaluate(net.eval(), (x, y), SUITE, eps=0.02, progress=False).result["metrics"]
    wanted = {"clean": "clean_acc", "fgsm": "fgsm", "pgd": "pgd", "larger": "larger"}
    for name, key in {**wanted, "worst": "worst"}.items():
        assert found[name].item() == pytest.approx(whole[key]), name
    assert found["larger"] < found["worst"] < found["clean"]


def test_entries_for_a_part_of_the_examples_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'fgsm' has examples 10"):
        RobustAccuracy({"fgsm": SuiteEntry(FGSM(0.02), examples=10)})
