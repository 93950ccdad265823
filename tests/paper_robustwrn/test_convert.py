"""Official files, written by an independent model with the official names, read by our network."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from common.checkpoints import load_checkpoint
from common.classifier import RobustClassifier
from common.errors import CheckpointError, ConfigurationError, UserError
from common.objectives import AT
from paper_robustwrn.convert import convert, main, recover, rename
from paper_robustwrn.method import RobustWideResNet, count_parameters

ROOT = Path(__file__).parents[2]


def conv(a: int, b: int, side: int, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    return nn.Conv2d(a, b, side, stride, padding, bias=False)


class OfficialBlock(nn.Module):
    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(a), conv(a, b, 3, stride, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(b), conv(b, b, 3, 1, 1)
        self.widens = a != b
        if self.widens or stride == 2:
            self.convShortcut = conv(a, b, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn1(x))
        h = self.conv2(F.relu(self.bn2(self.conv1(a))))
        if not hasattr(self, "convShortcut"):
            return x + h
        return h + self.convShortcut(a if self.widens else x)


class OfficialStage(nn.Module):
    def __init__(self, depth: int, a: int, b: int, stride: int) -> None:
        super().__init__()
        rest = [OfficialBlock(b, b, 1) for _ in range(depth - 1)]
        self.layer = nn.Sequential(OfficialBlock(a, b, stride), *rest)


class Official(nn.Module):
    """The network under the official names, with weights from a formula."""

    def __init__(
        self,
        depths=(2, 1, 2),
        channels=(4, 6, 6, 5),
        strides=(1, 2, 2),
        k=10,
        c=3,
        large=False,
        stem_stride=1,
    ) -> None:
        super().__init__()
        self.stem_conv: nn.Module = conv(c, channels[0], 3, stem_stride, 1)
        if large:
            pool = nn.MaxPool2d(3, 2, 1)
            stem = (conv(c, channels[0], 7, 2, 3), nn.BatchNorm2d(channels[0]), nn.ReLU(), pool)
            self.stem_conv = nn.Sequential(*stem)
        pairs = zip(depths, channels, channels[1:], strides, strict=False)
        self.blocks = nn.ModuleList(OfficialStage(*stage) for stage in pairs)
        self.bn1 = nn.BatchNorm2d(channels[-1])
        self.fc = nn.Linear(channels[-1], k)
        for number, (name, tensor) in enumerate(self.state_dict().items()):
            if tensor.is_floating_point():
                wave = torch.sin(torch.arange(tensor.numel()) * 0.7 + number).view_as(tensor)
                tensor.copy_(1 + 0.3 * wave if name.endswith("running_var") else 0.5 * wave)
            else:
                tensor.fill_(number)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_conv(x)
        for stage in self.blocks:
            x = stage.layer(x)
        return self.fc(F.adaptive_avg_pool2d(F.relu(self.bn1(x)), 1).flatten(1))


def official_file(model: nn.Module) -> dict[str, object]:
    """What the official code saves, the flop counter's leftovers and numpy's numbers included."""
    state = dict(model.state_dict())
    state |= {"total_ops": torch.zeros(1), "blocks.0.layer.total_params": torch.zeros(1)}
    environment = {
        "global_step": 39_000,
        "best_pgd_acc": np.float64(52.5),
        "pgd_eval_history": [(50, np.float32(50.5)), (51, 51.0)],
        "stable_acc_history": [np.int64(3)],
    }
    optimizer = torch.optim.SGD(model.parameters(), 0.1).state_dict()
    names = ("model_state_dict", "optimizer_state_dict", "ENV", "genotype", "epoch")
    return dict(zip(names, (state, optimizer, environment, None, 99), strict=True))


@pytest.fixture
def source(tmp_path) -> Path:
    torch.save(official_file(Official()), tmp_path / "official.pth")
    return tmp_path / "official.pth"


def converted_net(target: Path) -> RobustWideResNet:
    """The network that the YAML file describes, with the checkpoint's weights."""
    section = yaml.safe_load(target.with_suffix(".yaml").read_text())["model"]["init_args"]["net"]
    assert section["class_path"] == "paper_robustwrn.method.RobustWideResNet"
    module = RobustClassifier(RobustWideResNet(**section["init_args"]), AT())
    checkpoint = load_checkpoint(target)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return module.net.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"channels": (4, 4, 4, 6)},  # 4 -> 4 without a stride, 4 -> 4 with one
        {"channels": (4, 5, 5, 5), "strides": (1, 2, 1)},  # without, where 2 is usual
        {"channels": (5, 5, 6, 4), "strides": (2, 2, 2)},
        {"depths": (1, 1, 2, 1), "channels": (3, 4, 4, 6, 5), "strides": (1, 2, 2, 2)},
        {"k": 100, "c": 1},
        {"large": True},
    ],
)
def test_logits_are_those_of_the_official_network(tmp_path, settings):
    model = Official(**settings).eval()
    torch.save(official_file(model), tmp_path / "official.pth")
    target = tmp_path / "out.ckpt"
    found = convert(tmp_path / "official.pth", target)
    assert found["strides"] == list(settings.get("strides", (1, 2, 2)))
    net = converted_net(target)
    x = torch.rand(4, settings.get("c", 3), 16, 16)
    expected = model(x)
    assert expected.std() > 1e-3
    assert torch.allclose(net(x), expected, atol=1e-6)
    assert len(net.state_dict()) == len(model.state_dict())


