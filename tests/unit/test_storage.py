"""Files and folders are whole or not there, whoever else writes, and nothing that is not ours is ever deleted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from shadowpeft import storage
from shadowpeft.data.teacher import TeacherCache
from shadowpeft.data.teacher_folder import INDEX
from shadowpeft.errors import ConfigError, ShadowPeftError
from tiny import base, tokens


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def content(path):
    """What stands under a name: a file's bytes, or a folder's files."""
    if path.is_dir():
        return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return path.read_bytes()


# ------------------------------------------------------------------------------------------------- power cuts and full disks


def recorded(monkeypatch):
    """What is asked of the system from here on: names that were synced or renamed, in order."""
    events, sync, rename = [], os.fsync, os.replace

    def fsync(handle):
        events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        sync(handle)

    def replace(source, target):
        events.append(("rename", os.path.basename(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "rename", replace)
    return events


def test_file_and_name_are_on_disk(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("old")
    events = recorded(monkeypatch)
    storage.write_json(tmp_path / "a.json", {"ä": 1})
    assert events == [("sync", "a.json"), ("rename", "a.json"), ("sync", tmp_path.name)]
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ä": 1}
    assert names(tmp_path) == ["a.json"]


def test_so_are_those_of_a_teacher_cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    (folder / storage.temporary_name()).mkdir(parents=True)  # a killed build left this
    written = []
    sync = storage.sync
    monkeypatch.setattr(storage, "sync", lambda path: written.append(path.name) or sync(path))
    TeacherCache.build(base(), [tokens()], folder, 4, data="d")
    assert written == [
        name for file in (INDEX, INDEX, "shard-00000.safetensors", INDEX) for name in (file, folder.name)
    ]
    record = json.loads((folder / INDEX).read_text())
    assert (folder / INDEX).read_text() == json.dumps(record, indent=2, sort_keys=True) + "\n"
    assert names(folder) == ["shard-00000.safetensors", INDEX]
    assert len(TeacherCache(folder, data="d")) == 3


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize("there", [True, False], ids=["replaced", "new"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, folder, there):
    if there:
        storage.write_text(tmp_path / "kept" / "a" if folder else tmp_path / "kept", "old")
    before = {p: content(p) for p in tmp_path.iterdir()}


    def fill(beside):
        (beside / "a" if folder else beside).write_text("half")
        raise OSError(28, "No space left on device")

    full = pytest.raises(ShadowPeftError, match="No space left on device")
    with full, storage.written_whole(tmp_path / "kept", folder=folder) as beside:
        fill(beside)
    assert {p: content(p) for p in tmp_path.iterdir()} == before


def test_a_parent_that_is_a_file_is_no_other_writer(tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused = pytest.raises(ShadowPeftError, match=r"could not be written to .* \(File exists|Not a directory")
    with refused, storage.written_whole(tmp_path / "file" / "edge"):
        pass
    assert content(tmp_path / "file") == b"in the way"


def test_a_place_that_cannot_be_written_to_is_told_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for place in (tmp_path / "file", tmp_path / "file" / "a" / "b", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"is no folder, but what is made goes into"):
            storage.require_writable(place)
        with pytest.raises(ConfigError, match=r"cannot be made \((File exists|Not a directory)"), storage.exclusive(place):
            pass
    storage.require_writable(tmp_path / "new" / "one")
    assert names(tmp_path) == ["file", "nowhere"]

    def full(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(ConfigError) as refused:
        storage.require_writable(tmp_path / "new")
    said = f"the folder '{tmp_path}' cannot be written to (No space left on device); choose another place"
    assert str(refused.value) == said


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "a.json")
    storage.write_json(tmp_path / "link.json", 1)
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real" / "a.json").read_text() == "1\n"
    assert names(tmp_path / "real") == ["a.json"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_who_may_read_the_folder_may_read_the_weights(tmp_path, mask, mode):
    """safetensors 0.8 writes files for their owner alone; a server of another user, as in the image, has to read them."""
    before = os.umask(mask)
    try:
        with storage.written_whole(tmp_path / "edge") as beside:
            save_file({"a": torch.zeros(2)}, beside / "model.safetensors")
            (beside / "script").touch(0o700)
            (beside / "link").symlink_to(tmp_path / "private")
            (tmp_path / "private").touch(0o600)
        storage.write_text(tmp_path / "a.json", "{}")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "edge").iterdir()}
    assert modes == {"model.safetensors": mode, "script": mode | 0o700, "link": 0o600}
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == mode


def test_a_linked_file_keeps_its_rights(tmp_path):
    """``export --to vllm`` links the base's weights, and their owner may keep them from others."""
    (tmp_path / "base").touch(0o600)
    with storage.written_whole(tmp_path / "out") as beside:
        os.link(tmp_path / "base", beside / "base")
    assert (tmp_path / "base").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "base").stat().st_nlink == 2


