"""What the READMEs show works: their Python runs, their files and make targets exist."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from torch import nn

from common.results import front, tables
from common.results.markdown import is_current
from common.results.store import read_result

ROOT = Path(__file__).parents[1]
PAPERS = sorted(ROOT.glob("paper_*/README.md"))
COMMON = sorted(ROOT.glob("common/**/README.md"))
COMPARISON = ROOT / "benchmarks/robustness/README.md"
READMES = [ROOT / "README.md", ROOT / "benchmarks/README.md", COMPARISON, *COMMON, *PAPERS]


def python_blocks(readme: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("readme", ["README.md", "common/evaluation/README.md"])
def test_a_model_is_evaluated_as_a_readme_says(readme, tmp_path, monkeypatch, capsys) -> None:
    block = python_blocks(ROOT / readme)[0]
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


def test_the_callback_and_the_metric_run_in_a_stock_trainer_as_the_readme_says(
    tmp_path, monkeypatch, capsys
) -> None:
    block = python_blocks(ROOT / "common/evaluation/README.md")[1]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    x, y = torch.rand(12, 1, 8, 8), torch.arange(12) % 4
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5)
    names = {"net": net, "loader": loader}
    exec(block, names)
    assert "worst" in capsys.readouterr().out
    logged = names["trainer"].callback_metrics
    (filed,) = read_result(tmp_path / "results.json")["checkpoints"].values()
    assert filed["examples"] == 12
    assert (filed["epoch"], filed["global_step"]) == (0, 3)
    assert logged["test/worst"].item() == pytest.approx(filed["metrics"]["worst"])


def test_a_method_runs_in_another_model_as_the_front_page_says() -> None:
    _, block = python_blocks(ROOT / "README.md")
    torch.manual_seed(0)
    names = {
        "backbone": nn.Sequential(nn.Conv2d(3, 256, 3, stride=4), nn.ReLU()),
        "head": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)),
        "x_adv": torch.rand(4, 3, 8, 8),
        "y": torch.arange(4),
    }
    exec(block, names)
    names["loss"].backward()
    assert names["backbone"][0].weight.grad.abs().sum() > 0


def test_the_front_page_is_short_and_up_to_date(monkeypatch) -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    wanted = {}
    monkeypatch.setattr(
        front, "write_readme", lambda path, *parts: wanted.update({parts[1]: parts})
    )
    front.write_front(ROOT / "README.md")
    assert set(wanted) == {"<!-- summary -->", "<!-- coverage -->"}
    for markdown, begin, end in wanted.values():
        assert is_current(ROOT / "README.md", markdown, begin, end), begin


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


@pytest.mark.parametrize("readme", READMES, ids=lambda p: str(p.parent.relative_to(ROOT)))
def test_files_and_targets_a_readme_names_exist(readme) -> None:
    text = readme.read_text()
    targets = set(re.findall(r"(?:`|^    )make ([a-z][a-z-]*)", text, flags=re.MULTILINE))
    rules = (ROOT / "Makefile").read_text()
    for target in targets:
        family = f"# {target.partition('-')[0]}-NAME:"
        assert family in rules or re.search(rf"^{target}:", rules, flags=re.MULTILINE), target
    for path in re.findall(r"\b((?:common|paper_[a-z]+)/[\w./]+\.(?:py|yaml))\b", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([\w./]+)(?:#[\w-]+)?\)", text):
        assert (readme.parent / link).exists(), link


@pytest.mark.parametrize("readme", [*PAPERS, COMPARISON], ids=lambda path: path.parent.name)
def test_the_tables_of_a_paper_are_those_of_its_results(readme: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    package = ".".join(readme.parent.relative_to(ROOT).parts)
    assert tables.main([package, "--check"]) == 0, capsys.readouterr().out[-300:]


def test_the_citation_is_about_this_version_and_these_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"]
    cited = {re.search(r"paper_\w+", one["notes"])[0]: str(one) for one in citation["references"]}
    assert set(cited) == {readme.parent.name for readme in PAPERS}
    for package, reference in cited.items():
        text = " ".join((ROOT / package / "__init__.py").read_text().split())
        (arxiv,) = set(re.findall(r"\d{4}\.\d{5}\b", text))
        assert f"arxiv.org/abs/{arxiv}'" in reference
        assert re.search(r"'title': '(.*?)'", reference)[1] in text
