"""The recipes of the papers: what the shared files say, and which of them each row names."""

import re
from typing import Any

import pytest

LINF10 = {"eps": "8/255", "step_size": "2/255", "steps": 10}
UNIFORM = LINF10 | {"start": "uniform"}
GAUSSIAN = LINF10 | {"start": "gaussian", "project_start": False}
SGD = {"lr": 0.1, "momentum": 0.9}


def milestones(*epochs: int) -> dict[str, Any]:
    return {"milestones": list(epochs), "gamma": 0.1}


SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "paper_awnet": {
        "adversary": GAUSSIAN,
        "adversary_digits": GAUSSIAN | {"eps": 0.3, "step_size": "eps/4", "steps": 7},
        "optimizer": SGD | {"weight_decay": 2e-4},
        "schedule_120": milestones(90, 108),
        "schedule_300": milestones(215, 260, 285),
        "schedule_digits": milestones(30, 37, 40),
    },
    "paper_cifs": {
        "adversary": UNIFORM,
        "adversary_digits": UNIFORM | {"eps": 0.2, "step_size": "1/15", "steps": 5},
        "optimizer": SGD | {"weight_decay": 2e-4},
        "optimizer_digits": SGD | {"weight_decay": 5e-4},
        "optimizer_svhn": SGD | {"lr": 0.01, "weight_decay": 2e-4},
        "schedule": milestones(75, 90),
        "schedule_digits": milestones(19, 25),
    },
    "paper_rcm": {
        "adversary": UNIFORM,
        "adversary_dajat": {"eps": "8/255", "epochs": 200, "steps": 5},
        "adversary_digits": UNIFORM | {"eps": 0.15, "step_size": "eps/3", "steps": 4},
        "adversary_fat": UNIFORM | {"eps": 0.031, "tau": {0: 0, 50: 1, 90: 2}, "noise": 0.001},
        "adversary_fattrades": {
            **{"eps": 0.031, "step_size": 0.007, "steps": 10, "start": "gaussian"},
            **{"start_scale": 0.001, "tau": {0: 0, 30: 1, 50: 2, 70: 3}, "noise": 0.001},
        },
        "adversary_mart": UNIFORM | {"step_size": 0.007},
        "adversary_trades": GAUSSIAN | {"step_size": 0.007, "start_scale": 0.001},
        "adversary_tradesawp": GAUSSIAN | {"start_scale": 0.001},
        "optimizer": SGD | {"weight_decay": 5e-4},
        "optimizer_2e-4": SGD | {"weight_decay": 2e-4},
        "optimizer_dajat": SGD | {"lr": 0.2, "weight_decay": 5e-4},
        "optimizer_digits": SGD | {"lr": 0.05, "weight_decay": 5e-4},
        "optimizer_mart": SGD | {"lr": 0.01, "weight_decay": 3.5e-3},
        "schedule": milestones(100, 105),
        "schedule_awp": milestones(100, 150),
        "schedule_dajat": {"T_max": 200},
        "schedule_digits": milestones(30, 36),
        "schedule_fat": {"factors": {59: 0.1, 89: 0.01, 109: 0.005}},
        "schedule_fattrades": milestones(74),
        "schedule_mart": milestones(75, 90),
        "schedule_std": milestones(82, 123),
    },
    "paper_robustwrn": {
        "adversary": GAUSSIAN | {"start_scale": "2/255"},
        "adversary_digits": GAUSSIAN
        | {"eps": 0.2, "step_size": "eps/4", "steps": 5, "start_scale": 0.05},
        "adversary_trades": GAUSSIAN | {"start_scale": 0.001},
        "optimizer": SGD | {"weight_decay": 2e-4},
        "optimizer_5e-4": SGD | {"weight_decay": 5e-4},
        "schedule": milestones(75, 90),
        "schedule_digits": milestones(15, 18),
    },
    "paper_wm": {
        "adversary": UNIFORM,
        "optimizer_adam": {"lr": 1e-3},
        "optimizer_sgd": SGD | {"nesterov": True, "weight_decay": 5e-4},
        "schedule_cnn3": milestones(30, 45),
        "schedule_cosine": {"T_max": 100},
    },
}

FASHION = "optimizer schedule"

