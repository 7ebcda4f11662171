"""One damaged adapter folder a request, in a forked process with a memory limit and an alarm; see test_fuzz.py."""

from __future__ import annotations

import copy
import json
import os
import resource
import select
import signal
import traceback
from pathlib import Path
from typing import Any

SECONDS = 20
SPARE = 2**30
"""Bytes that a case may allocate beyond what the process has; the adapters have 100 KiB."""


def digest(folder: Path) -> dict[str, str]:
    """Everything below ``folder`` by name: contents of files, targets of links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = "link " + os.readlink(path)
        else:
            small = path.is_file() and path.stat().st_size < 2**24
            found[str(path)] = path.read_bytes().hex() if small else str(path.stat().st_size)
    return found


class Judge:
    """Loads a folder in every way and says what is wrong with what happened."""

    def __init__(self, bases: dict[str, Any]) -> None:
        import torch

        from tiny import tokens

        self.bases, self.tokens = bases, tokens()
        with torch.no_grad():
            self.logits = {task: base(self.tokens).logits for task, base in bases.items()}
        self.keys = {task: {k: v.clone() for k, v in base.state_dict().items()} for task, base in bases.items()}

    def untouched(self, task: str, model: Any) -> str | None:
        """What is left on a base after an error."""
        import torch

        state = model.state_dict()
        if state.keys() != self.keys[task].keys():
            return f"keys left on the base: {sorted(set(state) ^ set(self.keys[task]))[:3]}"
        if any(not torch.equal(state[k], v) for k, v in self.keys[task].items()):
            return "a weight of the base changed"
        if hasattr(model, "peft_config") or any(m._forward_pre_hooks or m._forward_hooks for m in model.modules()):
            return "peft_config or hooks left on the base"
        with torch.no_grad():
            if not torch.equal(model(self.tokens).logits, self.logits[task]):
                return "the base computes something else"
        return None

    def loaded(self, task: str, model: Any, folder: Path) -> str | None:
        """What differs between a loaded adapter and its file, or between its base and the base."""
        import torch
        from peft import get_peft_model_state_dict
        from safetensors.torch import load_file

        tensors, own = load_file(folder / "adapter_model.safetensors"), get_peft_model_state_dict(model)
        own = {k if k.startswith("base_model.model.") else f"base_model.model.{k}": v for k, v in own.items()}
        if own.keys() != tensors.keys():
            return f"names differ from the file: {sorted(set(own) ^ set(tensors))[:3]}"
        for name, value in tensors.items():
            if not torch.equal(own[name].double(), value.double()):
                return f"{name} differs from the file"
            if not torch.isfinite(value).all():
                return f"{name} is not finite"
        with model.disable_adapter(), torch.no_grad():
            if not torch.equal(model(self.tokens).logits, self.logits[task]):
                return "with the adapter disabled the base computes something else"
        return self.finite(model)

    def finite(self, model: Any) -> str | None:
        """What is wrong with the logits of a loaded adapter whose numbers are all finite.

        A file may hold any finite number, in our format and in others': there is no size that training cannot reach and
        damage can, so a limit would be a guess. Numbers whose square overflows may make logits that are not finite; they are
        what the file says.
        """
        import torch

        with torch.no_grad():
            logits = model(self.tokens).logits
        limit = torch.finfo(torch.float32).max ** 0.5
        if torch.isfinite(logits).all() or any(bool((p.abs() > limit).any()) for p in model.parameters()):
            return None
        return "the loaded adapter's logits are not finite, and no number in it is large enough for that"

    def message(self, error: BaseException, folder: Path) -> str | None:
        """What is wrong with an error's message."""
        text = str(error)
        if "\n" in text or len(text) > 1500 or len(text) < 20:
            return f"the message is no sentence ({len(text)} characters): {text[:200]!r}"
        if "allocate" in text:
            return f"memory was asked for before the file was judged: {text}"
        return None

    def load(self, folder: Path, task: str, way: str) -> tuple[str, str | None]:
        """``(outcome, complaint)`` of one way of loading."""
        from peft import PeftModel

        import shadowpeft
        from shadowpeft.apps import info
        from shadowpeft.errors import ShadowPeftError
        from shadowpeft.hf.load import read_config

        model = copy.deepcopy(self.bases[task])
        try:
            if way == "load":
                made = shadowpeft.load(folder, model)
            elif way == "peft":
                made = PeftModel.from_pretrained(model, str(folder))
            elif way == "info":
                info.main(str(folder), True)
                return "loaded", None
            else:
                read_config(folder)
                return "loaded", None
        except ShadowPeftError as error:
            complaint = self.message(error, folder) or self.untouched(task, model)
            return f"{type(error).__name__}: {error}", complaint
        return "loaded", self.loaded(task, made, folder)

    def foreign(self, folder: Path, task: str) -> dict[str, Any]:
        """An adapter in another package's format, which only ``shadowpeft.load`` reads."""
        import torch

        import shadowpeft
        from shadowpeft.errors import ShadowPeftError

        before, model = digest(folder), copy.deepcopy(self.bases[task])
        try:
            made = shadowpeft.load(folder, model)
        except ShadowPeftError as error:
            outcome = f"{type(error).__name__}: {error}"
            complaint = self.message(error, folder) or self.untouched(task, model)
        except Exception as error:  # noqa: BLE001  (the point: nothing but the package's own errors may come)
            outcome = f"{type(error).__name__}: {error}"[:300]
            complaint = "".join(traceback.format_exception(error)[-6:])
        else:
            outcome, complaint = "loaded", None
            with torch.no_grad():
                complaint = self.finite(made)
                with made.disable_adapter():
                    if not torch.equal(made(self.tokens).logits, self.logits[task]):
                        complaint = "with the adapter disabled the base computes something else"
        if complaint is None and digest(folder) != before:
            complaint = "the folder was changed"
        return {"load": outcome, "complaint": complaint}

    def judge(self, folder: Path, task: str, foreign: bool) -> dict[str, Any]:
        """Every way; the first complaint."""
        if foreign:
            return self.foreign(folder, task)
        before = digest(folder)
        outcome: dict[str, Any] = {"complaint": None}
        for way in ("load", "config", "info", "peft"):
            try:
                outcome[way], complaint = self.load(folder, task, way)
            except Exception as error:  # noqa: BLE001  (the point: nothing but the package's own errors may come)
                outcome[way] = f"{type(error).__name__}: {error}"[:300]
                # before our code runs, PEFT reads the JSON by itself to find the method's name
                by_peft = way == "peft" and not outcome["load"].startswith("loaded") and reads_alone(error)
                complaint = None if by_peft else "".join(traceback.format_exception(error)[-6:])
            if complaint is not None and outcome["complaint"] is None:
                outcome["complaint"] = f"{way}: {complaint}"
        if outcome["load"] == "loaded" and not outcome["peft"].startswith("loaded"):
            outcome["complaint"] = outcome["complaint"] or f"load accepts what PEFT's loader refuses: {outcome['peft']}"
        if outcome["complaint"] is None and digest(folder) != before:
            outcome["complaint"] = "the folder was changed"
        return outcome


