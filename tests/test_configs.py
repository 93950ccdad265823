"""Every configuration of every paper, through the real command line."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from common.cli.main import RobustCLI, main
from common.evaluation.suite import steps_of

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(ROOT.glob("paper_*/configs/*.yaml"))
DIGITS = [path for path in CONFIGS if path.stem.startswith("digits")]
# Two images and short attacks: what a full-size network costs on a CPU here is its imports.
SMALL = {
    "data.batch_size": 2,
    "data.eval_batch_size": 2,
    "data.val_limit": 2,
    "data.train_limit": 20,
    "data.test_limit": 2,
    "adversary.attack.steps": 1,
    "trainer.fast_dev_run": "true",
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
}


def name(path: Path) -> str:
    return path.stem


def kind(path: Path) -> tuple[str, ...]:
    """What a configuration is made of: classes and shared files, without their numbers."""

    def classes(value: object) -> list[str]:
        if isinstance(value, dict):
            own = [value["class_path"]] if "class_path" in value else []
            return own + [c for part in value.values() for c in classes(part)]
        if isinstance(value, list):
            return [c for part in value for c in classes(part)]
        return [value] if isinstance(value, str) and value.endswith(".yaml") else []

    return (path.parents[1].name, *classes(yaml.safe_load(path.read_text())))


# One of each kind is made by default, all of them by the slow tests.
def mostly_slow(paths: list[Path]) -> list[object]:
    first = {kind(path): path for path in reversed(paths)}.values()
    marks = {path: () if path in first else pytest.mark.slow for path in paths}
    return [pytest.param(path, id=path.stem, marks=marks[path]) for path in paths]


def predecessors(config: dict) -> dict[str, str]:
    """By option, the experiments whose networks the objective of this one asks."""
    arguments = config["model"]["init_args"]["objective"].get("init_args", {})
    return {
        f"model.objective.{name}": value["experiment"]
        for name, value in arguments.items()
        if isinstance(value, dict) and "experiment" in value
    }


def options(path: Path, **more: object) -> list[str]:
    settings = SMALL | more
    config = yaml.safe_load(path.read_text())
    if config["adversary"].get("attack") is None:
        settings = {k: v for k, v in settings.items() if not k.startswith("adversary")}
    for key in predecessors(config):  # networks that other runs train are taken as they are
        settings[f"{key}.as_it_is"] = "true"
    flat = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    return ["--config", str(path), *flat]


def test_there_are_configs() -> None:
    assert len(CONFIGS) > 50
    assert len(DIGITS) >= 8


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_a_config_describes_one_known_experiment(path) -> None:
    reference = yaml.safe_load((path.parents[1] / "reference.yaml").read_text())
    assert path.stem in reference["rows"]
    assert path.read_text().startswith("# "), "the first line says which row this is"
    config = yaml.safe_load(path.read_text())
    assert {"model", "data", "adversary", "evaluation", "trainer"} <= set(config)
    if start := config.get("warm_start"):
        assert (path.parent / f"{start['experiment']}.yaml").exists()
    for experiment in predecessors(config).values():
        assert (path.parent / f"{experiment}.yaml").exists()


@pytest.mark.parametrize("path", mostly_slow(CONFIGS))
def test_a_config_parses_and_everything_in_it_can_be_made(path) -> None:
    """Large networks without weights: shapes and counts need none."""
    arguments = [*options(path), "--trainer.logger", "false"]
    with torch.device("cpu" if path in DIGITS else "meta"), torch.inference_mode():
        cli = RobustCLI(path.parents[1].name, arguments, run=False)
        net = cli.model.net
        shape = cli.datamodule.shape
        logits = cli.model.eval()(torch.rand(1, *shape))
    assert logits.shape == (1, cli.datamodule.num_classes)
    assert sum(p.numel() for p in net.parameters()) > 5_000
    needs_attack = cli.model.objective.needs_x_adv
    adversary = cli.config_init["adversary"]
    assert (adversary.attack is not None) == needs_attack
    suite = cli.config_init["evaluation"].suite
    for step in steps_of(suite, cli.model, cli.datamodule.num_classes, seed=0):
        assert step.kind == "noise" or step.threat is None or step.threat.radius >= 0
    assert suite


@pytest.mark.parametrize("path", mostly_slow(DIGITS))
def test_a_digits_config_survives_fit(path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["fit", *options(path), "--warm_start.experiment", "null"], package=path.parents[1].name)


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in CONFIGS if p not in DIGITS], ids=name)
def test_every_config_survives_fit(path, tmp_path, monkeypatch, request) -> None:
    dataset = path.stem.partition("_")[0]
    fixture = {
        "cifar10": "fake_cifar10",
        "cifar100": "fake_cifar100",
        "svhn": "fake_svhn",
        "mnist": "fake_mnist",
        "fashion": "fake_fashion_mnist",
        "tiny": "fake_tiny_imagenet",
    }
    root = request.getfixturevalue(fixture[dataset])
    monkeypatch.chdir(tmp_path)
    more = {"data.source.root": root, "data.val_limit": 2}
    if dataset == "tiny":
        # Twelve images of three classes; one of each is held out.
        more |= {"data.val_size": 3, "data.source.verify": "false"}
    if "500k" in path.stem:
        more["data.extra.root"] = root
        images = np.zeros((8, 32, 32, 3), dtype=np.uint8)
        extra = {"data": images, "extrapolated_targets": np.arange(8)}
        (Path(root) / "ti_500K_pseudo_labeled.pickle").write_bytes(pickle.dumps(extra))
    arguments = options(path, **more)
    main(
        ["fit", *arguments, "--warm_start.experiment", "null"],
        package=path.parents[1].name,
    )
