"""What several commands share: the model in a chosen mode, printing as table or JSON, a progress bar."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowpeft.errors import AdapterFileError, ConfigError
from shadowpeft.terminal import one_line, terminal

if TYPE_CHECKING:
    import torch
    from rich.console import Console

MODES = ("attached", "detached", "base")


def quiet_imports() -> None:
    """Only errors from the imports of torchao and bitsandbytes, where they are installed."""
    import logging

    for name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Only errors from transformers and from what it imports: a command prints its own messages."""
    import warnings

    quiet_imports()
    from transformers import logging
    from transformers.utils import logging as hf_logging

    logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def has_tokenizer(adapter: str) -> bool:
    """Whether a tokenizer was saved with an adapter, in its folder or on the Hub."""
    from shadowpeft.hf.files.locate import find_file

    try:
        find_file(adapter, "tokenizer_config.json")
    except AdapterFileError:
        return False  # if the adapter itself is missing, whoever loads it says so
    return True


def load_tokenizer_of(adapter: str, base: str | None) -> Any:
    """The tokenizer saved with the adapter, else the base's; with a pad token."""
    from shadowpeft.hf.load import read_config
    from shadowpeft.tokenizer import load_tokenizer

    if has_tokenizer(adapter):
        return load_tokenizer(adapter)
    config = read_config(adapter)
    name = base or config.base_alias or config.base_model_name_or_path
    if not name:
        raise ConfigError("neither the adapter nor its base has a tokenizer; pass --base")
    return load_tokenizer(name)


def left_behind(source: str, page: str) -> dict[str, str]:
    """What is told of a calibration beside a model that is written elsewhere, and where to read on; nothing without one."""
    from shadowpeft.serve.router import FILE

    calibration = Path(source) / FILE
    return {"calibration": f"stays in {calibration}; see {page}"} if calibration.is_file() else {}


def config_of(adapter: str) -> dict[str, Any]:
    """What the configuration of an adapter, or of an edge model, says; nothing if there is none, of which whoever loads it says
    more."""
    from shadowpeft.hf.files.locate import CONFIG, find_file
    from shadowpeft.hf.files.reading import read_json

    try:
        return read_json(find_file(adapter, CONFIG))
    except AdapterFileError:
        file = Path(adapter) / "config.json"
        return read_json(file) if file.is_file() else {}


def mode_of(source: str, mode: str | None) -> str:
    """How an adapter answers, attached unless ``mode`` says otherwise; or an edge model, which is a detached shadow.

    Raises:
        ConfigError: if another mode is asked of an edge model.
    """
    from shadowpeft.serve.loading import is_edge_folder

    if not is_edge_folder(source):
        return mode or "attached"
    if mode not in (None, "detached"):
        raise ConfigError(f"mode is '{mode}' but '{source}' is an edge model, a detached shadow alone; leave --mode out")
    return "detached"


def system_message(adapter: str, given: str | None) -> str | None:
    """The system message of prompts that bring none: what was ``given`` (an empty one: none), or that of the training,
    which adapters and edge models record."""
    if given is not None:
        return given or None
    trained = config_of(adapter).get("system_message")
    return trained if isinstance(trained, str) else None


def pick_device(name: str) -> torch.device:
    """The device that a command's models run on: ``auto`` is the first CUDA device, else the CPU.

    Raises:
        ConfigError: if this machine has no such device.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu"]
    if accelerator is not None:
        kind = accelerator.type
        devices += [kind, *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]
    if name == "auto":
        return torch.device("cuda" if "cuda" in devices else "cpu")
    if name not in devices:
        raise ConfigError(f"device is '{name}' but this machine has {', '.join(devices)}; choose one of these, or auto")
    return torch.device(name)


def placed(model: Any, device: torch.device) -> Any:
    """``model`` on ``device``; one that was loaded onto an accelerator, such as a quantised base, stays there."""
    return model.to(device) if next(model.parameters()).device.type == "cpu" else model


def check_drafts(modes: Sequence[str]) -> None:
    """Refuse ``--speculative`` where nothing drafts in any of ``modes``.

    Raises:
        ConfigError: naming them.
    """
    if "attached" not in modes:
        raise ConfigError(
            f"--speculative was given for --mode {', '.join(modes)}, but the shadow drafts for the attached model; leave one "
            "out"
        )


@contextmanager
def in_mode(model: Any, mode: str) -> Iterator[Any]:
    """The model to run for ``mode``: the adapted base, the detached shadow, or the bare base.

    Raises:
        ConfigError: for another mode.
    """
    from shadowpeft.evaluate import runner_in_mode

    if mode not in MODES:
        raise ConfigError(f"mode is '{mode}' but must be one of {', '.join(MODES)}")
    with runner_in_mode(model, mode) as runner:
        yield runner


def show(result: dict[str, Any], title: str, as_json: bool) -> None:
    """Print a result on standard output, as a table or as JSON (in ASCII, which every terminal and pipe can carry)."""
    if as_json:
        print(json.dumps(result, indent=2))
        return
    from rich.table import Table

    table = Table(show_header=False)
    for key, value in flat(result).items():
        table.add_row(one_line(key.replace("_", " ")), one_line(value))
    console = terminal()
    console.print(one_line(title))
    console.print(table)


def flat(result: dict[str, Any]) -> dict[str, str]:
    """One level of ``key`` or ``part: key``, with every value in words."""
    lines: dict[str, str] = {}
    for key, value in result.items():
        inner = flat(value) if isinstance(value, dict) else None
        lines |= {key: in_words(value)} if inner is None else {f"{key}: {name}": text for name, text in inner.items()}
    return lines


def in_words(value: Any) -> str:
    """A value as people write it, not as Python does."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.2g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {text}" for key, text in flat(value).items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(in_words, value)) or "none"
    return "none" if value is None else str(value)


@contextmanager
def bar(console: Console, label: str, total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A progress bar with ETA, without a terminal a line a minute; yields a function that takes the number done."""
    from shadowpeft.watching import Watched

    with Watched(console, label, total, quiet=quiet) as watched:
        yield watched.update
