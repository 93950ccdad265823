import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from common.evaluation.drawing import (
    BLUE,
    RED,
    accuracy_curve,
    adversarial_grid,
    blank_figure,
    confusion_matrix,
    draw_per_class_bars,
    example_grid,
    magnification,
    per_class_bars,
    save_figure,
)

NAMES = ["zero", "one", "two"]


def images(n=4, channels=1, eps=0.1):
    generator = torch.Generator().manual_seed(0)
    x = 0.2 + 0.6 * torch.rand(n, channels, 8, 8, generator=generator)
    return x, x + eps * torch.randn(x.shape, generator=generator).sign()


def grid_of(n=4, channels=1, eps=0.1, **changes):
    x, x_adv = images(n, channels, eps)
    y = torch.arange(n) % 3
    arguments = {
        "clean": x,
        "adversarial": x_adv,
        "predicted_clean": y,
        "predicted_adv": (y + 1) % 3,
        "y": y,
        "class_names": NAMES,
    } | changes
    return example_grid(**arguments)


def rows_of(fig):
    axes = np.array(fig.axes)
    return axes.reshape(3, -1)


@pytest.mark.parametrize("channels", [1, 3])
def test_example_grid_shows_both_images_and_their_difference(channels):
    x, x_adv = images(channels=channels, eps=0.1)
    rows = rows_of(grid_of(channels=channels, eps=0.1))
    assert rows.shape == (3, 4)
    wanted = (x, x_adv, 0.5 + 5 * (x_adv - x))
    for axes, tensor in zip(rows, wanted, strict=True):
        for ax, picture in zip(axes, tensor, strict=True):
            shown = np.asarray(ax.images[0].get_array())
            expected = picture.permute(1, 2, 0).squeeze(-1).numpy()
            assert np.allclose(shown, expected, atol=1e-6)
            if channels == 1:  # otherwise matplotlib stretches each image to its own range
                assert ax.images[0].get_clim() == (0, 1)
    assert "× 5" in rows[2, 0].get_ylabel()


def test_example_grid_marks_wrong_predictions_only():
    y = torch.tensor([0, 1, 2, 0])
    rows = rows_of(grid_of(predicted_adv=torch.tensor([0, 2, 2, 1])))
    assert [ax.get_title() for ax in rows[0]] == ["zero", "one", "two", "zero"]
    assert [ax.get_title() for ax in rows[1]] == ["zero", "✗ two", "two", "✗ one"]
    is_red = [to_rgb(ax.title.get_color()) == to_rgb(RED) for ax in rows[1]]
    assert is_red == [False, True, False, True]
    assert not any(to_rgb(ax.title.get_color()) == to_rgb(RED) for ax in rows[0])
    assert [ax.get_xlabel() for ax in rows[2]] == [f"true: {NAMES[k]}" for k in y]


def test_example_grid_shows_no_more_than_asked_for():
    assert rows_of(grid_of(n=6, max_examples=2)).shape == (3, 2)
    assert rows_of(grid_of(n=2, max_examples=8)).shape == (3, 2)


def test_the_factor_belongs_to_the_images_shown():
    x, x_adv = images()
    x_adv[3] = x[3] + 0.25  # not shown
    rows = rows_of(grid_of(adversarial=x_adv, max_examples=3))
    assert "× 5" in rows[2, 0].get_ylabel()


@pytest.mark.parametrize(
    ("largest", "factor"), [(0.0, 1), (0.1, 5), (0.2, 2), (8 / 255, 15), (0.5, 1), (0.8, 0.6)]
)
def test_magnification_fits_and_is_round(largest, factor):
    delta = torch.tensor([[-largest, largest / 3]])
    assert magnification(delta) == pytest.approx(factor)
    assert magnification(delta) * largest <= 0.5 + 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": torch.rand(4, 2, 8, 8)}, "1 or 3"),
        ({"clean": torch.rand(4, 64)}, "1 or 3"),
        ({"adversarial": torch.rand(4, 1, 4, 4)}, "clean images' shape"),
        ({"predicted_clean": torch.zeros(3)}, "predicted_clean"),
        ({"predicted_adv": torch.zeros(4, 10)}, "predicted_adv"),
        ({"max_examples": 0}, "at least one"),
    ],
)
def test_example_grid_refuses_what_it_cannot_draw(changes, message):
    with pytest.raises(ValueError, match=message):
        grid_of(**changes)


