"""One task through one model: every method of adaptation by the same code, in batches, resumable, with a record at the end."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.helpers import DoraCaching
from rich.console import Console
from torch import nn

from shadowpeft.data.chat import answer_ids, fingerprint, prompt_ids, with_system
from shadowpeft.data.tasks import CLASSIFY_MAX_LENGTH, Example, Task, class_ids
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.evaluate import record as facts
from shadowpeft.evaluate.scores import wilson
from shadowpeft.generate import answer, evaluating
from shadowpeft.hf.detach import detach
from shadowpeft.hf.layer import find_hub
from shadowpeft.runtime import peak_memory_bytes
from shadowpeft.storage import exclusive, write_json
from shadowpeft.watching import Watched

MODES = ("attached", "detached", "base", "lora", "dora")
METHODS = ("generate", "likelihood", "classify")
FORMAT = 1
PREDICTIONS, SETTINGS, RECORD = "predictions.jsonl", "evaluation.json", "record.json"


Said = tuple[Any, str, int, list[float]]
"""Prediction, text, tokens, scores."""


@dataclass(frozen=True)
class Row:
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


@contextmanager
def runner_in_mode(model: Any, mode: str) -> Iterator[Any]:
    """The model to run for ``mode``, in eval mode.

    ``attached``: with its shadow adapter; ``detached``: the shadow alone; ``base``: adapters off; ``lora``, ``dora``: a PEFT
    model of that method as it is.

    Raises:
        ConfigError: for an unknown mode, or a model without the adapter that the mode needs.
    """
    if mode not in MODES:
        raise ConfigError(f"mode is '{mode}' but must be one of {', '.join(MODES)}")
    with evaluating(model):
        if mode == "attached":
            find_hub(model)
            yield model
        elif mode == "detached":
            yield detach(model).eval()
        elif mode == "base":
            if hasattr(model, "disable_adapter"):
                with model.disable_adapter():
                    yield model
            else:
                yield model
        else:
            found = _peft_method(model)
            if found != mode:
                raise ConfigError(f"mode is '{mode}' but the model is {found}; pass a PEFT model of that method")
            with norms_kept(model):
                yield model


@contextmanager
def norms_kept(model: nn.Module) -> Iterator[None]:
    """Inside, PEFT's DoRA layers compute the norm of their merged matrix once, not at each forward: no weight may change. Other
    models run as always; the model is in evaluation mode afterwards.

    PEFT empties what it keeps when a model goes to training; that is done before, so that no norm of older weights is used,
    and after, so that none is left.
    """
    model.train().eval()
    try:
        with DoraCaching():
            yield
    finally:
        model.train().eval()


def _peft_method(model: Any) -> str:
    configs = getattr(model, "peft_config", None)
    if not configs:
        return f"a {type(model).__name__} without adapter"
    active = configs[model.active_adapter]
    kind = str(getattr(active.peft_type, "value", active.peft_type)).lower()
    return "dora" if kind == "lora" and getattr(active, "use_dora", False) else kind


def evaluate_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    mode: str,
    split: str = "test",
    shots: int = 0,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    method: str | None = None,
    folder: Path | None = None,
    resume: bool = True,
    extra: dict[str, Any] | None = None,
    max_length: int = CLASSIFY_MAX_LENGTH,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Score a model on a task, in the mode given.

    ``generate`` answers greedily with a KV cache and scores what the task parses. ``likelihood`` takes the likeliest of an
    example's choices; where a task has none, an example's value is the geometric mean probability of its gold answer's tokens
    (end of turn included), and ``nll`` their mean negative log-likelihood. ``classify`` takes the likeliest class of a
    sequence classifier.

    Batches are fixed by the prompts' lengths, longest first, so that a resumed evaluation computes what an undisturbed one
    does; whatever was written before a kill is kept.

    Args:
        model: a PEFT model (or, for ``base``, any model). mode: see :func:`runner_in_mode`.
        split, shots, limit, seed: which examples, see :meth:`Task.load`; ``seed`` also draws the interval.
        method: None: the one of the task's kind.
        folder: where ``predictions.jsonl``, ``evaluation.json`` and ``record.json`` go; None: nowhere.
        resume: continue what the folder holds; otherwise a folder with predictions is refused.
        extra: kept in the record. max_length: tokens of a text that a classifier reads.
        progress: called with the number of examples done after each batch; None: a bar on standard error.

    Returns:
        the record: id, score, interval (95 %, bootstrap), scores, n, seed, tokens_per_second, peak_memory_bytes, wall_seconds,
        commit, versions, device, data, settings, extra. ``id`` is derived from the rest.

    Raises:
        ConfigError: mode, method and model do not fit together, or the folder holds another evaluation.
        DataError: the data are missing, or a prompt does not fit the model.
    """
    method = method or task.kind
    if method not in METHODS:
        raise ConfigError(f"method is '{method}' but must be one of {', '.join(METHODS)}")
    if (method == "classify") != (task.kind == "classify"):
        raise ConfigError(
            f"method is '{method}' but task '{task.name}' is scored by {task.kind}"
            f"{'' if task.kind == 'classify' else ' or likelihood'}; choose that"
        )
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size} but must be at least 1")
    examples, origin = task.load_with_source(split, shots=shots, limit=limit, seed=seed)
    lock = nullcontext() if folder is None else exclusive(folder)
    with lock, runner_in_mode(model, mode) as runner:
        settings = {
            "task": task.name,
            "split": split,
            "mode": mode,
            "method": method,
            "shots": shots,
            "limit": limit,
            "seed": seed,
            "batch_size": batch_size,
            "max_new_tokens": task.max_new_tokens if method == "generate" else None,
            "max_length": max_length if method == "classify" else None,
            "examples": fingerprint(asdict(e) for e in examples),
            "weights": facts.weights_digest(runner),
        }
        done = _open_folder(folder, settings, resume)
        if folder is not None and (folder / RECORD).is_file() and all(e.id in done for e in examples):
            return dict(json.loads((folder / RECORD).read_text(encoding="utf-8")))  # the same number keeps its id
        began, before = time.perf_counter(), sum(row.seconds for row in done.values())
        facts.reset_peak(runner)
        batches = _batches(tokenizer, task, examples, method, batch_size, max_length)
        with _shown(progress, f"{task.name} {mode}", len(examples)) as report:
            for batch in batches:
                if any(e.id not in done for e in batch):
                    made = _run(runner, tokenizer, task, batch, method, max_length)
                    new = [row for row in made if row.id not in done]
                    _append(folder, new)
                    done.update({row.id: row for row in new})
                report(sum(e.id in done for e in examples))
        rows = [done[e.id] for e in examples]
        result = _record(task, examples, rows, settings, origin, runner, extra)
    result["wall_seconds"] = before + time.perf_counter() - began
    result = {"id": hashlib.sha256(json.dumps(result, sort_keys=True, default=str).encode()).hexdigest()[:12], **result}
    if folder is not None:
        write_json(folder / RECORD, result)
    return result


