"""A fixed seed, one thread, tiny batches, and small sets of images in their real file formats."""

import copy
import gzip
import hashlib
import json
import pickle
import shutil
import struct
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
import yaml
from torch import Tensor

from common.data.corruptions import CORRUPTIONS
from common.data.sources import FashionMNIST
from common.evaluation.presets import load_suite
from common.results.lines import Line, Outcomes, Threat
from common.results.outcomes import checkpoint_entry
from common.results.reference import Reference, read_reference
from common.results.store import merge_result, result_path

torch.set_num_threads(1)
# The first backward pass starts a thread for every accelerator there is, also for one that a later
# test pretends to have, and a process with such threads cannot differentiate after a fork.
torch.zeros((), requires_grad=True).backward()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Where the time of the tests went: seconds over all workers, by folder or file."""
    seconds: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
        if isinstance(report, pytest.TestReport):
            folders = Path(report.nodeid.partition("::")[0]).parts[1:]
            part = "/".join(folders[: 2 if folders[0] == "common" else 1])
            seconds[part] += report.duration
            count[part] += report.when == "call"
    if sum(seconds.values()) < 30.0:
        return
    terminalreporter.section("seconds by part, all workers together")
    for part, spent in seconds.most_common():
        terminalreporter.write_line(f"{spent:8.1f}  {count[part]:5d} tests  {part}")


@pytest.fixture(autouse=True)
def _traced() -> Iterator[None]:
    """The official AutoAttack, where a test runs it by itself, ends coverage and debuggers."""
    trace = sys.gettrace()
    yield
    if sys.gettrace() is not trace:
        sys.settrace(trace)


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    torch.default_generator.manual_seed(0)  # torch.manual_seed formats a stack, 1 ms a test
    np.random.seed(0)  # noqa: NPY002 (libraries under test may draw from it)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Six random 3x8x8 images of ten classes."""
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.rand(6, 3, 8, 8, generator=generator),
        "y": torch.randint(10, (6,), generator=generator),
        "index": torch.arange(6),
    }


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every attempt to open an address fails; the list says which were tried."""
    tried: list[str] = []

    def refuse(request: Any, *_: Any, **__: Any) -> None:
        tried.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return tried


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def _images(rng: np.random.Generator, n: int, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, (n, *shape), dtype=np.uint8)


def _labels(n: int, classes: int) -> list[int]:
    return [i % classes for i in range(n)]


@pytest.fixture
def write_cifar10() -> Callable[..., Path]:
    """``write(root, per_batch=20)``: five training batches and a test batch, unofficial."""

    def write(root: Path, per_batch: int = 20) -> Path:
        folder = root / "cifar-10-batches-py"
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
            entry = {
                "batch_label": name,
                "labels": _labels(per_batch, 10),
                "data": _images(rng, per_batch, 3072),
                "filenames": [f"{i}.png" for i in range(per_batch)],
            }
            (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
        return root

    return write


@pytest.fixture
def fake_cifar10(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_cifar10: Callable[..., Path]
) -> Path:
    """100 + 20 images that pass for the official ones."""
    root = write_cifar10(tmp_path / "data")
    cls = torchvision.datasets.CIFAR10
    for attribute in ("train_list", "test_list"):
        files = [[n, _md5(root / cls.base_folder / n)] for n, _ in getattr(cls, attribute)]
        monkeypatch.setattr(cls, attribute, files)
    return root


@pytest.fixture
def write_cifar10c() -> Callable[..., Path]:
    """``write(root, names=CORRUPTIONS, per_severity=4)``: CIFAR-10-C, cut down."""

    def write(root: Path, names: Sequence[str] = CORRUPTIONS, per_severity: int = 4) -> Path:
        folder = root / "CIFAR-10-C"
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for name in names:
            np.save(folder / f"{name}.npy", _images(rng, 5 * per_severity, 32, 32, 3))
        np.save(folder / "labels.npy", np.tile(np.arange(per_severity, dtype=np.uint8), 5))
        return root

    return write


@pytest.fixture
def fake_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """200 + 100 images that pass for the official ones."""
    root, cls = tmp_path / "data", torchvision.datasets.CIFAR100
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for name, n in (("train", 200), ("test", 100)):
        entry = {
            "fine_labels": _labels(n, 100),
            "coarse_labels": _labels(n, 20),
            "data": _images(rng, n, 3072),
        }
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    monkeypatch.setattr(cls, "train_list", [["train", _md5(folder / "train")]])
    monkeypatch.setattr(cls, "test_list", [["test", _md5(folder / "test")]])
    return root


@pytest.fixture
def fake_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 + 30 images that pass for the official ones; the digit 0 is labelled 10, as there."""
    from scipy.io import savemat

    root, cls = tmp_path / "data", torchvision.datasets.SVHN
    root.mkdir()
    rng = np.random.default_rng(2)
    lists = dict(cls.split_list)
    for split, n in (("train", 60), ("test", 30)):
        path = root / f"{split}_32x32.mat"
        labels = np.array([[i % 10 + 1] for i in range(n)], dtype=np.uint8)
        images = _images(rng, n, 32, 32, 3).transpose(1, 2, 3, 0)
        savemat(path, {"X": images, "y": labels}, do_compression=True)
        lists[split] = [cls.split_list[split][0], path.name, _md5(path)]
    monkeypatch.setattr(cls, "split_list", lists)
    return root


