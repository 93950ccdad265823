"""Configurations of papers and of the comparison: what they say and build, and that they train.

The parser of the command line parses each distinct section once: a command line for each experiment
would take minutes. One experiment of each kind goes through ``main``, all of them in slow tests.
"""

import importlib
import json
import pickle
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import Namespace

from common.cli import parser as cli_parser
from common.cli.main import RobustCLI
from common.cli.rows import Row
from common.cli.start import main
from common.evaluation.suite import check_suite, steps_of
from common.packages import package_folder, papers
from common.parsing import ArgumentParser, load_named
from common.results.reference import read_reference
from common.results.selection import select

ROOT = Path(__file__).parents[1]
CONFIGS = [
    path
    for folder in ("paper_*", "benchmarks/robustness")
    for path in sorted(ROOT.glob(f"{folder}/configs/*.yaml"))
]
PAPERS = list(dict.fromkeys(str(path.parents[1].relative_to(ROOT)) for path in CONFIGS))
# Two images and short attacks: what a full-size network costs on a CPU here is its imports.
SMALL = {
    "data.batch_size": 2,
    "data.eval_batch_size": 2,
    "data.val_limit": 2,
    "data.train_limit": 20,
    "data.test_limit": 2,
    "adversary.attack.steps": 1,
    "warm_start.experiment": "null",
    "trainer.fast_dev_run": "true",
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
}
FAKES = {
    "cifar10": "fake_cifar10",
    "cifar100": "fake_cifar100",
    "svhn": "fake_svhn",
    "mnist": "fake_mnist",
    "fashion": "fake_fashion_mnist",
    "tiny": "fake_tiny_imagenet",
}


@pytest.fixture(params=PAPERS)
def paper(request, paper_of):
    return paper_of(request.param)


def predecessors(config: dict) -> dict[str, str]:
    """By option, the experiments whose networks the objective of this one asks."""
    arguments = config["model"]["init_args"]["objective"].get("init_args", {})
    return {
        f"model.objective.{name}": value["experiment"]
        for name, value in arguments.items()
        if isinstance(value, dict) and "experiment" in value
    }


# ------------------------------------------------------------------------------------ what is said


def test_nothing_is_written_twice(paper) -> None:
    for path in [paper.folder / "reference.yaml", *paper.folder.rglob("configs/**/*.yaml")]:
        paper.read(str(path.relative_to(paper.folder)))
    for path in ROOT.glob("common/configs/*.yaml"):
        paper.read(str(path))


def test_every_experiment_has_a_row_and_every_group_has_rows(paper) -> None:
    reference = paper.reference
    assert set(paper.paths) == set(reference.rows)
    filled = {group for row in reference.rows.values() for group in row.groups}
    assert filled == {group.id for group in reference.groups}
    tags = paper.read("reference.yaml").get("tags", {})
    assert {row.source for row in reference.rows.values()} <= {*tags, None}
    readme = (paper.folder / "README.md").read_text()
    assert all(f"### {group.title}" in readme for group in reference.groups)


def test_an_experiment_says_which_row_it_is_and_what_it_needs(paper) -> None:
    for stem, path in paper.paths.items():
        text, config = path.read_text(), paper.config(stem)
        assert text.startswith("# "), "the first line says which row this is"
        assert not re.search("num_classes|in_channels|image_shape", text), "the data decide these"
        assert {"model", "data", "adversary", "evaluation", "trainer"} <= set(config)
        has_attack = config["adversary"]["attack"] is not None
        objective = load_named(config["model"]["init_args"]["objective"]["class_path"])
        assert objective.needs_x_adv == has_attack, stem
        starts = [config["warm_start"]["experiment"]] if "warm_start" in config else []
        assert {*starts, *predecessors(config).values()} <= set(paper.paths)


def test_on_the_digits_an_audit_is_about_the_examples_of_the_worst_case(paper) -> None:
    """Else the worst case of a row that only the audit breaks is about fewer than in other rows."""
    for stem in paper.paths:
        evaluation = paper.config(stem)["evaluation"]
        if stem.startswith("digits_") and "audit" in evaluation:
            parts = [entry.get("examples") for entry in evaluation["suite"].values()]
            assert evaluation["audit"]["examples"] == min(filter(None, parts)), stem


