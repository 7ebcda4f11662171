"""docs/architecture.md names files that exist, every package and every room, and its picture names the same rooms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "shadowpeft"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/]+(?:\.(?:py|md|yaml)|/[\w/]+))`", PAGE))))
def test_every_path_on_the_page_exists(name: str) -> None:
    assert any((folder / name).exists() for folder in (PACKAGE, ROOT)), f"{name} is on the page but not in the tree"


def test_every_package_and_room_is_on_the_page_and_every_room_in_the_picture() -> None:
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    rooms = {path.name for path in (PACKAGE / "hf").iterdir() if (path / "__init__.py").is_file()}
    assert packages
    assert rooms
    assert {name for name in packages if f"`{name}" not in PAGE} == set()
    assert {name for name in rooms if f"`hf/{name}`" not in PAGE} == set()
    picture = (ROOT / "docs" / "house.svg").read_text(encoding="utf-8")
    assert {name for name in rooms if f">{name}/<" not in picture} == set()
    old_names = {"bases"}  # of base/aliases
    door = {path.stem for path in (PACKAGE / "hf").glob("*.py")} - {"__init__"} - old_names
    assert {name for name in door if f">{name}<" not in picture} == set()


def test_no_file_is_too_long_to_read_in_one_sitting() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in ("src", "experiments", "benchmarks", "scripts")
        for path in (ROOT / folder).rglob("*.py")
        if (lines := path.read_text(encoding="utf-8").count("\n")) > 400
    }
    assert long == {}