def _write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def _fake_mnist(root: Path, cls: type, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = root / cls.__name__ / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    resources, contents = [], {}
    for part, n in (("train", 60), ("t10k", 30)):
        images = folder / f"{part}-images-idx3-ubyte.gz"
        labels = folder / f"{part}-labels-idx1-ubyte.gz"
        _write_idx(images, _images(rng, n, 28, 28))
        _write_idx(labels, np.array(_labels(n, 10), dtype=np.uint8))
        for path in (images, labels):
            resources.append((path.name, _md5(path)))
            contents[path.name] = hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
    monkeypatch.setattr(cls, "resources", resources)
    if cls is torchvision.datasets.FashionMNIST:
        monkeypatch.setattr(FashionMNIST, "contents", contents)
        monkeypatch.setattr(FashionMNIST, "elsewhere", (str(root / "system"),))
    return root


@pytest.fixture
def fake_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 + 30 images that pass for the official ones."""
    return _fake_mnist(tmp_path / "data", torchvision.datasets.MNIST, monkeypatch)


@pytest.fixture
def fake_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 + 30 images that pass for the official ones."""
    return _fake_mnist(tmp_path / "data", torchvision.datasets.FashionMNIST, monkeypatch)


@pytest.fixture
def fake_tiny_imagenet(tmp_path: Path) -> Path:
    """Three of the classes, 4 training and 2 validation images each, as one-coloured JPEGs."""
    from PIL import Image

    root = tmp_path / "data"
    folder = root / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    annotations = []
    for k, wnid in enumerate(("n12267677", "n01443537", "n02124075")):
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        for i in range(4):
            colour = (40 * k + 10 * i, 100, 200)
            Image.new("RGB", (64, 64), colour).save(images / f"{wnid}_{i}.JPEG", quality=95)
        for i in range(2):
            name = f"val_{2 * k + i}.JPEG"
            image = Image.new("L", (64, 64), 50 * k + 20 * i)  # some of the official are grey too
            image.save(folder / "val" / "images" / name, quality=95)
            annotations.append(f"{name}\t{wnid}\t0\t0\t62\t62\n")
    annotations.reverse()
    (folder / "val" / "val_annotations.txt").write_text("".join(annotations))
    return root


@pytest.fixture
def entries_of(tmp_path) -> Callable[[Mapping[str, Any], str], dict[str, Any]]:
    """What entries of a suite, as YAML has them, come to with a radius for ``threat``: numbers."""

    def numbers(attack: Any) -> dict[str, Any]:
        known = {name: value for name, value in vars(attack).items() if name != "_given"}
        return {name: round(v, 9) if isinstance(v, float) else v for name, v in known.items()}

    def found(suite: Mapping[str, Any], eps: str) -> dict[str, Any]:
        file = tmp_path / "suite.yaml"
        file.write_text(yaml.safe_dump({"evaluation": {"suite": dict(suite)}}))
        return {
            name: ([numbers(attack) for attack, _ in entry.variants()], entry.losses)
            for name, entry in load_suite(file, eps).entries.items()
        }

    return found


TINY = """
model:
  class_path: common.classifier.RobustClassifier
  init_args:
    net:
      class_path: common.networks.resnet.ResNet
      init_args: {depths: [1, 1], widths: [4, 4], strides: [1, 2]}
    objective: common.objectives.AT
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.9}}
data: {source: common.data.sources.Digits, batch_size: 20, val_size: 60, train_limit: 40,
  val_limit: 20, test_limit: 20}
adversary: {attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: 0.1}}}
evaluation:
  pictures: false
  validation: {attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: 0.1}}}
  suite: {fgsm: {attack: {class_path: common.attacks.pgd.FGSM, init_args: {eps: 0.1}}}}
trainer: {max_epochs: 2, accelerator: cpu, logger: false, log_every_n_steps: 1,
  enable_progress_bar: false, enable_model_summary: false}
"""


class Tiny:
    """A small experiment in an empty folder, through the real command line."""

    run = Path("runs/paper_tiny/tiny/seed0")
    last = run / "checkpoints/last.ckpt"
    text = TINY

    def __init__(self, folder: Path, capsys: Any = None, finished: Any = None) -> None:
        self.config, self._capsys, self._finished = folder / "tiny.yaml", capsys, finished
        self.config.write_text(TINY)

    def __call__(self, command: str, *options: object, package: str = "paper_tiny") -> None:
        """Run a subcommand; later options win over the experiment's file."""
        from common.cli.start import main

        main([command, "--config", str(self.config), *map(str, options)], package=package)

    def done(self, command: str, *options: object) -> None:
        """What this command leaves, from a run that all tests share."""
        folder = self._finished(command, *map(str, options))
        shutil.copytree(folder, self.config.parent, dirs_exist_ok=True)

    def refused(self, command: str, *options: object, package: str = "paper_tiny") -> str:
        """The one line of an error that the user can mend."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            self(command, *options, package=package)
        assert caught.value.code == 2
        printed = self._capsys.readouterr().err.splitlines()
        (line,) = [line for line in printed if line.startswith("error: ")]
        return line

    def overlay(self, settings: str | Mapping[str, Any]) -> tuple[str, Path]:
        """The option for a second file with these settings."""
        path = self.config.with_name("overlay.yaml")
        path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(dict(settings)))
        return "--config", path

    def checkpoint(self, runs: str = "runs", name: str = "last") -> dict[str, Any]:
        """What a checkpoint of its first run holds."""
        path = Path(runs, *self.run.parts[1:], "checkpoints", f"{name}.ckpt")
        found: dict[str, Any] = torch.load(path)
        return found

    def result(self) -> dict[str, Any]:
        """What its first run measured."""
        found: dict[str, Any] = json.loads((self.run / "results.json").read_text())
        return found


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """The YAML of a small experiment."""
    return TINY


@pytest.fixture(scope="session")
def finished_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder in which a command of the small experiment has run, once for all tests."""

    @cache
    def made(command: str, *options: str) -> Path:
        folder = tmp_path_factory.mktemp("tiny")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            Tiny(folder)(command, *options)
        return folder

    return made


@pytest.fixture
def tiny(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished_tiny: Callable[..., Path],
) -> Tiny:
    """A small experiment, run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return Tiny(tmp_path, capsys, finished_tiny)


@pytest.fixture(scope="session")
def quiet_trainer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``make(*callbacks, **settings)``: our trainer on a CPU; files only where callbacks write."""

    def make(*callbacks: Any, kind: Any = None, **settings: Any) -> Any:
        from lightning.pytorch.callbacks import Checkpoint  # Lightning, which most tests do without

        from common.cli.trainer import Trainer

        quiet: dict[str, Any] = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            "default_root_dir": tmp_path_factory.mktemp("run"),
        }
        return (kind or Trainer)(**quiet | settings, callbacks=list(callbacks))

    return make


