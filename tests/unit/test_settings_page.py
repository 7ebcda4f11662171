"""docs/settings.md names every setting with its real default; its samples are rows, its numbers those of the records."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import yaml

from shadowpeft import ShadowPeftConfig, __version__
from shadowpeft.apps.intents import read_intents
from shadowpeft.data.chat import check_row
from shadowpeft.presets import PRESETS
from shadowpeft.train.config import DataConfig, RunConfig, ShadowSection, TrainingSection

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")


def table(heading):
    """Cells by setting of the tables under a heading, up to the next one."""
    (part,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", PAGE, re.DOTALL | re.MULTILINE)
    rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in part.splitlines() if line.startswith("| `")]
    made = {row[0].strip("` "): row[1:] for row in rows}
    assert len(made) == len(rows)
    return made


def value(cell):
    assert re.fullmatch("`[^`]+`", cell), cell
    return yaml.safe_load(cell.strip("`"))


ADAPTER = "The adapter: `ShadowPeftConfig`, and `shadow:` in a run file"


def test_every_setting_of_the_adapter():
    stated, config = table(ADAPTER), ShadowPeftConfig()
    assert stated.keys() == {f.name for f in fields(config)}
    assert stated.pop("peft_version")[0] == "of PEFT"
    for name, cells in stated.items():
        assert value(cells[0]) == getattr(config, name), name
        assert cells[2], name


def test_every_setting_of_the_adapter_that_a_run_file_takes():
    stated, section = table(ADAPTER), ShadowSection.model_validate({}).fields
    assert {name for name, cells in stated.items() if cells[1] != "-"} == section.keys()
    for name, default in section.items():
        assert value(stated[name][1]) == default, name


def test_every_other_key_of_a_run_file():
    sections = {"Top level": RunConfig, "`data`": DataConfig, "`training`": TrainingSection}
    for heading, kind in sections.items():
        stated = table(heading)
        assert stated.keys() == kind.model_fields.keys()
        for name, info in kind.model_fields.items():
            if info.is_required():
                assert stated[name][0] == "required", name
            elif name not in ("shadow", "training"):
                assert value(stated[name][0]) == info.get_default(call_default_factory=True), name
    assert (
        table("`shadow`").keys() == ShadowSection.model_fields.keys() - ShadowSection.model_validate({}).fields.keys()
    )
    assert value(table("`shadow`")["preset"][0]) == ShadowSection.model_fields["preset"].default


def test_the_presets_side_by_side():
    stated = table("Presets")
    for column, name in enumerate(("paper", "tuned", "device")):
        assert {key: value(cells[column]) for key, cells in stated.items()} == PRESETS[name]


def test_the_sample_rows_are_rows(tmp_path):
    chat, intents = re.findall(r"^```json\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    rows = [check_row(json.loads(line), "the page") for line in chat.splitlines()]
    assert [row["path"] for row in rows] == ["both", "both", "both", "base", "shadow"]
    assert [row["shadow_response"] is None for row in rows] == [True, True, False, True, True]
    (tmp_path / "rows.jsonl").write_text(intents, encoding="utf-8")
    assert [row["skill"] for row in read_intents(str(tmp_path / "rows.jsonl"), "fit", None)] == ["Sit", "REMOTE"]


def numbers(content):
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        return {number for item in content for number in numbers(item)}
    return {round(100 * content, 1)} if isinstance(content, float) else set()


def test_linked_numbers_are_in_their_records():
    found = re.findall(r"\[(\d+\.\d) %\]\((\S+?)\)", PAGE)
    assert len(found) >= 3
    for number, link in found:
        assert float(number) in numbers(json.loads((ROOT / "docs" / link).read_text(encoding="utf-8"))), (number, link)
    for link in re.findall(r"\]\((\S+?)\)", PAGE):
        assert (ROOT / "docs" / link).is_file(), link


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["references"][0]["title"] in (ROOT / "README.md").read_text(encoding="utf-8").replace(
        "{", ""
    ).replace("}", "")
