"""Models by name, claims about them, and networks of ours for others."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from common.attacks.pgd import FGSM
from common.errors import UserError
from common.evaluation import SuiteEntry, evaluate
from common.evaluation.__main__ import main
from common.evaluation.claims import read_claim
from common.evaluation.models import load_run
from common.evaluation.named_models import find_model
from common.results.lines import Threat

MEAN, STD = [0.5, 0.25, 0.125], [0.5, 0.25, 2.0]
X = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
STANDARDISED = (X - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class Sums(nn.Module):
    """Sums of each channel as scores; ``pack`` puts them into an object."""

    def __init__(self, pack: Any = None) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": tuple(MEAN), "std": tuple(STD), "input_size": (3, 8, 8)}
        self.pack = pack or (lambda scores: scores)

    def forward(self, x: torch.Tensor) -> Any:
        return self.pack(x.sum((2, 3)))


@pytest.fixture
def asked(monkeypatch) -> list[dict[str, Any]]:
    """What the collections, which are not installed, are asked for."""
    calls: list[dict[str, Any]] = []

    def made(net: nn.Module) -> Any:
        def make(model_name: str, **given: Any) -> nn.Module:
            calls.append({"model_name": model_name, **given})
            if model_name == "unknown":
                raise KeyError(model_name)
            return net

        return make

    # Bytes are multiplied by 2 / 255, 1 is subtracted, and std divides twice.
    pixels: dict[str, Any] = {"rescale_factor": 2 / 255, "rescale_offset": True}
    pixels |= {"include_top": True, "image_std": [(2 * s) ** 0.5 for s in STD]}
    pixels |= {"image_mean": [2 * m - 1 for m in MEAN]}
    packed = Sums(lambda scores: SimpleNamespace(logits=scores))
    transformers = SimpleNamespace(
        AutoModelForImageClassification=SimpleNamespace(from_pretrained=made(packed)),
        AutoImageProcessor=SimpleNamespace(from_pretrained=lambda _: SimpleNamespace(**pixels)),
    )
    for name, module in (
        ("robustbench", SimpleNamespace()),
        ("robustbench.utils", SimpleNamespace(load_model=made(Sums()))),
        ("timm", SimpleNamespace(create_model=made(Sums()))),
        ("transformers", transformers),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.mark.parametrize(
    ("name", "arguments", "call", "expected"),
    [
        ("robustbench:Standard", {}, {}, X),
        (
            "robustbench:cifar100/L2/Standard",
            {"model_dir": "zoo"},
            {"dataset": "cifar100", "threat_model": "L2", "model_dir": "zoo"},
            X,
        ),
        ("timm:Standard", {}, {"pretrained": True}, STANDARDISED),
        ("timm:Standard", {"pretrained": False}, {"pretrained": False}, STANDARDISED),
        ("hf:Standard", {}, {}, STANDARDISED),
    ],
)
def test_collections_give_logits_of_pixels(asked, name, arguments, call, expected) -> None:
    model, data = find_model(name, arguments)
    assert asked == [{"model_name": "Standard", **call}]
    assert data is None
    assert not model.training
    torch.testing.assert_close(model(X), expected.sum((2, 3)), rtol=1e-4, atol=1e-4)


def test_torchvision_brings_its_weights_and_normalisation(monkeypatch) -> None:
    torch.manual_seed(0)
    net = torchvision.models.shufflenet_v2_x0_5().eval()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *_, **__: net.state_dict()
    )
    name = "shufflenet_v2_x0_5"
    preset = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT.transforms()
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (preset.mean, preset.std))
    with torch.no_grad():
        torch.testing.assert_close(find_model(f"torchvision:{name}")[0](X), net((X - mean) / std))
    bare, _ = find_model(f"torchvision:{name}", {"weights": None, "num_classes": 4})
    assert bare(X).shape == (3, 4)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("robustbench:unknown", "unknown"),
        ("robustbench:model_info/cifar10/Linf/Standard", "model_info"),
        ("torchvision:squeezenet1_1", "no route to host"),
        ("torchvision:resnet1", "resnet1"),
        ("runs/nowhere", "runs/nowhere"),
        (".", "config.yaml"),
        ("paper_cifs:digits_resnet_cifs-seed3", "make reproduce-cifs"),
        ("paper_cifs:digits", "paper_cifs:digits"),
    ],
)
def test_models_that_are_not_there_are_one_line(
    asked, no_network, tmp_path, monkeypatch, name, named
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", urllib.request.urlopen)
    with pytest.raises(UserError) as caught:
        evaluate(name, (X, torch.zeros(3, dtype=torch.int64)))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zoo", ["robustbench", "timm", "hf"])
def test_a_missing_package_is_one_line(monkeypatch, capsys, zoo) -> None:
    package = {"hf": "transformers"}.get(zoo, zoo)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["--model", f"{zoo}:Standard"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"pip install {package}" in line or f"{package}.git" in line.lower()


def test_a_claim_is_compared(linear, data, tmp_path) -> None:
    x, y = data
    model, eps = linear().eval(), 0.1
    robust = model.exact(x, y, eps).float().mean().item()
    path = tmp_path / "claim.json"
    claim: dict[str, Any] = {"clean_acc": "100.00", "reported": "99.5", "eps": "1/10"}
    path.write_text(json.dumps(claim | {"autoattack_acc": f"{100 * robust:.2f}"}))
    given: dict[str, Any] = {"eps": eps, "progress": False, "claim": path}
    suite = {"fgsm": SuiteEntry(FGSM(eps))}
    found = evaluate(model, data, suite, **given)
    compared = {one.name: one for one in found.comparisons}
    assert {name: one.is_inside for name, one in compared.items()} == {
        **{"clean_acc": True, "reported": False, "autoattack_acc": True}
    }
    assert compared["reported"].difference == pytest.approx(robust - 0.995, abs=0.02)
    assert f"{100 * (found.robust_acc - 0.995):+.2f}" in str(found)
    for wrong, named in (
        ({"eps": "8/255"}, "8/255"),
        ({"threat_model": "L2"}, "l2"),
        ({"clean_acc": "0.9x"}, "0.9x"),
        ({"reported": 101}, "101"),
        ({"reported": True}, "True"),
    ):
        path.write_text(json.dumps(claim | wrong))
        with pytest.raises(UserError, match=named):
            evaluate(model, data, suite, **given)
    path.write_text("[]")
    with pytest.raises(UserError, match=str(path)):
        evaluate(model, data, suite, **given)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"clean_acc": "94.78", "reported": "0.0", "autoattack_acc": "0.28"}, (94.78, 0, 0.28)),
        ({"clean_acc": " 91.5 %", "reported": "Unknown", "autoattack_acc": None}, (91.5,)),
        ({"clean_acc": 0.5538, "reported": 58, "eps": 8 / 255, "external": "N/A"}, (55.38, 58)),
        ({"clean_acc": "90", "reported": "80.1", "corruptions_acc": "80.1"}, (90, 80.1)),
    ],
    ids=["percent", "signs", "shares", "corruptions"],
)
def test_claims_as_robustbench_writes_them(tmp_path, found, expected) -> None:
    path = tmp_path / "model_info.json"
    rest = {"eps": "8/255", "additional_data": False, "architecture": None, "footnote": "50 %"}
    path.write_text(json.dumps(rest | found))
    claim = read_claim(path, Threat("linf", "8/255"))
    assert [100 * share for share in claim.values()] == pytest.approx(expected)
    assert ("reported" in claim) == ("corruptions_acc" not in found and len(expected) > 1)


def test_a_run_by_name_and_exported(tiny, capsys, monkeypatch, tmp_path) -> None:
    tiny.done("reproduce")
    images = torch.rand(4, 1, 8, 8)
    logits = load_run(tiny.run)[0](images)
    package = tmp_path / "somewhere" / "paper_tiny" / "configs"
    package.mkdir(parents=True)
    (package / "tiny.yaml").write_text(tiny.text)
    (package.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(package.parents[1]))
    assert torch.equal(find_model("paper_tiny:tiny")[0](images), logits)

    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert main(["export", str(tiny.run), "given"]) == 0
    assert len([line for line in Path("given/loader.py").read_text().splitlines() if line]) <= 11
    measured = tiny.result()["checkpoints"]["last"]["metrics"]
    claim = json.loads(Path("given/claim.json").read_text())
    assert float(claim["reported"]) == pytest.approx(100 * measured["worst"], abs=0.01)
    assert (claim["eps"], claim["dataset"], claim["threat_model"]) == ("0.1", "digits", "Linf")
    assert claim["reported"] in Path("given/README.md").read_text()
    monkeypatch.syspath_prepend("given")
    model, _ = find_model("loader:load_model")
    assert torch.equal(model(images), logits)

    capsys.readouterr()
    suite = "evaluation: {suite: {a: {attack: {class_path: common.attacks.pgd.FGSM, init_args: "
    Path("suite.yaml").write_text(suite + "{eps: threat}}}}}")
    options = ["--eps", "0.1", "--suite", "suite.yaml", "--device", "cpu"]
    options += ["--examples", "20"]
    for given in ([str(tiny.run)], ["loader:load_model", "--data", "given/data.yaml"]):
        assert main(["--model", *given, *options, "--claim", "given/claim.json"]) == 0
        assert capsys.readouterr().out.count(" inside ") == 2
    assert main(["--model", str(tiny.run), "--data_root", "somewhere"]) == 2
    assert "somewhere" in capsys.readouterr().err
    assert main(["export", str(tiny.run), "given"]) == 2
    assert "given" in capsys.readouterr().err
    del sys.modules["loader"]


@pytest.mark.slow
def test_an_export_in_another_process(tiny, tmp_path) -> None:
    tiny.done("reproduce")
    assert main(["export", str(tiny.run), "given"]) == 0
    assert Path("given/weights.safetensors").is_file()
    torch.manual_seed(0)
    torch.save(torch.rand(4, 1, 8, 8), "images.pt")
    code = (
        "import torch\nfrom loader import load_model\n"
        "torch.save(load_model()(torch.load('images.pt')), 'logits.pt')"
    )
    paths = [str(tmp_path / "given"), str(Path(__file__).parents[3])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    expected = load_run(tiny.run)[0](torch.load("images.pt"))
    assert torch.equal(torch.load("logits.pt"), expected)
