"""Figures show the values they are given and survive on disk."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from common.evaluation.drawing import (
    BLUE,
    RED,
    accuracy_curve,
    adversarial_grid,
    blank_figure,
    confusion_matrix,
    draw_per_class_bars,
    magnification,
    per_class_bars,
    save_figure,
    tidy_log_axis,
)

NAMES = ["zero", "one", "two"]


def images(n: int = 4, channels: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 0.2 + 0.6 * torch.rand(n, channels, 8, 8, generator=generator)
    return x, x + 0.1 * torch.randn(x.shape, generator=generator).sign()


def grid_of(n: int = 4, channels: int = 1, **changes) -> Figure:
    x, x_adv = images(n, channels)
    y = torch.arange(n) % 3
    arguments = {
        **{"x": x, "x_adv": x_adv, "y": y, "predicted": y, "predicted_adv": (y + 1) % 3},
        "distances": {"linf": torch.full((n,), 0.1), "l2": torch.arange(n) / 3},
    } | changes
    return adversarial_grid(**({"class_names": NAMES} | arguments))


def test_classes_without_names_have_numbers() -> None:
    assert below(grid_of(class_names=()).axes[2]) == [f"true: {k}" for k in (0, 1, 2, 0)]


@pytest.mark.parametrize("span", [1.04, 1.2, 2, 3, 4, 9, 30, 90, 1e4])
def test_numbers_of_a_logarithmic_axis_are_apart(span: float) -> None:
    fig = blank_figure(3.0, 3.0)
    ax = fig.subplots()
    ax.plot([0.3, 0.3 * span], [0, 1])
    ax.set_xscale("log")
    tidy_log_axis(ax.xaxis)
    fig.draw_without_rendering()
    ends = [ax.transAxes.transform((side, 0))[0] for side in (0, 1)]
    labels = [*ax.get_xticklabels(), *ax.get_xticklabels(minor=True)]
    boxes = [one.get_window_extent() for one in labels if one.get_text()]
    seen = sorted((b.x0, b.x1) for b in boxes if ends[0] <= (b.x0 + b.x1) / 2 <= ends[1])
    assert len(seen) >= 2
    assert all(left[1] < right[0] for left, right in itertools.pairwise(seen))


def shown(ax: Axes) -> list[np.ndarray]:
    """The 8x8 images of a row, each with a margin of one pixel."""
    strip = np.asarray(ax.images[0].get_array())
    left, right, bottom, top = ax.images[0].get_extent()
    assert (left, right) == (-0.5, strip.shape[1] // 10 - 0.5)  # image i is about x = i
    assert bottom > top
    return [strip[1:-1, 10 * i + 1 : 10 * i + 9] for i in range(strip.shape[1] // 10)]


def above(ax: Axes) -> list[Text]:
    return [text for text in ax.texts if text.get_position()[1] > 1]


def below(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts if text.get_position()[1] < 0]


@pytest.mark.parametrize("channels", [1, 3])
def test_an_adversarial_image_is_the_sum_of_what_is_above_it(channels: int) -> None:
    axes = grid_of(channels=channels).axes
    assert "× 5" in axes[1].get_ylabel()
    columns = zip(*map(shown, axes), *images(channels=channels), strict=True)
    for clean, delta, adversarial, *pair in columns:
        x, x_adv = (picture.permute(1, 2, 0).squeeze(-1) for picture in pair)
        assert np.allclose(clean, x, atol=1e-6)
        assert np.allclose(adversarial, x_adv, atol=1e-6)
        assert np.allclose(clean + (delta - 0.5) / 5, adversarial, atol=1e-5)
    if channels == 1:  # otherwise matplotlib stretches the images to their own range
        assert all(ax.images[0].get_clim() == (0, 1) for ax in axes)


def test_a_grid_names_classes_and_distances_and_marks_wrong_predictions() -> None:
    axes = grid_of(predicted_adv=torch.tensor([0, 2, 2, -1])).axes
    assert [text.get_text() for text in above(axes[0])] == ["zero", "one", "two", "zero"]
    assert [text.get_text() for text in above(axes[2])] == ["zero", "✗ two", "two", "✗ -1"]
    is_red = [to_rgb(text.get_color()) == to_rgb(RED) for text in above(axes[2])]
    assert is_red == [False, True, False, True]
    assert below(axes[2]) == [f"true: {NAMES[k]}" for k in (0, 1, 2, 0)]
    assert below(axes[1])[1] == "L∞ 0.1\nL2 0.333"


def test_a_grid_shows_as_many_as_asked_for() -> None:
    for fig, count in ((grid_of(max_examples=3, distances=None), 3), (grid_of(n=2), 2)):
        assert [len(shown(ax)) for ax in fig.axes] == [count] * 3
        assert [len(above(ax)) for ax in fig.axes] == [count, 0, count]


@pytest.mark.parametrize("norms", [[], ["linf"], ["linf", "l2"]])
def test_texts_of_a_grid_touch_no_image_and_no_other_text(norms: list[str]) -> None:
    fig = grid_of(n=8, distances={norm: torch.full((8,), 0.1) for norm in norms})
    fig.draw_without_rendering()
    texts = [text for ax in fig.axes for text in ax.texts if text.get_text()]
    boxes = [item.get_window_extent() for item in [*fig.axes, *texts]]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert fig.bbox.x0 <= box.x0 < box.x1 <= fig.bbox.x1
        assert fig.bbox.y0 <= box.y0 < box.y1 <= fig.bbox.y1


@pytest.mark.parametrize(
    ("largest", "factor"), [(0.0, 1), (0.1, 5), (0.2, 2), (8 / 255, 15), (0.5, 1), (0.8, 0.6)]
)
def test_magnification_fits_and_is_round(largest: float, factor: float) -> None:
    delta = torch.tensor([[-largest, largest / 3]])
    assert magnification(delta) == pytest.approx(factor)
    assert magnification(delta) * largest <= 0.5 + 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.rand(4, 2, 8, 8)}, "1 or 3"),
        ({"x": torch.rand(4, 64)}, "1 or 3"),
        ({"x_adv": torch.rand(4, 1, 4, 4)}, "alike"),
        ({"max_examples": 0}, "0 are shown"),
        ({"x_adv": torch.full((4, 1, 8, 8), math.nan)}, "got NaN"),
    ],
)
def test_a_grid_refuses_images_that_it_cannot_draw(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid_of(**changes)


def test_a_confusion_matrix_has_true_classes_in_its_rows() -> None:
    ax = confusion_matrix([[6, 2, 0], [0, 5, 0], [0, 0, 0]], NAMES, "PGD-20").axes[0]
    shown = np.asarray(ax.images[0].get_array())
    assert np.allclose(shown, [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]])
    assert [text.get_text() for text in ax.texts] == ["6", "2", "0", "0", "5", "0", "0", "0", "0"]
    assert ax.texts[1].get_position() == (1, 0)
    assert [label.get_text() for label in ax.get_yticklabels()] == NAMES
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("predicted", "true", "PGD-20")
    many = confusion_matrix(np.eye(50, dtype=int), [f"class {i}" for i in range(50)]).axes[0]
    assert not many.texts
    assert "class 1" not in [label.get_text() for label in many.get_xticklabels()]


def test_bars_have_the_heights_given_or_their_mean_with_a_dot_each() -> None:
    ax = per_class_bars({"natural": [0.9, 0.8, 1.0], "PGD-20": [0.5, 0.25, 0.0]}, NAMES).axes[0]
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([90, 80, 100, 50, 25, 0])
    assert [label.get_text() for label in ax.get_xticklabels()] == NAMES
    assert ax.get_ylim() == (0, 100)
    ax = blank_figure(3, 3).subplots()
    table = [[0.0, 0.2, 0.4], [1.0, 0.4, 0.4]]
    draw_per_class_bars(ax, {"corr": table}, NAMES)
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([0.5, 0.3, 0.4])
    assert [list(line.get_ydata()) for line in ax.lines] == table
    for values in ([1.0, 2.0], np.zeros((2, 2, 3))):
        with pytest.raises(ValueError, match="each of 3 classes"):
            per_class_bars({"a": values}, NAMES)


def test_curves_have_the_points_given_and_bands_where_there_are_intervals() -> None:
    series = {"plain": [0.9, 0.5, math.nan], "CIFS": [1, 0.6, 0.1]}
    ends = [(0.6, 0.9), (0.4, 0.7), (math.nan, math.nan)]
    fig = accuracy_curve([0, 2, 4], series, "eps", {"CIFS": ends})
    plain, cifs = fig.axes[0].lines
    assert list(plain.get_xdata()) == [0, 2, 4]
    assert np.allclose(plain.get_ydata(), [90, 50, np.nan], equal_nan=True)
    assert np.allclose(cifs.get_ydata(), [100, 60, 10])
    assert plain.get_color() == BLUE
    assert plain.get_marker() != cifs.get_marker()  # told apart without colour
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["plain", "CIFS"]
    (band,) = fig.axes[0].collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(6)}
    assert corners == {(0, 60), (0, 90), (2, 40), (2, 70)}
    assert tuple(band.get_facecolor()[0][:3]) == to_rgb(cifs.get_color())
    assert not accuracy_curve([0, 2, 4], series, "eps").axes[0].collections


def test_a_saved_figure_is_whole_and_repeatable(tmp_path: Path, monkeypatch) -> None:
    path = save_figure(grid_of(), tmp_path / "new" / "figure.png")
    with Image.open(path) as picture:
        assert picture.size == tuple((100 * grid_of().get_size_inches()).astype(int))
        assert np.asarray(picture.convert("L")).std() > 10  # not blank
    first = path.read_bytes()
    save_figure(grid_of(), path)
    assert path.read_bytes() == first
    with pytest.raises(ValueError, match=r"figure\.bmpp"):
        save_figure(grid_of(), tmp_path / "figure.bmpp")

    def write_half(self, file, **_) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", write_half)
    with pytest.raises(OSError, match="disk full"):
        save_figure(grid_of(), path)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]
