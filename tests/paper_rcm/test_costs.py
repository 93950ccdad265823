"""E4: the base of every network, and costs that are measured once."""

import pytest
import torch

from common.analysis.profiling import Ratio
from common.errors import ConfigurationError
from paper_rcm import costs
from paper_rcm.costs import CONFIGS, DATA, base_section, count, main, make, net_section


@pytest.mark.parametrize(
    ("stem", "base"),
    [
        ("cifar10_resnet18_1222_m3bilinear_at", "cifar10_resnet18_1222_at"),
        ("cifar10_alexnet_1112_at", "cifar10_alexnet_1122_at"),
        ("cifar10_vgg16_11222_m2_at", "cifar10_vgg16_11222_at"),
        ("cifar10_vittiny_m2_at", "cifar10_vittiny_at"),
        ("cifar100_resnet18_1122_dajat", "cifar100_resnet18_1222_dajat"),
        ("digits_112_max", "digits_222_avg"),
    ],
)
def test_the_base_of_a_network_is_that_of_its_table(stem: str, base: str) -> None:
    own, expected = (net_section(CONFIGS / f"{name}.yaml") for name in (stem, base))
    sections, shape = (base_section(own), expected), DATA[stem.partition("_")[0]][0]
    with torch.device("meta"):
        nets = [make(one) for one in sections]
    assert nets[0].arch.head.linear.out_features == DATA[stem.partition("_")[0]][1]
    first, second = ({n: p.shape for n, p in net.state_dict().items()} for net in nets)
    assert first == second
    assert count(sections[0], shape) == count(sections[1], shape)


def test_networks_are_measured_once_and_the_base_is_one(tmp_path, monkeypatch, capsys) -> None:
    timed = []

    def fake(steps, base, rounds, warm_up, device):
        timed.append(set(steps))
        return {"base": Ratio(1.0, 1.0, 1.0), "this": Ratio(1.5, 1.25, 1.75)}

    monkeypatch.setattr(costs, "relative_times", fake)
    monkeypatch.setattr(costs, "peak_memory", lambda build, shape, batch: 3 * batch)
    (tmp_path / "configs").mkdir()
    for stem in ("digits_122_avg", "digits_222_avg", "digits_222_m2_avg"):
        (tmp_path / "configs" / f"{stem}.yaml").write_bytes((CONFIGS / f"{stem}.yaml").read_bytes())
    monkeypatch.setattr(costs, "CONFIGS", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "runs/paper_rcm/results"
    main(["--batch_size", "4"])
    printed = capsys.readouterr().out.replace("\n", "")
    assert "digits_cost.png" in printed
    assert "digits_122_avg: step time x 1.50" in printed
    assert len(timed) == 2, "the base is not timed against itself"
    found = costs.read_costs(results)
    assert found["digits_222_avg"]["step_time"] == 1.0
    of = found["digits_122_avg"]
    assert (of["step_time"], of["parameters"], of["macs"]) == (1.5, 19810, 193344)
    assert [one["map_side"] for one in found.values()] == [2, 1, 2]
    assert {one["peak_memory"] for one in found.values()} == {3 * 128}
    main(["--batch_size", "4"])
    assert (costs.read_costs(results), len(timed)) == (found, 2)
    main(["--batch_size", "8", "--on", "digits_122"])
    assert len(timed) == 3, "another batch size is another measurement"
    with pytest.raises(ConfigurationError, match="'x'"):
        main(["--on", "x"])


@pytest.mark.parametrize("name", ["imagenet_x.yaml", "digits_x.yaml"])
def test_mistakes_are_named(tmp_path, name) -> None:
    other = tmp_path / name
    other.write_text("model: {init_args: {net: {class_path: a}}}")
    with pytest.raises(ConfigurationError, match=f"{name}.*digits.*EnlargedNetwork"):
        net_section(other)
