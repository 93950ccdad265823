"""The published numbers, typed a second time where it matters; names, sizes and recipes."""

import re

import pytest

from paper_robustwrn.method import EQUAL_BUDGET, NETWORKS, STAGE_GRID, Configuration, named

SIZES = ("parameters", "macs")
SMALL = ("digits_", "fashion_small_")
WIDE = "paper_robustwrn.method.RobustWideResNet"

METRICS = ("clean_acc", "pgd20/ce_f", "cw40/cw_f", "aa")  # each harder to hold
NOTHING = (None, None, None, None)
# what was published of the selected checkpoint
PUBLISHED = {
    "cifar10_wrn34r_trades_500k": (90.56, None, None, 61.56),
    "cifar10_wrn34r_trades_500k_ema": (91.23, None, None, 62.54),
    "cifar10_wrn34_12_trades_500k": NOTHING,
    "cifar10_wrn34r_sat": NOTHING,
    "cifar10_wrn34r_mart": NOTHING,
    "cifar10_wrn34_12_sat": (None, 52.85, 51.36, None),
    "cifar10_wrn34_12_mart": (None, 57.40, 53.11, None),
    "cifar10_wrn34_12_trades": (84.93, 56.01, 53.53, 51.97),
    "cifar10_wrn34r_trades": (85.80, 57.35, 54.77, 53.23),
    "cifar10_wrn28_10_trades": (84.62, 55.90, 53.15, 51.66),
    "cifar10_wrn70_16_trades": (85.51, 56.78, 54.52, 52.80),
    "cifar100_wrn34_12_trades": (56.08, 29.87, 26.51, 25.47),
    "cifar100_wrn34r_trades": (58.78, 31.17, 27.33, 26.31),
    "cifar10_d4-4-4-w11-13-6_trades": (None, 56.89, 53.87, None),
    "cifar10_w13-16-7_trades": (None, 57.06, 54.29, None),
    "cifar10_d5-5-2_trades": (None, 56.05, 53.14, None),
    "cifar10_d6-6-3-w12-12-12_trades": (None, 56.42, 53.91, None),
}


@pytest.fixture(scope="module")
def paper(paper_of):
    return paper_of("paper_robustwrn")


def wide_rows(paper) -> dict[str, Configuration]:
    """Networks of the rows with wide residual networks on photographs."""
    nets = {stem: paper.config(stem)["model"]["init_args"]["net"] for stem in paper.paths}
    return {
        stem: Configuration(tuple(net["init_args"]["depths"]), tuple(net["init_args"]["widths"]))
        for stem, net in nets.items()
        if net["class_path"] == WIDE and not stem.startswith(SMALL)
    }


# --------------------------------------------------------------------------------------- reference


def test_published_numbers(paper) -> None:
    for stem, numbers in PUBLISHED.items():
        found = paper.reference.rows[stem].selected
        assert {key: found.get(key) for key in METRICS} == dict(zip(METRICS, numbers, strict=True))
        assert "aa" in found, "not found is written as null, not left out"


def test_numbers_have_a_public_source(paper) -> None:
    for stem, row in paper.reference.rows.items():
        assert not row.last, f"{stem}: nobody published the end of training"
        assert not stem.startswith(SMALL) or not row.selected
        known = {key for key, value in row.selected.items() if value is not None}
        if accuracies := known - set(SIZES):
            assert row.source in ("P", "F"), f"{stem} has numbers without a public source"
            assert row.source != "P" or accuracies <= {"clean_acc", "aa"}
        elif known:
            assert row.source in ("C", "F"), stem


def test_numbers_are_percentages_and_sizes_are_those_of_the_networks(paper) -> None:
    checked, networks = 0, wide_rows(paper)
    for stem, row in paper.reference.rows.items():
        known = {key: number for key, number in row.selected.items() if number is not None}
        assert all(20.0 < number < 100.0 for key, number in known.items() if key not in SIZES)
        values = [known[key] for key in METRICS if key in known]
        assert values == sorted(values, reverse=True), stem
        for key in known.keys() & SIZES if stem in networks else ():
            exact = networks[stem].cost(key) / (1e6 if key == "parameters" else 1e9)
            tolerance = 0.0006 if row.source == "C" else 0.015 * exact
            assert abs(known[key] - exact) <= tolerance, (stem, key)
            checked += 1
    assert checked > 60


def test_columns_of_sizes_have_their_units(paper) -> None:
    for metric in (metric for group in paper.reference.groups for metric in group.metrics):
        assert (metric.unit == "plain") == (metric.key == "lipschitz")
        assert (metric.unit == "percent") == (metric.key not in ("lipschitz", *SIZES))


# ----------------------------------------------------------------------------------------- configs


def test_the_name_is_that_of_the_network(paper) -> None:
    for stem, network in wide_rows(paper).items():
        if found := re.match(r"cifar\d+_(?:grid_)?([dw]\d[\d\-dw]*)(?:_trades)?$", stem):
            assert network == named(found[1])
            assert network.name == found[1]
        else:
            label = re.match(r"cifar\d+_wrn(\d+)(?:r|_(\d+))", stem)
            assert label is not None
            expected = NETWORKS["WRN-34-R"]
            if label[2] is not None:
                expected = Configuration(((int(label[1]) - 4) // 6,) * 3, (int(label[2]),) * 3)
            assert network == expected
        text = paper.paths[stem].read_text()
        said = re.search(r"^# ([\d.]+) M parameters, ([\d.]+) G MACs", text, re.M)
        assert said is not None
        classes = 100 if stem.startswith("cifar100") else 10
        assert float(said[1]) == round(network.parameters(classes) / 1e6, 1), stem
        assert float(said[2]) == round(network.macs(classes) / 1e9, 2), stem


def test_the_sweeps_are_complete(paper) -> None:
    grid = {stem.removeprefix("cifar10_grid_") for stem in paper.paths if "_grid_" in stem}
    assert {network.name for network in STAGE_GRID} <= grid
    assert len(STAGE_GRID) == 25
    rows = {network.name for network in EQUAL_BUDGET} - {"w12-12-12", "w20-20-8"}
    assert rows == {"w10-20-8", "w4-10-12", "w4-4-13"}
    assert rows <= grid
    reference = paper.reference
    members = {
        g.id: {s for s, r in reference.rows.items() if g.id in r.groups} for g in reference.groups
    }
    assert len(members["X4-widths"] | members["X4-depths"]) == 25
    assert len(members["X5"]) == 5
    partners = ("sat", "trades", "mart", "trades_500k")
    pairs = {f"cifar10_{net}_{partner}" for net in ("wrn34_12", "wrn34r") for partner in partners}
    assert members["T2"] == pairs | {"cifar10_wrn34r_trades_500k_ema"}
