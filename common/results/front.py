"""What the root README shows: one small table of results, and which rows have been run."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from common.errors import ConfigurationError
from common.results.cells import spread_of
from common.results.columns import Columns
from common.results.markdown import Sheet, write_readme
from common.results.reference import Reference, Row, read_reference
from common.results.schema import Result
from common.results.statistics import paired_t_test
from common.results.store import load_results

Results = Mapping[str, Sequence[Result]]
"""By experiment."""


def by_experiment(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results by experiment, in their order."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result["experiment"], []).append(result)
    return found


def summary(reference: Reference, results: Results) -> Sheet:
    """The table that ``summary`` of a ``reference.yaml`` describes.

    It shows last checkpoints: the mean over seeds of every metric, and the mean difference of one
    metric to the baseline with its 95 % interval over seeds.

    Raises:
        ConfigurationError: If it names a table or metric that is not there.
    """
    wanted = reference.summary
    groups = {group.id: group for group in reference.groups}
    group = groups.get(str(wanted.get("group")))
    metrics = {} if group is None else {metric.key: metric for metric in group.metrics}
    keys = list(wanted.get("metrics", []))
    compared = str(wanted.get("difference"))
    if group is None or not {*keys, compared} <= set(metrics):
        raise ConfigurationError(
            f"summary is {wanted}, expected the id of a group, and metrics and difference among "
            "the columns of it"
        )
    rows = [row for row in reference.rows.values() if group.id in row.groups]
    columns = Columns(group, [row.stem for row in rows], results)

    def of(row: Row | None, key: str) -> dict[int, float]:
        found = {}
        for result in results.get(row.stem, []) if row is not None else []:
            last = result["checkpoints"].get("last")
            if last and (value := columns.value(result["experiment"], metrics[key], last)):
                found[result["seed"]] = 100.0 * value
        return found

    baseline = reference.rows.get(group.baseline or "")
    lines = []
    for row in rows:
        ours, theirs = of(row, compared), of(baseline, compared)
        seeds = [] if row is baseline else sorted(set(ours) & set(theirs))
        lines.append(
            [
                row.label,
                *(spread_of(list(of(row, key).values())) for key in keys),
                _difference([ours[s] for s in seeds], [theirs[s] for s in seeds]),
                str(len(results.get(row.stem, []))),
            ]
        )
    titles = [metrics[key].title for key in keys]
    against = "" if baseline is None else f" to {baseline.label}"
    header = ["network", *titles, f"difference{against}", "seeds"]
    note = (
        f"Percent, mean ± standard deviation over seeds; the difference is that of the "
        f"{metrics[compared].title}, in points, with its 95 % t interval over seeds."
    )
    parts = [
        f"{metrics[key].title} on {basis.size:,} images"
        for key in keys
        if (basis := columns.basis[key]) is not None and not basis.is_whole
    ]
    notes = [note, *([f"On a part of the test images: {'; '.join(parts)}."] if parts else [])]
    return Sheet("", "", header, lines, notes)


def _difference(ours: list[float], theirs: list[float]) -> str:
    found = paired_t_test([a - b for a, b in zip(ours, theirs, strict=True)])
    return "" if found is None else found.text()


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
        readme: Its folder holds the papers, each with a ``reference.yaml``.
    """
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    papers = {
        path.parent.name: (
            read_reference(path),
            by_experiment(load_results(path.parent / "results")),
        )
        for path in sorted(readme.parent.glob("paper_*/reference.yaml"))
    }
    tables = {"coverage": coverage(papers)}
    for reference, results in papers.values():
        if reference.summary:
            tables["summary"] = summary(reference, results)
    for name, sheet in tables.items():
        if f"<!-- {name} -->" in text:
            write_readme(readme, sheet.to_markdown(), f"<!-- {name} -->", f"<!-- /{name} -->")