# ---------------------------------------------------------------------------------------------------- what others put there


NAME = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=30).filter(
    lambda name: name not in (".", "..") and len(name.encode()) <= 200
)
DECORATED = st.sampled_from(
    ["old-{}", "partial-{}", ".{}.partial", "{}.partial", "{}~", ".{}.tmp", ".shadowpeft-{}", ".shadowpeft-lock-{}"]
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAME, decorations=st.lists(DECORATED, max_size=4), others=st.lists(NAME, max_size=3), folder=st.booleans())
def test_siblings_of_any_name_are_left_alone(tmp_path_factory, name, decorations, others, folder):
    parent = tmp_path_factory.mktemp("siblings")
    target = parent / name
    for other in {*(d.format(name) for d in decorations), *others} - {name}:
        if len(other.encode()) <= 255 and not storage.is_temporary(other) and not (parent / other).exists():
            (parent / other).mkdir()
            (parent / other / "precious").write_text(other)
    before = {p.name: content(p) for p in parent.iterdir()}
    for text in ("one", "two"):  # made, then replaced
        with storage.written_whole(target, folder=folder) as beside:
            (beside / "a" if folder else beside).write_text(text)
        after = {p.name: content(p) for p in parent.iterdir()}
        assert after.pop(target.name) == ({"a": text.encode()} if folder else text.encode())
        assert after == before


def test_only_leftovers_go(tmp_path):
    """A workspace in use stays, in this process and in others; one whose process is gone does not."""
    (tmp_path / storage.temporary_name()).mkdir()
    storage.write_text(tmp_path / "a", "1")
    assert names(tmp_path) == ["a"]
    with storage.whole(tmp_path / "b") as beside:
        beside.write_text("b")
        storage.write_text(tmp_path / "a", "2")
        storage.clear_leftovers(tmp_path)
        assert beside.read_text() == "b"
    assert (tmp_path / "a").read_text() == "2"
    assert names(tmp_path) == ["a", "b"]


def test_a_swap_that_was_cut_in_two_is_undone(tmp_path):
    """Killed between the two renames of a replacement: the old folder comes back with the next write beside it."""
    space = tmp_path / storage.temporary_name()
    (space / "replaced" / "edge").mkdir(parents=True)
    (space / "replaced" / "edge" / "weights").write_text("old")
    (space / "edge").mkdir()
    storage.write_text(tmp_path / "other", "x")
    assert content(tmp_path / "edge") == {"weights": b"old"}
    assert names(tmp_path) == ["edge", "other"]


# ------------------------------------------------------------------------------------------------------- several processes


WRITER = """
import signal, sys, time
from pathlib import Path
from shadowpeft import storage
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background of a shell ignores
target, text, folder, replace = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "folder", sys.argv[4] == "replace"
with storage.written_whole(target, folder=folder, replace=replace) as beside:
    for i in range(20):
        (beside / f"{i}" if folder else beside).write_text(text)
    print("written", flush=True)
    sys.stdin.readline()
print("done", flush=True)
"""


def writer(target, text, kind, replace="replace"):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target), text, kind, replace],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "written\n"
    return process