# ------------------------------------------------------------------------------------------------------------- batches


def _batches(
    tokenizer: Any, task: Task, examples: list[Example], method: str, size: int, max_length: int
) -> list[list[Example]]:
    """Examples of like length together, longest first: memory is tried at once and the time left is not underestimated."""
    if len({e.id for e in examples}) != len(examples):
        raise DataError(f"task '{task.name}' has two examples with one id; ids tell predictions apart")
    if method == "classify":
        lengths = [len(class_ids(tokenizer, e.prompt, max_length)) for e in examples]
    else:
        lengths = [len(prompt_ids(tokenizer, _chat(task, e))) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: (-lengths[i], i))
    return [[examples[i] for i in order[start : start + size]] for start in range(0, len(order), size)]


def _chat(task: Task, example: Example) -> list[dict[str, str]]:
    return with_system([{"role": "user", "content": example.prompt}], task.system)


def _run(model: nn.Module, tokenizer: Any, task: Task, batch: list[Example], method: str, max_length: int) -> list[Row]:
    began = time.perf_counter()
    if method == "generate":
        chats = [_chat(task, e) for e in batch]
        answers = answer(model, tokenizer, chats, max_new_tokens=task.max_new_tokens, batch_size=len(batch))
        said: list[Said] = [(task.parse(a.text), a.text, a.tokens, []) for a in answers]
    elif method == "classify":
        said = _classified(model, tokenizer, task, batch, max_length)
    else:
        said = _likeliest(model, tokenizer, task, batch)
    share, peak = (time.perf_counter() - began) / len(batch), peak_memory_bytes(next(model.parameters()).device)
    return [
        Row(e.id, prediction, _value(task, method, prediction, e), e.gold, text, tokens, share, peak, scores)
        for e, (prediction, text, tokens, scores) in zip(batch, said, strict=True)
    ]


