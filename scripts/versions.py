"""Run a part of the tests with other releases of transformers, PEFT and TRL, and write which of them work.

    python scripts/versions.py [--only transformers-5.20] [--work build/versions] [--render]

Each environment is this one with one to three packages replaced: the other releases are installed without their
dependencies into a folder of their own, which comes first on the import path. torch stays the installed one. The result of
every environment goes into docs/records/versions.json, the table into docs/versions.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.markdown import table
from experiments.measuring import releases, stamp

from shadowpeft import versions
from shadowpeft.storage import write_text

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "docs/records/versions.json", ROOT / "docs/versions.md"
PYTHONS = ROOT / "docs/records/pythons.json"
CORE = ["tests/unit/test_equality.py", "tests/unit/test_generation.py", "tests/unit/test_persistence.py"]
ADAPTERS = ["tests/unit/test_adapters.py", "tests/unit/test_detach.py"]
TRAINERS = ["tests/integration/test_trainers.py"]
ALL = [*CORE, *ADAPTERS, *TRAINERS]
ENVIRONMENTS: dict[str, tuple[list[str], list[str]]] = {
    "newest": ([], ALL),
    "transformers-5.22": (["transformers==5.22.2"], ALL),
    "transformers-5.21": (["transformers==5.21.1"], ALL),
    "transformers-5.20": (["transformers==5.20.2"], ALL),
    "transformers-5.19": (["transformers==5.19.0"], ALL),
    "peft-0.21.0": (["peft==0.21.0"], ALL),
    "peft-0.20": (["peft==0.20.0"], ALL),
    "peft-0.19": (["peft==0.19.1"], ALL),
    "peft-0.18": (["peft==0.18.1"], ALL),
    "trl-1.15": (["trl==1.15.0"], TRAINERS),
    "trl-1.14": (["trl==1.14.2"], TRAINERS),
    "trl-1.13": (["trl==1.13.0"], TRAINERS),
    "trl-1.12": (["trl==1.12.0"], TRAINERS),
    "oldest": (["transformers==5.20.0", "peft==0.21.0", "trl==1.16.0"], ALL),
}
"""Name -> (replaced packages, tests)."""
UNCHECKED = (
    "import sys, pytest\n"
    "from shadowpeft import versions\n"
    "versions.check = lambda *packages: None\n"
    "sys.exit(pytest.main(sys.argv[1:]))\n"
)
"""pytest with the package's own limits lifted: what it refuses is run here too, to see whether the limits are right."""


def install(folder: Path, packages: list[str]) -> None:
    """The releases in a folder, without dependencies, once."""
    wanted = {p.replace("==", "-") for p in packages}
    if packages and not wanted <= {f.name.removesuffix(".dist-info") for f in folder.glob("*.dist-info")}:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
        subprocess.run(command, check=True)


