"""Saved adversarial images: whole, resumed after a kill, checked, and shown to another model."""

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from common.attacks.noise import GaussianNoise
from common.attacks.pgd import FGSM, PGD
from common.errors import ConfigurationError, RunDirectoryError
from common.evaluation import SavedExamples, SuiteEntry, evaluate, load_examples
from common.evaluation.presets import load_suite
from common.evaluation.runner import _Run
from common.evaluation.steps import in_ball
from common.results.lines import Threat

SUITE = {
    "noise": SuiteEntry(GaussianNoise([0.1])),
    "large": SuiteEntry(FGSM(0.3)),
    "fgsm": SuiteEntry(FGSM(0.06)),
    "pgd": SuiteEntry(PGD(0.06, steps=5), survivors_only=True),
}


@pytest.fixture(scope="module")
def digits(lab) -> tuple[Tensor, Tensor]:
    return tuple(part[:50] for part in lab.images("test"))


@pytest.fixture(scope="module")
def models(lab) -> list[nn.Module]:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        found.append(lab.fitted(net, epochs=2))
    return found


def test_saved_images(tmp_path, monkeypatch, models, digits) -> None:
    settings = {"eps": 0.06, "progress": False, "batch_size": 9, "examples": 40}
    whole = evaluate(
        models[0], digits, SUITE, output=tmp_path / "a", save_examples=True, **settings
    )
    saved = load_examples(tmp_path / "a" / "adversarial", models[0], digits)
    x_adv, x = torch.from_numpy(saved.x_adv.copy()), digits[0][saved.position]
    assert 0 < int(saved.robust.sum()) == int(whole.robust.sum()) < 40
    assert torch.equal(saved.robust, models[0](x_adv).argmax(1) == saved.y)
    assert in_ball(x_adv, x, saved.threat).all()
    is_right = whole.outcomes.correct["clean"]
    is_moved = (x_adv != x).flatten(1).any(1)
    assert torch.equal(is_moved, is_right)
    broken = (
        is_right & ~whole.outcomes.correct["fgsm/ce_f"]
    )  # by the first: the corners of the ball
    assert broken.any()
    at_first = FGSM(0.06)(lambda x: nn.functional.cross_entropy(models[0](x), saved.y[broken],
                          reduction="none"), x[broken])  # fmt: skip
    assert torch.allclose(x_adv[broken], at_first, atol=1e-6)

    killed, chunks = _Run._attacked, []

    def kill(self, step, rows):
        chunks.append(step.key)
        if chunks.count("pgd/ce_f") == 2:
            raise KeyboardInterrupt
        return killed(self, step, rows)

    arguments = {"output": tmp_path / "b", "save_examples": True} | settings
    monkeypatch.setattr(_Run, "_attacked", kill)
    with pytest.raises(KeyboardInterrupt):
        evaluate(models[0], digits, SUITE, **arguments)
    with pytest.raises(RunDirectoryError):
        load_examples(tmp_path / "b" / "adversarial")
    chunks.clear()
    monkeypatch.setattr(_Run, "_attacked", lambda *a: (chunks.append(a[1].key), killed(*a))[1])
    evaluate(models[0], digits, SUITE, **arguments)
    assert "fgsm/ce_f" not in chunks
    again = load_examples(tmp_path / "b" / "adversarial", models[0], digits)
    assert np.array_equal(again.x_adv, saved.x_adv)
    assert again.about["x_adv_digest"] == saved.about["x_adv_digest"]


def test_saved_images_of_another_model(tmp_path, models, digits) -> None:
    settings = {"eps": 0.06, "progress": False, "batch_size": 9}
    evaluate(models[0], digits, SUITE, output=tmp_path, save_examples=True, examples=40, **settings)
    folder = tmp_path / "adversarial"
    saved = load_examples(folder)
    suite = {"saved": SuiteEntry(SavedExamples(str(folder)))}
    found = evaluate(models[1], digits, suite, examples=30, **settings)
    rows = [saved.position.tolist().index(place) for place in found.position.tolist()]
    with torch.no_grad():
        right = [
            models[1](part).argmax(1) == saved.y[rows]
            for part in (digits[0][found.position], torch.from_numpy(saved.x_adv[rows]))
        ]
    assert torch.equal(found.robust, right[0] & right[1])
    assert 0 < found.robust_acc < found.clean_acc
    entry = {"class_path": "common.evaluation.saved.SavedExamples"}
    entry["init_args"] = {"folder": str(folder)}
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"evaluation": {"suite": {"saved": {"attack": entry}}}}))
    assert load_suite(path).threat == saved.threat == Threat("linf", 0.06)
    x, y = digits
    with pytest.raises(ConfigurationError):
        evaluate(models[1], (0.8 * x + 0.1, y), suite, examples=30, **settings)
    for data in ((0.8 * x + 0.1, y), (x, (y + 1) % 10)):
        with pytest.raises(ConfigurationError):
            load_examples(folder, data=data)
    with pytest.raises(ConfigurationError):
        load_examples(folder, models[1])
    with (folder / "x_adv.npy").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x00\x00\x3f")
    with pytest.raises(RunDirectoryError):
        load_examples(folder)
