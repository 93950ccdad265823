"""What an engine and other late settings mean for runs that do without."""

from pathlib import Path

import pytest

from common.attacks.engine.network import AttackEngine
from common.cli.main import CONFIGS, RobustCLI
from common.cli.parser import training_digest

SETTINGS = {
    "model": {"class_path": "x"},
    "adversary": {"attack": None, "mode": "eval"},
    "evaluation": {"validation": {"losses": ["ce_f"]}},
}


def test_switched_off_settings_leave_digests_as_they_were() -> None:
    before = training_digest(SETTINGS)
    late = {
        **SETTINGS,
        "adversary": {**SETTINGS["adversary"], "engine": None},
        "evaluation": {"validation": {"losses": ["ce_f"], "until_broken": False}, "engine": None},
    }
    assert training_digest(late) == before
    late["adversary"]["engine"] = {"class_path": "common.attacks.engine.network.AttackEngine"}
    assert training_digest(late) != before


def test_an_engine_of_the_evaluation_changes_no_weights() -> None:
    before = training_digest(SETTINGS)
    evaluation = {**SETTINGS["evaluation"], "engine": {"class_path": "x"}}
    assert training_digest({**SETTINGS, "evaluation": evaluation}) == before


@pytest.mark.parametrize(("overlay", "precision"), [("fast", "32"), ("fast_bf16", "bf16")])
def test_overlays_bring_an_engine_to_training_and_evaluation(overlay: str, precision: str) -> None:
    experiment = Path(__file__).parents[3] / "paper_robustwrn/configs/digits_d3-1-1_sat.yaml"
    arguments = ["--config", str(experiment), "--config", str(CONFIGS / f"{overlay}.yaml")]
    cli = RobustCLI("paper_robustwrn", [*arguments, "--trainer.logger", "false"], run=False)
    found = [c.engine for c in cli.trainer.callbacks if hasattr(c, "engine")]
    assert [engine.settings() for engine in found] == 2 * [
        AttackEngine(precision=precision).settings()
    ]