def run(name: str, work: Path) -> dict[str, Any]:
    """Install one environment, run its tests, count."""
    packages, tests = ENVIRONMENTS[name]
    folder = work / name
    install(folder, packages)
    path = os.pathsep.join(str(p) for p in (folder, ROOT / "src", ROOT / "tests"))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ask = (
        "import json; from importlib.metadata import version as v\n"
        "print(json.dumps({n: v(n) for n in ('torch', 'transformers', 'peft', 'trl', 'accelerate')}))"
    )
    used = subprocess.run(
        [sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True
    ).stdout
    began = time.perf_counter()
    command = [sys.executable, "-c", UNCHECKED, "-q", "--tb=line", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    seconds = round(time.perf_counter() - began)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.M)
    marks = re.findall(r"^([.FEsxX]+)(?: +\[ *\d+%\])?$", done.stdout, flags=re.M)
    passed = sum(line.count(".") for line in marks)
    reasons = re.findall(r"^E? *\S*?((?:\w+\.)*\w*(?:Error|Exception): .*)$", done.stdout + done.stderr, flags=re.M)
    return {
        "replaced": packages,
        "versions": json.loads(used),
        "tests": tests,
        "passed": passed,
        "failed": failed,
        "first_reason": reasons[0][:300] if reasons else None,
        "exit": done.returncode,
        "seconds": seconds,
        **stamp(),
    }


def page(record: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        "# Versions",
        "",
        "Which releases work: `make versions` installs each of them beside the others, runs the tests of equality with a naive",
        "loop, generation, persistence, adapters, detaching and trainers (TRL rows: trainers), and writes this page. The",
        "limits that the package enforces are in `shadowpeft/versions.py`: older than the oldest is refused when PEFT is",
        "imported, newer than the newest gives one warning. `shadowpeft doctor` prints them beside what is installed. torch",
        "was 2.13 throughout; its lower bound, 2.6, is that of the dependencies and was not run.",
        "",
        f"Record: [records/versions.json](records/versions.json). Python {record['python']}, {record['platform']}.",
        "",
    ]
    rows, notes = [], []
    for name, row in record["environments"].items():
        v = row["versions"]
        share = row["passed"] / max(1, row["passed"] + len(row["failed"]))
        verdict = (
            "works" if row["exit"] == 0 else "works but for what is named below" if share > 0.9 else "does not work"
        )
        limits = {n: versions.TESTED[n].oldest for n in ("transformers", "peft", "trl")}
        inside = all(versions.release(v[n]) >= versions.release(oldest) for n, oldest in limits.items())
        passed, failed = str(row["passed"]), str(len(row["failed"]))
        within = "yes" if inside else "no"
        rows.append([v["transformers"], v["peft"], v["trl"], passed, failed, verdict, within, row["date"]])
        if row["exit"]:
            tests = sorted({f.split("::")[-1].split("[")[0] for f in row["failed"]})
            shown = ", ".join(tests[:6]) + (f" and {len(tests) - 6} more" if len(tests) > 6 else "")
            notes.append(f"- `{name}`: {shown}. First reason: `{row['first_reason']}`")
    header = ["transformers", "PEFT", "TRL", "passed", "failed", "verdict", "within the limits", "date"]
    lines += table(header, rows)
    if notes:
        lines += ["", "## What fails", "", *notes]
    return "\n".join(lines) + "\n"


def pythons(record: dict[str, Any]) -> str:
    """What scripts/pythons.py recorded, as a section of the page."""
    lines = [
        "",
        "## Pythons",
        "",
        "`make pythons PYTHON=python3.13 VENV=.venv-3.13` makes an environment of its own with the constraints' releases, runs",
        "these parts of the tests in it, and records the result in [records/pythons.json](records/pythons.json).",
        "",
    ]
    header = ["Python", "torch", "transformers", "numpy", "installed", "parts", "passed", "failed", "skipped", "date"]
    rows = []
    for row in record.values():
        parts = " ".join(f"`{part}`" for part in row["tests"])
        counts = [str(row["passed"]), str(len(row["failed"])), str(row["skipped"])]
        found = row["versions"]
        source = "wheel" if row["from_a_wheel"] else "clone"
        about = [row["python"], *(found[name] for name in ("torch", "transformers", "numpy")), source]
        rows.append([*about, parts, *counts, row["date"]])
    lines += table(header, rows)
    failures = {row["python"]: Counter(name.partition("[")[0] for name in row["failed"]) for row in record.values()}
    notes = [
        f"- {python} failed: " + ", ".join(f"`{name}`" + (f" ({n} times)" if n > 1 else "") for name, n in names.items())
        for python, names in failures.items()
        if names
    ]
    notes += [f"- {row['python']}, {row['since']}." for row in record.values() if "since" in row]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def main() -> None:
    """Run the environments and write record and page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", action="append", choices=list(ENVIRONMENTS), help="repeatable; default: all")
    parser.add_argument("--render", action="store_true", help="only write the page of what is recorded")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "versions")
    arguments = parser.parse_args()
    record: dict[str, Any] = (
        json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {"environments": {}}
    )
    record["python"], record["platform"] = platform.python_version(), f"{platform.system()} {platform.machine()}"
    record.update(releases("torch"))
    for name in [] if arguments.render else arguments.only or ENVIRONMENTS:
        result = run(name, arguments.work)
        record["environments"][name] = result
        ordered = {n: record["environments"][n] for n in ENVIRONMENTS if n in record["environments"]}
        record["environments"] = ordered
        write_text(RECORD, json.dumps(record, indent=2) + "\n")
        print(f"{name}: {result['passed']} passed, {len(result['failed'])} failed, {result['seconds']} s", flush=True)
    write_text(PAGE, page(record) + pythons(json.loads(PYTHONS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
