"""What the root README shows: one small table of results, and which rows have been run."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from common.results.bases import Results, by_experiment
from common.results.cells import seeds_of, spread_of
from common.results.columns import Columns
from common.results.markdown import Sheet, write_readme
from common.results.reference import Reference, Row, Summary, read_reference
from common.results.statistics import paired_t_test
from common.results.store import load_results


def summary(wanted: Summary, reference: Reference, results: Results) -> Sheet:
    """The table that ``summary`` of a ``reference.yaml`` describes.

    It shows last checkpoints: the mean over seeds of every metric, and the mean difference of one
    metric to the baseline with its 95 % interval over seeds.
    """
    (group,) = (group for group in reference.groups if group.id == wanted.group)
    metrics = {metric.key: metric for metric in group.metrics}
    rows = reference.members(group)
    columns = Columns(group, [row.stem for row in rows], results)

    def of(row: Row | None, key: str) -> dict[int, float]:
        last = [one for one in results.get(row.stem, []) if one.label == "last"] if row else []
        found = {one.seed: columns.value(metrics[key], one) for one in last}
        return {seed: 100.0 * value for seed, value in found.items() if value is not None}

    baseline = reference.rows.get(group.baseline or "")
    theirs = of(baseline, wanted.difference)
    lines = []
    for row in rows:
        ours = {} if row is baseline else of(row, wanted.difference)
        test = paired_t_test([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
        cells = [spread_of(list(of(row, key).values())) for key in wanted.metrics]
        seeds = str(len(seeds_of(row, results)))
        lines.append([row.label, *cells, "" if test is None else test.text(), seeds])
    shown = [metrics[key] for key in wanted.metrics]
    against = "" if baseline is None else f" to {baseline.label}"
    header = [
        "network",
        *(metric.title for metric in shown),
        f"difference{against}",
        "number of seeds",
    ]
    notes = [
        f"Percent, mean ± standard deviation over seeds; the difference is that of the "
        f"{metrics[wanted.difference].title}, in points, with its 95 % t interval over seeds."
    ]
    if parts := columns.parts(shown):
        notes.append(f"On a part of the test images: {'; '.join(parts)}.")
    return Sheet("", "", header, lines, notes)


def coverage(papers: Mapping[str, tuple[Reference, Results]]) -> Sheet:
    """How many of the configured rows of each paper have a result, and on which data sets."""
    lines = []
    for package, (reference, results) in papers.items():
        run = [stem for stem in reference.rows if stem in results]
        rest = [stem for stem in reference.rows if stem not in results]
        total = f"{len(run)} / {len(reference.rows)}"
        lines.append([f"`{package}`", total, _data_sets(run), _data_sets(rest)])
    return Sheet("", "", ["package", "rows run / configured", "run", "not run"], lines)


def _data_sets(stems: Iterable[str]) -> str:
    counts = Counter(stem.partition("_")[0] for stem in stems)
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "none"


def write_front(readme: Path) -> None:
    """Render the summary and the coverage of a root README, where it has places for them.

    Args:
        readme: Its folder holds the papers and the comparison, each with a ``reference.yaml``.
    """
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    papers = {
        path.parent.relative_to(readme.parent).as_posix(): (
            read_reference(path),
            by_experiment(load_results(path.parent / "results")),
        )
        for folder in ("paper_*", "benchmarks/*")
        for path in sorted(readme.parent.glob(f"{folder}/reference.yaml"))
    }
    tables = {"coverage": coverage(papers)}
    for reference, results in papers.values():
        if reference.summary is not None:
            tables["summary"] = summary(reference.summary, reference, results)
    for name, sheet in tables.items():
        if f"<!-- {name} -->" in text:
            write_readme(readme, sheet.to_markdown(), f"<!-- {name} -->", f"<!-- /{name} -->")
