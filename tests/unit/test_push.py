"""Uploading an adapter: the folder goes up as it is, and a refusal says where the adapter still lies."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from shadowpeft.errors import AdapterFileError, ShadowPeftError
from shadowpeft.hf.files import locate
from shadowpeft.train.config import parse_run
from shadowpeft.train.run import push


def test_push_creates_a_private_repository_and_uploads_the_folder(monkeypatch: Any, tmp_path: Path) -> None:
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **kw: calls.append(("create", name, kw)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kw: calls.append(("upload", kw["repo_id"], kw)))
    push(tmp_path, "me/robot")
    assert [(c[0], c[1]) for c in calls] == [("create", "me/robot"), ("upload", "me/robot")]
    assert calls[0][2]["private"] is True
    assert calls[1][2]["folder_path"] == str(tmp_path)


CLIENT: Any = importlib.import_module(HTTPError.__module__.partition(".")[0])
"""The HTTP library of the installed huggingface_hub; its connection errors are not OSErrors."""


@pytest.mark.parametrize("error", [ConnectionError, CLIENT.ConnectError, CLIENT.ReadTimeout])
def test_a_refused_upload_names_the_folder(monkeypatch: Any, tmp_path: Path, error: Any) -> None:
    def refuse(self: HfApi, name: str, **kwargs: Any) -> None:
        raise error("no route to the hub")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ShadowPeftError, match=r"is saved in .* \(no route to the hub\)"):
        push(tmp_path, "me/robot")


def test_an_impossible_hub_id_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ShadowPeftError, match="is saved in"):
        push(tmp_path, "a b/c")


def test_a_file_on_an_unreachable_hub(monkeypatch: Any) -> None:
    def refuse(name: str, file: str) -> str:
        raise CLIENT.ConnectError("no route to the hub")

    with pytest.raises(AdapterFileError, match=r"'a b/c' is neither a folder nor a Hub id"):
        locate.find_file("a b/c", "adapter_config.json")
    monkeypatch.setattr(locate, "hf_hub_download", refuse)
    with pytest.raises(AdapterFileError, match=r"could not be fetched from the Hub \(ConnectError\)"):
        locate.find_file("me/robot", "adapter_config.json")


def test_the_hub_id_is_checked_with_the_run() -> None:
    content = {"base": "b", "data": {"train": "t.jsonl"}, "push_to_hub": "not an id"}
    with pytest.raises(ShadowPeftError, match="push_to_hub"):
        parse_run(content, "run.yaml")