def test_grids_refuse_images_that_were_not_attacked():
    _, x_adv = images()
    x_adv[1] = math.nan
    with pytest.raises(ValueError, match="got NaN; show attacked images only"):
        grid_of(adversarial=x_adv)


def adversarial_grid_of(n=4, channels=3, eps=0.1, **changes):
    x, x_adv = images(n, channels, eps)
    y = torch.arange(n) % 3
    arguments = {
        "x": x,
        "x_adv": x_adv,
        "y": y,
        "predicted": (y + 1) % 3,
        "distances": {"linf": torch.full((n,), eps), "l2": torch.arange(n) / 3},
        "class_names": NAMES,
    } | changes
    return adversarial_grid(**arguments)


def test_an_adversarial_image_is_the_sum_of_what_is_above_it():
    x, x_adv = images(channels=3, eps=0.1)
    rows = rows_of(adversarial_grid_of(eps=0.1))
    assert "× 5" in rows[1, 0].get_ylabel()
    for column, clean, adversarial in zip(rows.T, x, x_adv, strict=True):
        shown = [np.asarray(ax.images[0].get_array()) for ax in column]
        assert np.allclose(shown[0], clean.permute(1, 2, 0), atol=1e-6)
        assert np.allclose(shown[2], adversarial.permute(1, 2, 0), atol=1e-6)
        assert np.allclose(shown[0] + (shown[1] - 0.5) / 5, shown[2], atol=1e-5)


def test_an_adversarial_grid_names_classes_and_distances():
    rows = rows_of(adversarial_grid_of(predicted=torch.tensor([0, 2, 2, 1])))
    assert [ax.get_title() for ax in rows[0]] == ["zero", "one", "two", "zero"]
    assert [ax.get_title() for ax in rows[2]] == ["zero", "✗ two", "two", "✗ one"]
    assert rows[1, 0].get_xlabel() == "L∞ 0.1\nL2 0"
    assert rows[1, 1].get_xlabel() == "L∞ 0.1\nL2 0.333"
    assert rows_of(adversarial_grid_of(n=6, distances={}, max_examples=2)).shape == (3, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predicted": torch.zeros(3)}, "predicted must hold one value for each of 4"),
        ({"distances": {"l2": torch.zeros(4, 1)}}, "l2 must hold one value"),
        ({"y": torch.zeros(5)}, "y must hold"),
        ({"x_adv": torch.rand(4, 3, 4, 4)}, "clean images' shape"),
    ],
)
def test_an_adversarial_grid_refuses_what_it_cannot_draw(changes, message):
    with pytest.raises(ValueError, match=message):
        adversarial_grid_of(**changes)


def test_a_confusion_matrix_has_true_classes_in_its_rows():
    counts = [[6, 2, 0], [0, 5, 0], [0, 0, 0]]
    ax = confusion_matrix(counts, NAMES, "PGD-20").axes[0]
    shown = np.asarray(ax.images[0].get_array())
    assert np.allclose(shown, [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]])
    assert [text.get_text() for text in ax.texts] == ["6", "2", "0", "0", "5", "0", "0", "0", "0"]
    assert ax.texts[1].get_position() == (1, 0)
    assert [label.get_text() for label in ax.get_yticklabels()] == NAMES
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("predicted", "true", "PGD-20")


def test_a_confusion_matrix_of_many_classes_has_no_numbers_that_overlap():
    ax = confusion_matrix(np.eye(50, dtype=int), [f"class {i}" for i in range(50)]).axes[0]
    assert not ax.texts
    assert "class 1" not in [label.get_text() for label in ax.get_xticklabels()]


@pytest.mark.parametrize("counts", [np.zeros((2, 2)), np.zeros((3, 2)), np.zeros(3)])
def test_a_confusion_matrix_refuses_another_number_of_classes(counts):
    with pytest.raises(ValueError, match=r"shape \(3, 3\)"):
        confusion_matrix(counts, NAMES)


def test_bars_have_the_heights_given():
    ax = per_class_bars({"natural": [0.9, 0.8, 1.0], "PGD-20": [0.5, 0.25, 0.0]}, NAMES).axes[0]
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([90, 80, 100, 50, 25, 0])
    assert [label.get_text() for label in ax.get_xticklabels()] == NAMES
    assert ax.get_ylim() == (0, 100)


