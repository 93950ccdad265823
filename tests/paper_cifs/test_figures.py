"""What the figures of the channels show."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.evaluation.drawing import blank_figure, save_figure
from paper_cifs.figures import (
    draw_channels,
    figure_f1,
    figure_f2,
    figure_f4,
    shown_classes,
    smoothed,
)
from paper_cifs.measures import Measurement, correlation, measure

K, EPS = 3, 0.1
NAMES = ("zero", "one", "two")

# ---------------------------------------------------------------------------------------- figures


def decoded(fig, tmp_path):
    path = save_figure(fig, tmp_path / "figure.png")
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")), path


def has_colour(pixels, colour, tolerance=40):
    return (np.abs(pixels.astype(int) - colour).max(axis=-1) < tolerance).mean() > 0.002


def test_smoothing_averages_three_neighbours():
    curve = torch.tensor([1.0, 4.0, 1.0, 0.0, 8.0])
    expected = [2.0, 2.0, 5 / 3, 3.0, 16 / 3]
    assert smoothed(curve).tolist() == pytest.approx(expected)


def heights(filled):
    """What a filled curve shows at 0, 1, 2, ..."""
    corners = filled.get_paths()[0].vertices
    steps = range(int(corners[:, 0].max()) + 1)
    return [max((y for x, y in corners if x == step), key=abs) for step in steps]


def test_a_panel_sorts_by_relevance_and_scales_by_the_common_maximum(random_channels):
    channels = random_channels()
    fig = blank_figure(3, 3)
    top, bottom = fig.subplots(2, 1)
    draw_channels(top, bottom, channels, 1)
    order = sorted(range(16), key=lambda i: -channels.relevance[1, i])
    nat, adv = (smoothed(a[1][order]) for a in (channels.natural, channels.adversarial))
    highest = max(float(nat.max()), float(adv.max()))
    assert heights(top.collections[0]) == pytest.approx((nat / highest).tolist())
    assert heights(top.collections[1]) == pytest.approx((adv / highest).tolist())
    relevance = channels.relevance[1].numpy()[order]
    assert heights(bottom.collections[0]) == pytest.approx(relevance / np.abs(relevance).max())
    assert top.get_ylim() == (0, 1)
    assert bottom.get_ylim() == (-1, 1)
    (x, _) = bottom.lines[0].get_xdata()
    assert x == pytest.approx((relevance >= 0).sum() - 0.5)


def test_f1_compares_the_trainings(tmp_path, plain_network, images):
    found = measure(plain_network(), *images(), K, EPS)
    fig = figure_f1({"plain_natural": found, "plain": found}, (0, 2), NAMES)
    titles = [ax.get_title() for ax in fig.axes if ax.get_title()]
    assert [title.splitlines()[0] for title in titles] == [
        "natural training, class zero",
        "adversarial training, class zero",
        "natural training, class two",
        "adversarial training, class two",
    ]
    cosine = float(found.channels["penultimate"].cosine()[2])
    assert f"cosine {cosine:.2f}" in titles[3]
    pixels, _ = decoded(fig, tmp_path)
    assert has_colour(pixels, (0, 158, 115))  # the relevance
    assert pixels.std() > 10


def test_f2_orders_classes_and_averages_seeds(random_channels):
    channels = {"penultimate": random_channels()}
    seeds = [
        Measurement(torch.ones(K), torch.tensor(robust), channels)
        for robust in ([0.1, 0.5, 0.7], [0.3, 0.9, 0.5])
    ]
    fig = figure_f2(seeds, NAMES)
    top, bottom = fig.axes
    assert [label.get_text() for label in top.get_xticklabels()] == ["one", "two", "zero"]
    tops = [bar.get_height() for bar in top.patches]
    assert tops == pytest.approx([100, 100, 100, 70, 60, 20], rel=1e-5)
    alignment = channels["penultimate"].alignment()[[1, 2, 0]].tolist()
    assert [bar.get_height() for bar in bottom.patches] == pytest.approx(alignment)
    links = [float(correlation(m.robust, m.channels["penultimate"].alignment())) for m in seeds]
    assert ", ".join(f"{link:+.2f}" for link in links) in bottom.get_title()


def test_f4_shows_four_features(tmp_path, cifs_network, images):
    found = measure(cifs_network(), *images(), K, EPS)
    fig = figure_f4(found, (1, 2), NAMES)
    titles = [ax.get_title().splitlines()[0] for ax in fig.axes if ax.get_title()]
    features = [
        "module 1, unmasked",
        "module 1, masked",
        "module 2, unmasked",
        "module 2, masked (W)",
    ]
    assert titles == [f"{feature}, class {name}" for name in ("one", "two") for feature in features]
    last = [ax for ax in fig.axes if ax.get_title()][3]
    assert f"cosine {float(found.channels['penultimate'].cosine()[1]):.2f}" in last.get_title()
    pixels, path = decoded(fig, tmp_path)
    assert pixels.shape == (540, 1030, 3)
    assert path.stat().st_size < 150_000


def test_classes_shown_are_the_published_ones_or_the_extremes():
    robust = torch.tensor([0.5, 0.9, 0.1])
    assert shown_classes("digits", robust, NAMES) == (1, 2)
    assert shown_classes("cifar10", robust, ("cat", "frog", "automobile")) == (2, 0)
