"""What files from strangers cannot do, and what results do not tell."""

import copy
import io
import json
import os
import re
import tarfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.datasets
import yaml
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable

from common.attacks.pgd import PGD
from common.checkpoints import checkpoint_beside
from common.cli.main import RobustCLI
from common.data.sources import CIFAR10
from common.errors import ConfigurationError, DataUnavailableError
from common.evaluation.__main__ import main as evaluation_command
from common.evaluation.models import load_run
from common.evaluation.named_data import load_section
from common.evaluation.presets import load_suite
from common.evaluation.suite import SuiteEntry, check_suite
from common.evaluation.transfer import Transfer
from common.files import write_sealed
from common.limits import check_name, read_yaml
from common.parsing import build as build_values
from common.parsing import load_named
from common.results.reference import read_reference
from common.results.store import load_results, read_costs, read_result

ROOT = Path(__file__).parents[1]
RESULTS = sorted(ROOT.glob("paper_*/results/*.json"))

# ---------------------------------------------------------------------------------------- configs

PLACES = (
    *("model", "model.net", "model.scheduler", "model.net.activation", "data.source"),
    *("data.views", "adversary.attack", "trainer.strategy", "evaluation.audit"),
)
LISTS = ("trainer.callbacks", "trainer.logger")


def popen(tmp_path: Path) -> dict[str, Any]:
    """What would touch a file if it were built."""
    settings = {"args": f"touch {tmp_path / 'touched'}", "shell": True}
    return {"class_path": "subprocess.Popen", "init_args": settings}


def build(tiny: Any, *settings: tuple[str, Any]) -> None:
    given = [part for name, value in settings for part in (f"--{name}", json.dumps(value))]
    RobustCLI("paper_tiny", ["--config", str(tiny.config), *given], run=False)


@pytest.mark.parametrize("place", [*PLACES, *LISTS])
def test_a_class_of_another_kind_is_not_built(tiny, tmp_path: Path, place: str) -> None:
    value = popen(tmp_path)
    with pytest.raises((SystemExit, ValueError, MisconfigurationException)):
        build(tiny, (place, [value] if place in LISTS else value))
    assert not (tmp_path / "touched").exists()


def test_nor_where_any_value_may_stand(tiny, tmp_path: Path) -> None:
    """A place of any type gets what is named there as plain values."""
    made = build_values({"free": dict[str, Any]}, {"free": {"a": tiny_net()}}).free
    assert not isinstance(made["a"], torch.nn.Module)
    assert made["a"]["class_path"] == tiny_net()["class_path"]
    for value in (popen(tmp_path), hidden_popen(tmp_path)):
        with pytest.raises(ConfigurationError, match=r"must not be named|cannot be imported"):
            build_values({"free": dict[str, Any]}, {"free": {"a": [value]}})
        logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"x": value}}
        with pytest.raises((SystemExit, ValueError)):
            build(tiny, ("trainer.logger", logger))
    assert not (tmp_path / "touched").exists()


def tiny_net() -> dict[str, Any]:
    return {"class_path": "common.networks.resnet.ResNet", "init_args": {"depths": [1]}}


def hidden_popen(tmp_path: Path) -> dict[str, Any]:
    """The same under a name that begins with one of ours."""
    return popen(tmp_path) | {"class_path": "common.callbacks.resuming.subprocess.Popen"}


HOSTILE = (
    *("os.system", "builtins.eval", "builtins.exec", "subprocess.run", "importlib.import_module"),
    *("functools.partial", "torch.load", "torch.hub.load", "torch.utils.cpp_extension.load"),
    *("torch.jit.load", "torch.nn.functional.torch.load", "lightning.pytorch.cli.LightningCLI"),
    *("common.callbacks.resuming.os.kill", "common.cli.submit.Command", "common.cli.rows.Runner"),
    *("common.limits.yaml.unsafe_load", "yaml.unsafe_load", "sympy.sympify", "numpy.load"),
    *("jsonargparse.set_parsing_settings", "no.such.module", "nothing", "common", ""),
)


