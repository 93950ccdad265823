"""What is compared is comparable: the same images, and as many passes as are said."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import accuracy, overheads
from benchmarks.loops import Task, bare, candidate, in_channels_last, ours
from benchmarks.peak import Passes, counted
from benchmarks.peers import PEERS, available
from benchmarks.training import measured
from common.attacks.engine.network import AttackEngine
from common.attacks.pgd import FGSM, PGD
from common.callbacks.adversarial_training import AdversarialTraining
from common.classifier import RobustClassifier
from common.cli.trainer import Trainer
from common.data.images import ImageDataModule
from common.data.sources import Digits
from common.evaluation.suite import SuiteEntry
from common.networks.resnet import DigitsResNet
from common.objectives import ALP, AT, MART, TRADES


@pytest.fixture
def task() -> Task:
    net = DigitsResNet(in_channels=3)
    x, y = torch.rand(6, 3, 8, 8), torch.randint(10, (6,))
    net.train()(x)
    return Task(net.eval(), x, y)


def share_apart(images, wanted) -> float:
    return (images - wanted).abs().gt(1e-5).float().mean().item()


def test_a_training_step_is_eleven_passes_and_one_weight_gradient(task) -> None:
    for attack, gradients in (
        (bare(task), 1),
        (bare(task, by_backward=True), 11),
        *((ours(task, e), 1) for e in (None, AttackEngine(), AttackEngine(precision="bf16"))),
    ):
        step = candidate(task, attack)
        step.images()  # a new network is tried out once
        with counted(step.net) as passes:
            step()
        assert passes == Passes(11, 11, gradients)
        head = step.net.head.linear
        assert not head._forward_hooks
        assert not head.weight._backward_hooks


def test_images_are_those_of_the_bare_loop(task, monkeypatch) -> None:
    wanted = candidate(task, bare(task)).images()
    assert (wanted - task.x).abs().max() > 0.03
    there, missing = available(task)
    for name, build in {"ours": ours, "backward": partial(bare, by_backward=True), **there}.items():
        assert share_apart(candidate(task, build(task)).images(), wanted) < 0.01, name
    assert share_apart(candidate(task, ours(task, AttackEngine())).images(), wanted) < 0.03
    assert len(there) + len(missing) == len(PEERS)

    def refuse(name):
        raise ImportError(f"no {name} here")

    monkeypatch.setattr("benchmarks.peers.importlib.import_module", refuse)
    there, missing = available(task)
    assert not there
    assert missing["foolbox"] == "ImportError: no foolbox here"


def test_a_step_keeps_weights_and_leaves_gradients_and_momentum_alive(task) -> None:
    before = {name: value.clone() for name, value in task.net.state_dict().items()}
    step = candidate(task, ours(task, AttackEngine()))
    at_first = sum(tensor.numel() for tensor in step.alive())
    assert at_first == sum(value.numel() for value in before.values())
    step()
    assert all(torch.equal(v, before[name]) for name, v in task.net.state_dict().items())
    assert all(torch.equal(v, before[name]) for name, v in step.net.named_parameters())
    weights = sum(parameter.numel() for parameter in step.net.parameters())
    assert sum(tensor.numel() for tensor in step.alive()) == at_first + 2 * weights


def test_a_candidate_that_fails_or_needs_too_much_memory_stops_no_other(task) -> None:
    def greedy(_):
        def attack(*_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

        return attack

    def late(_):
        calls = []

        def attack(net, x, y):
            calls.append(1)
            if len(calls) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return x

        return attack

    def broken(_):
        raise AttributeError("no such option")

    what = replace(task, steps=1)
    builds = {"bare loop": bare, "greedy": greedy, "late": late, "broken": broken, "ours": ours}
    said = []
    rows, missing = measured({k: (what, v) for k, v in builds.items()}, 2, say=said.append)
    assert list(rows) == ["bare loop", "ours"]
    assert missing["greedy"] == missing["late"] == "out of memory"
    assert "no such option" in missing["broken"]
    assert rows["bare loop"]["ratio"] == 1.0
    assert rows["ours"]["passes"] == {"forward": 2, "backward": 2, "weight_gradient": 1}
    assert rows["ours"]["images_per_s"] > 0
    assert any("3 of 5" in line for line in said)
    rows, missing = measured({"greedy": (what, greedy), "ours": (what, ours)}, 1, say=said.append)
    assert "ratio" not in rows["ours"], "nothing to compare with"
    rows, missing = measured({"ours": (what, ours), "bare": (what, bare)}, 1, 0.0, said.append)
    assert list(rows) == ["ours"]
    assert set(missing) == {"bare"}


@pytest.mark.parametrize("numerics", ["fp32", "tf32", "bf16"])
def test_numerics_are_those_of_attack_and_update_alone(task, numerics) -> None:
    seen = []

    def attack(net, x, y):
        seen.append(torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32)
        seen.append(net(x).dtype)
        return x

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    candidate(in_channels_last(replace(task, numerics=numerics)), attack)()
    dtype = torch.bfloat16 if numerics == "bf16" else torch.float32
    assert seen == [numerics != "fp32", dtype]
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)


@pytest.mark.parametrize(
    ("objective", "expected", "engine"),
    [
        (AT(), Passes(4, 4, 1), None),
        (TRADES(), Passes(6, 5, 1), AttackEngine()),
        (MART(), Passes(5, 5, 1), None),
        (ALP(), Passes(5, 5, 1), AttackEngine()),
    ],
    ids=["AT", "TRADES, engine", "MART", "ALP, engine"],
)
def test_lightning_adds_no_pass(objective, expected, engine) -> None:
    """Three steps of attack, clean and adversarial images once each, clean logits before it."""
    module = RobustClassifier(DigitsResNet(), objective)
    data = ImageDataModule(Digits(), batch_size=20)

    def fit(steps: int) -> None:
        trainer = Trainer(
            max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0,
            callbacks=[AdversarialTraining(PGD(0.1, 0.05, 3), engine=engine)], accelerator="cpu",
            log_every_n_steps=0,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)

    fit(1)  # a new network is tried out once
    with counted(module.net) as passes:
        fit(2)
    twice = Passes(2 * expected.forward, 2 * expected.backward, 2 * expected.weight_gradient)
    twice.forward += 1  # two blank images before training
    assert passes == twice


def test_what_an_engine_does_to_robustness_is_measured_over_seeds(monkeypatch) -> None:
    monkeypatch.setattr(accuracy, "SUITE", {"fgsm": SuiteEntry(FGSM(accuracy.EPS))})
    monkeypatch.setattr(
        accuracy, "ENGINES", {"no engine": None, "bf16": AttackEngine(precision="bf16")}
    )
    kept: list[dict[str, Any]] = []
    accuracy.compare(seeds=1, epochs=1, keep=kept.append)
    (found,) = kept
    for name, row in found["rows"].items():
        assert row["worst"] == found["accuracies"][name][0]["worst"]
        assert 0.05 < row["worst"] < row["clean"] < 1.0
    base, reduced = found["accuracies"].values()
    assert base != reduced  # bf16 takes another path


def test_steps_of_the_trainer_and_bare_ones_are_timed_in_turns() -> None:
    found = overheads.lightning(batch=4, attack_steps=1, steps=3, is_small=True)
    assert found["steps"] == 3
    assert found["bare_cpu_s"] > 0
    assert 0 < found["lower"] <= found["ratio"] <= found["upper"]
