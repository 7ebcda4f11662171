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
    return f"""---
{header}---
# Shadow adapter for {run.base}

Trained with shadowpeft for {summary["steps"]} steps on `{data["source"]}`
{size}; {summary["trainable_parameters"]:,} trainable
parameters.
{table}
```python
import shadowpeft

model = shadowpeft.load("path/to/this/folder")  # attached: the adapted base
edge = shadowpeft.detach(model)                 # detached: a stock transformers model
```

## Settings

```yaml
{settings}```
"""
