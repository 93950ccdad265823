"""What the figures of the channels show."""

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d

from common.evaluation.drawing import blank_figure
from paper_cifs.figures import (
    channel_figure,
    draw_channels,
    figure_f2,
    masked_features,
    shown_classes,
)
from paper_cifs.measures import Measurement, correlation

K, NAMES = 3, ("zero", "one", "two")


def heights(filled):
    """What a filled curve shows at 0, 1, 2, ..."""
    corners = filled.get_paths()[0].vertices
    steps = range(int(corners[:, 0].max()) + 1)
    return [max((y for x, y in corners if x == step), key=abs) for step in steps]


def test_a_panel_sorts_by_relevance_and_scales_by_the_common_maximum(random_channels):
    channels = random_channels()
    top, bottom = blank_figure(3, 3).subplots(2, 1)
    draw_channels(top, bottom, channels, 1)
    order = sorted(range(16), key=lambda i: -channels.relevance[1, i])
    nat, adv = (
        convolve1d(a[1].numpy()[order], [1 / 3] * 3, mode="nearest")
        for a in (channels.natural, channels.adversarial)
    )
    highest = max(*nat, *adv)
    assert heights(top.collections[0]) == pytest.approx(nat / highest)
    assert heights(top.collections[1]) == pytest.approx(adv / highest)
    relevance = channels.relevance[1].numpy()[order]
    assert heights(bottom.collections[0]) == pytest.approx(relevance / np.abs(relevance).max())
    assert top.get_ylim() == (0, 1)
    assert bottom.get_ylim() == (-1, 1)
    (x, _) = bottom.lines[0].get_xdata()
    assert x == pytest.approx((relevance >= 0).sum() - 0.5)


def test_panels_stand_in_a_row_per_class_with_their_numbers(random_channels):
    columns = {"natural training": random_channels(), "adversarial training": random_channels()}
    fig = channel_figure(columns, (0, 2), NAMES)
    titles = [ax.get_title() for ax in fig.axes if ax.get_title()]
    assert [title.splitlines()[0] for title in titles] == [
        f"{training}, class {name}" for name in ("zero", "two") for training in columns
    ]
    numbers = {k: float(v[2]) for k, v in random_channels().numbers().items()}
    shares = (numbers[f"negative_share_{kind}"] for kind in ("natural", "adversarial"))
    note = f"cosine {numbers['cosine']:.2f}, NR share {' → '.join(f'{s:.2f}' for s in shares)}"
    assert titles[3].splitlines()[1] == note


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


def test_f4_shows_the_features_around_the_masks(random_channels):
    names = [f"module{s}_{side}" for s in (1, 2) for side in ("unmasked", "masked")]
    names = ["penultimate", *names, *(f"{name}_by_class" for name in names)]
    channels = {name: random_channels(seed=seed) for seed, name in enumerate(names)}
    columns = masked_features(Measurement(torch.ones(K), torch.ones(K), channels))
    assert columns == {
        "module 1, unmasked": channels["module1_unmasked"],
        "module 1, masked": channels["module1_masked"],
        "module 2, unmasked": channels["module2_unmasked"],
        "module 2, masked (W)": channels["penultimate"],
    }


def test_classes_shown_are_the_published_ones_or_the_extremes():
    robust = torch.tensor([0.5, 0.9, 0.1])
    assert shown_classes("digits", robust, NAMES) == (1, 2)
    assert shown_classes("cifar10", robust, ("cat", "frog", "automobile")) == (2, 0)