def test_a_change_in_a_shared_file_is_a_change_of_the_row(paper) -> None:
    for stem, path in paper.paths.items():
        row = Row(paper.package, stem, 0, ())
        named = set(re.findall(r"[\w./-]+\.yaml\b", re.sub("#.*", "", path.read_text())))
        assert {part.resolve() for part in row.parts} == {
            (path.parent / name).resolve() for name in named
        }, stem


# ----------------------------------------------------------------------------------- what is built


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    """The parser of the command line."""
    with torch.device("meta"):
        made = RobustCLI(PAPERS[0], ["--config", str(CONFIGS[0])], run=False).parser
    made.exit_on_error = False
    return made


def parse(parser: ArgumentParser, settings: dict[str, Any]) -> Namespace:
    """Settings without the defaults of what they do not state: those make parsing slow."""
    return parser.parse_object(settings, defaults=False, _skip_validation=True)


@pytest.fixture(scope="module")
def section(parser) -> Callable[[str, str], Any]:
    """``section(name, text)``: made once for all experiments that share it."""
    required = {"data": parse(parser, {"data": str(ROOT / "common/configs/digits.yaml")}).data}

    @cache
    def make(name: str, text: str) -> Any:
        given = parse(parser, {name: json.loads(text)})
        return parser.instantiate(Namespace(required | {name: given[name]}))[name]

    return make


