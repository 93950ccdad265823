"""From runs and results to tables, verdicts and figures; what is missing is named."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from common.results.lines import Line, Outcomes, Threat
from paper_wm import analysis
from paper_wm.analysis import ANALYSIS
from paper_wm.figures import curve, gains_and_accuracy
from paper_wm.measures import methods_of, scope, split_stem, transfer
from paper_wm.method import weight_maps
from paper_wm.networks import SmallCNN, try_insertions, with_weight_maps

N, SHAPE, SEEDS = 40, (1, 8, 8), (0, 1, 2)
HELD = {  # method -> how many images stand (uniform 0.4, salt and pepper, PGD-20)
    "base": (20, 22, 6),
    "smoothing": (36, 35, 24),
    "smoothing_frozen": (36, 34, 24),
    "unsharp": (12, 11, 1),
    "scale": (20, 22, 6),
}
LINES = {
    "uniform/level=0.4": Line("uniform", kind="noise", at={"level": 0.4}),
    "saltpepper/level=0.1": Line("saltpepper", kind="noise", at={"level": 0.1}),
    "pgd20/ce_f/eps=0.05": Line("pgd20", norm="linf", eps=0.05, at={"eps": 0.05}),
    "pgd20/ce_f/eps=0.03": Line("pgd20", norm="linf", eps=0.03, at={"eps": 0.03}),
    "bypass/ce_f": Line("bypass", norm="linf", eps=0.05),
}


@pytest.fixture
def results(tmp_path: Path, monkeypatch, file_result) -> Path:
    """Result files of three seeds; nothing is inserted into other networks."""
    monkeypatch.setattr(analysis, "try_insertions", lambda variant: {"a": True})
    y, right = torch.arange(N) % 10, torch.ones(N, dtype=torch.bool)
    for (method, held), seed in ((item, seed) for item in HELD.items() for seed in SEEDS):
        counts = (*held, held[2], held[2])
        correct = {
            key: torch.arange(N) < count - seed * count // 10
            for key, count in zip(LINES, counts, strict=True)
        }
        outcomes = Outcomes(
            y,
            {"clean": right, **correct},
            dict.fromkeys(LINES, right),
            LINES,
            threat=Threat("linf", 0.05),
        )
        verdict = "fail" if (method, seed) == ("unsharp", 1) else "pass"
        check = {"id": "black_box", "question": "?", "value": 0.0, "threshold": 0.0}
        check |= {"verdict": verdict, "detail": ""}
        audit = {"examples": N, "checks": [check]}
        file_result(tmp_path, "paper_wm", f"digits_cnn3_{method}", seed, outcomes, audit=audit)
    return tmp_path


@pytest.fixture
def load(stub_data):
    """A network instead of a run, and random images."""
    x, y = torch.rand(N, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 10

    def load_run(run: Path):
        method = split_stem(run.parent.name)[1]
        torch.manual_seed(int(run.name.removeprefix("seed")))
        net: nn.Module = SmallCNN((4, 4, 4), image_shape=SHAPE)
        if method != "base":
            trainable = not method.endswith("frozen")
            variant = method.partition("_")[0]
            net = with_weight_maps(net, variant, image_shape=SHAPE, trainable=trainable)
            for weight_map in weight_maps(net).values():
                weight_map.map.data += 0.1 * trainable * torch.randn_like(weight_map.map)
        return net.eval(), stub_data([{"x": x, "y": y}])

    return load_run


def test_stems_and_what_is_asked_for() -> None:
    assert split_stem("mnist_cnn3_smoothing_all_post") == ("mnist_cnn3", "smoothing_all_post")
    assert split_stem("cifar10_wrn16_4_base_at") == ("cifar10_wrn16_4", "base_at")
    assert split_stem("elsewhere") == ("elsewhere", "")
    for on, base in (
        ("digits", "digits_cnn3"),
        ("fashion_mnist", "fashion_mnist_cnn3"),
        ("cifar10_resnet18", "cifar10_resnet18"),
        ("cifar10_wrn16_4_smoothing", "cifar10_wrn16_4"),
    ):
        assert scope(on) == (base, f"{base}_")


SLOW = [pytest.param(v, marks=pytest.mark.slow) for v in ("unsharp", "subtract_summed")]


@pytest.mark.parametrize("variant", ["smoothing", *SLOW])
def test_maps_go_into_every_kind_of_network(variant) -> None:
    """C1."""
    found = try_insertions(variant)
    assert len(found) == 8
    assert all(found.values())


def test_the_whole_analysis(results, load, touch_checkpoints) -> None:
    runs = results / "runs"
    methods = ("base", "smoothing", "smoothing_frozen", "unsharp")
    touch_checkpoints(runs, [f"digits_cnn3_{method}" for method in methods], SEEDS)
    report = ANALYSIS.analyse(runs, results, "digits", SEEDS, load=load)
    assert report["on"] == "digits_cnn3"
    verdicts = {
        claim["id"]: {name: one["verdict"] for name, one in claim["judgements"].items()}
        for claim in report["claims"]
    }
    assert verdicts["C2"] == {"smoothing": "supported", "unsharp, lam 1": "contradicted"}
    assert verdicts["C1"]["smoothing"] == "supported"
    assert verdicts["C7"]["smoothing"] == "not run"
    names = {Path(path).name for path in report["figures"]}
    parts = ("differences", "1_noise", "2_attacks", "3_maps", "4_histogram", "5_scatter")
    assert names == {f"digits_cnn3_{part}.png" for part in parts}
    missing = [what for what in report["missing"] if "digits_cnn3_scale" in what]
    assert len(missing) == len(report["missing"]) == 3, "results without runs are named"

    tables = {table["title"]: table for table in report["tables"]}
    rows = {line[0]: line for line in tables["E4: amplification"]["lines"]}
    shown = ["smoothing", "smoothing, values shuffled", "smoothing, frozen"]
    assert list(rows) == [*shown, "unsharp", "unsharp, values shuffled"]
    header = tables["E4: amplification"]["header"]
    theory = dict(zip(header, rows["smoothing, frozen"], strict=True))["white noise, theory"]
    assert theory == "7.56 ± 0.00", "9 inside, 6 at edges, 4 in corners of an 8x8 map"
    checks = {line[0]: line for line in tables["E6: adaptive checks"]["lines"]}
    assert checks["unsharp"][-1] == "seed 1: black_box"
    assert checks["smoothing"][-1] == "none"
    assert checks["base"][-2] == "", "base is the source of the transferred images"
    assert set(report["amplification"]["digits_cnn3_smoothing"]["seed1"]) == {"blocks.0.conv"}
    assert json.loads((results / "analysis.json").read_text())["claims"] == json.loads(
        json.dumps(report["claims"])
    )


def test_results_alone_are_enough_for_verdicts(results, load) -> None:
    report = ANALYSIS.analyse(results / "nowhere", results, "digits", SEEDS, load=load)
    by_id = {claim["id"]: claim["judgements"]["smoothing"] for claim in report["claims"]}
    assert by_id["C2"]["verdict"] == "supported"
    assert by_id["C6"]["verdict"] == "not run"
    names = [Path(path).stem.removeprefix("digits_cnn3_") for path in report["figures"]]
    assert sorted(names) == ["1_noise", "2_attacks", "differences"]


def test_transfer_is_the_accuracy_under_images_of_another_network() -> None:
    source, victim = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2))
    x = torch.rand(30, *SHAPE)
    with torch.no_grad():
        y, predicted = source(x).argmax(1), victim(x).argmax(1)
    assert transfer(source, source, x, y, 0.0) == 1.0
    assert transfer(copy.deepcopy(source), source, x, y, 0.3) == 0.0
    agree = float((predicted == y).float().mean())
    assert transfer(source, victim, x, y, 0.0) == pytest.approx(agree)
    assert transfer(source, victim, x, y, 0.3) <= agree


def test_methods_are_named_the_known_ones_first() -> None:
    methods = ("smoothing_k5", "unsharp", "unsharp_lam-0.5", "subtract_summed", "base")
    assert list(methods_of({(method, 0): {} for method in methods}).items()) == [
        ("base", "base"),
        ("unsharp", "unsharp"),
        ("unsharp_lam-0.5", "unsharp, lam -0.5"),
        ("subtract_summed", "summed map subtracted"),
        ("smoothing_k5", "smoothing, k5"),
    ]


def test_curves_begin_at_clean_accuracy() -> None:
    metrics = {
        ("base", 0): {"clean_acc": 0.9, "uniform/level=0.2": 0.5, "uniform/level=0.2/draw=1": 0.1},
        ("base", 1): {"clean_acc": 0.8, "uniform/level=0.1": 0.6, "uniform/level=0.2": 0.4},
    }
    found = curve(metrics, "base", "uniform/level=")
    assert found == {0.0: [0.9, 0.8], 0.1: [0.6], 0.2: [0.5, 0.4]}
    assert curve(metrics, "base", "gaussian/level=") == {}
    assert curve(metrics, "scale", "uniform/level=") == {}


def test_points_need_gains_and_accuracy() -> None:
    noise = "uniform/level=0.1"
    summaries = {("a", seed): {"ratio": gain} for seed, gain in enumerate((4.0, 2.0, None))}
    metrics = {("a", 0): {noise: 0.7}, ("a", 1): {}, ("a", 2): {noise: 0.7}, ("b", 0): {noise: 0.7}}
    assert gains_and_accuracy(metrics, summaries, "a", "ratio") == [(4.0, 0.7)]
    assert gains_and_accuracy(metrics, summaries, "b", "ratio") == []
