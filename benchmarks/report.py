"""Results as JSON, and as the tables people read."""

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import goals
from common.analysis.profiling import device_name
from common.files import write_json_atomically, write_text_atomically
from common.limits import read_json
from common.results.markdown import write_readme

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    *("torch", "lightning", "pyautoattack", "torchattacks", "foolbox"),
    "adversarial-robustness-toolbox",
)


def machine(device: str) -> dict[str, Any]:
    """What the numbers belong to."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "processor": device_name(device),
        "threads": torch.get_num_threads(),
        "bf16_units": _bf16_units(),
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _bf16_units() -> str:
    has = torch.cpu.get_capabilities()
    if has.get("amx_bf16", False):
        return "AMX"
    return "AVX-512 dot products" if has.get("avx512_bf16", False) else "none"


def write(name: str, section: str, found: Any, device: str) -> Path:
    """Put one section's findings beside the others and render all of them again."""
    path = RESULTS / f"{name}.json"
    whole = read_json(path) if path.is_file() else {}
    whole[section] = {"machine": machine(device), "found": found}
    write_json_atomically(path, whole)
    write_text_atomically(path.with_suffix(".md"), rendered(name, whole))
    readme = RESULTS.parent / "README.md"
    if name == "cpu" and readme.is_file():
        for block, lines in summary(whole).items():
            write_readme(readme, "\n".join(lines), f"<!-- {block} -->", f"<!-- /{block} -->")
    return path


def summary(whole: dict[str, Any]) -> dict[str, list[str]]:
    """What the README shows of the results on a CPU, by the names of the markers around it."""
    found: dict[str, list[str]] = {}
    if "training" in whole:
        found["goals"] = table(["what", "goal", "measured", ""], goals.rows(whole))
    if "accuracy" in whole:
        found["accuracy"] = _accuracy(whole["accuracy"]["found"])
    return found


def rendered(name: str, whole: dict[str, Any]) -> str:
    """All sections as Markdown."""
    lines = [f"# Benchmarks on {name}", ""]
    if "training" in whole:
        lines += ["## Goals", "", *table(["what", "goal", "measured", ""], goals.rows(whole)), ""]
    for section, render in SECTIONS.items():
        if section not in whole:
            continue
        about = whole[section]["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v)
        lines += [f"## {section.capitalize()}", ""]
        lines += render(whole[section]["found"])
        lines += [
            "",
            f"{about['processor']}, {about['threads']} thread(s), bf16 units: "
            f"{about['bf16_units']}; {versions}; {about['date']}.",
            "",
        ]
    return "\n".join(lines)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table, all columns but the first to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in [head, rule, *rows]]


def _training(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{found['setting']}; {found['rounds']} rounds in turns, ratios of processor time.",
        "",
    ]
    rows = []
    for name, row in found["rows"].items():
        passes = row.get("passes")
        counts = "/".join(str(n) for n in passes.values()) if passes else ""
        rows.append(
            [
                name,
                f"{row['ratio']:.3f}",
                f"{row['lower']:.3f} to {row['upper']:.3f}",
                f"{row['images_per_s']:.1f}",
                counts,
                f"{100 * row['pixels_apart']:.2f} %",
                f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else "",
                f"{100 * row['of_conv_peak']:.0f} %",
                f"{100 * row['of_matmul_peak']:.0f} %",
            ]
        )
    head = ["step", "time / bare loop", "quartiles", "images/s"]
    head += ["forward/backward/weight passes", "pixels other than the bare loop's (PGD-3)"]
    head += ["peak memory / bare loop", "of the convolution peak", "of the matrix peak"]
    lines += table(head, rows)
    lines += [""] + [f"- {name} did not run: {why}" for name, why in found["missing"].items()]
    peak = ", ".join(f"{name} {value:.0f}" for name, value in found["peaks_gflops"].items())
    return [*lines, "", f"Measured peaks in GFLOP/s: {peak}."]


def _evaluation(found: dict[str, Any]) -> list[str]:
    lines = [found["setting"] + "."]
    for title, key in (("AutoAttack standard", "autoattack"), ("PGD-100", "pgd100")):
        rounds = found[key]["rounds"]
        head = [f"{title}, {rounds} round(s)", "time / first", "quartiles", "images classified"]
        head += ["robust", "broken here alone", "broken there alone"]
        counts = ("images", "robust", "broken_here_alone", "broken_there_alone")
        rows = [
            [
                name,
                f"{row['ratio']:.3f}",
                f"{row['lower']:.3f} to {row['upper']:.3f}" if rounds > 1 else "",
                *(str(row.get(k, "")) for k in counts),
            ]
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

    rows = [
        [name, *percent(row, "clean"), *percent(row, "worst")]
        for name, row in found["rows"].items()
    ]
    difference = "difference, 95 % interval (Welch)"
    head = ["training attack", "clean %", difference, "p", "worst case %", difference, "p"]
    return [f"{found['setting']}; mean ± standard deviation.", "", *table(head, rows)]


def _overheads(found: dict[str, Any]) -> list[str]:
    rows = [
        [f"step through Lightning / bare: {row['setting']}; {row.get('steps', '')} steps",
         f"{row['ratio']:.4f}", f"{row['lower']:.4f} to {row['upper']:.4f}"]
        for row in found["lightning"]
    ]  # fmt: skip
    rows += [
        [f"fetching and augmenting, share of the time: {row['setting']}",
         f"{100 * row['data_share']:.2f} %", ""]
        for row in found["lightning"]
        if "data_share" in row
    ]  # fmt: skip
    rows += [[f"import {k}, CPU s", f"{v:.2f}", ""] for k, v in found["imports"].items()]
    rows += [[f"command line: {k}", f"{v:.2f}", ""] for k, v in found["command_line"].items()]
    return table(["what", "value", "quartiles"], rows)


def _growth(found: dict[str, Any]) -> list[str]:
    lines = [found["setting"] + ".", ""]
    rows = []
    for axis in ("batch", "steps", "network"):
        seconds = ", ".join(f"{k}: {v:.3g}" for k, v in found[axis]["seconds"].items())
        power = found[axis].get("exponent")
        rows.append([axis, seconds, "" if power is None else f"{power:.2f}"])
    return lines + table(["along", "seconds", "exponent"], rows)


SECTIONS = {
    "training": _training,
    "evaluation": _evaluation,
    "accuracy": _accuracy,
    "overheads": _overheads,
    "growth": _growth,
}