@pytest.mark.parametrize("path", HOSTILE)
def test_what_must_not_be_named(path: str) -> None:
    with pytest.raises(ConfigurationError):
        load_named(path)
    for value in (path, {"class_path": path, "init_args": {}}):
        with pytest.raises((ValueError, ArgumentError)):  # that of a checkpoint, which is compared
            build_values({"scheduler": LRSchedulerCallable}, {"scheduler": schedule(value)})


def schedule(function: Any) -> dict[str, Any]:
    path = "torch.optim.lr_scheduler.LambdaLR"
    return {"class_path": path, "init_args": {"lr_lambda": function}}


def test_nor_by_an_experiment(tiny) -> None:
    for value in ("os.system", {"class_path": "common.callbacks.resuming.os.kill"}):
        with pytest.raises((SystemExit, ValueError)):
            build(tiny, ("model.scheduler", schedule(value)))


@pytest.mark.parametrize(
    "path",
    [
        *("torch.nn.ReLU", "torch.nn.functional.relu", "torch.optim.SGD", "common.objectives.AT"),
        *("torchvision.models.resnet18", "lightning.pytorch.loggers.TensorBoardLogger"),
        *("lightning.pytorch.callbacks.EarlyStopping", "lightning.pytorch.strategies.DDPStrategy"),
        *("lightning.pytorch.cli.ReduceLROnPlateau", "torchmetrics.Accuracy"),
    ],
)
def test_what_may_be_named(path: str) -> None:
    assert load_named(path).__name__ == path.rpartition(".")[2]


def test_modules_of_the_user_may_be_named(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mypkg_core.py").write_text(
        "from common.objectives import AT\nfrom common.networks.resnet import ResNet\n"
        "class MyNet(ResNet):\n    pass\nclass MyAT(AT):\n    pass\n"
        "def rate(epoch: int) -> float:\n    return 0.5\n"
    )
    (tmp_path / "mypkg_other.py").write_text("from mypkg_core import MyAT\n")
    net = {"depths": [1], "widths": [4], "strides": [1]}
    build(
        tiny,
        ("model.objective", {"class_path": "mypkg_core.MyAT"}),
        ("model.scheduler", schedule("mypkg_core.rate")),
        ("model.net", {"class_path": "mypkg_core.MyNet", "init_args": net}),
    )
    with pytest.raises(ConfigurationError, match=r"in mypkg_core; name it mypkg_core\.MyAT"):
        build(tiny, ("model.objective", {"class_path": "mypkg_other.MyAT"}))


def test_parsers_are_made_in_one_place() -> None:
    made = re.compile(
        r"import .*\bArgumentParser\b|jsonargparse\.ArgumentParser|set_parsing_settings"
    )
    for path in [*ROOT.glob("common/**/*.py"), *ROOT.glob("paper_*/**/*.py")]:
        lines = [line for line in path.read_text().splitlines() if "jsonargparse" in line]
        found = [line for line in lines if made.search(line)]
        assert not found or path == ROOT / "common/parsing.py", f"{path}: {found}"


def suite_file(tmp_path: Path, attack: Any) -> Path:
    path = tmp_path / "suite.yaml"
    path.write_text(json.dumps({"evaluation": {"suite": {"a": {"attack": attack}}}}))
    return path


def test_a_suite_file_of_the_evaluation_command_builds_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hosts = [popen(tmp_path), hidden_popen(tmp_path), {"class_path": "os.system"}]
    transfer = "common.evaluation.transfer.Transfer"
    hosts += [{"class_path": transfer, "init_args": {"surrogate": one}} for one in hosts[:2]]
    hosts += [
        one | {"init_args": one.get("init_args", {}) | {"eps": "threat"}} for one in hosts[:2]
    ]
    for attack in hosts:
        with pytest.raises(ConfigurationError, match=r"must not be named|cannot be imported"):
            load_suite(suite_file(tmp_path, attack))
    given = ["--model", "common.networks.resnet:DigitsResNet", "--data", "digits"]
    assert evaluation_command([*given, "--suite", str(suite_file(tmp_path, hosts[1]))]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "touched").exists()


