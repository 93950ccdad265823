"""E4: the base of every network, and costs that are measured once."""

from pathlib import Path

import pytest
import torch

from common.analysis.profiling import Ratio
from common.errors import ConfigurationError
from paper_rcm import costs
from paper_rcm.costs import base_section, count, data_of, digest, make, measure_costs, net_section

CONFIGS = Path(__file__).parents[2] / "paper_rcm" / "configs"


def section(stem: str) -> dict:
    return net_section(CONFIGS / f"{stem}.yaml")


@pytest.mark.parametrize(
    ("stem", "base"),
    [
        ("cifar10_resnet18_1122_at", "cifar10_resnet18_1222_at"),
        ("cifar10_resnet18_1222_m3bilinear_at", "cifar10_resnet18_1222_at"),
        ("cifar10_alexnet_1112_at", "cifar10_alexnet_1122_at"),
        ("cifar10_vgg16_11222_m2_at", "cifar10_vgg16_11222_at"),
        ("cifar10_vittiny_m2_at", "cifar10_vittiny_at"),
        ("cifar100_resnet18_1122_dajat", "cifar100_resnet18_1222_dajat"),
        ("digits_112_max", "digits_222_avg"),
    ],
)
def test_the_base_of_a_network_is_that_of_its_table(stem: str, base: str) -> None:
    sections = (base_section(section(stem)), section(base))
    with torch.device("meta"):
        shapes = [{n: p.shape for n, p in make(one).state_dict().items()} for one in sections]
    assert shapes[0] == shapes[1]
    sizes = [count(one, data_of(stem)[0]) for one in sections]
    assert sizes[0] == sizes[1]


def test_classes_follow_the_data() -> None:
    with torch.device("meta"):
        net = make(section("cifar100_resnet18_1222_at"))
    assert net.arch.head.linear.out_features == 100


def test_networks_are_measured_once_and_the_base_is_one(tmp_path, monkeypatch) -> None:
    timed = []

    def fake(steps, base, rounds, warm_up, device):
        timed.append(set(steps))
        return {"base": Ratio(1.0, 1.0, 1.0), "this": Ratio(1.5, 1.25, 1.75)}

    monkeypatch.setattr(costs, "relative_times", fake)
    stems = ("digits_122_avg", "digits_222_avg", "digits_222_m2_avg")
    paths = [CONFIGS / f"{stem}.yaml" for stem in stems]
    found = measure_costs(paths, tmp_path, batch_size=4)
    assert len(timed) == 2, "the base is not timed against itself"
    assert found["digits_222_avg"]["metrics"]["step_time"] == 1.0
    of = found["digits_122_avg"]["metrics"]
    assert (of["step_time"], of["parameters"], of["macs"], of["map_side"]) == (
        1.5,
        19810,
        193344,
        2,
    )
    memory = [found[stem]["metrics"]["peak_memory"] for stem in stems]
    assert memory[1] < memory[0] < memory[2]
    again = measure_costs(paths, tmp_path, batch_size=4)
    assert (again, len(timed)) == (found, 2)
    assert [path.name for path in costs.draw(found, tmp_path)] == ["digits_cost.png"]
    measure_costs(paths[:1], tmp_path, batch_size=8)
    assert len(timed) == 3, "another batch size is another measurement"


def test_mistakes_are_named(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="'imagenet_x' begins with none of digits"):
        data_of("imagenet_x")
    other = tmp_path / "digits_x.yaml"
    other.write_text("model: {init_args: {net: {class_path: a}}}")
    with pytest.raises(ConfigurationError, match="has to be an EnlargedNetwork"):
        net_section(other)


def test_the_digest_knows_no_order() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