def reads_alone(error: BaseException) -> bool:
    """Whether an error comes from PEFT's first look at a configuration, where no hook of ours is called."""
    frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return "_get_peft_type" in frames or (
        frames[-1] == "from_pretrained" and files[-1].endswith(os.path.join("peft", "peft_model.py"))
    )


class Worker:
    """A forked process that judges folders; started again when it dies."""

    def __init__(self, bases: dict[str, Any]) -> None:
        self.bases, self.pid = bases, 0
        self.deaths = 0

    def start(self) -> None:
        ours, theirs = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(ours[1])
            os.close(theirs[0])
            _serve(self.bases, ours[0], theirs[1])
        os.close(ours[0])
        os.close(theirs[1])
        self.requests, self.answers = os.fdopen(ours[1], "w"), os.fdopen(theirs[0])

    def stop(self) -> None:
        if self.pid:
            self.requests.close()
            self.answers.close()
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def judge(self, folder: Path, task: str, foreign: bool = False) -> dict[str, Any]:
        """The outcome; a process that dies or says nothing in ``SECONDS`` is a complaint."""
        if not self.pid:
            self.start()
        self.requests.write(json.dumps([str(folder), task, foreign]) + "\n")
        self.requests.flush()
        ready, _, _ = select.select([self.answers], [], [], SECONDS + 10)
        line = self.answers.readline() if ready else ""
        if line:
            return json.loads(line)
        self.stop()
        self.deaths += 1
        return {"complaint": "the process died" if ready else f"no answer in {SECONDS} seconds"}


def _serve(bases: dict[str, Any], source: int, sink: int) -> None:
    """The worker's part; never returns."""
    try:
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silent, stream)
        judge = Judge(bases)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, used + SPARE))
        with os.fdopen(source) as requests, os.fdopen(sink, "w") as answers:
            for line in requests:
                folder, task, foreign = json.loads(line)
                signal.alarm(SECONDS)
                outcome = judge.judge(Path(folder), task, foreign)
                signal.alarm(0)
                answers.write(json.dumps(outcome) + "\n")
                answers.flush()
    finally:
        os._exit(1)
