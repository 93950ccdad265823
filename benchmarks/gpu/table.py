"""The results of a device as Markdown."""

from typing import Any

from benchmarks.gpu.journal import DONE, UNFINISHED, Journal, Row
from benchmarks.report import table
from benchmarks.training import BASE
from common.files import write_text_atomically

TITLES = {
    "tests": "Tests marked gpu",
    "papers": "Verdicts of short runs, on the device and on the CPU",
    "steps": "Steps of adversarial training, PGD-10",
    "autoattack": "AutoAttack and strong, ResNet-18 on digits of 32x32, linf eps 0.1, float32",
    "waits": "Where the host waits for the device",
    "epochs": "Epochs on Fashion-MNIST",
}
EAGER = "fp32"


def write(journal: Journal) -> str:
    """Render the figures beside them; returns the text."""
    text = rendered(journal.whole())
    write_text_atomically(journal.path.with_suffix(".md"), text)
    return text


def rendered(whole: dict[str, Any]) -> str:
    """All parts as Markdown."""
    about = whole["machine"]
    lines = [f"# Benchmarks on {about['processor']}", "", _described(about), ""]
    for part, title in TITLES.items():
        rows: dict[str, Row] = whole["parts"].get(part, {})
        lines += [f"## {title}", ""]
        if part == "steps":
            lines += _steps(rows)
        shown = [
            [key, "" if row["state"] == DONE else row["state"], row.get("summary", "")]
            for key, row in rows.items()
        ]
        lines += [*table(["what", "", "found"], shown, words=(0, 1, 2)), ""]
    return "\n".join(lines)


def _described(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items() if value)
    more = ", ".join(f"{name} {about[name]}" for name in ("cuda", "cudnn") if name in about)
    return f"Python {about['python']}, {versions}{', ' if more else ''}{more}; {about['date']}."


def _steps(rows: dict[str, Row]) -> list[str]:
    """Goals, then one table per network and batch."""
    found = [row for row in rows.values() if row["state"] in (DONE, UNFINISHED) and "net" in row]
    if not found:
        return []
    peaks = rows.get("peaks", {}).get("gflops", {})
    lines = [*table(["network, batch", "goal", "measured", ""], goals(found)), ""]
    for net, batch in dict.fromkeys((row["net"], row["batch"]) for row in found):
        groups = [row for row in found if (row["net"], row["batch"]) == (net, batch)]
        base = _eager(groups)
        cells = [
            _cells(name, row, group["numerics"], base, peaks)
            for group in groups
            for name, row in group["rows"].items()
        ]
        cells += [
            [name, group["numerics"], why, *[""] * 4]
            for group in groups
            for name, why in group["missing"].items()
        ]
        head = [f"{net}, batch {batch}", "numerics", "images/s", f"/ {BASE}"]
        head += [f"/ {BASE} in {EAGER}", "peak memory, GB", "of the matrix peak"]
        lines += [*table(head, cells, words=(0, 1)), ""]
    return lines


def _eager(groups: list[Row]) -> float | None:
    """Images per second of the bare loop in float32, not compiled."""
    rates = [g["rows"][BASE]["images_per_s"] for g in groups
             if g["numerics"] == EAGER and BASE in g["rows"]]  # fmt: skip
    return rates[0] if rates else None


def _cells(
    name: str, row: Row, numerics: str, base: float | None, peaks: dict[str, float]
) -> list[str]:
    memory, peak = row.get("peak_memory_mb"), peaks.get(f"matmul {numerics}")
    return [
        name,
        numerics,
        f"{row['images_per_s']:.0f}",
        f"{1 / row['ratio']:.2f}" if "ratio" in row else "",
        "" if base is None else f"{row['images_per_s'] / base:.2f}",
        "" if memory is None else f"{memory / 1000:.2f}",
        "" if peak is None else f"{100000 * row['tflops'] / peak:.0f} %",
    ]


def goals(found: list[Row]) -> list[list[str]]:
    """Our throughput over the bare loop's at its least, and at its best over that in float32.

    The first is over the modes: numerics, not compiled or compiled, and always of our best
    candidate over the best bare loop.
    """
    rows = []
    for net, batch in dict.fromkeys((row["net"], row["batch"]) for row in found):
        groups = [row for row in found if (row["net"], row["batch"]) == (net, batch)]
        ratios = [ours / loop for g in groups if (ours := _best(g, "ours"))
                  and (loop := _best(g, BASE))]  # fmt: skip
        bests = [ours for group in groups if (ours := _best(group, "ours"))]
        base = _eager(groups)
        where = f"{net}, {batch}"
        for goal, value, bound in (
            (f"least / {BASE} in the same mode", min(ratios, default=None), 0.9),
            (f"most / {BASE} in {EAGER}", max(bests) / base if bests and base else None, 3.0),
        ):
            verdict = "not measured"
            if value is not None:
                verdict = "reached" if value >= bound else "not reached"
            shown = "" if value is None else f"{value:.2f}"
            rows.append([where, f"{goal} ≥ {bound:g}", shown, verdict])
    return rows


def _best(group: Row, beginning: str) -> float | None:
    rates = [r["images_per_s"] for name, r in group["rows"].items() if name.startswith(beginning)]
    return max(rates, default=None)
