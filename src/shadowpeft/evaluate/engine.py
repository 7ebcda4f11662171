"""One task through one model: every method of adaptation by the same code, in batches, resumable, with a record at the end."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shadowpeft.data.chat import answer_ids, encode, prompt_ids, rows_digest
from shadowpeft.data.declined import Vote
from shadowpeft.data.padding import pad_inputs
from shadowpeft.data.second_opinion import SecondOpinion
from shadowpeft.data.tasks import CLASSIFY_MAX_LENGTH, Example, Task, class_ids, training_rows
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.evaluate import held
from shadowpeft.evaluate import record as facts
from shadowpeft.evaluate.folder import RECORD, Prediction, append, open_folder, read_object
from shadowpeft.evaluate.modes import runner_in_mode
from shadowpeft.evaluate.scores import answer_loss, wilson
from shadowpeft.generate import answer
from shadowpeft.hf.forward.speculation import Speculation
from shadowpeft.runtime import peak_memory_bytes
from shadowpeft.storage import exclusive, write_json
from shadowpeft.terminal import terminal
from shadowpeft.watching import Watched

METHODS = ("generate", "likelihood", "classify")
FORMAT = 1

Judged = tuple[Any, str, int, list[float]]
"""Prediction, text, tokens, scores."""


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
    loss: bool = False,
    speculative: Speculation | None = None,
    opinion: SecondOpinion | None = None,
    vote: bool = False,
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
        loss: whether the record also has ``loss`` and ``perplexity`` per token of the examples' answers, ``answer_tokens``.
        speculative: how the shadow drafts answers of the attached model; its counts go into the record.
        opinion: of the device's calibration; the score with it is ``second_opinion`` in the record.
        vote: whether the shadow weighs which action an answer of the attached model begins with, see
            :mod:`shadowpeft.vote`; its time is in ``wall_seconds`` alone.
        progress: called with the number of examples done after each batch; None: a bar on standard error.

    The device of a task with actions is also asked to choose among them, and both halves of one with tools are held to valid
    calls: ``constrained`` in the record has the score that this gives, beside that of free answers.

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
    if speculative is not None and (mode != "attached" or method != "generate"):
        raise ConfigError(
            f"speculative was given for mode '{mode}' and method '{method}', but the shadow drafts what the attached model "
            "generates; leave it out"
        )
    if vote and (mode != "attached" or method != "generate" or not held.may_vote(task) or speculative is not None):
        raise ConfigError(
            f"vote was given for task '{task.name}', mode '{mode}', method '{method}'{' and drafts' if speculative else ''}, "
            "but the shadow weighs the action or call that an answer of the attached model begins with; leave it out"
        )
    examples, origin = task.load_with_source(split, shots=shots, limit=limit, seed=seed)
    examples = task.for_path(examples, "shadow" if mode == "detached" else "base")
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
            "examples": rows_digest(asdict(e) for e in examples),
            "weights": facts.weights_digest(runner),
            **task.settings,
        }
        if loss:
            settings["loss"] = True
        if speculative is not None:
            settings["speculative"] = True
        if vote:
            settings["vote"] = True
        chooses = method == "generate" and held.holds(task, mode) and not vote  # a vote holds the answers already
        done = open_folder(folder, settings, resume) if folder is not None else {}
        if folder is not None and (folder / RECORD).is_file() and all(e.id in done for e in examples):
            record = read_object(folder / RECORD)
            judged = record.get("second_opinion", {}).get("digest")
            if not chooses or judged == (None if opinion is None else opinion.digest):
                return record  # the same number keeps its id
        began, before = time.perf_counter(), sum(row.seconds for row in done.values())
        facts.reset_peak(runner)
        batches = _batches(tokenizer, task, examples, method, batch_size, max_length)
        voted: dict[str, Vote] | None = None
        if vote:  # by all, so that a resumed evaluation has the same batches
            found = held.voted(runner, tokenizer, task, examples)
            voted = {e.id: vote for e, vote in zip(examples, found, strict=True)}
        with _shown(progress, f"{task.name} {mode}", len(examples)) as report:
            for batch in batches:
                if any(e.id not in done for e in batch):
                    predictions = _run(runner, tokenizer, task, batch, method, max_length, speculative, voted)
                    new = [p for p in predictions if p.id not in done]
                    if folder is not None:
                        append(folder, new)
                    done.update({p.id: p for p in new})
                report(sum(e.id in done for e in examples))
        rows = [done[e.id] for e in examples]
        result = _record(task, examples, rows, settings, origin, runner, extra)
        asked = (runner, tokenizer, task, examples, batch_size)
        if chooses:
            result["constrained"] = held.worth(*asked, alone=mode == "detached")
        if chooses and opinion is not None:
            weighed = held.worth(*asked, alone=True, opinion=opinion)
            result["second_opinion"] = {**weighed, "digest": opinion.digest}
        if speculative is not None:
            result["speculation"] = speculative.counts.summary()
        if loss:
            result |= _loss(runner, tokenizer, task, examples)
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
        lengths = [len(prompt_ids(tokenizer, task.chat(e), **task.told)) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: (-lengths[i], i))
    return [[examples[i] for i in order[start : start + size]] for start in range(0, len(order), size)]


def _run(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    batch: list[Example],
    method: str,
    max_length: int,
    speculative: Speculation | None = None,
    voted: dict[str, Vote] | None = None,
) -> list[Prediction]:
    began = time.perf_counter()
    if method == "generate":
        chats = [task.chat(e) for e in batch]
        options: dict[str, Any] = {"template": [task.told] * len(batch)}
        if speculative is not None:
            options["speculative"] = speculative
        if voted is not None:
            options["actions"] = [voted[e.id] for e in batch]
        answers = answer(model, tokenizer, chats, max_new_tokens=task.max_new_tokens, batch_size=len(batch), **options)
        judged: list[Judged] = [(task.parse(a.text), a.text, a.tokens, []) for a in answers]
    elif method == "classify":
        judged = _classified(model, tokenizer, task, batch, max_length)
    else:
        judged = _likeliest(model, tokenizer, task, batch)
    share, peak = (time.perf_counter() - began) / len(batch), peak_memory_bytes(next(model.parameters()).device)
    return [
        Prediction(e.id, prediction, _value(task, method, prediction, e), e.gold, text, tokens, share, peak, scores)
        for e, (prediction, text, tokens, scores) in zip(batch, judged, strict=True)
    ]


def _value(task: Task, method: str, prediction: Any, example: Example) -> float:
    return (
        math.exp(prediction)
        if method == "likelihood" and not example.choices
        else task.per_example(prediction, example)
    )


@torch.inference_mode()
def _classified(model: nn.Module, tokenizer: Any, task: Task, batch: list[Example], max_length: int) -> list[Judged]:
    """Logits ``(B, C)`` of right-padded texts, each pooled where its model class pools."""
    ids = [class_ids(tokenizer, e.prompt, max_length) for e in batch]
    logits = model(**pad_inputs(ids, tokenizer.pad_token_id, device=next(model.parameters()).device)).logits
    if logits.dim() != 2 or logits.shape[1] != len(task.labels):
        raise ConfigError(
            f"the model's logits have shape {tuple(logits.shape)} but task '{task.name}' has {len(task.labels)} classes; load "
            f"a sequence classifier with num_labels={len(task.labels)}"
        )
    scores = logits.float().log_softmax(-1)
    return [(int(s.argmax()), "", len(i), [round(v, 5) for v in s.tolist()]) for s, i in zip(scores, ids, strict=True)]


@torch.inference_mode()
def _likeliest(model: nn.Module, tokenizer: Any, task: Task, batch: list[Example]) -> list[Judged]:
    """The likeliest choice, or the mean log-likelihood of the gold answer's tokens where there are no choices."""
    texts: list[tuple[list[int], list[int]]] = []
    for e in batch:
        chat = task.chat(e)
        head = prompt_ids(tokenizer, chat)
        tails = [answer_ids(tokenizer, chat, text, closed=False) for text in e.choices]
        texts += [(head, tail) for tail in tails or [answer_ids(tokenizer, chat, e.answer)]]
    rows = iter(zip(texts, sequence_likelihoods(model, tokenizer.pad_token_id, texts), strict=True))
    judged: list[Judged] = []
    for e in batch:
        own = [next(rows) for _ in e.choices or ("answer",)]
        tokens, sums = sum(len(head) + len(tail) for (head, tail), _ in own), [total for _, total in own]
        if e.choices:
            judged.append((e.choices[max(range(len(sums)), key=sums.__getitem__)], "", tokens, sums))
        else:
            judged.append((sums[0] / len(own[0][0][1]), "", tokens, sums))
    return judged


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
    inputs = pad_inputs(rows, pad, "left", where)
    keep = 1 if single else max(len(tail) for _, tail in texts) + 1
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = model(**inputs, position_ids=positions, use_cache=False, logits_to_keep=keep).logits
    scores = logits[:, -keep:].float().log_softmax(-1)
    sums = []
    for (_, tail), index in zip(texts, place, strict=True):
        at = scores[index, -1:] if single else scores[index, -len(tail) - 1 : -1]
        sums.append(float(at.gather(-1, torch.tensor(tail, device=where)[:, None]).double().sum()))
    return sums


def _loss(model: nn.Module, tokenizer: Any, task: Task, examples: list[Example]) -> dict[str, float]:
    longest = getattr(model.config, "max_position_embeddings", None) or 10**9  # type: ignore[union-attr]
    sequences = encode(training_rows(task, examples), tokenizer, max_length=longest)
    mean = answer_loss(model, sequences, tokenizer.pad_token_id)
    return {"loss": mean["loss"], "perplexity": mean["perplexity"], "answer_tokens": mean["tokens"]}


@contextmanager
def _shown(progress: Callable[[int], None] | None, label: str, total: int) -> Iterator[Callable[[int], None]]:
    if progress is not None:
        yield progress
        return
    with Watched(terminal(stderr=True), label, total) as watched:
        yield watched.update


# -------------------------------------------------------------------------------------------------------------- record


def _record(
    task: Task,
    examples: list[Example],
    rows: list[Prediction],
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
    device = facts.describe_device(model)
    record: dict[str, Any] = {
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
        record["wilson_interval"] = list(wilson(int(sum(values)), len(values)))
    return {
        **record,
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
