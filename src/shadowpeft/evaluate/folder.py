"""An evaluation on disk: its settings, and a line for each example; a killed one goes on after its last whole line."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shadowpeft.errors import ConfigError
from shadowpeft.json_text import parse_json
from shadowpeft.storage import write_json

PREDICTIONS, SETTINGS, RECORD = "predictions.jsonl", "evaluation.json", "record.json"


@dataclass(frozen=True)
class Prediction:
    """What is kept of one example: a line of ``predictions.jsonl``."""

    id: str
    prediction: Any
    value: float
    """0 to 1, what the interval resamples."""
    gold: Any
    text: str
    """The generated text; for other methods the empty string."""
    tokens: int
    """Generated tokens; for other methods tokens read."""
    seconds: float
    """Wall time of its batch over the batch's size."""
    peak_memory: int
    scores: list[float]
    """Log-likelihoods of the choices, or of the classes; the answer's alone where there are no choices."""


def open_folder(folder: Path, settings: dict[str, Any], resume: bool) -> dict[str, Prediction]:
    """Predictions that an earlier sitting left, by id; the folder is ready to be appended to.

    Raises:
        ConfigError: if it holds another evaluation, or any and not ``resume``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored, file = folder / SETTINGS, folder / PREDICTIONS
    if not stored.is_file():
        if file.exists():
            raise ConfigError(
                f"'{folder}' has {PREDICTIONS} but no {SETTINGS}, so they belong to nothing; choose another folder"
            )
        write_json(stored, settings)
        return {}
    if not resume:
        raise ConfigError(f"'{folder}' already holds an evaluation; choose another folder, or resume it")
    before = read_object(stored)
    differing = [key for key in settings | before if before.get(key, "absent") != settings.get(key, "absent")]
    if differing:
        raise ConfigError(
            f"'{folder}' holds an evaluation with another {', '.join(differing)}; choose another folder, or evaluate as it was"
        )
    return _read(file)


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object of the folder.

    Raises:
        ConfigError: if the file is damaged.
    """
    try:
        return dict(parse_json(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"'{file}' is damaged: it {error}; start the evaluation in another folder") from error


def _read(file: Path) -> dict[str, Prediction]:
    """Whole lines; what a kill left of a last one is cut off."""
    if not file.is_file():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(file, len(whole))
    predictions = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            prediction = Prediction(**parse_json(line))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"line {number} of '{file}' is no prediction ({error}); start in another folder"
            ) from error
        predictions[prediction.id] = prediction
    return predictions


def append(folder: Path, predictions: list[Prediction]) -> None:
    """Write predictions; they are on disk afterwards."""
    with (folder / PREDICTIONS).open("a", encoding="utf-8") as handle:
        handle.write("".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in predictions))
        handle.flush()
        os.fsync(handle.fileno())