@pytest.mark.parametrize(("wrapper", "prefix"), [("", "module."), ("state_dict", "")])
def test_published_copies_are_read_too(tmp_path, wrapper, prefix):
    model = Official().eval()
    state = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "official.pth")
    convert(tmp_path / "official.pth", tmp_path / "out.ckpt")
    converted = converted_net(tmp_path / "out.ckpt").state_dict()
    assert torch.equal(converted["head.linear.weight"], model.fc.weight)
    assert load_checkpoint(tmp_path / "out.ckpt")["epoch"] == (3 if wrapper else 0)


def test_the_full_size_network_is_recovered(tmp_path):
    """WRN-34-R by its shapes alone."""
    with torch.device("meta"):
        names = Official((5, 5, 5), (16, 320, 640, 512)).state_dict()
    assert len(names) == 191
    found = recover(names, "official.pth")
    assert (found["depths"], found["channels"]) == ([5, 5, 5], [16, 320, 640, 512])
    assert (found["strides"], found["num_classes"], found["in_channels"]) == ([1, 2, 2], 10, 3)
    assert len(rename(names, found, "official.pth")) == 191


@pytest.mark.parametrize(("stem_stride", "strides"), [(1, (1, 1, 2)), (3, (1, 2, 2))])
def test_strides_that_the_file_does_not_tell_are_given(tmp_path, capsys, stem_stride, strides):
    model = Official(channels=(4, 5, 6, 7), strides=strides, stem_stride=stem_stride).eval()
    torch.save(official_file(model), tmp_path / "official.pth")
    x = torch.rand(3, 3, 16, 16)
    torch.save({"x": x, "logits": model(x).detach()}, tmp_path / "logits.pt")
    arguments = [str(tmp_path / name) for name in ("official.pth", "out.ckpt")]
    arguments += ["--check", str(tmp_path / "logits.pt")]
    with pytest.raises(CheckpointError, match=r"strides \[1, 2, 2\] and stem stride 1"):
        main(arguments)
    assert not (tmp_path / "out.ckpt").exists()
    told = ["--stem_stride", str(stem_stride), "--strides", *map(str, strides)]
    main([*arguments, *told])
    assert f"stem stride {stem_stride}" in capsys.readouterr().out
    assert torch.allclose(converted_net(tmp_path / "out.ckpt")(x), model(x), atol=1e-6)


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"x": torch.rand(2, 3, 8, 8)}, "it needs x, images"),
        ({"x": torch.rand(2, 1, 8, 8), "logits": torch.rand(2, 10)}, "cannot be checked"),
        ({"x": torch.rand(2, 3, 8, 8), "logits": torch.rand(2, 9)}, "cannot be checked"),
        ({"x": torch.rand(2, 3, 8, 8), "logits": torch.full((2, 10), torch.nan)}, "gives other"),
        ({"x": torch.rand(0, 3, 8, 8), "logits": torch.rand(0, 10)}, "gives other"),
    ],
)
def test_stated_logits_that_say_nothing_are_refused(source, tmp_path, stated, message):
    torch.save(stated, tmp_path / "logits.pt")
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out.ckpt", stated=tmp_path / "logits.pt")


# ----------------------------------------------------------------------- what comes out is used


@pytest.mark.parametrize(("k", "data"), [(10, "cifar10"), (100, "cifar100"), (7, None)])
def test_the_data_follow_from_the_number_of_classes(tmp_path, k, data):
    torch.save(Official(k=k).state_dict(), tmp_path / "official.pth")
    convert(tmp_path / "official.pth", tmp_path / "out.ckpt")
    text = (tmp_path / "out.yaml").read_text()
    assert text.startswith("# Converted from 'official.pth'")
    section = yaml.safe_load(text).get("data")
    if data is None:
        assert section is None
    else:
        assert Path(section) == ROOT / "common" / "configs" / f"{data}.yaml"


