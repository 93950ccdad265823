"""The anchors, typed a second time; names and sizes of networks; the official recipes."""

import re

import pytest
import torch

from common.cli.main import RobustCLI
from common.evaluation.measures import cost
from common.evaluation.suite import check_suite, steps_of
from paper_rcm.costs import DATA, make, net_section
from paper_rcm.figures import network_of

DEFENCES = ("at", "alp", "trades", "mart", "fat", "fattrades", "atawp", "tradesawp", "dajat")
SIZES = ("parameters", "macs")
SMALL = ("digits", "fashion_small")

# defence -> (clean, AutoAttack) of the last and of the best checkpoint, CIFAR-10, ResNet-18 1222
ANCHORS = {
    "at": ((84.15, 48.72), (84.15, 48.72)),
    "alp": ((86.53, 47.38), (86.53, 47.38)),
    "trades": ((82.62, 49.47), (82.35, 49.54)),
    "atawp": ((82.32, 49.52), (82.32, 49.88)),
    "tradesawp": ((82.69, 51.84), (82.75, 51.86)),
    "martreleased": ((82.77, 47.29), (79.23, 47.83)),
    "fat": ((87.34, 41.56), (87.55, 44.10)),
    "fattrades": ((83.09, 47.68), (82.71, 48.16)),
    "std": ((95.28, 0.0), (None, None)),
}
AWP = {
    "atawp": {"gamma": 0.01},
    "tradesawp": {"gamma": 0.005, "start_epoch": 10},
    "dajat": {"gamma": 0.005, "start_epoch": 9},
}
BASES = ("alexnet_1122", "vgg16_11222", "resnet18_1222", "preactresnet18_1222", "wrn28_10_122")


@pytest.fixture(scope="module")
def paper(paper_of):
    return paper_of("paper_rcm")


@pytest.fixture(scope="module")
def reference(paper):
    return paper.reference


def defence_of(stem: str) -> str:
    return stem.rpartition("_")[2]


# --------------------------------------------------------------------------------------- reference


def test_anchors(reference) -> None:
    notes = {group.id: group.note for group in reference.groups}
    for defence, (last, selected) in ANCHORS.items():
        row = reference.rows[f"cifar10_resnet18_1222_{defence}"]
        assert (row.last["clean_acc"], row.last["aa"]) == last, defence
        assert (row.selected.get("clean_acc"), row.selected.get("aa")) == selected, defence
        assert row.source == "author-fw"
        for group in row.groups:
            assert re.search(r"NOT (a cell|cells) of the paper", notes[group]), group


def test_no_cell_of_the_paper_was_found(reference) -> None:
    """Whatever accuracy is there is an anchor."""
    natural = {"fgsm/ce_f": 37.96, "pgd40/ce_f": 0.0, "deepfool": 2.03}
    for stem, row in reference.rows.items():
        for label, numbers in (("last", row.last), ("selected", row.selected)):
            known = {k: v for k, v in numbers.items() if k not in SIZES and v is not None}
            if stem == "cifar100_resnet18_1222_std":
                assert known == ({"clean_acc": 76.34} if label == "last" else {})
            elif stem.removeprefix("cifar10_resnet18_1222_") in ANCHORS:
                rest = {k: v for k, v in known.items() if k not in ("clean_acc", "aa")}
                is_natural = stem.endswith("_std") and label == "last"
                assert rest == (natural if is_natural else {}), stem
            else:
                assert not known, stem
        if stem.startswith(SMALL):
            assert row.last == row.selected == {}
        else:
            assert {"clean_acc", "pgd20/ce_f", "aa"} <= set(row.last), "not found is null"


def test_tags_of_the_notes_are_in_the_legend(paper) -> None:
    tags = paper.read("reference.yaml")["tags"]
    for group in paper.reference.groups:
        assert set(re.findall(r"\[(\w[\w-]*)\]", group.note)) <= set(tags)


def test_columns_have_their_units(reference) -> None:
    special = {"pooled_change_noise": "plain", "step_time": "plain", "peak_memory": "millions"}
    for group in reference.groups:
        sizes = dict.fromkeys(SIZES, "thousands" if group.id in SMALL else "millions")
        units = {"pooled_change": "plain", **special, **sizes}
        for metric in group.metrics:
            assert metric.unit == units.get(metric.key, "percent"), metric.key


