"""``shadowpeft eval ADAPTER``: both paths and the bare base on a JSONL file, on the robot set, or on a task."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shadowpeft.apps.common import MODES, bar, in_mode, load_tokenizer_of, pick_device, placed, quiet_libraries
from shadowpeft.errors import ConfigError, DataError


def main(
    adapter: str,
    data: str,
    modes: list[str],
    base: str | None,
    limit: int | None,
    max_new_tokens: int,
    batch_size: int,
    device: str,
    as_json: bool,
) -> None:
    """Evaluate and print one row a mode: loss per answer token, and exact match or intent accuracy.

    A mode is asked what its own path learns: a row with ``path`` or ``shadow_response`` counts as in training.
    """
    unknown = [m for m in modes if m not in MODES]
    if unknown:
        raise ConfigError(f"mode '{unknown[0]}' is unknown; choose from {', '.join(MODES)}")
    quiet_libraries()
    import shadowpeft
    from shadowpeft import evaluate
    from shadowpeft.data import chat
    from shadowpeft.data.robot import load as load_robot
    from shadowpeft.train.run import ROBOT_SYSTEM, prepare_cpu, robot_rows

    prepare_cpu()
    where = pick_device(device)
    robot = data == "robot"
    system = ROBOT_SYSTEM if robot else None
    raw: list[dict[str, Any]] = load_robot("test_normal") if robot else chat.read_jsonl(data)
    checked = robot_rows("test_normal") if robot else raw
    if limit is not None and limit < len(raw):
        chosen = sorted(random.Random(0).sample(range(len(raw)), limit))
        raw, checked = [raw[i] for i in chosen], [checked[i] for i in chosen]
    tokenizer = load_tokenizer_of(adapter, base)
    model = placed(shadowpeft.load(adapter, base), where)
    length = getattr(model.config, "max_position_embeddings", 10**9)
    sequences = chat.encode(checked, tokenizer, max_length=length, system=system)
    _check_paths(data, modes, sequences)
    console = Console(stderr=True)
    results: dict[str, Any] = {"adapter": adapter, "data": data, "rows": len(raw), "modes": {}}
    for mode in modes:
        detached = mode == "detached"
        mine = [s for s in sequences if (s.shadow if detached else s.base)]
        asked = [row for row in checked if row["path"] in ("both", "shadow" if detached else "base")]
        with in_mode(model, mode) as runner, bar(console, mode, len(asked), quiet=as_json) as progress:
            record: dict[str, Any] = dict(evaluate.answer_loss(runner, mine, tokenizer.pad_token_id))
            if robot:
                actions, _ = evaluate.intents(
                    runner, tokenizer, raw, system=system, batch_size=batch_size, progress=progress
                )
                hits = [a == row["skill"] for a, row in zip(actions, raw, strict=True)]
            else:
                hits = evaluate.exact_match(
                    runner,
                    tokenizer,
                    asked,
                    system=system,
                    max_new_tokens=max_new_tokens,
                    batch_size=batch_size,
                    detached=detached,
                    progress=progress,
                )
        results["modes"][mode] = {**record, **evaluate.accuracy(hits)}
    if as_json:
        print(json.dumps(results, indent=2))
        return
    table = Table("mode", "loss", "intent accuracy" if robot else "exact match", "95 % interval", "rows", title=data)
    for mode, r in results["modes"].items():
        low, high = r["interval"]
        table.add_row(mode, f"{r['loss']:.3f}", f"{r['accuracy']:.1%}", f"{low:.1%} - {high:.1%}", str(r["n"]))
    Console().print(table)


def _check_paths(data: str, modes: list[str], sequences: list[Any]) -> None:
    for mode in modes:
        path = "shadow" if mode == "detached" else "base"
        if not any(getattr(s, path) for s in sequences):
            raise DataError(
                f"'{data}' has no row for the {path} path, which mode '{mode}' answers with; leave that mode out"
            )


def run_task(
    adapter: str,
    name: str,
    modes: list[str] | None,
    base: str | None,
    *,
    split: str,
    shots: int,
    limit: int | None,
    seed: int,
    method: str | None,
    batch_size: int,
    out: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Evaluate an adapter (a shadow, LoRA or DoRA) on a task and print one row a mode; ``out`` receives a folder a mode."""
    from shadowpeft.data.tasks import get_task

    task = get_task(name)
    quiet_libraries()
    from shadowpeft.evaluate import evaluate_task
    from shadowpeft.train.run import prepare_cpu

    prepare_cpu()
    where = pick_device(device)
    model, tokenizer, fitting = _load_for_task(adapter, base, task)
    model = placed(model, where)
    if modes is None:  # the bare base of a classifier has a random head, so only generating tasks ask it
        modes = fitting if task.kind == "classify" else ["base", *fitting]
    records = {}
    for mode in modes:
        records[mode] = evaluate_task(
            model,
            tokenizer,
            task,
            mode=mode,
            split=split,
            shots=shots,
            limit=limit,
            seed=seed,
            batch_size=batch_size,
            method=method,
            folder=Path(out) / mode if out else None,
            extra={"adapter": adapter},
            progress=(lambda done: None) if as_json else None,
        )
    if as_json:
        print(json.dumps({"adapter": adapter, "task": name, "modes": records}, indent=2, ensure_ascii=False))
        return
    table = Table("mode", "score", "95 % interval", "n", "tokens/s", "record", title=f"{name}, {split}")
    for mode, r in records.items():
        low, high = r["interval"]
        shown = (f"{r['score']:.2%}", f"{low:.2%} - {high:.2%}", str(r["n"]), f"{r['tokens_per_second']:.0f}", r["id"])
        table.add_row(mode, *shown)
    Console().print(table)
    origin = next(iter(records.values()))["data"]
    files = ", ".join(origin.get("name") or origin.get("path") or [])
    lacks = f" (partial: {origin['lacks']})" if origin["partial"] else ""
    Console().print(f"data from the {origin['from']}: {files}{lacks}")


def _load_for_task(adapter: str, base: str | None, task: Any) -> tuple[Any, Any, list[str]]:
    """Model, tokenizer, and the modes that fit the adapter's method."""
    from peft import PeftConfig, PeftModel

    import shadowpeft
    from shadowpeft.hf.base.load import load_base
    from shadowpeft.hf.files.locate import find_file
    from shadowpeft.hf.load import read_config
    from shadowpeft.train.run import load_tokenizer

    kind = json.loads(find_file(adapter, "adapter_config.json").read_text(encoding="utf-8")).get("peft_type")
    plain = kind == "LORA"
    config: Any = PeftConfig.from_pretrained(adapter) if plain else read_config(adapter)
    named = base or getattr(config, "base_alias", None) or config.base_model_name_or_path
    if not named:
        raise ConfigError("the adapter does not name its base; pass --base")
    tokenizer = load_tokenizer(named) if plain else load_tokenizer_of(adapter, base)
    wanted = "SEQ_CLS" if task.kind == "classify" else "CAUSAL_LM"
    found = str(getattr(config.task_type, "value", config.task_type))
    if found != wanted:
        raise ConfigError(
            f"task '{task.name}' needs a {wanted} adapter but '{adapter}' is a {found} one; choose another task"
        )
    options = {"num_labels": len(task.labels)} if task.labels else {}
    model: Any = load_base(named, wanted, **options)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if plain:
        method = "dora" if config.use_dora else "lora"
        return PeftModel.from_pretrained(model, adapter), tokenizer, [method]
    return shadowpeft.load(adapter, model), tokenizer, ["attached", "detached"]
