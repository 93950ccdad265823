"""What files from strangers cannot do, and what results do not tell."""

import getpass
import io
import json
import re
import socket
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torchvision.datasets
from lightning.fabric.utilities.exceptions import MisconfigurationException

from common.cli import RobustCLI, main
from common.data.sources import CIFAR10
from common.errors import DataUnavailableError

ROOT = Path(__file__).parents[1]
RESULTS = sorted(ROOT.glob("paper_*/results/*.json"))

CONFIG = """
model:
  class_path: common.classifier.RobustClassifier
  init_args:
    net:
      class_path: common.networks.resnet.ResNet
      init_args: {depths: [1, 1], widths: [4, 4], strides: [1, 2]}
    objective: common.objectives.AT
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}
data: {source: common.data.sources.Digits, batch_size: 20, val_size: 60, train_limit: 40,
  val_limit: 20, test_limit: 20}
adversary: {attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: 0.1}}}
evaluation:
  pictures: false
  validation: {attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: 0.1}}}
  suite: {fgsm: {attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: 0.1}}}}
trainer: {max_epochs: 1, accelerator: cpu, logger: false, enable_progress_bar: false,
  enable_model_summary: false}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


# ---------------------------------------------------------------------------------------- configs

PLACES = (
    *("model", "model.net", "model.objective", "model.optimizer", "model.scheduler"),
    *("model.net.activation", "model.net.block", "data.source", "data.views", "adversary.attack"),
    *("trainer.strategy", "trainer.profiler", "evaluation.audit", "evaluation.threat"),
)
LISTS = ("trainer.callbacks", "trainer.plugins", "trainer.logger")


def popen(tmp_path: Path) -> dict[str, Any]:
    """What would touch a file if it were built."""
    settings = {"args": f"touch {tmp_path / 'touched'}", "shell": True}
    return {"class_path": "subprocess.Popen", "init_args": settings}


def build(config: Path, option: str, value: Any) -> None:
    arguments = ["--config", str(config), f"--{option}", json.dumps(value)]
    RobustCLI("paper_tiny", arguments, run=False)


@pytest.mark.parametrize("place", PLACES)
def test_a_class_of_another_kind_is_not_built(config: Path, tmp_path: Path, place: str) -> None:
    for value in (popen(tmp_path), "os.system", {"class_path": "os.system"}):
        with pytest.raises((SystemExit, ValueError, MisconfigurationException)):
            build(config, place, value)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("place", LISTS)
def test_nor_in_a_list(config: Path, tmp_path: Path, place: str) -> None:
    with pytest.raises((SystemExit, ValueError)):
        build(config, place, [popen(tmp_path)])
    assert not (tmp_path / "touched").exists()


def test_nor_where_any_value_may_stand(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A logger's free settings; jsonargparse builds what is named there unless told not to."""
    import lightning.pytorch.loggers as loggers
    from jsonargparse import set_parsing_settings

    import common.cli

    class Free(loggers.CSVLogger):
        def __init__(self, save_dir: str, tags: dict[str, Any] | None = None) -> None:
            super().__init__(save_dir)
            self.tags = tags

    monkeypatch.setattr(loggers, "Free", Free, raising=False)
    Free.__module__, Free.__qualname__ = "lightning.pytorch.loggers", "Free"
    settings = {"save_dir": str(tmp_path), "tags": {"a": popen(tmp_path)}}
    logger = {"class_path": "lightning.pytorch.loggers.Free", "init_args": settings}
    build(config, "trainer.logger", logger)
    assert not (tmp_path / "touched").exists()
    monkeypatch.setattr(common.cli.RobustCLI, "_draw_as_ever", lambda self: None)
    set_parsing_settings(instantiate_subclass_spec_in_any=True)
    try:
        build(config, "trainer.logger", logger)
    finally:
        set_parsing_settings(instantiate_subclass_spec_in_any=False)
    until = time.monotonic() + 10
    while not (tmp_path / "touched").exists():
        assert time.monotonic() < until, "the place was not one where any value may stand"
        time.sleep(0.01)


def test_settings_of_a_stranger_are_not_built_for_their_random_numbers(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own models are built twice, see ``_draw_as_ever``; others and their settings are not."""
    import common.cli
    from common.config import class_paths

    seen: list[Any] = []
    monkeypatch.setattr(common.cli, "set_parsing_settings", lambda **given: seen.append(given))
    build(config, "seed_everything", 3)
    assert seen
    seen.clear()
    monkeypatch.setattr(common.cli, "OWN_CLASSES", ("paper_",))
    build(config, "seed_everything", 3)
    assert not seen
    nested = {
        "a": [{"class_path": "x.Y", "init_args": {"b": {"class_path": "z.W"}}}],
        "class_path": 3,
    }
    assert list(class_paths(nested)) == ["x.Y", "z.W"]


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


# ---------------------------------------------------------------------------------------- results

# A path on a machine: /home/..., /tmp/...; not 8/255, not the name of a step with its loss.
ABSOLUTE = re.compile(r"(?:^|[\s'\"=(,:])(?:/[A-Za-z_.][\w.-]*/[\w.-]|~/|[A-Z]:\\\\)")
SECRET = re.compile(
    r"(?i)(api[_-]?key|passw|secret|token|bearer |AKIA[0-9A-Z]{12}|BEGIN [A-Z ]*KEY)"
)


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(text for part in value.values() for text in strings(part))]
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


def assert_discreet(path: Path) -> None:
    names = {socket.gethostname(), socket.getfqdn()} - {"localhost", ""}
    names |= {getpass.getuser()} - {"root", "user"}
    for text in strings(json.loads(path.read_text())):
        assert not ABSOLUTE.search(text), f"{path.name}: {text}"
        assert not SECRET.search(text), f"{path.name}: {text}"
        assert not any(re.search(rf"\b{re.escape(name)}\b", text) for name in names), text


def test_committed_results_name_no_machine_folder_or_secret() -> None:
    assert len(RESULTS) > 50
    for path in RESULTS:
        assert_discreet(path)


def test_the_patterns_find_what_they_look_for() -> None:
    for text in ("/home/somebody/runs", "in '/tmp/x/y'", "path=/data/cifar", "~/runs"):
        assert ABSOLUTE.search(text), text
    for text in ("8/255", "pgd20/ce_f", "eps_sweep/ce_f/eps=0.1", "1/2 of them", "and/or"):
        assert not ABSOLUTE.search(text), text


def test_a_fresh_result_names_none_either(config: Path, tmp_path: Path) -> None:
    main(["reproduce", "--config", str(config)], package="paper_tiny")
    path = Path("runs/paper_tiny/tiny/seed0/results.json")
    assert_discreet(path)
    assert set(json.loads(path.read_text())["provenance"]["last"]) == {
        "commit", "dirty", "versions", "device", "world_size", "threads", "precision", "tf32",
        "checkpoint_digest", "config_digest", "wall_time_s", "attack_seconds", "date", "protocol",
        "weights",
    }  # fmt: skip
