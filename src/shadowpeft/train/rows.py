"""The rows of a fine-tuning run, as sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shadowpeft.data import chat
from shadowpeft.data.robot import SYSTEM as ROBOT_SYSTEM
from shadowpeft.data.robot import load as load_robot
from shadowpeft.train.config import RunConfig

ROBOT_REMOTE_REPEATS = 10


def robot_rows(split: str) -> list[dict[str, Any]]:
    """Rows of the packaged robot set in the form of :mod:`shadowpeft.data.chat`.

    ``train`` joins the three training parts: skill commands for both paths, open-domain answers for the base path, open-domain
    requests answered ``[REMOTE]`` for the shadow path (the paper, Appendix F). The last are only 47, so they are repeated
    ``ROBOT_REMOTE_REPEATS`` times: they cost almost nothing, and a shadow that never learns to defer executes questions.
    """
    paths = {"train_remote_base": "base", "train_remote_shadow": "shadow"}
    names = {
        "train": ["train_normal", "train_remote_base", "train_remote_shadow"],
        "validation": ["validation_normal"],
    }.get(split, [split])
    return [
        chat.check_row(
            {"prompt": row["prompt"], "response": row["response"], "path": paths.get(name, "both")}, row["id"]
        )
        for name in names
        for row in load_robot(name) * (ROBOT_REMOTE_REPEATS if name == "train_remote_shadow" else 1)
    ]


def read_rows(source: str, split: str) -> list[dict[str, Any]]:
    """Rows of a JSONL file, or of the packaged set for ``robot``."""
    return robot_rows(split) if source == "robot" else chat.read_jsonl(source)


def encode_run(
    run: RunConfig, tokenizer: Any, warn: Callable[[str], None]
) -> tuple[list[chat.Sequence], list[chat.Sequence] | None, dict[str, Any]]:
    """Training and validation sequences, and the record of the data: source, rows that are used, rows that are left out, and
    fingerprint. ``warn`` is told of rows that are left out.
    """
    system = run.data.system if run.data.system is not None else (ROBOT_SYSTEM if run.data.train == "robot" else None)
    options: dict[str, Any] = {"max_length": run.data.max_length, "too_long": run.data.too_long, "system": system}
    validation = run.data.validation or ("robot" if run.data.train == "robot" else None)
    encoded: dict[str, chat.Encoded] = {}
    record: dict[str, Any] = {}
    for part, source in (("train", run.data.train), ("validation", validation)):
        if source is not None:
            rows = read_rows(source, part)
            encoded[part] = chat.encode(rows, tokenizer, **options)
            record[part] = {"source": source, **encoded[part].record(), "sha256": chat.rows_digest(rows)}
            if encoded[part].skipped is not None:
                warn(f"data.{part}: {encoded[part].skipped}")
    training = encoded["train"]
    again = [chat.Sequence(s.ids, s.start, base=False, shadow=True) for s in training if s.shadow]
    return training + again * run.data.shadow_repeats, encoded.get("validation"), record
