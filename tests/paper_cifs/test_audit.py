"""The audit on a network with channel selections: masks alone are no reason for an alarm."""

from functools import partial

import pytest
import torch

from common.attacks.pgd import PGD
from common.data.sources import Digits
from common.evaluation.audit.checks import Audit
from common.evaluation.runner import run_steps
from common.results.lines import Threat
from paper_cifs.method import CIFSDigitsResNet, JointCrossEntropy
from paper_cifs.module import CIFSClassifier


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:AutoAttack")
def test_a_trained_network_with_selections_raises_no_alarm() -> None:
    torch.manual_seed(0)
    objective = JointCrossEntropy()
    model = CIFSClassifier(CIFSDigitsResNet(), objective, partial(torch.optim.SGD, lr=0.1))
    x, y = Digits().load("train")
    x = x.float() / 255
    attack = PGD(0.1, 0.05, steps=2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(6):
        for rows in torch.randperm(len(y)).split(64):
            batch = {"x": x[rows], "y": y[rows]}
            model.eval()
            is_warm = epoch >= 3
            loss = objective.inner(model, batch)
            batch["x_adv"] = attack(loss, batch["x"]) if is_warm else batch["x"]
            model.train()
            optimizer.zero_grad()
            objective.outer(model, batch).backward()
            optimizer.step()
    model.eval().requires_grad_(False)
    x, y = (part[:50] for part in Digits().load("test"))
    examples = {"x": x.float() / 255, "y": y, "index": torch.arange(50)}
    audit = Audit(
        50,
        ["ce_f", "ce_undetached"],
        steps=20,
        restarts=2,
        square_queries=100,
        random_samples=50,
        decision_queries=500,
    )
    threat = Threat("linf", 0.1)
    outcomes = run_steps(model, examples, audit.steps(model, threat, 10), seed=0, threat=threat)
    assert outcomes.correct["clean"].float().mean() > 0.6
    checks = audit.report(outcomes, 10)["checks"]
    assert [check["id"] for check in checks if check["verdict"] == "fail"] == []