def test_bars_of_several_repeats_are_means_with_a_dot_each():
    ax = blank_figure(3, 3).subplots()
    table = [[0.0, 0.2, 0.4], [1.0, 0.4, 0.4]]
    draw_per_class_bars(ax, {"corr": table}, NAMES)
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([0.5, 0.3, 0.4])
    assert [list(line.get_ydata()) for line in ax.lines] == table


@pytest.mark.parametrize("series", [{}, {"a": [1.0, 2.0]}, {"a": np.zeros((2, 2, 3))}])
def test_bars_refuse_another_number_of_classes(series):
    with pytest.raises(ValueError, match=r"series|each of 3 classes"):
        per_class_bars(series, NAMES)


def test_curves_have_the_points_given():
    fig = accuracy_curve([0, 2, 4], {"plain": [0.9, 0.5, math.nan], "CIFS": [1, 0.6, 0.1]}, "eps")
    plain, cifs = fig.axes[0].lines
    assert list(plain.get_xdata()) == [0, 2, 4]
    assert np.allclose(plain.get_ydata(), [90, 50, np.nan], equal_nan=True)
    assert np.allclose(cifs.get_ydata(), [100, 60, 10])
    assert plain.get_color() == BLUE
    assert plain.get_marker() != cifs.get_marker()  # told apart without colour
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["plain", "CIFS"]


@pytest.mark.parametrize("series", [{}, {"plain": [0.1, 0.2]}])
def test_curves_refuse_another_number_of_points(series):
    with pytest.raises(ValueError, match=r"series|must have 3 values"):
        accuracy_curve([0, 1, 2], series, "eps")


def test_curves_have_bands_where_there_are_intervals():
    series = {"plain": [0.9, 0.5, 0.1], "CIFS": [0.8, 0.6, 0.4]}
    ends = [(0.6, 0.9), (0.4, 0.7), (math.nan, math.nan)]
    ax = accuracy_curve([0, 2, 4], series, "eps", {"CIFS": ends}).axes[0]
    (band,) = ax.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(6)}
    assert corners == {(0, 60), (0, 90), (2, 40), (2, 70)}
    assert tuple(band.get_facecolor()[0][:3]) == to_rgb(ax.lines[1].get_color())
    assert not accuracy_curve([0, 2, 4], series, "eps").axes[0].collections


@pytest.mark.parametrize(
    ("intervals", "message"),
    [
        ({"CIFS": [(0, 1)] * 3}, r"\['CIFS'\] belong to no series; there are \['plain'\]"),
        ({"plain": [(0, 1)] * 2}, r"'plain' must have the shape \(3, 2\), got \(2, 2\)"),
    ],
)
def test_bands_that_fit_no_line_are_refused(intervals, message):
    with pytest.raises(ValueError, match=message):
        accuracy_curve([0, 1, 2], {"plain": [0.1, 0.2, 0.3]}, "eps", intervals)


@pytest.mark.parametrize(
    "draw",
    [
        grid_of,
        adversarial_grid_of,
        lambda: per_class_bars({"a": [0.1, 0.9, 0.5]}, NAMES),
        lambda: confusion_matrix(np.eye(3), NAMES),
    ],
)
def test_saved_figures_are_whole_and_repeatable(tmp_path, draw):
    fig = draw()
    path = save_figure(fig, tmp_path / "new" / "folder" / "figure.png")
    with Image.open(path) as picture:
        assert picture.size == tuple((100 * fig.get_size_inches()).astype(int))
        assert np.asarray(picture.convert("L")).std() > 10  # not blank
    first = path.read_bytes()
    save_figure(draw(), path)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]


def test_a_figure_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    save_figure(grid_of(), path)
    before = path.read_bytes()

    def write_half(self, file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", write_half)
    with pytest.raises(OSError, match="disk full"):
        save_figure(grid_of(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_suffixes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"figure\.bmpp"):
        save_figure(grid_of(), tmp_path / "figure.bmpp")


def test_figures_go_to_tensorboard(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.add_figure("examples", grid_of(), global_step=3)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    (image,) = events.Images("examples")
    assert image.step == 3
    assert image.width > 300