def test_the_experiments_are_complete(reference) -> None:
    members = {
        g.id: {s for s, r in reference.rows.items() if g.id in r.groups} for g in reference.groups
    }
    strings = [f"1{a}{b}{c}" for a in "12" for b in "12" for c in "12"]
    assert members["E3"] == {f"cifar10_resnet18_{s}_at" for s in strings}
    strides = {f"cifar10_resnet18_{s}_at" for s in ("1222", "1122", "1112", "1111")}
    sizes = [f"m{m}{mode}" for m in (2, 3, 4) for mode in ("", "bilinear")]
    factors = {f"cifar10_resnet18_1222_{size}_at" for size in sizes}
    assert members["E2"] == strides | factors
    strings = ("2222", "1222", "1122", "1112")
    pools = {f"cifar10_resnet18_{s}{pool}_at" for s in strings for pool in ("", "_max")}
    assert members["E7"] == pools
    for base in BASES:
        net = base.rpartition("_")[0]
        defences = {defence_of(stem) for stem in members[f"E9-{net}"]}
        assert defences == ({"at"} if net == "wrn28_10" else {"at", "alp", "trades"})
        assert len(members[f"E9-{net}"]) == 3 * len(defences)
        for stem in members[f"E9-{net}"]:
            baseline = reference.rows[stem].baseline or f"cifar10_{base}_at"
            assert baseline == f"cifar10_{base}_{defence_of(stem)}"
    for data in ("cifar10", "cifar100"):
        rows = {f"{data}_resnet18_{s}_{d}" for s in ("1222", "1122") for d in DEFENCES}
        released = {f"cifar10_resnet18_{s}_martreleased" for s in ("1222", "1122")}
        assert members[f"E11-{data}"] == rows | (released if data == "cifar10" else set())


# ----------------------------------------------------------------------------------------- configs


@pytest.mark.slow
def test_the_name_is_that_of_the_network(paper) -> None:
    counted: dict[str, float] = {}
    for stem, path in paper.paths.items():
        dataset, _, method = stem.partition("_")
        section, (strides, pool, factor) = net_section(path), network_of(method)
        settings = section["init_args"]
        arguments = settings["arch"]["init_args"]
        assert "".join(map(str, arguments.get("strides", ()))) == strides
        assert (settings["scale_factor"], arguments.get("pool", "avg")) == (factor, pool)
        mode = settings.pop("mode", "nearest")
        assert mode == ("bilinear" if "bilinear" in method else "nearest")
        key = f"{settings['arch']} {factor} {dataset}"
        if key not in counted:  # many rows share a network
            with torch.device("meta"):
                net = make(section).eval()
            counted[key] = cost(net, torch.empty(DATA[dataset][0], device="meta"))["macs"] / 1e6
        macs = counted[key]
        said = re.search(r"parameters, ([\d.]+) M MACs", path.read_text())
        assert said is not None
        assert float(said[1]) == round(macs, 2 if stem.startswith(SMALL) else 1), stem
        known = paper.reference.rows[stem].last.get("macs")
        # Official counts of transformers leave attention's products out.
        if known is not None and "vit" not in stem:
            assert known == pytest.approx(macs, abs=0.6 if known == int(known) else 0.06), stem


def test_weights_are_perturbed_as_published(paper) -> None:
    for stem in paper.paths:
        assert paper.config(stem).get("weight_perturbation") == AWP.get(defence_of(stem)), stem


def test_nothing_but_the_strides_changes_from_base_to_shrunk(paper) -> None:
    """Never retune."""
    for stem in (stem for stem in paper.paths if "_1222_" in stem):
        shrunk = stem.replace("_1222_", "_1122_")
        if shrunk not in paper.paths:
            assert re.search(r"_m\d", stem)
            continue
        one, other = paper.config(stem), paper.config(shrunk)
        for config, strides in ((one, [1, 2, 2, 2]), (other, [1, 1, 2, 2])):
            arch = config["model"]["init_args"]["net"]["init_args"]["arch"]["init_args"]
            assert arch.pop("strides") == strides
        assert one == other, stem


def test_the_suite_is_that_of_the_tables_and_the_longer_one_begins_with_it(
    paper, entries_of
) -> None:
    tables = paper.read("configs/shared/evaluation_cifar.yaml")
    masking = paper.read("configs/shared/evaluation_masking.yaml")
    overlay = paper.read("../common/configs/paper-rcm.yaml")["evaluation"]["suite"]
    assert list(tables["suite"]) == ["fgsm", "pgd20", "pgd40", "cw20", "deepfool", "aa"]
    assert all(masking["suite"][name] == entry for name, entry in tables["suite"].items())
    assert list(masking["suite"])[:6] == list(tables["suite"])
    own = {name: entry for name, entry in masking["suite"].items() if name in overlay}
    assert {*tables["suite"], "cw_l2", "budget"} == set(own)
    assert entries_of(overlay, "8/255") == entries_of(own, "8/255")
    assert masking["measures"] == tables["measures"]
    validation = tables["validation"]["attack"]["init_args"]
    assert validation == {"eps": "8/255", "step_size": "2/255", "steps": 10, "start": "uniform"}


def test_the_longer_suite_can_be_made_of_any_resnet(paper) -> None:
    arguments = ["--config", str(paper.paths["cifar10_resnet18_1122_at"])]
    suite = paper.folder / "configs/shared/evaluation_masking.yaml"
    cli = RobustCLI("paper_rcm", [*arguments, "--evaluation", str(suite)], run=False)
    suite = cli.config_init["evaluation"].suite
    check_suite(suite, cli.model)
    steps = [step.key for step in steps_of(suite, cli.model, 10, 0)]
    assert len([key for key in steps if key.startswith("budget/")]) == 20
    assert {"feature/feature", "strides/ce_strides", "cw_l2", "square/square"} <= set(steps)
