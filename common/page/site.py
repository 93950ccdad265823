"""Gathers the results of all papers and of the comparison, and renders the page."""

import base64
import gzip
import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import get_args

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image
from plotly.offline import get_plotlyjs

from common.analysis.claims import Verdict
from common.errors import ConfigurationError
from common.files import write_text_atomically
from common.packages import package_folder, short_name
from common.page.details import COLUMNS, Details, details_of
from common.page.plots import Plot, plots_of
from common.results.markdown import Sheet, one_line
from common.results.ranking import RANKED, ranking_sheet
from common.results.reference import Row
from common.results.schema import Result
from common.results.store import load_results, read_costs
from common.results.tables import Report, render_table

TEMPLATES = Path(__file__).parent / "templates"

COMPARISON = Path("benchmarks") / "robustness"
"""The comparison of all methods: a ``reference.yaml`` whose groups are its tables and whose rows
are its experiments, and ``results`` with a result file for each experiment and seed."""


@dataclass(frozen=True)
class Source:
    """A paper, or the comparison of all methods.

    Attributes:
        name: Of the package.
        report: Its tables.
        boards: Rankings of its tables that have a worst case.
        details: Its experiments.
        plots: Curves, trade-off and cost.
        figures: Published pictures.
    """

    name: str
    report: Report
    boards: list[Sheet]
    details: list[Details]
    plots: list[Plot]
    figures: list[Path]

    @property
    def short(self) -> str:
        """Its name in menus."""
        return short_name(self.name)

    @property
    def links(self) -> dict[str, str]:
        """Where the experiments with results are shown, by stem."""
        return {one.row.stem: one.anchor for one in self.details if one.parts}


@dataclass
class _Anchors:
    """Names of places on the page: each once, made of harmless characters."""

    taken: set[str] = field(default_factory=set)

    def new(self, *words: str) -> str:
        base = re.sub(r"[^\w.-]+", "-", "-".join(words), flags=re.ASCII)
        name, number = base, 1
        while name in self.taken:
            number += 1
            name = f"{base}-{number}"
        self.taken.add(name)
        return name


def gather(papers: Sequence[str], comparison: Path = COMPARISON) -> list[Source]:
    """The published results of papers, and of the comparison where there is one.

    Raises:
        ConfigurationError: If a file is damaged.
    """
    folders = {name: package_folder(name) for name in papers}
    if (comparison / "reference.yaml").is_file():
        folders = {comparison.name: comparison} | folders
    anchors = _Anchors()
    return [_source(name, folder, anchors) for name, folder in folders.items()]


def _source(name: str, folder: Path, anchors: _Anchors) -> Source:
    report, results = render_table(folder), load_results(folder / "results")
    rows = report.reference.rows | {stem: Row(stem, [], stem) for stem in report.strangers}
    made: dict[str, list[Result]] = {
        stem: list(group) for stem, group in groupby(results, lambda one: one["experiment"])
    }
    details = [
        details_of(name, row, made.get(stem, []), folder / "results", anchors.new(name, stem))
        for stem, row in rows.items()
    ]
    examples = {one.examples for one in details}
    figures = sorted(set((folder / "results" / "figures").glob("*.png")) - examples)
    plots = plots_of(report.reference, results, read_costs(folder / "results"))
    return Source(name, report, list(_boards(report)), details, plots, figures)


def _boards(report: Report) -> Iterator[Sheet]:
    """Rankings of the tables with a worst case of at least two rows."""
    for group in report.reference.groups:
        if "worst" in (metric.key for metric in group.metrics):
            sheet = ranking_sheet(group, report.reference.members(group), report.results)
            if len(sheet.lines) > 1:
                yield sheet


# ---------------------------------------------------------------------------------------- render


def inline(text: str, links: Mapping[str, str] = {}) -> Markup:
    """One line of text with ``*emphasis*`` and `code`; code that names a row is a link to it."""
    parts = []
    for i, part in enumerate(re.split(r"`([^`]+)`", one_line(text))):
        if i % 2:
            code = Markup("<code>{}</code>").format(breakable(part))
            link = Markup('<a href="#{}">{}</a>')
            parts.append(link.format(links[part], code) if part in links else code)
        else:
            parts += [
                Markup("<em>{}</em>").format(word) if j % 2 else escape(word)
                for j, word in enumerate(re.split(r"(?<!\w)\*(?! )([^*]+)(?<! )\*(?!\w)", part))
            ]
    return Markup("").join(parts)


def breakable(name: str) -> Markup:
    """A name that a narrow column may break behind underscores and slashes."""
    return Markup(re.sub("([_/])", r"\1<wbr>", str(escape(name))))


def blocks(sheet: Sheet) -> list[list[list[str]]]:
    """The lines of a table by row: a line whose first cell is empty belongs to the one above."""
    found: list[list[list[str]]] = []
    for line in sheet.lines:
        if line[0] or not found:
            found.append([])
        found[-1].append(line)
    return found


def is_prose(sheet: Sheet) -> bool:
    """Whether a table has sentences, which a narrow screen shows below each other."""
    cells = (cell for line in sheet.lines for cell in line)
    return any(len(re.sub(r"`[^`]*`", "", cell)) > 60 for cell in cells)  # names are no sentences


def picture(path: Path) -> str:
    """A PNG as part of the page: the same pixels as WebP, in less than half the size.

    Raises:
        ConfigurationError: If it is damaged.
    """
    smaller = io.BytesIO()
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.save(smaller, "WEBP", lossless=True)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigurationError(f"{path} is no readable PNG: {error}; publish it again") from error
    return "data:image/webp;base64," + base64.b64encode(smaller.getvalue()).decode()


def digest(script: str) -> str:
    """What a Content-Security-Policy calls a script that may run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def render(sources: Sequence[Source]) -> str:
    """The page: one HTML document that loads nothing."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "inline": inline,
        "breakable": breakable,
        "blocks": blocks,
        "is_prose": is_prose,
        "picture": picture,
    }
    papers = [source for source in sources if source.name != COMPARISON.name]
    plotly, script = get_plotlyjs(), (TEMPLATES / "page.js").read_text()
    rows = [one for source in sources for one in source.details]
    titles = [f"{title}, {whose}" for title in COLUMNS for whose in ("published", "ours")]
    return environment.get_template("index.html").render(
        sources=sources,
        papers=papers,
        comparison=next((one for one in sources if one.name == COMPARISON.name), None),
        rows=rows,
        titles=[title for title in titles if any(row.columns[title].text for row in rows)],
        ranked=RANKED,
        verdicts=get_args(Verdict),
        plotly=base64.b64encode(gzip.compress(plotly.encode(), mtime=0)).decode(),
        script=Markup(script),
        digests=[digest(plotly), digest(script)],
        style=Markup((TEMPLATES / "page.css").read_text()),
    )


def write_page(path: Path, papers: Sequence[str], comparison: Path = COMPARISON) -> None:
    """Write the page.

    Raises:
        ConfigurationError: If a file is damaged.
        RunDirectoryError: If it cannot be written.
    """
    write_text_atomically(path, render(gather(papers, comparison)))