# What the names of rows contain, epochs, and the shared files; the first that fits counts.
ROWS: dict[str, dict[str, tuple[int, str]]] = {
    "paper_awnet": {
        "fashion_small_teacher_clean": (3, FASHION),
        "fashion_small": (3, f"{FASHION} adversary"),
        "digits_teacher_clean": (35, "optimizer"),
        "digits_teacher_robust": (35, "optimizer adversary_digits"),
        "digits": (42, "optimizer schedule_digits adversary_digits"),
        "_(st|teacher_clean|oat)$": (120, "optimizer schedule_120"),
        "_(resnet18|resnet34|teacher)_(at|mart|trades|robust)$": (
            120,
            "optimizer schedule_120 adversary",
        ),
        "": (300, "optimizer schedule_300 adversary"),
    },
    "paper_cifs": {
        "fashion_small": (3, f"{FASHION} adversary"),
        "digits.*natural": (8, "optimizer_digits"),
        "digits": (30, "optimizer_digits schedule_digits adversary_digits"),
        "svhn.*natural": (50, "optimizer_svhn"),
        "svhn": (120, "optimizer_svhn schedule adversary"),
        "natural_full": (120, "optimizer schedule"),
        "natural": (50, "optimizer"),
        "fat|trades": (120, "optimizer schedule"),
        "wrn": (110, "optimizer schedule adversary"),
        "": (120, "optimizer schedule adversary"),
    },
    "paper_rcm": {
        "fashion_small": (3, f"{FASHION} adversary"),
        "digits": (40, "optimizer_digits schedule_digits adversary_digits"),
        "_std$": (164, "optimizer_2e-4 schedule_std"),
        "_(at|alp)$": (110, "optimizer schedule adversary"),
        "_trades$": (110, "optimizer schedule adversary_trades"),
        "_atawp$": (200, "optimizer schedule_awp adversary"),
        "_tradesawp$": (200, "optimizer schedule_awp adversary_tradesawp"),
        "_mart": (120, "optimizer_mart schedule_mart adversary_mart"),
        "_fat$": (120, "optimizer_2e-4 schedule_fat adversary_fat"),
        "_fattrades$": (85, "optimizer schedule_fattrades adversary_fattrades"),
        "_dajat$": (200, "optimizer_dajat schedule_dajat adversary_dajat"),
    },
    "paper_robustwrn": {
        "fashion_small": (3, f"{FASHION} adversary"),
        "digits.*natural": (20, "optimizer_5e-4 schedule_digits"),
        "digits": (20, "optimizer_5e-4 schedule_digits adversary_digits"),
        "_500k": (400, "optimizer_5e-4 adversary_trades"),
        "_trades$": (100, "optimizer schedule adversary_trades"),
        "": (100, "optimizer schedule adversary"),
    },
    "paper_wm": {
        "^fashion": (4, "optimizer_adam"),
        "^(digits|mnist)": (20, "optimizer_adam"),
        "^cifar10_cnn3": (60, "optimizer_adam schedule_cnn3"),
        "_at$": (100, "optimizer_sgd schedule_cosine adversary"),
        "": (100, "optimizer_sgd schedule_cosine"),
    },
}

OBJECTIVES: dict[str, dict[str, dict[str, Any]]] = {
    "paper_rcm": {
        "ALP": {"weight": 0.5},
        "TRADES": {"beta": 6.0},
        "MART": {"beta": 5.0},
        "DAJAT": {"beta": 11.0, "js_weight": 2.0},
    },
    "paper_robustwrn": {"TRADES": {"beta": 6.0}, "MART": {"beta": 6.0}},
}

# Other settings by what the names of rows contain; the first that fits counts.
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "paper_rcm": {
        "digits|fashion": {},
        "_dajat$": {"data.batch_size": 128, "data.crop_padding": 4, "data.crop_padding_mode": None},
        "": {
            **{"data.batch_size": 128, "data.crop_padding": 4, "data.flip": True},
            **{"data.crop_padding_mode": "reflect", "data.validate_on": "test"},
        },
    },
    "paper_robustwrn": {
        "fashion": {},
        "digits": {
            **{"data.batch_size": 64, "checkpoint.from_epoch": 10},
            "trainer.gradient_clip_val": 5.0,
        },
        "_500k": {
            **{"data.batch_size": 256, "data.drop_last": True, "checkpoint.from_epoch": 200},
            **{"trainer.gradient_clip_val": None, "data.validate_on": "test"},
        },
        "": {
            **{"data.batch_size": 128, "data.drop_last": True, "checkpoint.from_epoch": 50},
            **{"trainer.gradient_clip_val": 5.0, "data.validate_on": "test"},
        },
    },
}


@pytest.fixture(params=SETTINGS)
def paper(request, paper_of):
    return paper_of(request.param)


def test_shared_files_say_what_was_published(paper) -> None:
    expected = SETTINGS[paper.folder.name]
    recipes = ("adversary", "optimizer", "schedule")
    shared = [path.stem for path in paper.folder.glob("configs/shared/*.yaml")]
    assert set(expected) == {stem for stem in shared if stem.startswith(recipes)}
    for name, settings in expected.items():
        found = paper.read(f"configs/shared/{name}.yaml")
        assert found.get("attack", found)["init_args"] == settings, name
        assert found.get("mode", "eval") == "eval", name


def test_every_row_names_the_files_of_its_recipe(paper) -> None:
    table, objectives = ROWS[paper.folder.name], OBJECTIVES.get(paper.folder.name, {})
    for stem, path in paper.paths.items():
        expected = next(wanted for part, wanted in table.items() if re.search(part, stem))
        text = re.sub("#.*", "", path.read_text())
        named = re.findall(
            r"(?:shared|fashion_small)/((?:adversary|optimizer|schedule)[\w-]*)\.yaml", text
        )
        config = paper.config(stem)
        assert (config["trainer"]["max_epochs"], set(named)) == (
            expected[0],
            set(expected[1].split()),
        ), stem
        objective = config["model"]["init_args"]["objective"]
        settings = objectives.get(objective["class_path"].rpartition(".")[2], {})
        assert settings.items() <= objective.get("init_args", {}).items(), stem


@pytest.mark.parametrize("package", OTHERS)
def test_rows_have_the_batches_clipping_and_selection_of_the_papers(package, paper_of) -> None:
    paper = paper_of(package)
    for stem in paper.paths:
        config = paper.config(stem)
        wanted = next(found for part, found in OTHERS[package].items() if re.search(part, stem))
        for key, value in wanted.items():
            section, _, name = key.partition(".")
            assert config[section].get(name) == value, (stem, key)
