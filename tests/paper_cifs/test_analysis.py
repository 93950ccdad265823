"""Claims either way, and the whole analysis on small runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.analysis.report import Found
from common.classifier import RobustClassifier
from common.evaluation import Outcomes
from common.files import read_sealed_json
from common.objectives import AT
from common.results.outcomes import checkpoint_entry
from common.results.store import merge_result, result_path
from paper_cifs.analysis import ANALYSIS, claims, experiment_of
from paper_cifs.measures import measure

K, EPS = 3, 0.1
NAMES = ("zero", "one", "two")

# --------------------------------------------------------------------------------------- claims


def made_up(plain=0.70, cifs=0.74, aux=0.73, cas=0.90, cas_probe=0.70, seeds=(0, 1, 2)):
    metrics = {}
    for seed in seeds:
        for method, accuracy in (("plain", plain), ("cifs", cifs), ("aux", aux)):
            metrics[method, seed] = {"pgd20/ce_f": accuracy, "pgd20": accuracy - 0.01}
        metrics["cas", seed] = {
            "pgd20/ce_f": cas,
            "pgd20/ce_p1": cas_probe,
            "pgd20/ce_p2": cas_probe + 0.05,
            "pgd20/ce_joint10": 0.0,  # not a probe's
        }
    return metrics


def made_up_summaries(
    cosine=(0.66, 0.98), excess=(0.19, 0.034), share=(0.28, 0.18), seeds=(0, 1, 2)
):
    summaries = {}
    for seed in seeds:
        for i, method in enumerate(("plain_natural", "plain")):
            numbers = {"cosine": torch.tensor(cosine[i]), "over_activation": excess[i]}
            summaries[method, seed] = {"features": {"penultimate": numbers}}
        summaries["cifs", seed] = {
            "features": {
                f"module2_{side}_by_class": {"negative_share_adversarial": value}
                for side, value in zip(("unmasked", "masked"), share, strict=True)
            }
        }
    return summaries


def verdicts(metrics=None, summaries=None, seeds=(0, 1, 2)):
    metrics = made_up() if metrics is None else metrics
    summaries = made_up_summaries() if summaries is None else summaries
    found = Found("digits_resnet", "digits_resnet_", seeds, Path(), Path(), metrics=metrics)
    found.kept["summaries"] = summaries
    return {claim.id: claim for claim in claims(found)}


def test_claims_are_supported_where_they_should():
    found = verdicts()
    assert {id_: claim.verdict for id_, claim in found.items()} == dict.fromkeys(
        "abcde", "supported"
    )
    values = {id_: claim.judgements[""].per_seed[0] for id_, claim in found.items()}
    expected = {"a": 4.0, "b": 0.08, "c": 0.156, "d": 20.0, "e": 1 - 0.18 / 0.28}
    assert values == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("id_", "verdict", "changes"),
    [
        ("a", "not decided", {"metrics": made_up(cifs=0.70)}),
        ("a", "contradicted", {"metrics": made_up(cifs=0.65)}),
        ("b", "contradicted", {"summaries": made_up_summaries(cosine=(0.66, 0.89))}),
        ("b", "contradicted", {"summaries": made_up_summaries(cosine=(0.91, 0.98))}),
        ("c", "contradicted", {"summaries": made_up_summaries(excess=(0.03, 0.04))}),
        ("d", "contradicted", {"metrics": made_up(cas=0.84)}),
        ("e", "contradicted", {"summaries": made_up_summaries(share=(0.27, 0.19))}),
    ],
)
def test_each_claim_can_fail(id_, verdict, changes):
    found = verdicts(**changes)
    assert found[id_].verdict == verdict
    assert all(found[other].verdict == "supported" for other in set("abcde") - {id_})


def test_what_aux_gains_stands_beside_the_first_claim():
    reason = verdicts()["a"].judgements[""].reason
    for part in ("cifs - plain, on f 4", "aux - plain, worst loss 3", "cifs - aux, on f 1"):
        assert part in reason


def test_verdicts_wait_for_every_seed():
    metrics, summaries = made_up(), made_up_summaries()
    for method in ("plain", "cas"):
        del metrics[method, 1]
    del summaries["plain_natural", 0], summaries["cifs", 2]
    found = verdicts(metrics, summaries)
    assert {claim.verdict for claim in found.values()} == {"not run"}
    assert {id_: tuple(c.judgements[""].per_seed) for id_, c in found.items()} == {
        "a": (0, 2),
        "b": (1, 2),
        "c": (1, 2),
        "d": (0, 2),
        "e": (0, 1),
    }


# ------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        ("digits", ("digits", "resnet")),
        ("digits_resnet_cifs", ("digits", "resnet")),
        ("cifar10", ("cifar10", "resnet18")),
        ("cifar10_resnet18_cifs_beta0.1", ("cifar10", "resnet18")),
        ("cifar10_wrn28_10", ("cifar10", "wrn28_10")),
        ("cifar10_wrn28_10_plain", ("cifar10", "wrn28_10")),
        ("fashion_mnist", ("fashion_mnist", "resnet10")),
        ("fashion_mnist_resnet10_cas", ("fashion_mnist", "resnet10")),
    ],
)
def test_what_on_stands_for(on, expected):
    assert experiment_of(on) == expected


class Images:
    """A data module that has bytes in its batches, as the real one does."""

    num_classes, class_names = K, NAMES

    def __init__(self, x, y):
        self.y = y
        self.x = (255 * x).to(torch.uint8)
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(stage)

    def test_dataloader(self):
        assert self.calls == ["prepare_data", "test"]
        return [
            {"x": self.x[i : i + 9], "y": self.y[i : i + 9], "index": torch.arange(i, i + 9)[:24]}
            for i in range(0, 24, 9)
        ]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch | {"x": batch["x"].float() / 255}


@pytest.fixture
def load(plain_network, cifs_network, images):
    def load_run(run):
        seed = int(run.name.removeprefix("seed"))
        make = cifs_network if run.parent.name.endswith("cifs") else plain_network
        return RobustClassifier(make(seed), AT()), Images(*images(24))

    return load_run


def write_checkpoints(runs, stems, seeds):
    for stem in stems:
        for seed in seeds:
            folder = runs / stem / f"seed{seed}" / "checkpoints"
            folder.mkdir(parents=True)
            (folder / "last.ckpt").touch()


def write_result(folder, stem, seed, accuracies, label="last"):
    everything = torch.ones(100, dtype=torch.bool)
    outcomes = Outcomes(
        y=torch.arange(100) % 2,
        correct={"clean": everything}
        | {name: torch.arange(100) < round(100 * acc) for name, acc in accuracies.items()},
        attacked=dict.fromkeys(accuracies, everything),
    )
    merge_result(
        result_path(folder, stem, seed),
        paper="paper_cifs",
        experiment=stem,
        seed=seed,
        label=label,
        entry=checkpoint_entry(outcomes),
        provenance={"config_digest": "x"},
    )


def write_results(folder, seeds, methods=("plain", "cifs", "aux", "cas")):
    losses = {"plain": {"pgd20/ce_f": 0.7}, "cifs": {"pgd20/ce_f": 0.75, "pgd20/ce_p1": 0.72}}
    losses |= {"aux": {"pgd20/ce_f": 0.76}, "cas": {"pgd20/ce_f": 0.9, "pgd20/ce_p1": 0.6}}
    for method in methods:
        for seed in seeds:
            write_result(folder, f"digits_resnet_{method}", seed, losses[method])


STEMS = ("digits_resnet_plain_natural", "digits_resnet_plain", "digits_resnet_cifs")


def test_the_whole_analysis(tmp_path, plain_network, images, load):
    runs, results = tmp_path / "runs", tmp_path / "results"
    write_checkpoints(runs, STEMS, (0, 1))
    write_results(results, (0, 1))
    report = ANALYSIS.analyse(runs, results, "digits", [0, 1], load=load)
    written = read_sealed_json(results / "analysis.json")
    assert written["missing"] == []
    verdict = {line[0]: line[2] for line in report["tables"][0]["lines"]}
    assert (verdict["a"], verdict["d"]) == ("supported", "supported")

    assert set(written["channels"]) == set(STEMS)
    data = Images(*images(24))
    found = measure(plain_network(1), data.x.float() / 255, data.y, K, 0.2)
    entry = written["channels"]["digits_resnet_plain"]["seed1"]
    cosine = found.channels["penultimate"].cosine()
    assert entry["features"]["penultimate"]["per_class"]["cosine"] == pytest.approx(
        cosine.tolist(), abs=1e-4
    )
    assert entry["pgd20_acc_per_class"] == pytest.approx(found.robust.tolist(), abs=1e-6)

    figures = sorted((results / "figures").iterdir())
    names = [
        f"digits_resnet_{name}.png"
        for name in ("differences", "f1_channels", "f2_classes", "f4_masks")
    ]
    assert [figure.name for figure in figures] == names
    assert sorted(report["figures"]) == [str(figure) for figure in figures]
    for figure in figures:
        assert figure.stat().st_size < 150_000
        with Image.open(figure) as picture:
            assert min(picture.size) > 100
            assert np.asarray(picture.convert("L")).std() > 10


def test_cifs_alone_gives_the_fourth_figure_and_the_same_files_each_time(tmp_path, load):
    write_checkpoints(tmp_path / "runs", STEMS[2:], (3,))
    written = []
    for name in ("first", "second"):
        folder = tmp_path / name
        ANALYSIS.analyse(tmp_path / "runs", folder, "digits", [3], load=load)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        assert [path.name for path in files] == ["analysis.json", "digits_resnet_f4_masks.png"]
        content = [path.read_bytes().replace(str(folder).encode(), b"") for path in files]
        content[0] = content[0].partition(b'"digest"')[0]  # of a text that names the folder
        written.append(content)
    assert written[0] == written[1]


def test_results_of_other_data_do_not_overwrite_those_of_digits(
    tmp_path, plain_network, images, load
):
    write_checkpoints(tmp_path / "runs", ["cifar10_resnet18_plain"], (0,))
    report = ANALYSIS.analyse(tmp_path / "runs", tmp_path, "cifar10", [0], load=load)
    assert report["path"] == str(tmp_path / "analysis_cifar10_resnet18.json")
    entry = report["channels"]["cifar10_resnet18_plain"]["seed0"]
    data = Images(*images(24))
    found = measure(plain_network(), data.x.float() / 255, data.y, K, "8/255")
    alignment = found.channels["penultimate"].cosine().mean()
    assert entry["features"]["penultimate"]["cosine"] == pytest.approx(float(alignment), abs=1e-4)
