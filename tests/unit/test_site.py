"""The documentation site without building it: navigation, links that leave docs/, what the docstrings become.

tests/site builds it (pytest -m site).
"""

from __future__ import annotations

import importlib
import re

import pytest
import yaml

from pages import ROOT

DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
REFERENCE = sorted((DOCS / "reference").glob("*.md"))


def leaves(item):
    if isinstance(item, str):
        return [item]
    return [leaf for each in (item.values() if isinstance(item, dict) else item) for leaf in leaves(each)]


def test_every_page_is_in_the_navigation_once():
    named = leaves(CONFIG["nav"])
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert sorted(named) == sorted(there)  # a new page needs a line in mkdocs.yml


def test_every_page_says_what_it_is_about():
    for name in leaves(CONFIG["nav"]):
        assert (DOCS / name).read_text(encoding="utf-8").startswith("# "), name


def test_nothing_is_fetched_from_elsewhere():
    assert CONFIG["theme"]["font"] is False
    assert CONFIG["strict"] is True
    assert CONFIG["extra"]["polyfills"] == ["iframe-worker.js"]  # the name by which the offline plugin leaves it alone
    assert (DOCS / "iframe-worker.js").is_file()
    assert all((DOCS / name).is_file() for name in CONFIG["extra_css"])
    assert all((ROOT / name).is_file() for name in CONFIG["hooks"])


@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.stem)
def test_what_the_reference_documents_exists_and_has_a_docstring(page):
    for path in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.M):
        module, _, name = path.rpartition(".")
        try:
            found = importlib.import_module(path)
        except ModuleNotFoundError:
            found = getattr(importlib.import_module(module), name)
        assert found.__doc__, path


def test_the_reference_has_every_public_name():
    import shadowpeft

    text = "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE)
    errors = "::: shadowpeft.errors\n" in text
    missing = {n for n in shadowpeft.__all__ if n != "__version__" and not re.search(rf"^::: [\w.]+\.{n}$", text, re.M)}
    assert missing == ({"ShadowPeftError"} if errors else set())  # on the page of the module


def test_links_out_of_the_pages_lead_to_copies():
    hook = pytest.importorskip("scripts.site_links")
    assert hook.outside("export.md", "../examples/home") == "examples/home"
    assert hook.outside("reference/method.md", "../method.md") is None
    assert hook.outside("reference/method.md", "../../tests/naive.py") == "tests/naive.py"
    assert hook.place("examples/home") == "repository/examples/home/files.md"
    assert hook.place("LOG.md") == "repository/LOG.md.txt"
    text = "[a](../LOG.md#x) [b](export.md)\n```\n[c](../README.md)\n```\n"
    assert hook.links_outside("method.md", text) == {"LOG.md"}


def test_several_entries_of_a_line_get_a_line_each():
    tidy = pytest.importorskip("scripts.site_docstrings").tidy
    text = "Do.\n\nArgs:\n    a: one. b: two, see :func:`~x.y.z`.\n        more. c: three\n\n"
    text += "Raises:\n    ValueError: if. DataError: or.\n"
    said = tidy(text, ["a", "b"])
    assert "    a: one.\n    b: two, see `z`.\n" in said
    assert "more. c: three" in said  # no parameter
    assert "    ValueError: if.\n    DataError: or.\n" in said