@cache
def arguments_of(class_path: str) -> ArgumentParser:
    """A parser of the arguments of a classifier: nested in ``model`` each is parsed many times."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(load_named(class_path), fail_untyped=False)
    return parser


@cache
def argument(class_path: str, name: str, text: str, source: str) -> Any:
    """An argument of a classifier, made once for all experiments on the same data that share it."""
    parser = arguments_of(class_path)
    found = parse(parser, {name: json.loads(text)})
    fill_networks(found)
    config = Namespace(model=found, data=Namespace(source=Namespace(**json.loads(source))))
    cli_parser.fill_from_data(config)
    return getattr(parser.instantiate(found), name)


def fill_networks(value: Any) -> None:
    """Give all networks below a section the arguments that the data decide."""
    items = value.items() if isinstance(value, dict) else vars(value).items()
    for key, part in list(items):
        if isinstance(part, Namespace | dict):
            if key in ("net", "arch"):
                known, given = cli_parser._defaults(part["class_path"]), part.get("init_args") or {}
                names = {"num_classes", "in_channels", "image_shape"} & known.keys()
                decided = {name: known[name] for name in names}
                part["init_args"] = Namespace(**{**decided, **dict(given.items())})
            fill_networks(part)


@pytest.fixture
def shapes_alone(monkeypatch) -> None:
    """Replace operations by ones that keep shapes, where torch's own are slow without values."""

    def same(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return x

    def batch_norm(x: torch.Tensor, mean: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        assert x.shape[1] == len(mean)
        return x

    monkeypatch.setattr(torch.nn.functional, "batch_norm", batch_norm)
    for name in ("relu", "relu_"):
        monkeypatch.setattr(torch, name, same)
    for name in ("uniform_", "normal_"):
        monkeypatch.setattr(torch.Tensor, name, same)


def test_everything_in_a_config_can_be_made(paper, section, shapes_alone) -> None:
    """Networks are tried out without weights: shapes and counts need none."""
    counts: dict[torch.nn.Module, int] = {}
    suites: dict[Any, int] = {}
    for stem, path in paper.paths.items():
        try:
            check_experiment(paper, stem, section, counts, suites)
        except Exception as error:
            error.add_note(str(path))
            raise


def check_experiment(paper, stem: str, section, counts: dict, suites: dict) -> None:
    """Make everything; networks and suites are tried out once."""
    config = paper.config(stem)
    model, source = config.pop("model"), json.dumps(config["data"]["source"])
    texts = {key: json.dumps(part) for key, part in config.items()}
    with torch.device("meta"):
        made = SimpleNamespace(**{key: section(key, text) for key, text in texts.items()})
        arguments = {
            name: argument(model["class_path"], name, json.dumps(part), source)
            for name, part in model["init_args"].items()
        }
        classifier = load_named(model["class_path"])(**arguments)
    net, classes = classifier.net, made.data.num_classes
    if net not in counts:
        with torch.inference_mode():
            logits = classifier.eval()(torch.empty(1, *made.data.shape, device="meta"))
        assert logits.shape == (1, classes)
        weights = net.named_parameters()
        counts[net] = sum(p.numel() for name, p in weights if "auxiliary" not in name)
        assert counts[net] > 4_000
    assert (made.adversary.attack is not None) == classifier.objective.needs_x_adv
    suite = (texts["evaluation"], *classifier.adaptive_losses())
    if suite not in suites:
        check_suite(made.evaluation.suite, classifier)
        steps = steps_of(made.evaluation.suite, classifier, classes, seed=0)
        assert all(s.kind == "noise" or s.threat is None or s.threat.radius >= 0 for s in steps)
        suites[suite] = len(steps)
    # The size of the network stands in the header and, where it was published, among the results.
    text = paper.paths[stem].read_text()
    said = re.search(r"^# ([\d.,]+)( M)? parameters", text, re.MULTILINE)
    if said is not None:
        number = said[1].replace(",", "")
        exact = counts[net] / 1e6 if said[2] else counts[net]
        assert float(number) == round(exact, len(number.partition(".")[2]))
    if (known := paper.reference.rows[stem].last.get("parameters")) is not None:
        assert known == round(counts[net] / 1e6, 3)


# ------------------------------------------------------------------------------------ what is run


def classes_of(path: Path) -> set[str]:
    """Classes of network, objective and adversary."""
    config = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    model, adversary = config["model"]["init_args"], config["adversary"]
    if isinstance(adversary, str):
        text = (path.parent / adversary).read_text()
        adversary = yaml.load(text, Loader=yaml.CSafeLoader)
    parts = (model["net"], model["objective"], adversary["attack"] or {})
    return {str(part.get("class_path")) for part in parts}


def digits_that_use_every_class() -> set[Path]:
    """A paper's experiments on the digits with a network, objective or adversary of a new class."""
    known: set[str] = set()
    chosen = set()
    for path in sorted(ROOT.glob("paper_*/configs/digits_*.yaml")):
        if not classes_of(path) <= known:
            known |= classes_of(path)
            chosen.add(path)
    return chosen


# Of the comparison two: tests/test_composition.py trains each method by each objective.
FAST = digits_that_use_every_class() | {
    ROOT / "benchmarks/robustness/configs" / f"digits_resnet_{row}.yaml"
    for row in ("rule_mart", "mixbn_atawp")
}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=() if path in FAST else pytest.mark.slow)
        for path in CONFIGS
    ],
)
def test_an_experiment_survives_fit(path, tmp_path, monkeypatch, request, paper_of) -> None:
    folder, dataset = str(path.parents[1].relative_to(ROOT)), path.stem.partition("_")[0]
    paper = paper_of(folder)
    config = paper.config(path.stem)
    settings: dict[str, Any] = dict(SMALL)
    if dataset != "digits":
        root = request.getfixturevalue(FAKES[dataset])
        settings["data.source.root"] = root
        if dataset == "tiny":  # twelve images of three classes; one of each is held out
            settings |= {"data.val_size": 3, "data.source.verify": "false"}
        if "500k" in path.stem:
            settings["data.extra.root"] = root
            images = np.zeros((8, 32, 32, 3), dtype=np.uint8)
            extra = {"data": images, "extrapolated_targets": np.arange(8)}
            (Path(root) / "ti_500K_pseudo_labeled.pickle").write_bytes(pickle.dumps(extra))
    if config["adversary"]["attack"] is None:
        del settings["adversary.attack.steps"]
    for key in predecessors(config):  # networks that other runs train are taken as they are
        settings[f"{key}.as_it_is"] = "true"
    options = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(path), *options], package=paper.package)


@pytest.mark.parametrize("package", papers())
@pytest.mark.parametrize("on", ["", "*", "cifar*", "cifar10", "fashion*", "*_at", "digits", "f*"])
def test_every_row_of_a_paper_is_in_the_analysis_of_any_selection(package: str, on: str) -> None:
    analysis = importlib.import_module(f"{package}.analysis").ANALYSIS
    stems = list(read_reference(package_folder(package) / "reference.yaml").rows)
    scopes = [analysis.scope(part) for part in dict.fromkeys(analysis.parts(on, stems))]
    for stem in select(stems, on):
        assert any(
            stem in select(stems, rows) and stem.startswith(prefix) for rows, prefix in scopes
        ), stem
