"""Finished rows, their analysis and figures become the published results of a paper.

``python -m common.cli.publish paper_cifs --on digits --seeds "0 1 2"`` copies them from
``runs/paper_cifs`` to ``paper_cifs/results`` and renders the READMEs. Nothing is copied if a row is
missing, was made with other options than the committed config's or by uncommitted code, or if the
analysis was made from other results.
"""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.cli.rows import Row, parser_of, results_folder, rows_of
from common.errors import ConfigurationError, UserError, listed, output_may_close
from common.files import read_sealed_json, write_bytes_atomically, write_sealed_json
from common.packages import package_folder, reproduction
from common.results.provenance import code_changes
from common.results.published import Digests, digests
from common.results.reference import read_reference
from common.results.schema import Result
from common.results.selection import parse_seeds, select
from common.results.store import COSTS, load_results, read_costs, read_result
from common.results.tables import render_readmes


@dataclass
class Publication:
    """What is published of a paper.

    Attributes:
        package: Of the paper.
        on: The rows, as asked for.
        seeds: Their seeds, as asked for.
        files: What is copied, by the path below the published results.
        costs: Entries of experiments that are put among the published ones.
        refusals: Why nothing is copied; empty if all is well.
        notes: What else the user should know.
    """

    package: str
    on: str
    seeds: str
    files: dict[str, Path] = field(default_factory=dict)
    costs: dict[str, Any] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def fresh(self) -> Path:
        """Where the analysis and figures are taken from."""
        return results_folder(self.package)

    @property
    def published(self) -> Path:
        """Where all is copied to."""
        return package_folder(self.package) / "results"

    def add_rows(self) -> None:
        """The results of the rows, and the analyses that are about them."""
        rows = rows_of(self.package, self.on, parse_seeds(self.seeds))
        labels = read_reference(package_folder(self.package) / "reference.yaml").checkpoints
        results = []
        for row in rows:
            result, problem = _result_of(row, labels)
            if result is None:
                self.refusals.append(f"{row} {problem}")
            else:
                results.append(result)
                self.files[row.result.name] = row.run / "results.json"
                picture = row.run / "figures" / "last_examples.png"
                if picture.is_file():  # of the first seed
                    self.files.setdefault(f"figures/{row.stem}_examples.png", picture)
        if not self.refusals:
            self.add_analyses(digests(results))

    def add_analyses(self, added: Digests) -> None:
        """The analyses made from exactly the results that will be published, and their figures.

        One made from others is left out if the results do not change, and refused if they do.
        """
        before = digests(load_results(self.published))
        changed = {name for name in added if before.get(name) != added[name]}
        for path in sorted(self.fresh.glob("analysis*.json")):
            report = _read(path)
            scope = _of_rows(before | added, report["on"])
            if not scope.keys() & added.keys():
                continue
            made_of = _of_rows(report["made_of"], report["on"])
            if made_of == scope:
                self._add_analysis(path, report)
                changed -= scope.keys()
                continue
            others = listed(sorted({name for name, _ in made_of.items() ^ scope.items()}))
            if changed & scope.keys():
                self.refusals.append(
                    f"{path} was made from other results than would be published ({others}); run "
                    f"{reproduction(self.package, report['on'])} with all seeds that are published"
                )
                changed -= scope.keys()
            else:
                self.notes.append(f"{path.name} stays as it is: the new one differs in {others}")
        if changed and (package_folder(self.package) / "analysis.py").is_file():
            self.refusals.append(
                f"{listed(sorted(changed))} are in no analysis; "
                f"run {reproduction(self.package, self.on)}"
            )

    def _add_analysis(self, path: Path, report: Mapping[str, Any]) -> None:
        """An analysis and its figures."""
        self.files[path.name] = path
        for figure in report["figures"]:
            name = f"figures/{Path(figure).name}"
            self.files[name] = self.fresh / name
            if not self.files[name].is_file():
                self.refusals.append(
                    f"{self.files[name]} is missing; run {reproduction(self.package, self.on)}"
                )
        published = self.published / path.name
        known = _read(published)["missing"] if published.is_file() else []
        lost = [what for what in report["missing"] if what not in known]
        self.notes += [f"{path.name} lacks {what}" for what in lost]

    def add_costs(self) -> None:
        """Costs of the rows' data sets, where all published ones were measured again."""
        costs, before = read_costs(self.fresh), read_costs(self.published)
        entries = read_sealed_json(self.fresh / COSTS)["experiments"] if costs else {}
        chosen = {row.stem for row in rows_of(self.package, self.on, parse_seeds(self.seeds))}
        for dataset in sorted({stem.partition("_")[0] for stem in chosen & costs.keys()}):
            known, measured = (
                {stem for stem in found if stem.partition("_")[0] == dataset}
                for found in (before, costs)
            )
            if known <= measured:
                self.costs |= {stem: entries[stem] for stem in measured}
                figure = f"figures/{dataset}_cost.png"
                if (self.fresh / figure).is_file():
                    self.files[figure] = self.fresh / figure
            else:
                self.files.pop(f"figures/{dataset}_cost.png", None)
                self.notes.append(f"costs stay: not all of {dataset} were measured again")

    def write(self) -> None:
        """Copy everything, each file atomically, and render the READMEs."""
        for name, path in self.files.items():
            write_bytes_atomically(self.published / name, path.read_bytes())
        if self.costs:
            path = self.published / COSTS
            known = read_sealed_json(path)["experiments"] if path.is_file() else {}
            merged = dict(sorted((known | self.costs).items()))
            write_sealed_json(path, {"schema": 1, "experiments": merged})
        render_readmes(self.package)


