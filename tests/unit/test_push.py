"""Uploading an adapter: the folder goes up as it is, and a refusal says where the adapter still lies."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from shadowpeft.errors import ShadowPeftError
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


def test_a_refused_upload_names_the_folder(monkeypatch: Any, tmp_path: Path) -> None:
    def refuse(self: HfApi, name: str, **kwargs: Any) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ShadowPeftError, match="is saved in"):
        push(tmp_path, "me/robot")


def test_the_hub_id_is_checked_with_the_run() -> None:
    content = {"base": "b", "data": {"train": "t.jsonl"}, "push_to_hub": "not an id"}
    with pytest.raises(ShadowPeftError, match="push_to_hub"):
        parse_run(content, "run.yaml")
