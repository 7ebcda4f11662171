"""The notebooks: valid, small, made of names that exist; and run from the first cell to the last with -m notebooks."""

from __future__ import annotations

import ast
import importlib
import json
import os
import time
from pathlib import Path

import pytest

from shadowpeft import cli

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
MINUTES = 5
"""On two idle cores; a machine that does other work takes longer, so the run below is given three times as long."""


def code(file: Path) -> list[str]:
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_there_are_three():
    assert [file.stem for file in FILES] == ["finetune_and_detach", "own_commands", "serve_and_route"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_file_is_valid_and_small(file):
    content = json.loads(file.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) >= (4, 5)
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    assert content["cells"][0]["cell_type"] == "markdown"
    assert "".join(content["cells"][0]["source"]).startswith("# ")
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in content["cells"] if "outputs" in cell)
    assert file.stat().st_size < 20_000


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_the_code_imports_and_calls_exists(file):
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    commands |= {group.typer_instance.info.name for group in cli.app.registered_groups}
    for cell in code(file):
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                missing = [
                    name.name
                    for name in node.names
                    if not hasattr(module, name.name) and importlib.util.find_spec(f"{node.module}.{name.name}") is None
                ]
                assert missing == []
            elif isinstance(node, ast.Import):
                assert all(importlib.import_module(name.name) for name in node.names)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "shadowpeft":
                assert node.args[0].value in commands
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "shadowpeft":
                assert hasattr(importlib.import_module("shadowpeft"), node.attr)


@pytest.mark.notebooks
@pytest.mark.timeout(60 * 3 * MINUTES + 60)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_notebook_runs(file, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    monkeypatch.setenv("SHADOWPEFT_RADIO", str(ROOT / "examples" / "radio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    began = time.perf_counter()
    client = nbclient.NotebookClient(
        notebook, timeout=60 * 3 * MINUTES, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    seconds = time.perf_counter() - began
    print(f"{file.stem}: {seconds:.0f} s")
    said = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert said.strip()
    if keep := os.environ.get("SHADOWPEFT_NOTEBOOKS"):  # a folder for what was run, to look at
        nbformat.write(notebook, Path(keep) / file.name)
    assert seconds < 60 * 3 * MINUTES