def ended(process):
    out, err = process.communicate("\n", timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(("kind", "replace"), [("folder", "replace"), ("folder", "keep"), ("file", "keep")])
def test_of_two_writers_one_is_told_that_it_lost(tmp_path, kind, replace):
    target = tmp_path / "edge"
    if replace == "replace":
        target.mkdir()
        (target / "0").write_text("old")
    first, second = (writer(target, text, kind, replace) for text in ("first", "second"))
    assert ended(second)[:2] == (0, "done\n")
    code, out, err = ended(first)
    assert (code, out) == (1, "")
    assert "another process has written there meanwhile" in err
    expected = {str(i): b"second" for i in range(20)} if kind == "folder" else b"second"
    assert content(target) == expected
    assert names(tmp_path) == ["edge"]


def test_of_two_writers_of_a_record_the_last_one_stays(tmp_path):
    first, second = (writer(tmp_path / "a.json", text, "file") for text in ("first", "second"))
    assert ended(second)[0] == ended(first)[0] == 0
    assert (tmp_path / "a.json").read_text() == "first"


@pytest.mark.parametrize("how", ["link", "no links"])
def test_a_file_that_appears_meanwhile_is_kept(tmp_path, monkeypatch, how):
    """Also one of a program that knows no locks."""
    if how == "no links":

        def link(source, target):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)


    def meet(beside):
        beside.write_text("ours")
        (tmp_path / "m.gguf").write_text("theirs")

    lost = pytest.raises(ShadowPeftError, match="another process has written there meanwhile")
    with lost, storage.written_whole(tmp_path / "m.gguf", folder=False, replace=False) as beside:
        meet(beside)
    assert content(tmp_path / "m.gguf") == b"theirs"
    with storage.written_whole(tmp_path / "n.gguf", folder=False, replace=False) as beside:
        beside.write_text("ours")
    assert content(tmp_path / "n.gguf") == b"ours"
    assert names(tmp_path) == ["m.gguf", "n.gguf"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_writer_that_is_ended_leaves_nothing_for_long(tmp_path, number):
    storage.write_text(tmp_path / "edge" / "0", "old")
    process = writer(tmp_path / "edge", "new", "folder")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number  # by the signal itself, as without any of this
    assert content(tmp_path / "edge") == {"0": b"old"}
    if number == signal.SIGKILL:
        assert len(names(tmp_path)) == 2
        storage.write_text(tmp_path / "edge" / "0", "new")  # elsewhere: the leftover stays
        assert len(names(tmp_path)) == 2
        storage.write_text(tmp_path / "next", "x")
        (tmp_path / "next").unlink()
    assert names(tmp_path) == ["edge"]


HOLDER = """
import sys
from pathlib import Path
from shadowpeft import storage
with storage.exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_folder_has_one_writer(tmp_path):
    for end in ("whole", "killed"):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process is writing to"), storage.exclusive(tmp_path / "run"):
            pass
        if end == "killed":
            process.kill()
        process.communicate("\n" if end == "whole" else None, timeout=60)
        with storage.exclusive(tmp_path / "run"), storage.whole(tmp_path / "run" / "adapter", folder=True) as beside:
            (beside / "a").write_text("x")
    assert names(tmp_path / "run") == ["adapter"]


def test_many_writers_at_once(tmp_path):
    """Each write is whole, and none takes the workspace of another for a leftover."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom shadowpeft import storage\n"
        "for i in range(60): storage.write_text(Path(sys.argv[1]) / 'a', sys.argv[2] * 50000)\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), letter]) for letter in "abc"]
    seen, until = set(), time.monotonic() + 60
    while any(p.poll() is None for p in started) and time.monotonic() < until:
        if (tmp_path / "a").exists():
            seen.add(Path(tmp_path / "a").read_text())
    assert [p.wait() for p in started] == [0, 0, 0]
    assert seen <= {letter * 50000 for letter in "abc"}
    assert names(tmp_path) == ["a"]
