"""Files that are whole or not there, and still there after a power cut."""

import json
import os

from shadowpeft import storage
from shadowpeft.data.teacher import INDEX, TeacherCache
from tiny import base, tokens


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
    return events


def test_file_and_name_are_on_disk(tmp_path, monkeypatch):
    events = recorded(monkeypatch)
    storage.write_json(tmp_path / "a.json", {"ä": 1})
    assert events == [("sync", ".a.json.partial"), ("rename", "a.json"), ("sync", tmp_path.name)]
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ä": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_so_are_those_of_a_teacher_cache(tmp_path, monkeypatch):
    events = recorded(monkeypatch)
    folder = tmp_path / "cache"
    (tmp_path / "cache").mkdir()
    (folder / storage.partial_of(folder / INDEX).name).write_text("a killed build left this")
    TeacherCache.build(base(), [tokens()], folder, 4, data="d")
    names = [name for what, name in events if what == "rename"]
    assert names == [INDEX, INDEX, "shard-00000.safetensors", INDEX]
    assert [what for what, _ in events] == ["sync", "rename", "sync"] * 4
    record = json.loads((folder / INDEX).read_text())
    assert (folder / INDEX).read_text() == json.dumps(record, indent=2, sort_keys=True) + "\n"
    assert sorted(path.name for path in folder.iterdir()) == ["shard-00000.safetensors", INDEX]
    assert len(TeacherCache(folder, data="d")) == 3
