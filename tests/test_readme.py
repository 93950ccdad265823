"""What the READMEs show works: their Python runs, their files and make targets exist."""

import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from common.results import tables

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", *sorted(ROOT.glob("paper_*/README.md"))]


def python_blocks(readme: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)


def test_a_torchvision_model_is_evaluated_as_the_front_page_says(
    tmp_path, monkeypatch, capsys
) -> None:
    block = python_blocks(ROOT / "README.md")[0]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10)
    torch.save(net.state_dict(), "weights.pt")
    data = torch.utils.data.TensorDataset(torch.rand(4, 3, 32, 32), torch.arange(4))
    exec(block.replace("audit=True, ", ""), {"dataset": data})
    printed = capsys.readouterr().out
    assert "worst" in printed
    assert "95 % interval" in printed
    assert (tmp_path / "evaluation" / "results.json").is_file()


def test_the_python_of_the_front_page_runs(capsys, monkeypatch) -> None:
    blocks = python_blocks(ROOT / "README.md")
    assert len(blocks) == 4
    monkeypatch.chdir(ROOT)
    names = {}
    exec(blocks[1], names)
    assert len(names["survivors"]) == len(names["images"]) == 100
    blocks = blocks[2:]
    torch.manual_seed(0)
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    names = {
        "backbone": nn.Sequential(nn.Conv2d(3, 256, 3, stride=4), nn.ReLU()),
        "head": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)),
        "x_adv": x,
        "y": y,
    }
    exec(blocks[0], names)
    names["loss"].backward()
    assert names["backbone"][0].weight.grad.abs().sum() > 0

    names = {"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), "x": x, "y": y}
    names["y"] = names["model"](x).argmax(1)
    exec(blocks[1].replace('AutoAttack(eps="8/255")', "AutoAttack('8/255', steps=2)"), names)
    assert "PGD-20" in capsys.readouterr().out


def test_a_torchvision_network_takes_a_weight_map_in_one_line() -> None:
    (block,) = python_blocks(ROOT / "paper_wm/README.md")
    names = {}
    with torch.device("meta"):
        exec(block, names)
        logits = names["net"](torch.empty(2, 3, 224, 224))
    assert logits.shape == (2, 10)
    keys = set(names["net"].state_dict()) - set(torchvision.models.resnet18().state_dict())
    assert keys == {"conv1.weight_map.map"}
    assert names["net"].conv1.weight_map.map.shape == (64, 112, 112)


@pytest.mark.parametrize("readme", READMES, ids=lambda p: p.parent.name)
def test_files_and_targets_a_readme_names_exist(readme) -> None:
    text = readme.read_text()
    targets = set(re.findall(r"(?:`|^    )make ([a-z][a-z-]*)", text, flags=re.MULTILINE))
    rules = (ROOT / "Makefile").read_text()
    for target in targets:
        is_row = target.startswith("reproduce-")
        assert is_row or re.search(rf"^{target}:", rules, flags=re.MULTILINE), target
    for path in re.findall(r"\b((?:common|paper_[a-z]+)/[\w./]+\.(?:py|yaml))\b", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([\w./]+)\)", text):
        assert (readme.parent / link).exists(), link


@pytest.mark.parametrize("readme", READMES[1:], ids=lambda path: path.parent.name)
def test_the_tables_of_a_paper_are_those_of_its_results(readme: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert tables.main([readme.parent.name, "--check"]) == 0, capsys.readouterr().out[-300:]
