"""What is compared is comparable: the same images, and as many passes as are said."""

import pytest
import torch

from benchmarks import accuracy, overheads
from benchmarks.loops import Task, bare, by_backward, candidate, one_graph, ours
from benchmarks.passes import Passes, counted
from benchmarks.peers import PEERS, available
from common.attacks.engine.network import AttackEngine
from common.attacks.pgd import FGSM
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


def passes_of(step) -> Passes:
    with counted(step.net) as passes:
        step()
    return passes


@pytest.mark.parametrize("engine", [None, AttackEngine(), AttackEngine(precision="bf16")])
def test_a_training_step_is_eleven_passes_and_one_weight_gradient(task, engine) -> None:
    step = candidate(task, ours(task, engine))
    step.images()  # a new network is tried out once
    assert passes_of(step) == passes_of(candidate(task, bare(task))) == Passes(11, 11, 1)


def test_backward_in_the_attack_is_seen_for_what_it_is(task) -> None:
    assert passes_of(candidate(task, by_backward(task))) == Passes(11, 11, 11)


def test_counting_leaves_nothing_behind(task) -> None:
    head = task.net.head.linear
    with counted(task.net):
        task.net(task.x)
    assert not head._forward_hooks
    assert not head.weight._backward_hooks


def test_images_are_those_of_the_bare_loop(task) -> None:
    wanted = candidate(task, bare(task)).images()
    assert (wanted - task.x).abs().max() > 0.03
    there, missing = available(task)
    attacks = {"ours": ours(task), "backward": by_backward(task), **there}
    for name, attack in attacks.items():
        found = candidate(task, attack).images()
        assert (found - wanted).abs().gt(1e-5).float().mean() < 0.01, name
    folded = candidate(task, ours(task, AttackEngine())).images()
    assert (folded - wanted).abs().gt(1e-5).float().mean() < 0.03
    assert len(there) + len(missing) == len(PEERS)


def test_a_missing_peer_says_why(task, monkeypatch) -> None:
    def refuse(name):
        raise ImportError(f"no {name} here")

    monkeypatch.setattr("benchmarks.peers.importlib.import_module", refuse)
    there, missing = available(task)
    assert not there
    assert missing["foolbox"] == "ImportError: no foolbox here"


def test_candidates_leave_the_task_alone_and_keep_their_weights(task) -> None:
    before = {name: value.clone() for name, value in task.net.state_dict().items()}
    step = candidate(task, ours(task, AttackEngine()))
    step()
    for name, value in task.net.state_dict().items():
        assert torch.equal(value, before[name])
    for one, other in zip(step.net.parameters(), task.net.parameters(), strict=True):
        assert torch.equal(one, other)


def test_between_steps_weights_gradients_and_momentum_are_alive(task) -> None:
    step = candidate(task, ours(task))
    at_first = sum(tensor.numel() for tensor in step.alive())
    assert at_first == sum(value.numel() for value in step.net.state_dict().values())
    step()
    weights = sum(parameter.numel() for parameter in step.net.parameters())
    assert sum(tensor.numel() for tensor in step.alive()) == at_first + 2 * weights


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (AT(), Passes(4, 4, 1)),
        (TRADES(), Passes(6, 5, 1)),
        (MART(), Passes(5, 5, 1)),
        (ALP(), Passes(5, 5, 1)),
    ],
    ids=["AT", "TRADES", "MART", "ALP"],
)
@pytest.mark.parametrize("engine", [None, AttackEngine()], ids=["plain", "engine"])
def test_lightning_adds_no_pass(objective, expected, engine) -> None:
    """Three steps of attack, clean and adversarial images once each, clean logits before it."""
    from common.attacks.pgd import PGD

    module = RobustClassifier(DigitsResNet(), objective)
    data = ImageDataModule(Digits(), batch_size=20)

    def trainer(steps: int) -> Trainer:
        return Trainer(
            max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0,
            callbacks=[AdversarialTraining(PGD(0.1, 0.05, 3), engine=engine)], accelerator="cpu",
            log_every_n_steps=0,
        )  # fmt: skip

    trainer(1).fit(module, datamodule=data)  # a new network is tried out once
    with counted(module.net) as passes:
        trainer(2).fit(module, datamodule=data)
    tried_out = 1  # two blank images before training
    assert (passes.forward - tried_out, passes.backward, passes.weight_gradient) == (
        2 * expected.forward,
        2 * expected.backward,
        2 * expected.weight_gradient,
    )


def test_what_an_engine_does_to_robustness_is_measured_over_seeds(monkeypatch) -> None:
    suite = {"fgsm": SuiteEntry(FGSM(accuracy.EPS))}
    monkeypatch.setattr(accuracy, "SUITE", suite)
    found = accuracy.compare(seeds=1, epochs=1)
    for name, row in found["rows"].items():
        assert row["worst"] == found["accuracies"][name][0]["worst"]
        assert 0.05 < row["worst"] < row["clean"] < 1.0
    folded, reduced = (found["accuracies"][name][0] for name in list(accuracy.ENGINES)[1:])
    assert folded != reduced  # bf16 takes another path


def test_steps_of_the_trainer_and_bare_ones_are_timed_in_turns() -> None:
    found = overheads.lightning(batch=4, attack_steps=1, steps=3, is_small=True)
    assert found["steps"] == 3
    assert found["bare_cpu_s"] > 0
    assert 0 < found["lower"] <= found["ratio"] <= found["upper"]
    assert 0 < found["data_share"] < 1


@pytest.mark.slow
def test_a_step_in_one_compiled_graph_gives_the_images_of_the_bare_loop(task) -> None:
    wanted = candidate(task, bare(task)).images()
    found = candidate(task, one_graph(task, AttackEngine())).images()
    assert (found - wanted).abs().gt(1e-5).float().mean() < 0.05