@pytest.fixture(scope="session")
def rates() -> Callable[[Any, int], list[float]]:
    """``rates(scheduler, epochs)``: of each epoch; stepped after it, as Lightning does."""

    def found(scheduler: Any, epochs: int) -> list[float]:
        used = []
        for _ in range(epochs):
            used.append(scheduler.get_last_lr()[0])
            scheduler.optimizer.step()
            scheduler.step()
        return used

    return found


@pytest.fixture(scope="session")
def stub_data() -> Callable[..., Any]:
    """``stub_data(batches, **more)``: as much of a data module as an analysis asks for."""

    def made(batches: Sequence[Mapping[str, Tensor]], **more: Any) -> SimpleNamespace:
        return SimpleNamespace(
            prepare_data=lambda: None,
            setup=lambda stage: None,
            test_dataloader=lambda: batches,
            on_after_batch_transfer=lambda batch, _: batch,
            **more,
        )

    return made


@pytest.fixture(scope="session")
def touch_checkpoints() -> Callable[[Path, Sequence[str], Sequence[int]], None]:
    """Makes empty checkpoints of experiments and seeds in a folder of runs."""

    def touch(runs: Path, stems: Sequence[str], seeds: Sequence[int]) -> None:
        for path in (runs / stem / f"seed{seed}" for stem in stems for seed in seeds):
            (path / "checkpoints").mkdir(parents=True)
            (path / "checkpoints/last.ckpt").touch()

    return touch


