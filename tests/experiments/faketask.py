"""Two tiny tasks in the form of ``shadowpeft.data.tasks``: one that generates, one that classifies."""

from __future__ import annotations

from typing import Any

from shadowpeft.data.chat import fingerprint
from shadowpeft.data.tasks import Example, Task

SIZES = {"train": 24, "validation": 10, "test": 12}


class Fake(Task):
    """Says which of three letters a text is full of; with ``paths`` some rows are for one path only."""

    max_new_tokens = 4

    def __init__(self, kind: str, paths: bool = False) -> None:
        self.kind, self.paths = kind, paths
        self.name = f"fake_{kind}"
        self.labels = ("a", "b", "c") if kind == "classify" else ()

    def rows(self, split: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        made = []
        for i in range(SIZES[split]):
            letter = "abc"[i % 3]
            path = ("base", "shadow", "both")[i % 3] if self.paths else "both"
            made.append({"text": split[:2] + letter * (2 + i % 7) + str(i), "letter": letter, "path": path})
        return made, {"from": "folder", "path": "inline", "fingerprint": fingerprint(made), "partial": False}

    def example(self, row: dict[str, Any], identity: str) -> Example:
        return Example(identity, row["text"], row["letter"], row["letter"], ("a", "b", "c"), {"path": row["path"]})

    def parse(self, text: str) -> str:
        return text.strip()[:1]


def evaluate_fake(
    model: Any, tokenizer: Any, task: Fake, *, mode: str, folder: Any, method: str, split: str = "test", **options: Any
) -> dict[str, Any]:
    """A stand-in for ``evaluate_task``: real predictions of the model, in the form of its record."""
    import torch
    from experiments.runner import bootstrap

    import shadowpeft
    from shadowpeft.generate import answer

    rows = task.load(split, shots=options.get("shots", 0), limit=options.get("limit"))
    runner = shadowpeft.detach(model) if mode == "detached" else model
    runner.eval()
    assert method in ("classify", "generate")
    if method == "classify":
        with torch.no_grad():
            ids = [torch.tensor([tokenizer(r.prompt).input_ids]) for r in rows]
            found = [task.labels[int(runner(input_ids=i).logits.argmax())] for i in ids]
    else:
        texts = answer(runner, tokenizer, [r.prompt for r in rows], max_new_tokens=task.max_new_tokens)
        found = [task.parse(t.text) for t in texts]
    hits = [task.per_example(p, r) for p, r in zip(found, rows, strict=True)]
    record = {**task.score(found, rows), "interval": list(bootstrap(hits)), "n": len(rows), "mode": mode}
    (folder / "record.json").write_text(str(record))
    return record
