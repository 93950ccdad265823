"""Results as JSON, and as the tables people read."""

import platform
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import goals
from common.files import write_json_atomically, write_text_atomically
from common.limits import read_json
from common.results.markdown import write_readme
from common.results.provenance import device_name
from common.versions import cpu_capabilities

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    *("torch", "lightning", "pyautoattack", "torchattacks", "foolbox"),
    "adversarial-robustness-toolbox",
)


def machine(device: str) -> dict[str, Any]:
    """What the numbers belong to."""
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    has = cpu_capabilities()
    units = "AVX-512 dot products" if has.get("avx512_bf16", False) else "none"
    return {
        "processor": device_name(device),
        "threads": torch.get_num_threads(),
        "bf16_units": "AMX" if has.get("amx_bf16", False) else units,
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine_text(about: Mapping[str, Any]) -> str:
    """Processor and versions in one line, without the date."""
    versions = ", ".join(f"{name} {found}" for name, found in about["versions"].items() if found)
    return (
        f"{about['processor']}, {about['threads']} thread(s), bf16 units: {about['bf16_units']}; "
        f"Python {about['python']}, {versions}"
    )


def write(name: str, section: str, device: str, found: Any) -> None:
    """Put one section's findings beside the others and render all of them again."""
    path = RESULTS / f"{name}.json"
    whole = read_json(path) if path.is_file() else {}
    whole[section] = {"machine": machine(device), "found": found}
    write_json_atomically(path, whole)
    write_text_atomically(path.with_suffix(".md"), rendered(name, whole))


def write_row(path: Path, row: Row) -> list[Row]:
    """Put a row beside the others of a file, in place of one of its name, and return all."""
    rows = read_json(path)["rows"] if path.is_file() else {}
    rows[row["name"]] = row | {"machine": machine_text(machine("cpu"))}
    write_json_atomically(path, {"rows": rows})
    return list(rows.values())


def measured_on(rows: Iterable[Row]) -> str:
    """The machines of rows as a paragraph."""
    return "; ".join(dict.fromkeys(row["machine"] for row in rows)) + "."


def write_blocks(path: Path, blocks: Mapping[str, str]) -> None:
    """Replace the parts of a text, each between comments with its name."""
    for name, text in blocks.items():
        write_readme(path, text, f"<!-- {name} -->", f"<!-- /{name} -->")


def rendered(name: str, whole: dict[str, Any]) -> str:
    """All sections as Markdown."""
    lines = [f"# Benchmarks on {name}", ""]
    if "training" in whole:
        head = ["what", "goal", "measured", ""]
        lines += ["## Goals", "", *table(head, goals.rows(whole)), ""]
    for section, render in SECTIONS.items():
        if section not in whole:
            continue
        about = whole[section]["machine"]
        lines += [f"## {section.capitalize()}", "", *render(whole[section]["found"]), ""]
        lines += [f"{machine_text(about)}; {about['date']}.", ""]
    return "\n".join(lines)


def table(head: list[str], rows: list[list[str]], words: Collection[int] = (0,)) -> list[str]:
    """A Markdown table; ``words`` are the places of its columns of text, the others are numbers."""
    rule = ["---" if place in words else "---:" for place in range(len(head))]
    return ["| " + " | ".join(cells) + " |" for cells in [head, rule, *rows]]


def _span(row: dict[str, Any], digits: int = 3) -> str:
    return f"{row['lower']:.{digits}f} to {row['upper']:.{digits}f}"


def _training(found: dict[str, Any]) -> list[str]:
    cells: dict[str, Callable[[str, Any], str]] = {
        "step": lambda name, row: name,
        "time / bare loop": lambda name, row: f"{row['ratio']:.3f}",
        "quartiles": lambda name, row: _span(row),
        "images/s": lambda name, row: f"{row['images_per_s']:.1f}",
        "forward/backward/weight passes": lambda name, row: "/".join(
            str(n) for n in row.get("passes", {}).values()
        ),
        "pixels other than the bare loop's (PGD-3)": lambda name, row: (
            f"{100 * row['pixels_apart']:.2f} %"
        ),
        "peak memory / bare loop": lambda name, row: (
            f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else ""
        ),
        "of the convolution peak": lambda name, row: f"{100 * row['of_conv_peak']:.0f} %",
        "of the matrix peak": lambda name, row: f"{100 * row['of_matmul_peak']:.0f} %",
    }
    rows = [[cell(*item) for cell in cells.values()] for item in found["rows"].items()]
    peak = ", ".join(f"{name} {value:.0f}" for name, value in found["peaks_gflops"].items())
    return [
        f"{found['setting']}; {found['rounds']} rounds in turns, ratios of processor time.",
        "",
        *table(list(cells), rows),
        "",
        *(f"- {name} did not run: {why}" for name, why in found["missing"].items()),
        "",
        f"Measured peaks in GFLOP/s: {peak}.",
    ]


def _evaluation(found: dict[str, Any]) -> list[str]:
    counts = ("images", "robust", "broken_here_alone", "broken_there_alone")
    lines = [found["setting"] + "."]
    for title, key in (("AutoAttack standard", "autoattack"), ("PGD-100", "pgd100")):
        if key not in found:
            continue
        rounds = found[key]["rounds"]
        head = [f"{title}, {rounds} round(s)", "time / first", "quartiles", "images classified"]
        head += ["robust", "broken here alone", "broken there alone"]
        rows = [
            [name, f"{row['ratio']:.3f}", _span(row) if rounds > 1 else ""]
            + [str(row[count]) for count in counts]
            for name, row in found[key]["rows"].items()
        ]
        lines += ["", *table(head, rows)]
    return lines


def _accuracy(found: dict[str, Any]) -> list[str]:
    def percent(row: dict[str, float | None], key: str) -> list[str]:
        mean, spread = row[key], row[f"{key}_std"]
        text = f"{100 * (mean or 0.0):.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")
        low, high, p = (row.get(f"{key}_{name}") for name in ("low", "high", "p"))
        if low is None or high is None:
            return [text, "", ""]
        return [text, f"{100 * low:+.2f} to {100 * high:+.2f}", "" if p is None else f"{p:.2f}"]

    rows = [[k, *percent(row, "clean"), *percent(row, "worst")] for k, row in found["rows"].items()]
    difference = "difference, 95 % interval (paired t)"
    head = ["training attack", "clean %", difference, "p", "worst case %", difference, "p"]
    return [f"{found['setting']}; mean ± standard deviation.", "", *table(head, rows)]


def _overheads(found: dict[str, Any]) -> list[str]:
    rows = []
    for row in found["lightning"]:
        what = f"step through Lightning / bare: {row['setting']}; {row['steps']} steps"
        rows.append([what, f"{row['ratio']:.4f}", _span(row, 4)])
    times = found.get("command_line", {}).items()
    rows += [[f"command line: {name}", f"{value:.2f}", ""] for name, value in times]
    return table(["what", "value", "quartiles"], rows)


def _growth(found: dict[str, Any]) -> list[str]:
    rows = []
    for axis in [axis for axis in ("batch", "steps", "network") if axis in found]:
        seconds = ", ".join(f"{k}: {v:.3g}" for k, v in found[axis]["seconds"].items())
        power = found[axis].get("exponent")
        rows.append([axis, seconds, "" if power is None else f"{power:.2f}"])
    return [found["setting"] + ".", "", *table(["along", "seconds", "exponent"], rows)]


SECTIONS = {
    "training": _training,
    "evaluation": _evaluation,
    "accuracy": _accuracy,
    "overheads": _overheads,
    "growth": _growth,
}
