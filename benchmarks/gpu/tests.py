"""The tests that need a GPU, in a process of their own."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.journal import Row
from benchmarks.gpu.parts import ROOT, Measurements, Setting

MARK = "pytest.mark.gpu"


def measurements(setting: Setting) -> Measurements:
    """One: pytest on the files that have such tests."""
    paths = sorted(ROOT.glob("tests/**/test_*.py"))
    files = [str(path) for path in paths if MARK in path.read_text(encoding="utf-8")]
    return {"pytest -m gpu": partial(_tested, setting, files)}


def _tested(setting: Setting, files: list[str]) -> Row:
    report = setting.runs / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--junitxml={report}", *files], cwd=ROOT, capture_output=True, text=True
    )
    (setting.runs / "tests.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    if not report.is_file():
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"pytest wrote no report: {last}")
    found = counted(report)
    if found["failed"]:
        raise RuntimeError(f"{found['summary']} (log in {setting.runs / 'tests.txt'})")
    return found


def counted(report: Path) -> Row:
    """Counts of a report in JUnit's format, and the names of tests that failed."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - skipped - len(failed)
    summary = f"{passed} passed, {skipped} skipped, {len(failed)} failed"
    return {
        "passed": passed,
        "skipped": skipped,
        "failed": failed,
        "summary": ": ".join([summary, *([", ".join(failed)] if failed else [])]),
    }
