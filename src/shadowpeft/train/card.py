"""The model card of a trained adapter."""

from __future__ import annotations

from typing import Any

import yaml

from shadowpeft.train.config import RunConfig


def model_card(run: RunConfig, summary: dict[str, Any], record: dict[str, Any]) -> str:
    """README of an adapter: base, data, settings, results, how to use both halves."""
    header = yaml.safe_dump(
        {
            "base_model": run.base,
            "library_name": "peft",
            "tags": ["shadowpeft", "adapter", "text-generation"],
            "pipeline_tag": "text-generation",
        },
        sort_keys=False,
    )
    losses = "\n".join(
        f"| {label} | {summary[key]:.4f} |"
        for key, label in (("eval_task_loss", "attached"), ("eval_shadow_loss", "detached"))
        if key in summary
    )
    table = f"\n| path | validation cross-entropy per answer token |\n|---|---|\n{losses}\n" if losses else ""
    settings = yaml.safe_dump(
        {"shadow": run.shadow.model_dump(), "training": run.training.model_dump()}, sort_keys=False
    )
    return f"""---
{header}---
# Shadow adapter for {run.base}

Trained with shadowpeft for {summary["steps"]} steps on `{record["train"]["source"]}`
({record["train"]["rows"]} rows, sha256 `{record["train"]["sha256"][:16]}`); {summary["trainable_parameters"]:,} trainable
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
