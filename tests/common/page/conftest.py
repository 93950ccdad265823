"""The page of the committed results."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common.page.site import gather, render

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def everything() -> tuple[list[Any], str]:
    """Their sources, and the page."""
    names = sorted(path.parent.name for path in ROOT.glob("paper_*/reference.yaml"))
    sources = gather(names, ROOT / "benchmarks" / "robustness")
    return sources, render(sources)


HOSTILE = (
    "<script>window.ran = 1</script> | \"'><img src=x onerror='window.ran = 1'>\n"
    "<a href='javascript:window.ran = 1'>`<i onclick='1'>`</a> "
    "*<b onclick='1'>* {{ 7 * 7 }} %{x}"
)


@pytest.fixture
def hostile(paper: Any) -> tuple[str, str]:
    """A text with scripts, and the page of a paper that has it wherever files hold text."""
    paper.write(
        title=HOSTILE,
        venue=HOSTILE,
        tags={"R": HOSTILE, "M": HOSTILE},
        rows={"toy_net_ours": {"label": HOSTILE, "source": HOSTILE}},
        groups={"E1": {"title": HOSTILE, "note": HOSTILE}},
    )
    text = HOSTILE.replace("/", "")  # a file's name has none
    check = {"id": "s", "verdict": "fail", "detail": HOSTILE, "value": 1.0, "threshold": None}
    audit = {"examples": 9, "checks": [{**check, "question": HOSTILE}]}
    for stem in ("toy_net_ours", "toy_net_plain", text):
        for seed in (0, 1):
            paper.put(
                stem, seed, extra=f"{text}/x", measures={HOSTILE: 1.0, "macs": 5.0}, audit=audit
            )
    for path in Path("paper_toy/results").glob("*.json"):
        data = json.loads(path.read_text())
        del data["digest"]
        data["provenance"]["last"] |= {"device": HOSTILE, "versions": {HOSTILE: HOSTILE}}
        data["checkpoints"]["last"]["remarks"].append(HOSTILE)
        path.write_text(json.dumps(data))
    figures = Path("paper_toy/results/figures")
    figures.mkdir()
    for name in (f"{text}.png", f"{text}_examples.png"):
        Image.new("RGB", (2, 3), "red").save(figures / name)
    return HOSTILE, render(gather(["paper_toy"]))