def test_nor_does_a_data_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "data.yaml"
    for source in (popen(tmp_path), hidden_popen(tmp_path), {"class_path": "torch.hub.load"}):
        path.write_text(json.dumps({"source": source}))
        given = ["--model", "common.networks.resnet:DigitsResNet", "--data", str(path)]
        assert evaluation_command(given) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "touched").exists()


def test_nor_does_the_config_of_a_run(tiny, tmp_path: Path) -> None:
    """Opened by an analysis, and as the surrogate of a transfer attack."""
    tiny("fit", "--trainer.max_epochs", "1")
    assert load_run(tiny.run)
    saved = tiny.run / "config.yaml"
    settings = yaml.safe_load(saved.read_text())
    for node, place in ((popen(tmp_path), "net"), (hidden_popen(tmp_path), "scheduler")):
        changed = copy.deepcopy(settings)
        changed["model"]["init_args"][place] = node
        saved.write_text(yaml.safe_dump(changed))
        with pytest.raises((SystemExit, ValueError)):
            load_run(tiny.run)
        attack = Transfer(PGD(0.1, 0.1, 1), str(tiny.last))
        with pytest.raises((SystemExit, ValueError)):
            _ = attack.network
    assert not (tmp_path / "touched").exists()
    saved.write_text(BOMBS["levels"])
    with pytest.raises(ConfigurationError, match="nested too deeply"):
        load_run(tiny.run)


@pytest.mark.parametrize(
    "value", ["../x", "/tmp/x", "a/b", ".hidden", "..", "a b", "x" * 300, "a\nb"]
)
def test_an_experiment_is_one_part_of_a_path(value: str) -> None:
    with pytest.raises(ConfigurationError, match="consists of letters"):
        checkpoint_beside("runs/p/e/seed0", value)
    if value != "a b":  # a label of results is no part of a path, and may have spaces
        with pytest.raises(ConfigurationError, match="printable text"):
            check_suite({value: SuiteEntry(PGD(0.1, 0.1, 1))}, None)
    assert check_name("cifar10_resnet18.v2+x-1", "it") == "cifar10_resnet18.v2+x-1"


@pytest.mark.parametrize("option", ["--experiment", "--warm_start.experiment"])
def test_so_says_the_command(tiny, option: str) -> None:
    assert "consists of letters, digits and ._+-" in tiny.refused("fit", f"{option}=../x")
    assert not Path("runs").exists()


# ------------------------------------------------------------------------------------ many, large