@pytest.fixture
def pgd_outcomes() -> Callable[..., Outcomes]:
    """Outcomes of PGD-20 in an linf ball: ``held`` of ``total`` examples of one class withstand."""

    def made(held: int, total: int = 50, eps: float = 0.3) -> Outcomes:
        right, name = torch.ones(total, dtype=torch.bool), "pgd20/ce_f"
        return Outcomes(
            torch.zeros(total, dtype=torch.int64),
            {"clean": right, name: torch.arange(total) < held},
            {name: right},
            {name: Line("pgd20", norm="linf", eps=eps)},
            threat=Threat("linf", eps),
        )

    return made


@pytest.fixture
def file_result() -> Callable[..., None]:
    """Writes a result file; further arguments are those of ``checkpoint_entry``."""

    def put(
        folder: Path,
        paper: str,
        stem: str,
        seed: int,
        outcomes: Any,
        label: str = "last",
        made: Mapping[str, Any] | None = None,
        **entry: Any,
    ) -> None:
        merge_result(
            result_path(folder, stem, seed),
            paper=paper,
            experiment=stem,
            seed=seed,
            label=label,
            entry=checkpoint_entry(outcomes, **entry),
            provenance={"config_digest": "x", **(made or {})},
        )

    return put


class UniqueKeys(yaml.CSafeLoader):
    """YAML in which a key that occurs twice is an error; usually the last one counts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{sorted(keys)} {node.start_mark}"
        return super().construct_mapping(node, deep=True)


@cache
def _read(path: Path) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeys)


class Paper:
    """The experiments of a paper.

    Attributes:
        folder: Of the paper.
        package: Its import name.
        paths: Configuration files, by stem.
    """

    def __init__(self, name: str) -> None:
        self.folder = Path(__file__).parents[1] / name
        self.package = name.replace("/", ".")
        self.paths = {path.stem: path for path in sorted(self.folder.glob("configs/*.yaml"))}

    @cached_property
    def reference(self) -> Reference:
        return read_reference(self.folder / "reference.yaml")

    def read(self, file: str) -> Any:
        """What a file of the paper says, without a key that occurs twice."""
        return copy.deepcopy(_read(self.folder / file))

    def config(self, stem: str) -> Any:
        """An experiment, with the contents of the files that it refers to."""
        return self._whole(_read(self.paths[stem]), self.paths[stem].parent)

    def _whole(self, value: Any, folder: Path) -> Any:
        if isinstance(value, str) and value.endswith(".yaml"):
            return self._whole(_read(folder / value), (folder / value).parent)
        if isinstance(value, dict):
            return {key: self._whole(part, folder) for key, part in value.items()}
        return [self._whole(part, folder) for part in value] if isinstance(value, list) else value


@pytest.fixture(scope="session")
def paper_of() -> Callable[[str], Paper]:
    """``paper_of("paper_cifs")``: the paper's experiments, read once."""
    return cache(Paper)
