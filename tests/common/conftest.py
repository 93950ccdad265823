"""A paper with four rows, whose results tests make up."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from common.results.lines import Line, Outcomes
from common.results.markdown import BEGIN, END
from common.results.outcomes import checkpoint_entry
from common.results.statistics import wilson_interval
from common.results.store import merge_result, result_path
from common.results.tables import render_table

N = 200
REFERENCE: dict[str, Any] = yaml.safe_load(
    """
title: A paper
tags: {R: the repository, M: measured}
groups:
  - id: E1
    title: "E1: main"
    note: A note.
    metrics:
      - {key: clean_acc, title: Natural}
      - {key: pgd20, title: PGD-20, source: M}
      - {key: aa, title: AA}
  - id: E6
    title: "E6: by loss"
    metrics: [{key: pgd20/ce_f, title: f}, {key: pgd20/ce_p1, title: p1}]
  - {id: E7, title: "E7: none", metrics: [{key: clean_acc, title: Natural}]}
  - {id: E8, title: "E8: worst", metrics: [{key: worst, title: worst}]}
rows:
  toy_net_plain:
    groups: [E1]
    label: plain |g|
    source: R
    last: {clean_acc: 84.56, pgd20: [46.0, 47.0], aa: null}
    selected: {clean_acc: 82.8}
  toy_net_ours: {groups: [E1, E6, E8], label: ours, source: C}
  toy_net_never: {groups: [E1, E7], label: never, source: C}
  other_net_plain: {groups: [E6], label: other, source: R, last: {pgd20/ce_f: 50.0}}
"""
)
METRICS = {group["id"]: group["metrics"] for group in REFERENCE["groups"]}


class Toy:
    """The package ``paper_toy``, on the path.

    Attributes:
        folder: Of the package.
        metrics: Columns of its tables, by the id of the table.
        n: Number of test examples.
    """

    metrics = METRICS
    rows = tuple(REFERENCE["rows"])
    n = N

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / "README.md").write_text(f"# Toy\n\n{BEGIN}\n{END}\n\nAfter.\n")
        self.write()

    def write(self, *, rows: Any = None, groups: Any = None, **more: Any) -> None:
        """Its ``reference.yaml``; changes of rows are by stem, those of groups by id."""
        data = copy.deepcopy(REFERENCE) | more
        for stem, change in (rows or {}).items():
            data["rows"][stem] |= change
        for group in data["groups"]:
            group |= (groups or {}).get(group["id"], {})
        (self.folder / "reference.yaml").write_text(yaml.safe_dump(data, sort_keys=False))

    def put(
        self,
        stem: str = "toy_net_ours",
        seed: int = 0,
        label: str = "last",
        clean: float = 0.9,
        robust: float = 0.5,
        without: str | None = None,
        shift: int = 0,
        labels: int = 10,
        part: slice = slice(N // 4),
        extra: str | None = None,
        few: str | None = None,
        weakness: str = "",
        **entry: Any,
    ) -> None:
        """A result in which the first examples are right; ``shift`` moves those of ce_f on.

        The attack ``aa/square`` meets ``part`` alone; ``extra`` is one more attack, ``few`` one
        that meets the first half of the examples.
        """
        right = torch.arange(N)
        correct = {
            "clean": right < round(clean * N),
            "pgd20/ce_f": (right - shift) % N < round(robust * N),
            "pgd20/ce_p1": right < round((robust + 0.1) * N),
            "aa/square": right < round(0.25 * (N // 4)),
        }
        attacked = dict.fromkeys(list(correct)[1:], right < N)
        attacked["aa/square"] = torch.zeros(N, dtype=torch.bool)
        attacked["aa/square"][part] = True
        if extra is not None:
            correct[extra], attacked[extra] = right < N, right < N
        if few is not None:
            attacked[few] = right < N // 2
        attacked.pop(without, None)  # type: ignore[arg-type]
        lines = {name: Line(name.partition("/")[0], weakness=weakness) for name in attacked}
        lines["aa/square"] = Line("aa", survivors_only=True, weakness=weakness)
        merge_result(
            result_path(self.folder / "results", stem, seed),
            paper="paper_toy",
            experiment=stem,
            seed=seed,
            label=label,
            entry=checkpoint_entry(Outcomes(right % labels, correct, attacked, lines), **entry),
            provenance={"config_digest": f"of seed {seed}"},
        )

    @staticmethod
    def one(percent: float, n: int = N) -> str:
        """The cell of a single seed."""
        low, high = (100 * end for end in wilson_interval(round(percent * n / 100), n))
        return f"{percent:.2f} [{low:.1f}, {high:.1f}]"

    @staticmethod
    def markdown(**options: Any) -> str:
        """All tables."""
        return render_table("paper_toy", **options).markdown

    def tables(self, **options: Any) -> dict[str, list[dict[str, str]]]:
        """The tables by their headings, each a list of lines by column."""
        found: dict[str, list[dict[str, str]]] = {}
        for section in self.markdown(**options).split("### ")[1:]:
            heading, *lines = section.splitlines()
            rows = [line.replace("\\|", "\0") for line in lines if line.startswith("|")]
            cells = [
                [cell.strip().replace("\0", "|") for cell in row.strip("|").split("|")]
                for row in rows
            ]
            assert len({len(row) for row in cells}) <= 1, "a ragged table"
            found[heading] = [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
        return found

    def lines_of(self, heading: str, stem: str, **options: Any) -> dict[str, dict[str, str]]:
        """The lines of a row in a table, by what they are about."""
        found, owner = {}, ""
        for line in self.tables(**options)[heading]:
            owner = line.pop("experiment") or owner
            kind = line.pop("")
            if f"`{stem}`" in owner:
                found[kind] = {title: cell for title, cell in line.items() if cell}
        return found


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A paper without results."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return Toy(tmp_path / "paper_toy")