BOMBS = {
    "levels": "a: " + "[" * 200_000,
    "closed levels": "a: " + "[" * 200_000 + "]" * 200_000,
    "sequences": "- " * 200_000,
    "laughs": "a0: &a0 [x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
    "merged laughs": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)),
    "a long chain": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 300)),
    "itself": "a: &a [*a]",
    "digits": "a: " + "9" * 400,
    "more digits": "a: " + "9" * 5000,
    "hexadecimal digits": "a: 0x" + "f" * 400,
    "python": "a: !!python/object/apply:os.system ['touch touched']",
    "bytes": "a: \x00",
    "nothing": "",
    "many": "- 1\n" * 300_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_every_reader_of_yaml_refuses_it_quickly(tiny, tmp_path: Path, name: str) -> None:
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text(BOMBS[name])
    begun = time.monotonic()
    given: list[tuple[object, ...]] = []
    if name == "levels":  # the others take the same way
        nested, quoted = tmp_path / "nested.yaml", tmp_path / "quoted.yaml"
        nested.write_text("data: bomb.yaml\n")
        quoted.write_text(json.dumps({"trainer": {"max_epochs": BOMBS[name]}}))
        given = [("--config", path) for path in (nested, quoted)]
        given += [(f"--model={BOMBS[name]}",)]
    if name in ("levels", "laughs", "digits", "python"):
        given += [("--config", bomb)]
    for options in given:
        assert len(tiny.refused("fit", *options)) < 2000
    for read in (load_suite, read_reference, load_section):
        with pytest.raises(ConfigurationError):
            read(str(bomb))
    assert time.monotonic() - begun < 20
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_file_is_named_as_that(tiny, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    expected = "it is a folder" if kind == "folder" else "it is no regular file"
    for read in (read_yaml, load_suite, read_reference, load_section, read_result):
        with pytest.raises(ConfigurationError, match=expected):
            read(str(path))


@pytest.mark.parametrize(
    ("option", "number"),
    [
        ("trainer.max_epochs", "9" * 400),
        ("data.batch_size", "-" + "9" * 5000),
        ("adversary.attack.eps", "1e999999999/255"),
        ("adversary.attack.eps", "1e400"),
    ],
)
def test_large_numbers_are_one_line(tiny, option: str, number: str) -> None:
    assert len(tiny.refused("fit", f"--{option}={number}")) < 1000


@cache
def hostile_results() -> dict[str, str]:
    result = json.loads(next(path for path in RESULTS if "-seed0" in path.name).read_text())
    last = next(iter(result["checkpoints"].values()))
    many = copy.deepcopy(result)
    for entry in many["checkpoints"].values():
        entry["examples"], entry["clean"]["outcomes"] = 40_000_000, "f" * 10_000_000
        entry["clean"]["per_class"] = [[40_000_000, 40_000_000]]
        entry["clean"]["correct"] = 40_000_000
    return {
        "levels": "[" * 200_000,
        "deep": '{"schema": 3, "a": ' + "[" * 900 + "]" * 900 + "}",
        "outcomes": json.dumps(many),
        "claimed outcomes": json.dumps(result).replace(f'"examples": {last["examples"]}',
                                                       '"examples": 1' + "0" * 14),
        "digits": json.dumps(result).replace('"seed": 0', '"seed": ' + "9" * 400),
        "more digits": '{"schema": ' + "9" * 5000 + "}",
        "schema": '{"schema": ' + "9" * 400 + "}",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["levels", "deep", "outcomes", "claimed outcomes", "digits",
                                  "more digits", "schema"])  # fmt: skip
def test_every_reader_of_json_refuses_it_quickly(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x-seed0.json"
    path.write_text(hostile_results()[name])
    begun = time.monotonic()
    with pytest.raises(ConfigurationError) as caught:
        read_result(path)
    assert len(str(caught.value)) < 1000
    with pytest.raises(ConfigurationError):
        load_results(tmp_path)
    (tmp_path / "costs.json").write_text(hostile_results()[name])
    with pytest.raises(ConfigurationError):
        read_costs(tmp_path)
    assert time.monotonic() - begun < 20


# ------------------------------------------------------------------------------------ checkpoints


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch touched",)


@pytest.mark.parametrize(("legacy", "sealed"), [(True, False), (False, True)])
def test_code_in_checkpoints_does_not_run(tiny, legacy: bool, sealed: bool) -> None:
    path, content = Path("evil.ckpt"), io.BytesIO()
    checkpoint = {"state_dict": Evil(), "pytorch-lightning_version": "2.6"}
    torch.save(checkpoint, content, _use_new_zipfile_serialization=not legacy)
    if sealed:
        write_sealed(path, content)
    else:
        path.write_bytes(content.getvalue())
    for option in ("--warm_start.path", "--ckpt_path"):
        assert "system" in tiny.refused("fit", option, path)
    given = ["--model", "common.networks.resnet:DigitsResNet", "--data", "digits"]
    assert evaluation_command([*given, "--weights", str(path)]) == 2
    assert not Path("touched").exists()


# --------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize("member", ["../escaped", "/tmp/robust-escaped", "link"])
def test_an_archive_cannot_write_outside_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[str], member: str
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    path = root / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo(member)
        if member == "link":
            entry.type, entry.linkname = tarfile.SYMTYPE, "../.."
            archive.addfile(entry)
            entry = tarfile.TarInfo("link/escaped")
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"evil"))
    import hashlib

    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5)
    with pytest.raises(DataUnavailableError, match="CIFAR-10 is not in"):
        CIFAR10(root=str(root)).prepare()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]
    assert not Path("/tmp/robust-escaped").exists()
    assert {p.name for p in root.iterdir()} <= {path.name, ".download.lock"}
