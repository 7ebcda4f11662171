"""Run a part of the tests on the Python that runs this, and write what came of it, with what was installed.

    make pythons PYTHON=python3.13 VENV=.venv-3.13        or: .venv-3.13/bin/python -m scripts.pythons [TESTS]

The result goes into docs/records/pythons.json under the Python's name; `python scripts/versions.py --render` makes the
table of docs/versions.md from it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from experiments.measuring import processor, stamp

import shadowpeft
from shadowpeft.storage import write_text

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs/records/pythons.json"
TESTS = ("tests/unit", "tests/adapters", "tests/serve", "tests/export", "tests/ways")
"""The default run's parts that touch the standard library and compiled packages most."""
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy", "pydantic", "typer", "fastapi", "pytest")


def counted(report: Path) -> dict[str, Any]:
    """Counts of pytest's XML report, and the names of what failed."""
    root = ElementTree.parse(report).getroot()
    cases = list(root.iter("testcase"))
    failed = [f"{c.get('classname')}::{c.get('name')}" for c in cases if {"failure", "error"} & {part.tag for part in c}]
    skipped = sum(any(part.tag == "skipped" for part in c) for c in cases)
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}


def run(tests: list[str], workers: str) -> dict[str, Any]:
    """Run the tests here, and count."""
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", workers, "--dist", "loadfile", "--tb=short"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        began = time.perf_counter()
        done = subprocess.run([*command, f"--junitxml={report}", *tests], cwd=ROOT, env=environment, check=False)
        seconds = round(time.perf_counter() - began)
        if done.returncode not in (0, 1):
            sys.exit(f"pytest ended with {done.returncode}: nothing is recorded")
        return {**counted(report), "seconds": seconds}


def main() -> None:
    """Run, and put the result beside those of the other Pythons."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tests", nargs="*", default=TESTS)
    parser.add_argument("--workers", default="2", help="processes of pytest")
    arguments = parser.parse_args()
    result = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "from_a_wheel": ROOT / "src" not in Path(shadowpeft.__file__).resolve().parents,
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "tests": list(arguments.tests),
        **run(list(arguments.tests), arguments.workers),
        **stamp(),
    }
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    record[".".join(platform.python_version_tuple()[:2])] = result
    ordered = dict(sorted(record.items(), key=lambda row: [int(part) for part in row[0].split(".")]))
    write_text(RECORD, json.dumps(ordered, indent=2) + "\n")
    print(f"Python {result['python']}: {result['passed']} passed, {len(result['failed'])} failed, {result['skipped']} skipped")


if __name__ == "__main__":
    main()
