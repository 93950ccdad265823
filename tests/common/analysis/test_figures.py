"""The forest plot shows means, intervals and which differences are significant."""

import pytest

from common.analysis.claims import t_test
from common.analysis.figures import forest_plot


def test_points_intervals_and_significance() -> None:
    clear, vague, alone = (
        t_test(dict(enumerate(v))) for v in ((10.0, 10.5, 11.0), (-30.0, 0.0, 35.0), (3.0,))
    )
    figure = forest_plot({"clear": clear, "vague": vague, "alone": alone}, "base", "accuracy")
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["clear", "vague", "alone"]
    assert [text.get_text() for text in ax.texts] == [d.text() for d in (clear, vague, alone)]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert [float(line.get_xdata()[0]) for line in dots] == pytest.approx([10.5, 5 / 3, 3.0])
    assert [line.get_markerfacecolor() != "white" for line in dots] == [True, False, False]
    arrows = [line.get_marker() for line in ax.lines if line.get_marker() in "<>"]
    assert sorted(arrows) == ["<", ">"], "only the wide interval leaves the axis"
    assert "difference to base" in ax.get_xlabel()
    with pytest.raises(ValueError, match="at least one"):
        forest_plot({}, "base", "accuracy")