def test_the_file_is_evaluated_in_two_commands(source, tmp_path, fake_cifar10, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["paper_robustwrn", *map(str, arguments)])
        runpy.run_module("paper_robustwrn", run_name="__main__")

    before = set(tmp_path.iterdir())
    command("convert", "official.pth", "out.ckpt")
    assert {path.name for path in {*tmp_path.iterdir()} - before} == {"out.ckpt", "out.yaml"}
    printed = capsys.readouterr().out
    assert "depths [2, 1, 2], channels [4, 6, 6, 5]" in printed
    assert "--ckpt_path out.ckpt" in printed
    attack = {"class_path": "common.attacks.pgd.FGSM", "init_args": {"eps": "8/255"}}
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    suite = {
        "evaluation": {"suite": {"fgsm": {"attack": attack}}, "results": "results.json"},
        "trainer": {**quiet, "enable_model_summary": False},
    }
    Path("suite.yaml").write_text(yaml.safe_dump(suite))
    options = ("--ckpt_path", "out.ckpt", "--data.source.root", fake_cifar10)
    command("test", "--config", "suite.yaml", "--config", "out.yaml", *options)
    result = yaml.safe_load(Path("results.json").read_text())
    entry = result["checkpoints"]["out"]
    assert (entry["epoch"], entry["global_step"], entry["examples"]) == (99, 39_000, 20)
    assert set(entry["attacks"]) == {"fgsm/ce_f"}
    assert entry["metrics"]["parameters"] == count_parameters((2, 1, 2), (4, 6, 6, 5))


# --------------------------------------------------------------------------- what is refused


def flat(state: dict) -> object:
    return state | {"stem_conv.weight": torch.zeros(5)}


def gap(state: dict) -> object:
    return {k.replace("blocks.1", "blocks.7"): v for k, v in state.items()}


def without(name: str):
    return lambda state: {key: value for key, value in state.items() if key != name}


OTHER = {"conv1.weight": torch.zeros(4, 3, 3, 3), "fc.weight": torch.zeros(10, 4)}
UNKNOWN = {"blocks.1.layer.0.relu1.weight": torch.zeros(1)}
MISSHAPEN = {"blocks.2.layer.1.conv1.weight": torch.zeros(5, 4, 3, 3)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: OTHER, "lacks stem_conv.weight .* first entries: conv1.weight"),
        (without("fc.weight"), "lacks fc.weight"),
        (without("blocks.1.layer.0.bn2.bias"), r"1 missing .*blocks.1.layer.0.bn2.bias"),
        (lambda state: state | UNKNOWN, r"1 unknown .*blocks.1.layer.0.relu1.weight"),
        (lambda state: state | MISSHAPEN, r"conv1.weight is \(5, 4, 3, 3\), .*\(5, 5, 3, 3\)"),
        (flat, r"have shapes \(5,\)"),
        (gap, r"stages \[0, 2, 7\]"),
        (without("blocks.2.layer.0.convShortcut.weight"), "missing .*0.convShortcut"),
        (lambda state: [1, 2], "no state dict"),
        (lambda state: {"a": 1}, "no state dict"),
        (lambda state: {}, "first entries: nothing"),
    ],
)
def test_files_that_are_not_official_are_refused(tmp_path, damage, message):
    torch.save(damage(dict(Official().state_dict())), tmp_path / "official.pth")
    target = tmp_path / "out.ckpt"
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "official.pth", target)
    assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pth", "out.ckpt"], "nowhere.pth does not exist"),
        (["official.pth", "out.pth"], "is a .ckpt file, got out.pth"),
        (["official.pth", "out.ckpt", "--strides", "1", "0", "2"], "at least 1"),
        (["official.pth", "out.ckpt", "--stem_stride", "0"], "stem_stride"),
        (["official.pth", "out.ckpt", "--strides", "1", "2"], "3 stages"),
        (["official.pth", "official.pth/out.ckpt"], "cannot write"),
    ],
)
def test_wrong_arguments_are_refused(source, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_other_files_are_never_overwritten(source, tmp_path):
    path = tmp_path / "official.ckpt"
    path.write_bytes(source.read_bytes())
    with pytest.raises(ConfigurationError, match="official file itself"):
        convert(path, path)
    (tmp_path / "out.yaml").write_text("model: {}")
    with pytest.raises(ConfigurationError, match=r"out\.yaml is there"):
        convert(source, tmp_path / "out.ckpt")