def _value(task: Task, method: str, prediction: Any, example: Example) -> float:
    return (
        math.exp(prediction)
        if method == "likelihood" and not example.choices
        else task.per_example(prediction, example)
    )


@torch.inference_mode()
def _classified(model: nn.Module, tokenizer: Any, task: Task, batch: list[Example], max_length: int) -> list[Said]:
    """Logits ``(B, C)`` of right-padded texts, each pooled where its model class pools."""
    ids = [class_ids(tokenizer, e.prompt, max_length) for e in batch]
    width, where = max(map(len, ids)), next(model.parameters()).device
    logits = model(
        input_ids=torch.tensor([i + [tokenizer.pad_token_id] * (width - len(i)) for i in ids], device=where),
        attention_mask=torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i in ids], device=where),
    ).logits
    if logits.dim() != 2 or logits.shape[1] != len(task.labels):
        raise ConfigError(
            f"the model's logits have shape {tuple(logits.shape)} but task '{task.name}' has {len(task.labels)} classes; load "
            f"a sequence classifier with num_labels={len(task.labels)}"
        )
    scores = logits.float().log_softmax(-1)
    return [(int(s.argmax()), "", len(i), [round(v, 5) for v in s.tolist()]) for s, i in zip(scores, ids, strict=True)]


@torch.inference_mode()
def _likeliest(model: nn.Module, tokenizer: Any, task: Task, batch: list[Example]) -> list[Said]:
    """The likeliest choice, or the mean log-likelihood of the gold answer's tokens where there are no choices."""
    texts: list[tuple[list[int], list[int]]] = []
    for e in batch:
        chat = _chat(task, e)
        head = prompt_ids(tokenizer, chat)
        tails = [answer_ids(tokenizer, chat, text, closed=False) for text in e.choices]
        texts += [(head, tail) for tail in tails or [answer_ids(tokenizer, chat, e.answer)]]
    sums = iter(sequence_likelihoods(model, tokenizer.pad_token_id, texts))
    counts = iter(texts)
    said: list[Said] = []
    for e in batch:
        heads = [next(counts) for _ in e.choices or ("answer",)]
        found = [next(sums) for _ in heads]
        read = sum(len(head) + len(tail) for head, tail in heads)
        if e.choices:
            said.append((e.choices[max(range(len(found)), key=found.__getitem__)], "", read, found))
        else:
            said.append((found[0] / len(heads[0][1]), "", read, found))
    return said


@torch.inference_mode()
def sequence_likelihoods(model: nn.Module, pad: int, texts: list[tuple[list[int], list[int]]]) -> list[float]:
    """``log p(tail | head)`` in nats, summed over the tail's tokens, of each ``(head, tail)``; equal heads with one-token tails
    are read once.

    Rows are padded on the left, so that the logits asked for are the last ones: ``(B, longest tail + 1, V)`` and no more.
    """
    single = all(len(tail) == 1 for _, tail in texts)
    rows: list[list[int]] = []
    place: list[int] = []
    for head, tail in texts:
        row = head if single else head + tail
        if not (single and rows and rows[-1] is head):
            rows.append(row)
        place.append(len(rows) - 1)
    width, where = max(map(len, rows)), next(model.parameters()).device
    limit = getattr(model.config, "max_position_embeddings", None)  # type: ignore[union-attr]
    if limit is not None and width > limit:
        raise DataError(
            f"a prompt with its answer has {width} tokens but the model reads {limit}; shorten or leave it out"
        )
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=where)
    keep = 1 if single else max(len(tail) for _, tail in texts) + 1
    logits = model(
        input_ids=torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=where),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=keep,
    ).logits
    scores = logits[:, -keep:].float().log_softmax(-1)
    found = []
    for (_, tail), index in zip(texts, place, strict=True):
        at = scores[index, -1:] if single else scores[index, -len(tail) - 1 : -1]
        found.append(float(at.gather(-1, torch.tensor(tail, device=where)[:, None]).double().sum()))
    return found


