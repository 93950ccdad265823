"""Robust accuracy batch by batch equals that of the whole evaluation."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from common.attacks.pgd import FGSM, PGD
from common.classifier import RobustClassifier
from common.errors import ConfigurationError
from common.evaluation import SuiteEntry, evaluate
from common.evaluation.metric import RobustAccuracy
from common.objectives import TRADES

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


def test_random_starts_belong_to_the_image_and_running_statistics_stay(task) -> None:
    """Also of a model in training mode, for which one image has no batch statistics."""
    net, x, y = task
    model = nn.Sequential(net, nn.BatchNorm1d(10)).train()
    before = deepcopy(model.state_dict())
    found = []
    for order, size in ((torch.arange(50), 20), (torch.arange(49, -1, -1), 7)):
        metric = RobustAccuracy({"start": SuiteEntry(PGD(0.05, steps=0))})
        for rows in order.split(size):
            metric.update(model, x[rows], y[rows])
        found.append(metric.compute())
    assert found[0] == found[1]
    assert model[1].training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_module_with_losses_under_bfloat16_is_measured_with_them_in_float32(task) -> None:
    """``model`` is the loss it is trained with."""
    net, x, y = task
    module = RobustClassifier(net, TRADES(beta=1.0), torch.optim.SGD)
    suite = {"own": SuiteEntry(PGD(0.02, steps=3), ["model", "ce_f"])}
    found = []
    for enabled in (False, True):
        metric = RobustAccuracy(suite)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            batch = metric(module, x, y)
        found.append(metric.compute())
        assert batch == found[-1]
    assert found[0] == found[1]
    assert 0 < found[0]["worst"] < found[0]["clean"]


def test_entries_for_a_part_of_the_examples_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'fgsm' has examples 10"):
        RobustAccuracy({"fgsm": SuiteEntry(FGSM(0.02), examples=10)})
