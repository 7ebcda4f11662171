"""The model card of a trained adapter."""

from __future__ import annotations

from typing import Any

import yaml

from shadowpeft.train.config import RunConfig


def model_card(run: RunConfig, summary: dict[str, Any], record: dict[str, Any]) -> str:
    """README of an adapter: base, data, settings, results, how to use both halves."""
    kind = "text-classification" if run.task_type == "SEQ_CLS" else "text-generation"
    header = yaml.safe_dump(
        {
            "base_model": run.base,
            "library_name": "peft",
            "tags": ["shadowpeft", "adapter", kind],
            "pipeline_tag": kind,
        },
        sort_keys=False,
    )
    losses = "\n".join(
        f"| {label} | {summary[key]:.4f} |"
        for key, label in (("eval_task_loss", "attached"), ("eval_shadow_loss", "detached"))
        if key in summary
    )
    unit = "row" if run.task_type == "SEQ_CLS" else "answer token"
    table = f"\n| path | validation cross-entropy per {unit} |\n|---|---|\n{losses}\n" if losses else ""
    if "accuracy" in summary:
        right = "\n".join(f"| {path} | {share:.2%} |" for path, share in summary["accuracy"].items())
        table += f"\n| path | validation rows classified right |\n|---|---|\n{right}\n"
    data = record["train"]
    digest = f", sha256 `{data['sha256'][:16]}`" if data["sha256"] else ""
    size = f"({data['rows']} rows{digest})" if data["rows"] else f"(streamed{digest})"
    settings = yaml.safe_dump(
        {"shadow": run.shadow.model_dump(), "training": run.training.model_dump()}, sort_keys=False
    )
    answers = run.task_type != "SEQ_CLS"
    return f"""---
{header}---
# Shadow adapter for {run.base}

One training run, two models: *attached*, the frozen base with this adapter, and *detached*, a small model of its own.
Trained with shadowpeft for {summary["steps"]} steps on `{data["source"]}`
{size}; {summary["trainable_parameters"]:,} trainable parameters.
No weight of the base is in this folder.

## Results
{table or _NOT_MEASURED}
{BEGIN}
{END}

## The cloud's half

```python
import shadowpeft

model = shadowpeft.load("path/to/this/folder")  # the adapted base; PeftModel.from_pretrained(base, folder) does the same
```
{_CLOUD if answers else ""}
## The device's half

```python
edge = shadowpeft.detach(model)  # a stock transformers model
edge.save_pretrained("edge")     # which loads without shadowpeft
```
{_DEVICE if answers else ""}{_ACTIONS if run.data.learns_actions else ""}
## Limits

- It belongs to one base, whose licence holds for it too; another base is refused.
- It was trained on the rows above and on nothing else. What it says beyond them is the base's, or worse.
- It cannot be merged into the base.

## Settings

```yaml
{settings}```
"""


_CLOUD = """
```
shadowpeft generate path/to/this/folder "a request"
shadowpeft serve mine=path/to/this/folder --role cloud --no-auth
```
"""
_DEVICE = """
```
shadowpeft detach path/to/this/folder edge
shadowpeft export path/to/this/folder edge.gguf --to gguf
shadowpeft serve mine=edge --role edge --cloud-url http://127.0.0.1:8000 --cloud-model mine --no-auth
```
"""
_NOT_MEASURED = "\nThe run had no validation rows, so nothing was measured.\n"
_ACTIONS = """
This device chooses among known actions: add `--skills actions.txt` to `generate` and to `serve`. What it is not sure of
it should hand on; `shadowpeft route calibrate` finds out how sure is sure enough, and writes that here.
"""
BEGIN, END = "<!-- routing -->", "<!-- /routing -->"
"""Between them stands what a calibration found."""


def with_calibration(card: str, report: dict[str, Any]) -> str:
    """A card with the results of ``shadowpeft route calibrate``; as it was where it has no place for them.

    Args:
        report: what ``routing.json`` reports of the rows that it was fitted on.
    """
    if BEGIN not in card or END not in card:
        return card
    before, rest = card.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    held = f"with {report['level']:.0%} confidence" if report.get("bound") else "on these rows alone"
    seconded = "\nThe second opinion beside `routing.json` weighs the device's choice." if "second_opinion" in report else ""
    shares = [
        ("commands kept on the device", report["commands_kept"]),
        ("open requests handed on", report["open_handed_on"]),
        ("wrong, of what is kept", report.get("wrong_share")),
    ]
    lines = "\n".join(f"| {name} | {'-' if share is None else f'{share:.1%}'} |" for name, share in shares)
    return f"""{before}{BEGIN}
Calibrated on `{report["data"]}` ({report["n"]} requests, {report["open_requests"]} of them open) so that at most
{report["target"]:.0%} of what the device keeps is wrong, {held}.
The shares are of the rows that were fitted, so they flatter.{seconded}

| share | |
|---|---|
{lines}
{END}{after}"""