# -------------------------------------------------------------------------------------------------------------- folder


def _open_folder(folder: Path | None, settings: dict[str, Any], resume: bool) -> dict[str, Row]:
    """Rows that an earlier sitting left, by id; the folder is ready to be appended to."""
    if folder is None:
        return {}
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
    try:
        before = json.loads(stored.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"'{stored}' is damaged ({error}); start the evaluation in another folder") from error
    differing = [key for key in settings if before.get(key, "absent") != settings[key]]
    if differing:
        raise ConfigError(
            f"'{folder}' holds an evaluation with another {', '.join(differing)}; choose another folder, or evaluate as it was"
        )
    return _read_rows(file)


def _read_rows(file: Path) -> dict[str, Row]:
    """Whole lines; what a kill left of a last one is cut off."""
    if not file.is_file():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(file, len(whole))
    rows = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            row = Row(**json.loads(line))
        except (UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
            raise ConfigError(
                f"line {number} of '{file}' is no prediction ({error}); start in another folder"
            ) from error
        rows[row.id] = row
    return rows


def _append(folder: Path | None, rows: list[Row]) -> None:
    if folder is None:
        return
    with (folder / PREDICTIONS).open("a", encoding="utf-8") as handle:
        handle.write("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))
        handle.flush()
        os.fsync(handle.fileno())


@contextmanager
def _shown(progress: Callable[[int], None] | None, label: str, total: int) -> Iterator[Callable[[int], None]]:
    if progress is not None:
        yield progress
        return
    with Watched(Console(stderr=True), label, total) as watched:
        yield watched.update


# -------------------------------------------------------------------------------------------------------------- record


def _record(
    task: Task,
    examples: list[Example],
    rows: list[Row],
    settings: dict[str, Any],
    origin: dict[str, Any],
    model: nn.Module,
    extra: dict[str, Any] | None,
) -> dict[str, Any]:
    values = [row.value for row in rows]
    whole = settings["method"] != "likelihood" or all(e.choices for e in examples)
    if whole:
        scores = task.score([_again(row.prediction) for row in rows], examples)
    else:
        scores = {"score": sum(values) / len(values), "nll": -sum(row.prediction for row in rows) / len(rows)}
    if settings["method"] == "likelihood" and whole:
        gold = [row.scores[e.choices.index(e.gold)] for row, e in zip(rows, examples, strict=True)]
        scores["gold_probability"] = sum(math.exp(g) for g in gold) / len(gold)
    seconds, tokens = sum(row.seconds for row in rows), sum(row.tokens for row in rows)
    device = facts.device_of(model)
    found: dict[str, Any] = {
        "format": FORMAT,
        "task": task.name,
        "split": settings["split"],
        "mode": settings["mode"],
        "method": settings["method"],
        "score": scores["score"],
        "interval": facts.bootstrap(values, settings["seed"]),
        "scores": scores,
        "n": len(rows),
        "seed": settings["seed"],
    }
    if set(values) <= {0.0, 1.0}:  # resampling says nothing at 0 % and 100 %
        found["wilson_interval"] = list(wilson(int(sum(values)), len(values)))
    return {
        **found,
        "tokens": tokens,
        "tokens_are": "generated" if settings["method"] == "generate" else "read",
        "tokens_per_second": tokens / seconds if seconds else float("nan"),
        "peak_memory_bytes": max(row.peak_memory for row in rows),
        "peak_memory_is": "allocated on the device"
        if device["type"] == "cuda"
        else "resident in the process since its start",
        "parameters": sum(p.numel() for p in model.parameters()),
        "commit": facts.commit(),
        "versions": facts.versions(),
        "device": device,
        "data": origin,
        "settings": settings,
        "extra": extra or {},
    }


def _again(prediction: Any) -> Any:
    return tuple(prediction) if isinstance(prediction, list) else prediction
