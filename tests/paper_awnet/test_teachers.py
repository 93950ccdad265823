"""Teachers are found, checked, frozen, and belong to nobody's parameters."""

import copy

import pytest
import torch
from torch import nn

from common.errors import CheckpointError, ConfigurationError
from paper_awnet.networks import DigitsStudent
from paper_awnet.objectives import MTARD
from paper_awnet.teachers import Teacher

SHAPE = (1, 8, 8)


def save(path, net: nn.Module) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {f"net.{k}": v for k, v in net.state_dict().items()}}, path)


def test_found_beside_the_students_run_by_seed(tmp_path) -> None:
    wanted = DigitsStudent()
    save(tmp_path / "runs/paper/teach/seed3/checkpoints/last.ckpt", wanted)
    teacher = Teacher(DigitsStudent(), experiment="teach")
    x = torch.rand(2, *SHAPE)
    assert not torch.allclose(teacher(x), wanted.eval()(x))
    teacher.load(tmp_path / "runs/paper/student/seed3-v2", SHAPE, 10)
    assert torch.equal(teacher(x), wanted(x))
    with pytest.raises(CheckpointError, match=r"teach has not been trained.*seed4.*--seed_every"):
        teacher.load(tmp_path / "runs/paper/student/seed4", SHAPE, 10)
    with pytest.raises(CheckpointError, match=r"selected\.ckpt does not exist"):
        Teacher(DigitsStudent(), "teach", "selected").load(
            tmp_path / "runs/paper/student/seed3", SHAPE, 10
        )


def test_a_path_goes_before_an_experiment(tmp_path) -> None:
    wanted = DigitsStudent()
    save(tmp_path / "elsewhere.ckpt", wanted)
    teacher = Teacher(DigitsStudent(), "nowhere", path=str(tmp_path / "elsewhere.ckpt"))
    teacher.load(tmp_path, SHAPE, 10)
    x = torch.rand(2, *SHAPE)
    assert torch.equal(teacher(x), wanted.eval()(x))


def test_frozen_in_evaluation_mode_and_without_graph() -> None:
    teacher = Teacher(DigitsStudent(), as_it_is=True)
    assert not teacher.net.training
    assert not any(p.requires_grad for p in teacher.net.parameters())
    x = torch.rand(2, *SHAPE, requires_grad=True)
    assert not teacher(x).requires_grad


def test_it_follows_the_precision_of_the_images() -> None:
    teacher = Teacher(DigitsStudent(), as_it_is=True)
    assert teacher(torch.rand(2, *SHAPE, dtype=torch.float64)).dtype == torch.float64


def test_whoever_holds_it_neither_trains_nor_saves_nor_switches_it() -> None:
    teacher = Teacher(DigitsStudent(), as_it_is=True)
    student = DigitsStudent()
    holder = nn.ModuleDict({"net": student})
    holder.objective = MTARD(teacher, teacher)
    holder.train()
    assert not teacher.net.training
    assert {id(p) for p in holder.parameters()} == {id(p) for p in student.parameters()}
    state = holder.state_dict()
    assert sum(v.numel() for k, v in state.items() if k.startswith("objective")) == 4
    assert copy.deepcopy(holder).objective.clean is teacher


def test_a_teacher_with_other_classes_or_for_other_images(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match=r"knows \(7,\) classes and the data have 10"):
        Teacher(DigitsStudent(num_classes=7), as_it_is=True).load(tmp_path, SHAPE, 10)
    with pytest.raises(ConfigurationError, match="cannot take images of shape"):
        Teacher(DigitsStudent(), as_it_is=True).load(tmp_path, (3, 8, 8), 10)
    save(tmp_path / "seven.ckpt", DigitsStudent(num_classes=7))
    with pytest.raises(CheckpointError, match="weights of another network"):
        Teacher(DigitsStudent(), path=str(tmp_path / "seven.ckpt")).load(tmp_path, SHAPE, 10)


def test_a_teacher_without_weights_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"a teacher needs weights.*as_it_is"):
        Teacher(DigitsStudent())
