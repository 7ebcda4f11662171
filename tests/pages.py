"""The numbers of a Markdown page: what tests compare with records. Sentences may change, numbers may not."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
_NOT_TEXT = re.compile(r"`[^`]*`|(?<=\])\([^)]*\)|<!--.*?-->")
"""Code, the targets of links, comments: their digits are names."""
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\d.]*\w)")


def numbers(text: str) -> list[float]:
    """Every number of a text, in order; not those in code, in targets of links or inside words (``r16``, ``2x``)."""
    return [float(each.replace(",", "")) for each in _NUMBER.findall(_NOT_TEXT.sub(" ", text))]


def links(text: str) -> list[str]:
    """Targets of the links, in order."""
    return re.findall(r"\]\(([^)]+)\)", text)


def marked(page: Path, name: str) -> str:
    """What stands between ``<!-- name -->`` and ``<!-- /name -->``."""
    (text,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", page.read_text(encoding="utf-8"), re.DOTALL)
    return text


def rows(text: str) -> list[list[str]]:
    """The cells of every line of a table but the rule below its head."""
    lines = [line.strip().strip("|") for line in text.splitlines() if line.startswith("|") and set(line) - set("|-: ")]
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def facts(text: str) -> tuple[list[float], list[str], list[list[str]]]:
    """All that a record can say of a page: its numbers, where it links to, and the cells of its tables beside their labels."""
    return numbers(text), links(text), [row[1:] for row in rows(text)[1:]]


def script(path: str) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