def _read(path: Path) -> dict[str, Any]:
    try:
        report = {"figures": [], "made_of": {}} | read_sealed_json(path)
        for key, kind in {"on": str, "figures": list, "made_of": dict, "missing": list}.items():
            if not isinstance(report[key], kind):
                raise TypeError(f"{key} is {report[key]!r:.80}")
        return report
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read ({type(error).__name__}: {error}); delete it and run the "
            "analysis again"
        ) from error


def _of_rows(digests: Digests, on: str) -> Digests:
    """Those of the rows of a selection."""
    stems = {name: name.rpartition("-seed")[0] for name in digests}
    chosen = set(select(set(stems.values()), on))
    return {name: digest for name, digest in digests.items() if stems[name] in chosen}


def _result_of(row: Row, labels: Sequence[str]) -> tuple[Result | None, str]:
    """The result of a row, or why it is not published."""
    if problem := row.problem:
        return None, problem
    try:
        result = read_result(row.run / "results.json")
    except UserError as error:
        return None, f"has no readable result: {error}"
    made = {key: result[key] for key in ("paper", "experiment", "seed")}
    if made != {"paper": row.package, "experiment": row.stem, "seed": row.seed}:
        return None, f"has the result of {made}"
    if lacking := [label for label in labels if label not in result["checkpoints"]]:
        return None, f"lacks the checkpoint {', '.join(lacking)}"
    for label, origin in result["provenance"].items():
        if origin.get("commit") is None:
            return None, f"was made outside of a git checkout ({label}); make it again in one"
        if origin.get("dirty"):
            return None, (
                f"was made with uncommitted changes of code or configs ({label}); remove {row.run} "
                "and make it again"
            )
    return result, ""


def _changed_code() -> Iterator[str]:
    changes = code_changes(Path.cwd())
    if changes is None:
        yield "this folder is no git checkout, so nobody can tell which code made the results"
    for path in changes or ():
        yield f"{path} has uncommitted changes; commit them, then make the rows again"


def main(argv: Sequence[str] | None = None) -> int:
    """Publish rows, or say why not; returns the exit status."""
    given = parser_of("common.cli.publish", __doc__).parse_args(argv)
    publication = Publication(given.package, given.on, given.seeds)
    try:
        publication.refusals += _changed_code()
        publication.add_rows()
        publication.add_costs()
        if publication.refusals:
            print(*(f"refused: {one}" for one in publication.refusals), sep="\n", file=sys.stderr)
            print(
                f"nothing was published; {reproduction(publication.package, given.on)} SEEDS="
                f"{shlex.quote(given.seeds)}, without ARGS, makes what is missing or old",
                file=sys.stderr,
            )
            return 1
        publication.write()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*publication.notes, sep="\n", end="\n" * bool(publication.notes))
    print(
        f"published {len(publication.files)} files in {publication.published} and rendered the "
        "READMEs; git diff shows what changed"
    )
    return 0


if __name__ == "__main__":
    with output_may_close():
        sys.exit(main())
