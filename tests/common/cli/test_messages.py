"""What a user reads after a mistake: one line that names what is wrong; most before torch."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import Namespace

from common.cli.declared import arguments_of, is_module, misfit
from common.cli.draft import PLAIN, SECTIONS, check, drafted
from common.cli.main import FILLED_IN, RobustCLI
from common.cli.parser import fill_from_data
from common.cli.preconditions import check_checkpoint
from common.cli.start import FIRST, checked, main
from common.cli.trainer import Trainer
from common.errors import CheckpointError
from common.evaluation.__main__ import FLAGS, OPTIONS
from common.evaluation.__main__ import main as evaluation
from common.evaluation.command import _parser
from common.objectives import TRADES
from common.packages import CONFIGS, data_sections, yaml_files
from common.settings import parameters_of

FIT = ("fit", "--config", "digits_resnet_cifs")
NET = ("--model", "common.networks.resnet:ResNet18")


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("model:\n  a: [1,\nb: }\n")
    Path("stray.yaml").write_text("data: {batchsize: 3}\n")
    Path("bare.yaml").write_text("data: digits\n")
    Path("odd.yaml").write_text("wieghts: a.pt\n")
    Path("text.ckpt").write_text("hello")
    torch.save({"state_dict": {}}, "bare.ckpt")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "reproduce"),
        (("fti",), "'fti'"),
        (("fit",), "--config NAME, there are digits_"),
        (("fit", "digits_resnet_cifs"), "'digits_resnet_cifs'"),
        (("fit", "--config"), "--config"),
        (("fit", "--config", "digits_resnet_cif"), "digits_resnet_cifs"),
        (("fit", "--config", "brken.yaml"), "broken.yaml"),
        (("fit", "--config", "digits_cnn3_base"), "paper_wm"),
        (("fit", "--config", "broken.yaml"), "broken.yaml cannot be read: it is no YAML (line 3"),
        ((*FIT, "--config", "dpp"), "ddp"),
        ((*FIT, "--config", "stray.yaml"), "data.batch_size"),
        ((*FIT, "--data", "cifar11"), "cifar10"),
        ((*FIT, "--lr", "1"), "model.optimizer.lr"),
        ((*FIT, "--model.optimizer.lr", "-1"), "optimizer.lr is -1"),
        ((*FIT, "--model.optimizer.weight_decay=-1e-4"), "optimizer.weight_decay is -1e-4"),
        ((*FIT, "--optimizer", "Adam"), "model.optimizer?"),
        ((*FIT, "--eps", "0.1"), "adversary.attack.eps"),
        ((*FIT, "--trainer.max_epoch", "1"), "trainer.max_epochs"),
        ((*FIT, "--adversary.attack.step", "1"), "adversary.attack.steps"),
        ((*FIT, "--model.objective", "common.objectives.Trades"), "TRADES"),
        ((*FIT, "--model.net", "common.attacks.pgd.PGD"), "common.attacks.pgd.PGD"),
        ((*FIT, "--model.optimizer", "torch.optim.SGDD"), "SGD?"),
        ((*FIT, "--seed_everything", "abc"), "abc"),
        ((*FIT, "--data.flip", "perhaps"), "perhaps"),
        ((*FIT, "--ckpt_path", "text.ckpt"), "b'hello'"),
        ((*FIT, "--ckpt_path", "none.ckpt"), "bare.ckpt, text.ckpt"),
        ((*FIT, "--ckpt_path", "bare.ckpt"), "bare.ckpt has no pytorch-lightning_version"),
        (("test", *FIT[1:], "--ckpt_path", "last"), "seed0/checkpoints/last.ckpt"),
        ((*FIT, "--adversary.attack.eps", "8"), "'8/255'"),
        ((*FIT, "--model.objective", "Trades"), "common.objectives.TRADES"),
        ((*FIT, "--model.net", "torch.optim.SGD"), "torch.optim.SGD"),
        ((*FIT, "--model.net", "collections.OrderedDict"), "collections.OrderedDict"),
        ((*FIT, "--model.net", "torchvision.models.resnet18"), "Digits has 1"),
        ((*FIT, "--model.net.width", "3"), "did you mean model.net.widths?"),
        ((*FIT, "--seed_everything", "4294967296"), "4294967296"),
        ((*FIT, "--trainer.gradient_clip_val", "-1e-3"), "-1e-3"),
        ((*FIT, "--trainer.max_steps", "0"), "max_steps is 0"),
        ((*FIT, "--trainer", "3"), "trainer is '3'"),
        ((*FIT, "--config", "bare.yaml"), "bare.yaml: data is 'digits'"),
    ],
)
def test_mistakes_are_found_before_lightning_is_imported(capsys, monkeypatch, words, named) -> None:
    monkeypatch.setitem(sys.modules, "common.cli.main", None)  # importing it would be an error
    with pytest.raises(SystemExit) as ended:
        main(words, package="paper_cifs")
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert named in line


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--model.objective", "null"), "objective"),
        (("--model.net.num_classes", "7"), "model.net.num_classes is 7 and Digits has 10"),
        (("--trainer.accelerator", "gpu"), "gpu"),
    ],
)
def test_mistakes_that_a_parser_or_a_class_finds_are_one_line(
    capsys, monkeypatch, words, named
) -> None:
    for device in ("cuda", "backends.mps"):
        monkeypatch.setattr(f"torch.{device}.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main((*FIT, *words), package="paper_cifs")
    assert ended.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_a_network_of_torchvision_gets_the_classes_of_the_data() -> None:
    net = Namespace(class_path="torchvision.models.resnet18", init_args=Namespace(num_classes=1000))
    model = Namespace(init_args=Namespace(net=net))
    source = Namespace(class_path="common.data.sources.CIFAR100")
    fill_from_data(Namespace(model=model, data=Namespace(source=source)))
    assert net.init_args.num_classes == 100


def test_processes_of_torchrun_need_a_device_each(capsys, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        main((*FIT, "--trainer.accelerator", "cpu"), package="paper_cifs")
    assert "--trainer.devices 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((), "--model"),
        (("--model", "nowhere.nets:net"), "'nowhere'"),
        (("--model", "common.networks.resnet"), "'common.networks.resnet'"),
        (("--model", "common.networks.resnet:norm"), "'norm'"),
        (("--model", "common.attacks.losses:margin"), "logits"),
        ((*NET, "--data.source.verify", "false"), "data.source.verify"),
        ((*NET, "--data", "cifar11"), "cifar10"),
        ((*NET, "--suite", "quik"), "quick"),
        ((*NET, "--wieghts", "a.pt"), "weights"),
        ((*NET, "--weights", "text.ckpt"), "b'hello'"),
        (("--config", "broken.yaml"), "broken.yaml"),
        ((*NET, "--config", "odd.yaml"), "weights"),
    ],
)
def test_mistakes_of_an_evaluation_are_one_line(capsys, words, named) -> None:
    assert evaluation(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--model", "timm:resnet18"), "pip install timm"),
        (("--model", "nowhere/seed0"), "'nowhere/seed0'"),
        (("--model", "paper_cifs:digits_resnet_cifs-seed7"), "runs/paper_cifs/digits_resnet_cifs/"),
        ((*NET, "--data", "nowhere/photos"), "nowhere/photos"),
        ((*NET, "--save-exampels"), "save_examples"),
        (("--model", "torchvision:resnet18", "--data", "torchvision:CIFAR100"), None),
        ((*NET, "--save-examples"), "--output"),
        (("--model", "run", "--data", "photos", "--save-examples", "--output", "out"), None),
        (("export", "run", "folder"), None),
    ],
)
def test_names_in_an_evaluation_are_checked_before_torch(capsys, monkeypatch, words, named) -> None:
    reached = SimpleNamespace(run=lambda _: 7, run_export=lambda _: 7)
    monkeypatch.setitem(sys.modules, "common.evaluation.command", None if named else reached)
    monkeypatch.setitem(sys.modules, "timm", None)
    for folder in ("run", "photos"):
        Path(folder).mkdir()
    assert evaluation(words) == (2 if named else 7)
    assert (named or "") in capsys.readouterr().err


def test_help_shows_the_first_options_and_lists_experiments(capsys) -> None:
    main(("fit", "--help"), package="paper_cifs")
    printed = capsys.readouterr().out
    assert all(option.partition(" ")[0] in printed for option in FIRST)
    assert len(FIRST) == 10
    assert "digits_resnet_" in printed
    assert evaluation(["--help"]) == 0
    assert "autoattack" in capsys.readouterr().out


def test_help_and_errors_import_neither_torch_nor_lightning() -> None:
    code = (
        "import sys, common.cli.start, common.evaluation.__main__\n"
        "sys.exit(len({'torch', 'lightning'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_option_of_the_parsers_is_known_before(tiny) -> None:
    """What is refused early is no option of the installed versions either."""
    words = ["--config", str(tiny.config), "--model.objective", "TRADES"]
    cli = RobustCLI("paper_tiny", words, run=False)
    assert type(cli.model.objective) is TRADES, "short names will do"
    filled_in = {f"{section}.{name}" for _, section, names in FILLED_IN for name in names}
    known = {*PLAIN, "model"} | {
        f"{section}.{name}" for section, path in SECTIONS.items() for name in arguments_of(path)
    }
    options = {".".join(name.split(".")[:2]) for name, _ in cli.parser.get_defaults().items()}
    assert {name for name in options if name[:6] not in ("model.", "__defa")} <= known
    assert {name.partition(".")[0] for name in known - filled_in} >= set(SECTIONS)
    for name, skipped in RobustCLI.subcommands().items():
        taken = set(inspect.signature(getattr(Trainer, name)).parameters) - skipped
        assert taken <= {*PLAIN, "self", "datamodule", "dataloaders"}, name
    parser = _parser()
    theirs = {name for name, _ in parser.get_defaults().items()} - {"__default_config__"}
    assert theirs == set(OPTIONS)
    assert set(FLAGS) - {"print_config"} <= theirs


@pytest.mark.parametrize(
    "path",
    [
        *(
            "common.attacks.pgd.PGD",
            "common.data.sources.CIFAR10",
            "torch.optim.lr_scheduler.StepLR",
        ),
        *("common.networks.resnet.ResNet18", "common.networks.resnet.DigitsResNet"),
        *("common.networks.wide_resnet.WideResNet", "paper_awnet.networks.AWNet"),
        *("paper_cifs.method.CIFSDigitsResNet", "torch.optim.SGD"),
    ],
)
def test_the_source_tells_what_a_parser_accepts(path) -> None:
    assert set(arguments_of(path)) == set(parameters_of(path))


@pytest.mark.parametrize("path", ["torch.nn.Linear", "torch.nn.ReLU", "somewhere.Net"])
def test_a_class_that_may_be_a_network_is_not_refused_early(path) -> None:
    assert is_module(path)


@pytest.mark.parametrize("attack", [{"eps": "2", "norm": "l2"}, {"eps": "1e0"}, {"eps": "9/255"}])
def test_radii_that_a_norm_allows_are_not_refused_early(attack) -> None:
    check({"adversary": {"attack": {"class_path": "common.attacks.pgd.PGD", "init_args": attack}}})


def test_no_configuration_of_this_project_is_refused_early() -> None:
    root = Path(__file__).parents[3]
    first = root / "paper_cifs/configs/digits_resnet_cifs.yaml"
    overlays = [path for name, path in yaml_files(CONFIGS).items() if name not in data_sections()]
    for path in [*sorted(root.glob("paper_*/configs/digits_*.yaml")), *overlays]:
        check(drafted([CONFIGS / "base.yaml", first, path], []))


@pytest.mark.parametrize(
    ("value", "annotation", "fits"),
    [
        ("1e-3", "float", True),
        ("-1", "int", True),
        ("null", "int | None", True),
        ("true", "Optional[bool]", True),
        ("8/255", "float | str", True),
        ("anything", "Norm", True),
        ("true", "int", False),
        ("", "int", False),
        ([1], "int", False),
        ("1e-3x", "Union[int, float]", False),
    ],
)
def test_a_value_is_refused_only_where_its_type_is_plain(value, annotation, fits) -> None:
    assert (misfit(value, annotation) == "") is fits


@pytest.mark.parametrize(
    "words",
    [
        ("paper_cifs", "fit", "--help"),
        ("common.evaluation", "--help"),
        ("common.cli.rows", "paper_cifs", "--plan"),
    ],
)
def test_a_reader_that_has_ended_is_no_error(words) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", *words], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_date_that_there_is_not_is_text() -> None:
    settings = drafted([CONFIGS / "base.yaml"], [("experiment", "2024-02-30")])
    assert settings["experiment"] == "2024-02-30"


def test_both_words_ask_for_the_help_on_everything() -> None:
    for word in ("-h", "--help"):
        assert checked(["fit", word, "all"], "paper_cifs", {}) == ["fit", "--help"]


def test_the_run_of_another_seed_has_no_checkpoint_of_this_one(tmp_path: Path) -> None:
    settings = {"ckpt_path": "last", "seed_everything": 1, "runs": str(tmp_path)}
    (tmp_path / "paper_cifs/a/seed10/checkpoints").mkdir(parents=True)
    (tmp_path / "paper_cifs/a/seed10/checkpoints/last.ckpt").touch()
    with pytest.raises(CheckpointError, match="train first"):
        check_checkpoint(settings, "paper_cifs", [Path("a.yaml")])
    (tmp_path / "paper_cifs/a/seed1-v1/checkpoints").mkdir(parents=True)
    (tmp_path / "paper_cifs/a/seed1-v1/checkpoints/last.ckpt").touch()
    check_checkpoint(settings, "paper_cifs", [Path("a.yaml")])
