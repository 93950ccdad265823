"""Claims either way, and the whole analysis on small runs."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.analysis import report as report_module
from common.analysis.report import Found
from common.classifier import RobustClassifier
from common.evaluation import Outcomes
from common.files import read_sealed_json
from common.objectives import AT
from paper_cifs.analysis import ANALYSIS, claims, experiment_of
from paper_cifs.measures import measure

K, SEEDS = 3, (0, 1, 2)

# --------------------------------------------------------------------------------------- claims


def varied(entry, seed: int):
    """The numbers of an entry, another little power in every seed: differences and ratios vary."""
    if isinstance(entry, dict):
        return {key: varied(value, seed) for key, value in entry.items()}
    return entry ** (1 + 1e-4 * seed)


def made_up(plain=0.70, cifs=0.74, aux=0.73, cas=0.90):
    """Metrics of every seed."""
    of = {
        method: {"pgd20/ce_f": accuracy, "worst": accuracy - 0.01}
        for method, accuracy in (("plain", plain), ("cifs", cifs), ("aux", aux))
    }
    # The last loss is not a probe's.
    of["cas"] = {"pgd20/ce_f": cas, "pgd20/ce_p1": 0.7, "pgd20/ce_p2": 0.75, "pgd20/ce_joint10": 0}
    return {(method, s): varied(numbers, s) for method, numbers in of.items() for s in SEEDS}


def measured(cosine=(0.66, 0.98), excess=(0.19, 0.034), share=(0.28, 0.18)):
    """Summaries of every seed: natural training and AT; before and after the mask."""
    of = {
        method: {"penultimate": {"cosine": torch.tensor(one), "over_activation": other}}
        for method, one, other in zip(("plain_natural", "plain"), cosine, excess, strict=True)
    }
    of["cifs"] = {
        f"module2_{side}_by_class": {"negative_share_adversarial": value}
        for side, value in zip(("unmasked", "masked"), share, strict=True)
    }
    return {(method, s): {"features": varied(f, s)} for method, f in of.items() for s in SEEDS}


def judged(metrics, summaries):
    found = Found("digits_resnet", "digits_resnet_", SEEDS, Path(), Path(), metrics=metrics)
    found.kept["summaries"] = summaries
    return {claim.id: claim for claim in claims(found)}


def test_claims_are_supported_where_they_should():
    found = judged(made_up(), measured())
    assert {claim.verdict for claim in found.values()} == {"supported"}
    values = {id_: claim.judgements[""].per_seed[0] for id_, claim in found.items()}
    expected = {"a": 4.0, "b": 0.08, "c": 0.156, "d": 20.0, "e": 1 - 0.18 / 0.28}
    assert values == pytest.approx(expected, abs=1e-6)
    for part in ("cifs - plain, on f 4", "aux - plain, worst case 3", "cifs - aux, on f 1"):
        assert part in found["a"].judgements[""].reason


@pytest.mark.parametrize(
    ("id_", "verdict", "metrics", "summaries"),
    [
        ("a", "not decided", made_up(cifs=0.70), measured()),
        ("a", "contradicted", made_up(cifs=0.65), measured()),
        ("b", "contradicted", made_up(), measured(cosine=(0.66, 0.89))),
        ("b", "contradicted", made_up(), measured(cosine=(0.91, 0.98))),
        ("c", "contradicted", made_up(), measured(excess=(0.03, 0.04))),
        ("d", "contradicted", made_up(cas=0.84), measured()),
        ("e", "contradicted", made_up(), measured(share=(0.27, 0.19))),
    ],
)
def test_each_claim_can_fail(id_, verdict, metrics, summaries):
    found = judged(metrics, summaries)
    assert {claim.id: claim.verdict for claim in found.values()} == {
        **dict.fromkeys("abcde", "supported"),
        id_: verdict,
    }


def test_verdicts_wait_for_every_seed():
    metrics, summaries = made_up(), measured()
    del metrics["plain", 1], metrics["cas", 1]
    del summaries["plain_natural", 0], summaries["cifs", 2]
    found = judged(metrics, summaries)
    assert {claim.verdict for claim in found.values()} == {"not run"}
    seeds = {"a": (0, 2), "b": (1, 2), "c": (1, 2), "d": (0, 2), "e": (0, 1)}
    assert {id_: tuple(claim.judgements[""].per_seed) for id_, claim in found.items()} == seeds


# ------------------------------------------------------------------------------------ the command


def test_what_on_stands_for():
    for on, expected in {
        "digits": ("digits", "resnet"),
        "digits_resnet_cifs": ("digits", "resnet"),
        "cifar10": ("cifar10", "resnet18"),
        "cifar10_resnet18_cifs_beta0.1": ("cifar10", "resnet18"),
        "cifar10_wrn28_10_plain": ("cifar10", "wrn28_10"),
        "fashion_mnist": ("fashion_mnist", "resnet10"),
        "fashion_mnist_resnet10_cas": ("fashion_mnist", "resnet10"),
    }.items():
        assert experiment_of(on) == expected


@pytest.fixture
def load(plain_network, cifs_network, images, stub_data):
    """A network instead of a run, and few images in two batches."""
    x, y = images(12)
    batches = [{"x": x[rows], "y": y[rows]} for rows in torch.arange(12).split(9)]
    data = stub_data(batches, num_classes=K, class_names=("zero", "one", "two"))

    def load_run(run):
        make = cifs_network if run.parent.name.endswith("cifs") else plain_network
        return RobustClassifier(make(int(run.name.removeprefix("seed"))), AT()), data

    return load_run


@pytest.fixture
def write_results(file_result):
    def write_results(folder, seeds):
        losses = {"plain": {"pgd20/ce_f": 70}, "cifs": {"pgd20/ce_f": 75, "pgd20/ce_p1": 72}}
        losses |= {"aux": {"pgd20/ce_f": 76}, "cas": {"pgd20/ce_f": 90, "pgd20/ce_p1": 60}}
        every, y = torch.ones(1000, dtype=torch.bool), torch.arange(1000)
        for method, seed in itertools.product(losses, seeds):
            right = {k: y < held * (50 - seed) // 5 for k, held in losses[method].items()}
            outcomes = Outcomes(y % 2, {"clean": every, **right}, dict.fromkeys(right, every))
            file_result(folder, "paper_cifs", f"digits_resnet_{method}", seed, outcomes)

    return write_results


STEMS = ("digits_resnet_plain_natural", "digits_resnet_plain", "digits_resnet_cifs")


def test_the_whole_analysis(
    tmp_path, plain_network, images, load, write_results, touch_checkpoints
):
    runs, results = tmp_path / "runs", tmp_path / "results"
    touch_checkpoints(runs, STEMS, (0, 1))
    write_results(results, (0, 1))
    report = ANALYSIS.analyse(runs, results, "digits", [0, 1], load=load)
    written = read_sealed_json(results / "analysis.json")
    assert written["missing"] == []
    verdict = {line[0]: line[2] for line in report["tables"][0]["lines"]}
    assert (verdict["a"], verdict["d"]) == ("supported", "supported")

    assert set(written["channels"]) == set(STEMS)
    expected = measure(plain_network(1), *images(12), K, 0.2).summary()
    entry = written["channels"]["digits_resnet_plain"]["seed1"]
    for key in ("clean_acc_per_class", "pgd20_acc_per_class"):
        assert entry[key] == pytest.approx(expected[key].tolist(), abs=1e-6)
    cosine = entry["features"]["penultimate"]["per_class"]["cosine"]
    wanted = expected["features"]["penultimate"]["per_class"]["cosine"]
    assert cosine == pytest.approx(wanted.tolist(), abs=1e-4)

    figures = sorted((results / "figures").iterdir())
    names = ("differences", "f1_channels", "f2_classes", "f4_masks")
    assert [figure.name for figure in figures] == [f"digits_resnet_{name}.png" for name in names]
    assert sorted(report["figures"]) == [str(figure) for figure in figures]
    for figure in figures:
        assert figure.stat().st_size < 150_000
        with Image.open(figure) as picture:
            assert min(picture.size) > 100
            assert np.asarray(picture.convert("L")).std() > 10


def test_other_data_have_their_file_and_radius(
    tmp_path, monkeypatch, cifs_network, images, load, touch_checkpoints
):
    """CIFS alone gives the fourth figure."""
    monkeypatch.setattr(report_module, "save_figure", lambda figure, path: path)
    touch_checkpoints(tmp_path / "runs", ["cifar10_resnet18_cifs"], (3,))
    report = ANALYSIS.analyse(tmp_path / "runs", tmp_path, "cifar10", [3], load=load)
    assert report["path"] == str(tmp_path / "analysis_cifar10_resnet18.json")
    assert [Path(f).name for f in report["figures"]] == ["cifar10_resnet18_f4_masks.png"]
    entry = report["channels"]["cifar10_resnet18_cifs"]["seed3"]
    wanted = measure(cifs_network(3), *images(12), K, "8/255").channels["penultimate"].numbers()
    cosine = entry["features"]["penultimate"]["cosine"]
    assert cosine == pytest.approx(float(wanted["cosine"].mean()), abs=1e-4)
