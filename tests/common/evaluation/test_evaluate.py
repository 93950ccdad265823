"""``evaluate`` and ``python -m common.evaluation`` on models that are not ours."""

import functools
import json
import random
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from common.attacks.noise import UniformNoise
from common.attacks.pgd import FGSM, PGD
from common.evaluation import SuiteEntry, evaluate
from common.evaluation.__main__ import main
from common.evaluation.named_models import build_model
from common.results.__main__ import main as results
from common.results.store import read_result


@pytest.fixture(scope="module")
def digits(lab) -> tuple[Tensor, Tensor]:
    return tuple(part[:60] for part in lab.images("test"))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(lab) -> nn.Module:
    """Trained for a moment on the training digits; nothing of ours in it."""
    torch.manual_seed(0)
    net = lab.fitted(network(), epochs=2).requires_grad_(True)
    net.zero_grad()
    return net


def test_an_ordinary_model_in_a_few_lines_is_left_as_it_was(model, digits) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    suite = {"pgd": SuiteEntry(PGD(0.1, steps=5), ["ce_f", "cw_f"]), "fgsm": SuiteEntry(FGSM(0.1))}
    found = evaluate(model, digits, suite, eps=0.1, examples=40, progress=False)
    assert found.clean_acc > 0.8
    assert found.robust_acc < found.clean_acc
    assert found.robust_acc == found.metrics["worst"] == int(found.robust.sum()) / 40
    low, high = found.result["intervals"]["worst"]
    assert low < found.robust_acc < high
    assert all(text in str(found) for text in ("worst", "95 % interval"))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (SuiteEntry(PGD(0.1, 0.02, 3)), "steps 3"),
        (SuiteEntry(PGD(0.1, "eps/5", 4, restarts=2)), "restarts 2"),
        (SuiteEntry(PGD(0.1, 0.05, 4)), "step_size 0.05"),
        (SuiteEntry(PGD(0.1, 0.02, 4), until_broken=True), "until broken"),
        (SuiteEntry(FGSM(0.1)), "FGSM"),
        (SuiteEntry(PGD(0.1, "eps/5", 4)), ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attacks_of_another_effort_are_not_compared(
    tmp_path, model, digits, capsys, entry, told
) -> None:
    for name, one in (("a", SuiteEntry(PGD(0.1, 0.02, 4))), ("b", entry)):
        evaluate(model, digits, {"it": one}, eps=0.1, output=tmp_path / name, progress=False)
    capsys.readouterr()
    files = [str(tmp_path / name / "results.json") for name in "ab"]
    assert results(["compare", *files]) == (2 if told else 0)
    error = capsys.readouterr().err
    assert error.count("\n") == bool(told)
    assert told in error
    assert ("PGD, step_size 0.02, steps 4" in error) == bool(told)
    assert results(["compare", *files, "--metric", "clean_acc"]) == 0


def test_results_pictures_and_outcomes_are_filed_and_gone_on_with(tmp_path, model, digits) -> None:
    noise = SuiteEntry(UniformNoise([0.1]))
    suite = {"fgsm": SuiteEntry(FGSM(0.1), sweep={"eps": [0.02, 0.05, 0.1]}), "noise": noise}
    one = evaluate(model, digits, suite, eps=0.1, output=tmp_path, progress=False)
    names = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert names == [
        f"model_{name}.png"
        for name in ("confusion", "examples", "fgsm_eps", "noise_level", "per_class")
    ]
    assert all(path.stat().st_size > 3000 for path in (tmp_path / "figures").iterdir())
    result = read_result(tmp_path / "results.json")
    entry = result["checkpoints"]["model"]
    assert entry == json.loads(json.dumps(one.result))
    table = torch.tensor(entry["confusion"])
    assert table.sum(1).tolist() == [total for _, total in entry["clean"]["per_class"]]
    assert table.trace() == one.robust.sum() < table.sum()
    digests = [result["provenance"]["model"]["data_digest"]]
    for name, images in (("same", digits), ("other", (digits[0].flip(0), digits[1]))):
        few = {"fgsm": SuiteEntry(FGSM(0.1))}
        evaluate(model, images, few, output=tmp_path / name, progress=False)
        there = read_result(tmp_path / name / "results.json")["provenance"]["model"]
        digests.append(there["data_digest"])
    assert digests[0] == digests[1] != digests[2]
    calls: list[int] = []
    with model.register_forward_hook(lambda *_: calls.append(1)):
        evaluate(model, digits, suite, eps=0.1, progress=False)
        all_calls = len(calls)
        evaluate(model, digits, suite, eps=0.1, output=tmp_path, progress=False)
    # At each radius gradient and verdict, then a gradient and two passes; one pass of noise.
    assert all_calls - (len(calls) - all_calls) == 3 * (2 + 3) + 1


FACTORY = """
    import torch
    from torch import nn

    def make(width=8):
        torch.manual_seed(0)
        conv = nn.Conv2d(1, width, 3)
        return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 10))
"""

SUITE = """
evaluation:
  suite:
    pgd: &pgd {attack: {class_path: common.attacks.pgd.PGD, init_args: {eps: threat, steps: 5}}}
    rest: {<<: *pgd, survivors_only: true}
"""


@pytest.fixture
def factory(tmp_path, monkeypatch) -> str:
    name = f"some_model_{random.randrange(10**9)}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(FACTORY))
    monkeypatch.chdir(tmp_path)
    return f"{name}:make"


def test_the_command_line(tmp_path, factory: str, capsys) -> None:
    (tmp_path / "suite.yaml").write_text(SUITE)
    arguments = ["--model", factory, "--data", "digits", "--eps", "0.1", "--examples", "32"]
    arguments += ["--suite", "suite.yaml"]
    more = ["--model_args", '{"width": 4}', "--output", "out", "--device", "cpu"]
    with pytest.warns(UserWarning, match="about chance"):
        assert main([*arguments, *more]) == 0
    assert "worst" in capsys.readouterr().out
    assert read_result(tmp_path / "out" / "results.json")["experiment"] == "make"
    net = build_model(factory)
    weights = {name: value / 2 for name, value in net.state_dict().items()}
    torch.save({"ema": weights, "state_dict": net.state_dict()}, "two.pt")
    for mistake, match in (
        (["--modle", "x"], "did you mean model?"),
        (["--batch_size", "x"], "batch_size: expected int, got x"),
        (["--config", "/dev/zero"], "it is no regular file"),
        (["--model", "nowhere:make"], "expected package.module:factory"),
        (["--model", "torch"], "expected package.module:factory"),
        (["--model", "torchvision.models.resnet18"], "expected package.module:factory"),
        (["--model_args", '{"depth": 3}'], "cannot be made with"),
        (["--data", "cifar"], "no data section 'cifar'; did you mean cifar10"),
        (["--suite", "harsh"], "there is no suite 'harsh'"),
        (["--suite", "paper-cifs", "--norm", "l2"], "attacks in linf, got norm 'l2'"),
        (["--data_root", "somewhere"], "have no files; drop --data_root"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--weights", "none.pt"], "does not exist"),
        (["--weights", "two.pt"], "'ema', 'state_dict': choose one"),
        (["--weights", "two.pt", "--weights_key", "ema", "--suite", "harsh"], "no suite 'harsh'"),
    ):
        assert main([*arguments, *mistake]) == 2
        error = capsys.readouterr().err.splitlines()
        assert match in error[-1]


@pytest.mark.parametrize("engine", [None, "fp32", "bf16"])
def test_options_of_a_file_reach_the_evaluation(
    tmp_path, factory: str, monkeypatch, engine
) -> None:
    seen: dict[str, Any] = {}
    told = functools.wraps(evaluate)(lambda *_, **given: seen.update(given))
    monkeypatch.setattr("common.evaluation.command.evaluate", told)
    options = {"model": factory, "data": "digits", "eps": 0.02, "examples": 40, "seed": 3}
    (tmp_path / "options.yaml").write_text(json.dumps(options))
    more = [] if engine is None else ["--engine", engine]
    assert main(["--config", str(tmp_path / "options.yaml"), *more, "--audit"]) == 0
    assert (seen["eps"], seen["examples"], seen["seed"], seen["audit"]) == (0.02, 40, 3, True)
    assert (seen["num_classes"], seen["name"]) == (10, "make")
    precision = {"fp32": "32", "bf16": "bf16"}.get(engine)
    assert getattr(seen["engine"], "precision", None) == precision


def test_data_by_name(tmp_path, factory: str, capsys) -> None:
    side = np.random.default_rng(0).integers(0, 255, (40, 20, 24, 3), dtype=np.uint8)
    for i, pixels in enumerate(side):
        folder = tmp_path / "photos" / f"class_{i % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "suite.yaml").write_text(SUITE)
    common = ["--model", "torch.nn:Flatten", "--eps", "0.1", "--suite", "suite.yaml"]
    assert main([*common, "--data", "photos", "--data_resize", "4", "--data_crop", "5"]) == 2
    assert "data_crop 5" in capsys.readouterr().err
    assert main([*common, "--data", "photos", "--data_crop", "21"]) == 2
    assert "24x20" in capsys.readouterr().err
    sizes = ["--data_resize", "4", "--data_crop", "2"]
    assert main([*common, "--data", "photos", *sizes]) == 2  # 12 scores, 10 classes
    assert "12 scores" in capsys.readouterr().err
    for data in ("torchvision:CIFAR10", "torchvision:Unknown"):
        assert main([*common, "--data", data, "--data_root", "photos/class_0/0.png"]) == 2
        assert data.partition(":")[2] in capsys.readouterr().err
