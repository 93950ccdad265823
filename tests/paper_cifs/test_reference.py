"""The paper's numbers, typed a second time where it matters, and its recipes."""

import pytest

from common.results.tables import render_table

CIFAR = "cifar10_resnet18"

# (stem, checkpoint, metric) -> what the published tables say, one or more of every table
PUBLISHED = {
    (f"{CIFAR}_plain", "last", "pgd100"): 44.72,
    (f"{CIFAR}_plain", "selected", "apgd_square/square"): [48.75, 48.85],
    (f"{CIFAR}_cas", "last", "pgd20/ce_joint0.1"): 61.34,
    (f"{CIFAR}_cas", "last", "cw30/cw_joint10"): 49.35,
    (f"{CIFAR}_cas", "selected", "apgd_square_clean"): 85.80,
    (f"{CIFAR}_cifs", "last", "clean_acc"): 83.86,
    (f"{CIFAR}_cifs", "last", "fgsm"): 59.35,
    (f"{CIFAR}_cifs", "last", "pgd100_random/ce_joint10"): 48.71,
    (f"{CIFAR}_cifs", "last", "apgd_square/square"): [46.20, 46.10],
    (f"{CIFAR}_cifs", "last", "pgd20/ce_f"): None,
    (f"{CIFAR}_cifs_scale1", "selected", "pgd20/ce_joint2"): 51.58,
    (f"{CIFAR}_cifs_beta0.1", "last", "pgd100/ce_joint1"): 46.28,
    (f"{CIFAR}_cifs_beta1", "last", "pgd20/ce_p1"): 53.57,
    (f"{CIFAR}_cifs_beta10", "last", "fgsm/ce_f"): 60.40,
    (f"{CIFAR}_cifs_beta100", "last", "pgd100/ce_p2"): 50.92,
    (f"{CIFAR}_trades_cifs", "last", "pgd20/ce_joint1"): 46.15,
    (f"{CIFAR}_plain_natural_full", "last", "clean_acc"): 94.81,
    (f"{CIFAR}_cifs_natural", "selected", "clean_acc"): 87.88,
    ("cifar10_wrn28_10_cifs", "last", "apgd_square/apgd-ce"): 50.90,
    ("svhn_resnet18_cas", "last", "apgd_square/square"): [39.30, 39.60],
    ("fashion_mnist_resnet10_cifs", "last", "pgd20"): None,
}


@pytest.fixture(scope="module")
def paper(paper_of):
    return paper_of("paper_cifs")


def test_published_numbers(paper) -> None:
    for (stem, checkpoint, metric), number in PUBLISHED.items():
        row = paper.reference.rows[stem]
        numbers = row.last if checkpoint == "last" else row.selected
        assert metric in numbers, "not found is written as null, not left out"
        assert numbers[metric] == number, (stem, checkpoint, metric)


def test_numbers_are_percentages_with_a_public_source(paper) -> None:
    for stem, row in paper.reference.rows.items():
        printed = [
            value
            for number in (*row.last.values(), *row.selected.values())
            for value in (number if isinstance(number, list) else [number])
            if value is not None
        ]
        assert all(20.0 < value < 100.0 for value in printed), stem
        assert not printed or row.source in ("R", "R0"), stem
        assert not stem.startswith(("digits_", "fashion_small_")) or not (row.last or row.selected)


def test_the_lowest_number_is_the_lowest_of_its_losses(paper) -> None:
    checked = 0
    for stem, row in paper.reference.rows.items():
        for attack in ("fgsm", "pgd20", "cw30", "pgd100"):
            losses = [v for k, v in row.last.items() if k.startswith(f"{attack}/") and v]
            if losses:
                assert row.last.get(attack, min(losses)) == min(losses), (stem, attack)
                checked += 1
    assert checked > 20


def test_two_losses_of_one_attack_share_a_cell() -> None:
    assert "| 48.20 / 48.10 [R0] | 46.20 / 46.10 [R0] |" in render_table("paper_cifs").markdown


# ----------------------------------------------------------------------------------------- configs


def test_a_warm_start_is_a_clean_run_of_the_same_network(paper) -> None:
    rows = {stem: paper.config(stem) for stem in paper.paths}
    started = [config for config in rows.values() if "warm_start" in config]
    assert started
    for config in started:
        first = rows[config["warm_start"]["experiment"]]
        assert first["adversary"] == {"attack": None}
        nets = [one["model"]["init_args"]["net"]["class_path"] for one in (first, config)]
        assert nets[0] == nets[1]


MASKS = {  # ablation -> class and settings of both masks
    "scale1": ("SoftmaxMask", {"scale": 1.0}),
    **{
        f"temperature{t:g}": ("SoftmaxMask", {"scale": 2.0, "temperature": t})
        for t in (0.5, 4.0, 8.0, 10.0, 12.0, 16.0, 24.0)
    },
    **{f"sigmoid{a:g}": ("SigmoidMask", {"alpha": a}) for a in (0.1, 1.0, 5.0, 10.0, 15.0)},
    "sigmoid1_shift5": ("SigmoidMask", {"alpha": 1.0, "shift": 5.0}),
    "sigmoid2_shift3": ("SigmoidMask", {"alpha": 2.0, "shift": 3.0}),
    "softplus5": ("SoftplusMask", {"alpha": 5.0}),
    "softplus10_power0.5": ("SoftplusMask", {"alpha": 10.0, "power": 0.5}),
    "softplus20_power0.25": ("SoftplusMask", {"alpha": 20.0, "power": 0.25}),
    "relu": ("ReluMask", {}),
    "magnitude": ("MagnitudeMask", {"scale": 2.0}),
    "summed": ("SummedSoftmaxMask", {"scale": 1.0}),
}
OTHERS = {*(f"beta{b}" for b in ("0.1", "1", "10", "100")), "hidden64", "hidden256"}
OTHERS |= {"top1", "top3", "top2_top1", "top3_top1", "linear_linear", "nonlinear_nonlinear"}
OTHERS |= {
    f"{place}_{probe}"
    for place in ("stage3", "block1", "block2")
    for probe in ("linear", "nonlinear")
}


def test_the_ablations_are_complete_and_their_masks_as_named(paper) -> None:
    start = f"{CIFAR}_cifs_"
    stems = {stem for stem in paper.paths if stem.startswith(start) and "natural" not in stem}
    assert stems == {f"{start}{name}" for name in MASKS.keys() | OTHERS}
    for ablation, (name, settings) in MASKS.items():
        net = paper.config(start + ablation)["model"]["init_args"]["net"]
        masks = [entry["init_args"]["mask"] for entry in net["init_args"]["selections"].values()]
        assert [
            (mask["class_path"].rpartition(".")[2], mask.get("init_args", {})) for mask in masks
        ] == [(name, settings)] * 2, ablation
