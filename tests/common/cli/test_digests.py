"""Which settings decide the weights of a run, and what is measured."""

from pathlib import Path

import pytest

from common.attacks.engine.network import AttackEngine
from common.cli.main import CONFIGS, RobustCLI
from common.cli.parser import protocol_digest
from common.results.identity import decisive


def test_an_engine_of_training_decides_weights_and_one_of_the_evaluation_does_not() -> None:
    engine = {"class_path": "common.attacks.engine.network.AttackEngine"}
    settings = {"adversary": {"engine": None}, "evaluation": {"engine": None}}
    before = decisive(settings)
    assert decisive({**settings, "evaluation": {"engine": engine}}) == before
    assert decisive({**settings, "adversary": {"engine": engine}}) != before


def test_what_decides_a_protocol() -> None:
    settings = {"evaluation": {"suite": {"fgsm": {"eps": 0.1}}}, "data": {"root": "here"}}
    before = protocol_digest(settings)
    assert protocol_digest({**settings, "data": {"root": "there"}}) == before
    for change in (
        {"evaluation": {"suite": {"fgsm": {"eps": 0.2}}}},
        {"data": {"root": "here", "test_limit": 5}},
        {"trainer": {"limit_test_batches": 1}},
    ):
        assert protocol_digest({**settings, **change}) != before


@pytest.mark.parametrize(("overlay", "precision"), [("fast", "32"), ("fast_bf16", "bf16")])
def test_overlays_bring_an_engine_to_training_and_evaluation(overlay: str, precision: str) -> None:
    experiment = Path(__file__).parents[3] / "paper_robustwrn/configs/digits_d3-1-1_sat.yaml"
    arguments = ["--config", str(experiment), "--config", str(CONFIGS / f"{overlay}.yaml")]
    cli = RobustCLI("paper_robustwrn", [*arguments, "--trainer.logger", "false"], run=False)
    found = [c.engine for c in cli.trainer.callbacks if hasattr(c, "engine")]
    assert [engine.settings() for engine in found] == 2 * [
        AttackEngine(precision=precision).settings()
    ]
