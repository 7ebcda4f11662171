"""What pages name in backticks is there: paths, modules, tests, make targets.

README's Python runs and it is short; the numbers of the rival are those of the record.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from chatbase import save_base
from pages import ROOT, links
from shadowpeft.hf.base import aliases

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGE = ROOT / "src" / "shadowpeft"
EXAMPLES = [ROOT / "examples" / name for name in ("home", "radio", "tools")]
PLACES = [ROOT, ROOT / "docs", ROOT / "tests", *EXAMPLES, PACKAGE, PACKAGE.parent]
PLACES += [path for path in (ROOT / "tests").iterdir() if path.is_dir()]
"""A page may leave out the folder that its subject makes plain."""
MADE = {"runs", "demo-output", "dist", "build", "site"}
"""What commands leave in a checkout; a fresh one has none of it."""
FOLDERS = {path.name for folder in (ROOT, PACKAGE) for path in folder.iterdir() if path.is_dir()} - MADE
_SPAN = re.compile(r"`([^`\n]+)`")
_WITH_SUFFIX = re.compile(r"(?<![\w./-])(?:[\w.-]+/)*[\w-]+\.(?:py|md|toml|yaml|txt|svg|cff)(?!\w)")
_IN_A_FOLDER = re.compile(rf"(?<![\w./-])(?:{'|'.join(sorted(FOLDERS))})(?:/[\w.-]+)+")
_MODULE = re.compile(r"(?<![\w./-])(?:shadowpeft|experiments|benchmarks|scripts)(?:\.\w+)+")
_TEST = re.compile(r"^test_\w+(?=\*?$)")
NOT_OURS = {
    "run.yaml": "a file of the reader's",
    "robot.yaml": "docs/edge.md tells the reader to write it",
    "script.py": "a file of the reader's",
    "skills.txt": "docs/routing.md tells the reader to write it",
    "table.md": "the system test writes it",
    "requests.md": "the system test writes it",
    ".venv/vllm/ready": "a target of the Makefile",
}
WITHOUT_ITS_LIBRARY = {
    "shadowpeft.apps.ray_serve": "imports Ray, an extra that the default run goes without",
    "shadowpeft.apps.lm_eval": "imports lm-eval, an extra that the default run goes without",
    "scripts.triton_compiled": "imports Triton, an extra that the default run goes without",
}
SPLITS = {"test_large", "test_normal"}
"""Of the robot set, not tests."""


def spans(page: Path) -> list[str]:
    return _SPAN.findall(re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_path_on_the_page_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {path for span in spans(page) for path in (*_WITH_SUFFIX.findall(span), *_IN_A_FOLDER.findall(span))}
    blocks = "\n".join(re.findall(r"^ *```.*?^ *```$", text, flags=re.M | re.S))
    named |= {path for path in _IN_A_FOLDER.findall(blocks) if path.split("/")[0] in ("examples", "scripts", "src")}
    missing = {path for path in named - NOT_OURS.keys() if not any((place / path).exists() for place in PLACES)}
    assert missing == set()
    targets = {target.split("#")[0] for target in links(text) if not target.startswith(("http", "#"))}
    assert {target for target in targets if not (page.parent / target).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_module_on_the_page_imports(page: Path) -> None:
    for name in {name for span in spans(page) for name in _MODULE.findall(span)}:
        module, parts = importlib.import_module(name.split(".")[0]), name.split(".")
        for i, part in enumerate(parts[1:], 2):
            if not hasattr(module, part):
                path = ".".join(parts[:i])
                if path in WITHOUT_ITS_LIBRARY:
                    assert importlib.util.find_spec(path), name
                    break
                importlib.import_module(path)
            module = getattr(module, part)


@pytest.fixture(scope="module")
def tests() -> set[str]:
    files = list((ROOT / "tests").rglob("test_*.py"))
    return {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_test_and_target_on_the_page_exists(page: Path, tests: set[str]) -> None:
    named = {span for span in spans(page) if _TEST.match(span)} - SPLITS
    starts = {name[:-1] for name in named if name.endswith("*")}
    assert {name for name in named if not name.endswith("*")} - tests == set()
    assert {start for start in starts if not any(name.startswith(start) for name in tests)} == set()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    asked = re.findall(r"(?:`|^)make ([\w-]+)", page.read_text(encoding="utf-8"), re.M)
    assert set(asked) - targets == set()


def test_readmes_python_runs(tmp_path, monkeypatch, capsys) -> None:
    folder = save_base(tmp_path / "base")
    monkeypatch.setattr(aliases, "materialise", lambda alias: {"smollm2-135m": folder}[alias])
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, flags=re.M | re.S)
    exec(compile(code, "README.md", "exec"), {})
    losses, answer = capsys.readouterr().out.split("\n", 1)
    assert losses.endswith(" LlamaForCausalLM")
    assert answer.strip()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_the_classifiers_other_numbers_are_those_of_the_records() -> None:
    folder = ROOT / "experiments" / "records" / "rivals"
    results = {p.stem: json.loads(p.read_text(encoding="utf-8"))["results"] for p in folder.glob("*.json")}
    robot = [results[name]["robot-svc-test_large"]["scores"] for name in ("robot-svc", "robot-svc-open")]
    classes = results["clinc150-svc"]["clinc150-svc"]["scores"]
    stated = [scores[key] for key in ("skill", "remote") for scores in robot]
    search = (ROOT / "docs" / "device-search.md").read_text(encoding="utf-8")
    for share in stated:
        assert f" {100 * share:.1f} %" in search
    compared = (ROOT / "docs" / "compared.md").read_text(encoding="utf-8")
    for share in classes.values():
        assert f" {100 * share:.1f} %" in compared
