"""JSON that somebody else wrote: whatever is wrong with it, every reader names the file, and the line where there are lines."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from products import covering
from shadowpeft.apps.intents import read_intents
from shadowpeft.data import chat
from shadowpeft.data.actions import read_skills
from shadowpeft.data.corpora import FileSource
from shadowpeft.data.packing import HELD, STREAM, Batches, Mixture, PackedStream
from shadowpeft.data.tasks.source import read_gzip
from shadowpeft.data.tools import read_tools
from shadowpeft.errors import ConfigError, ShadowPeftError
from shadowpeft.evaluate.folder import PREDICTIONS, SETTINGS, open_folder
from shadowpeft.hf.files.reading import read_json
from shadowpeft.json_text import parse_json
from shadowpeft.serve.loading import is_lora
from shadowpeft.serve.router import Calibration
from shadowpeft.train.folder import stored_record
from shadowpeft.train.progress import read_metrics

BAD = {
    "a number of 5,000 digits": b"[" + b"9" * 5000 + b"]",
    "nesting": b"[" * 100_000 + b"]" * 100_000,
    "cut short": b'{"text": "x',
    "latin-1": '{"text": "grün"}'.encode("latin-1"),
}


def stream(folder):
    (folder / "c.jsonl").write_text('{"text": "x"}\n')
    return PackedStream(Mixture([FileSource("c", [folder / "c.jsonl"])], [1.0], lambda text: [1], 0), 4)


def resume(folder):
    batches = Batches(stream(folder), 1)
    batches.save(folder / "state")
    (folder / "state" / STREAM).write_bytes((folder / "x").read_bytes())
    assert (folder / "state" / HELD).is_file()
    batches.load(folder / "state")


def evaluation(folder, name):
    (folder / "e").mkdir()
    (folder / "e" / SETTINGS).write_text("{}")
    (folder / "e" / name).write_bytes((folder / "x").read_bytes() + b"\n")
    open_folder(folder / "e", {}, True)


def gzipped(folder):
    file = folder / "x.jsonl.gz"
    file.write_bytes(gzip.compress(b"{}\n" + (folder / "x").read_bytes()))
    return list(read_gzip(file))


def named(folder, name, read):
    (folder / name).write_bytes((folder / "x").read_bytes())
    return read(folder / name)


def lines(folder, name, read):
    (folder / name).write_bytes(b"\n" + (folder / "x").read_bytes() + b"\n")
    return read(folder / name)


READERS = {
    "chat rows": (lambda f: lines(f, "x.jsonl", chat.read_jsonl), r"x\.jsonl, line 2"),
    "a corpus": (lambda f: lines(f, "x.jsonl", lambda file: FileSource("c", [file]).next()), r"x\.jsonl.*line [12]"),
    "a task": (gzipped, r"x\.jsonl\.gz' is damaged after line 1"),
    "rows with a skill": (
        lambda f: lines(f, "x.jsonl", lambda file: read_intents(str(file), "fit", None)),
        r"x\.jsonl, line 2",
    ),
    "skills": (lambda f: named(f, "skills.txt", read_skills), r"skills\.txt"),
    "predictions": (lambda f: evaluation(f, PREDICTIONS), "line 1 of '.*predictions"),
    "settings of an evaluation": (lambda f: evaluation(f, SETTINGS), r"evaluation\.json"),
    "the state of a stream": (resume, "state"),
    "metrics": (
        lambda f: lines(f, "metrics.jsonl", lambda file: read_metrics(file.parent)),
        r"metrics\.jsonl', line 2",
    ),
    "a run's record": (lambda f: named(f, "data.json", stored_record), r"data\.json"),
    "a calibration": (lambda f: named(f, "routing.json", Calibration.load), r"routing\.json"),
    "an adapter's method": (
        lambda f: named(f, "adapter_config.json", lambda p: is_lora(str(p.parent))),
        "adapter_config",
    ),
    "a configuration": (lambda f: named(f, "config.json", read_json), r"config\.json"),
}


@pytest.mark.parametrize(("reader", "wrong"), covering(READERS, BAD))
def test_every_reader_names_what_it_cannot_read(tmp_path, reader, wrong):
    read, place = READERS[reader]
    (tmp_path / "state").mkdir()
    (tmp_path / "x").write_bytes(BAD[wrong])
    with pytest.raises(ShadowPeftError, match=place) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("content", "clause"),
    [
        ('[\n  {"name": "a"}, // the lamp\n  {"name": "b"}\n]', r"line 2, column 18; JSON has no comments\)"),
        ('// my tools\n[\n  {"name": "a"}\n]', r"line 1, column 1; JSON has no comments\)"),
        ('/* all */ [{"name": "a"}]', r"at column 1; JSON has no comments\)"),
        ('[{"name": "a"}]\n# done', r"line 2, column 1; JSON has no comments\)"),
        ('[\n  "LampOn",\n]', r"line [23], column \d+; JSON has no comma before a closing bracket\)"),
        ('[{"name": "a",}]', r"column 1[45]; JSON has no comma before a closing bracket\)"),
        ('["http://a" "b"]', r"column 13\)"),  # what is no comment is called none
        ('{"name": "a"}', "is a JSON dict but must be a list"),
    ],
)
@pytest.mark.parametrize("reader", [read_skills, read_tools])
def test_comments_and_last_commas_of_a_file_of_actions_are_called_so(tmp_path, reader, content, clause):
    (tmp_path / "actions.json").write_text(content)
    with pytest.raises(ConfigError, match=clause) as caught:
        reader(tmp_path / "actions.json")
    assert str(caught.value).startswith(f"the actions file '{tmp_path / 'actions.json'}' is ")


@settings(deadline=None)
@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_value_or_one_clause(content):
    try:
        value, clause = parse_json(content), None
    except ValueError as error:
        value, clause = None, str(error)
    if clause is None:
        json.dumps(value, ensure_ascii=False).encode()  # it can be written again
    else:
        assert clause.startswith(("is ", "holds ", "nests "))
        assert "\n" not in clause


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_subnormal=False)
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    )
)
def test_what_json_can_say_is_read(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_json(text) == parse_json("\ufeff".encode() + text.encode()) == value
