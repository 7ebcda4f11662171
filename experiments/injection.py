"""Where a trained shadow's corrections act: how large they are at each layer, and what each layer's is worth.

    python -m experiments.injection ADAPTER [--task robot] [--rows 64] [--out NAME]

For held-out rows of a task, at the tokens of the answer: the size of the correction ``|alpha c| / |h|`` (Eqs. 3-4), of the
shadow state ``|s| / |h|`` and the discrepancy ``|h - s| / |h|`` (Eq. 2), and of a step of the state ``|s' - s| / |s|`` (Eq. 7).
And the loss of the attached path as it is, without the correction of one layer, without any, and with the shadow state
taken for zero by all of them, which leaves a low-rank function of the base's own state. Writes ``docs/records/NAME.json`` and
``docs/NAME.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

import shadowpeft
from experiments.measuring import stamp
from shadowpeft.apps.common import bar, load_tokenizer_of, quiet_libraries
from shadowpeft.core.modules import Injection, Update
from shadowpeft.data.chat import ChatCollator, ChatDataset
from shadowpeft.data.tasks import get_task
from shadowpeft.evaluate import answer_loss
from shadowpeft.runtime import environment, prepare_cpu
from shadowpeft.storage import write_json
from shadowpeft.train import baselines

DOCS = Path(__file__).parent.parent / "docs"


class Sizes:
    """Mean relative sizes over the tokens of ``mask`` ``(B, T)``, by the module that made them."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.sums: dict[tuple[int, str], list[float]] = {}

    def add(self, module: int, name: str, part: Tensor, whole: Tensor) -> None:
        """``|part| / |whole|`` of each token, both ``(B, T, d)``."""
        share = (part.norm(dim=-1) / whole.norm(dim=-1).clamp(min=1e-12))[self.mask]
        total = self.sums.setdefault((module, name), [0.0, 0.0])
        total[0] += float(share.detach().sum())
        total[1] += share.numel()

    def mean(self, module: Any, name: str) -> float | None:
        """None for what was never called, as the update before the first refined layer."""
        total = self.sums.get((id(module), name))
        return None if total is None else total[0] / total[1]

    @contextmanager
    def watching(self, modules: list[Any]) -> Iterator[None]:
        """Look at every call of the injections and updates inside."""

        def look(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            if isinstance(module, Injection):
                h, s = args[:2]
                self.add(id(module), "correction", output - h, h)
                self.add(id(module), "discrepancy", h - s, h)
                self.add(id(module), "state", s, h)
            else:
                self.add(id(module), "step", output - args[0], args[0])

        with _hooked(module.register_forward_hook(look) for module in modules):
            yield


@contextmanager
def _hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Hooks that are taken away afterwards."""
    hooks = list(handles)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def without(injections: list[Injection]) -> Iterator[None]:
    """These injections left out."""
    with _hooked(each.register_forward_hook(lambda module, args, output: args[0]) for each in injections):
        yield


@contextmanager
def without_state(injections: list[Injection]) -> Iterator[None]:
    """These injections told that the shadow state is zero."""

    def zero(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        h, s, *rest = args
        return h, torch.zeros_like(s), *rest

    with _hooked(each.register_forward_pre_hook(zero) for each in injections):
        yield


@torch.inference_mode()
def layers(model: Any, data: ChatDataset, pad: int, console: Console, batch_size: int = 16) -> dict[str, Any]:
    """The figures of every refined layer, and the loss with all corrections, with none, and with a shadow state of zero."""
    model.eval()
    injections = {n: m for n, m in model.named_modules() if isinstance(m, Injection)}
    updates = {n: m for n, m in model.named_modules() if isinstance(m, Update)}
    sequences = [s for s in data.sequences if s.base]
    sizes, collate = Sizes(), ChatCollator(pad)
    with sizes.watching([*injections.values(), *updates.values()]):
        for start in range(0, len(sequences), batch_size):
            batch = collate([s.features() for s in sequences[start : start + batch_size]])
            sizes.mask = batch["labels"] != -100
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    def loss() -> float:
        return answer_loss(model, sequences, pad, batch_size=batch_size)["loss"]

    whole = loss()
    with without(list(injections.values())):
        bare = loss()
    with without_state(list(injections.values())):
        stateless = loss()
    by_layer = []
    with bar(console, "one layer's correction left out", len(injections)) as progress:
        for number, (name, injection) in enumerate(injections.items(), 1):
            with without([injection]):
                alone = loss()
            update = updates.get(name.replace("shadowpeft_injection", "shadowpeft_update"))
            by_layer.append(
                {
                    "layer": next(int(part) for part in name.split(".") if part.isdigit()),
                    "correction": sizes.mean(injection, "correction"),
                    "discrepancy": sizes.mean(injection, "discrepancy"),
                    "state": sizes.mean(injection, "state"),
                    "step": None if update is None else sizes.mean(update, "step"),
                    "loss_without": alone - whole,
                }
            )
            progress(number)
    return {
        "loss": whole,
        "loss_without_corrections": bare,
        "loss_with_state_zero": stateless,
        "rows": len(sequences),
        "layers": by_layer,
    }


def draw(record: dict[str, Any], file: Path) -> None:
    """Sizes above, worth below, over the layers."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    where = [each["layer"] for each in record["layers"]]
    titles = {
        "discrepancy": "discrepancy |h - s| / |h|",
        "state": "shadow state |s| / |h|",
        "correction": "correction |alpha c| / |h|",
        "step": "state step |s' - s| / |s|",
    }
    for i, (key, title) in enumerate(titles.items()):
        values = [float("nan") if each[key] is None else each[key] for each in record["layers"]]
        above.plot(where, values, marker="o", markersize=3, color=f"C{i}", label=title)
    above.set_yscale("log")
    above.set_ylabel("relative size")
    above.legend(fontsize=8)
    below.bar(where, [each["loss_without"] for each in record["layers"]], color="#1f5fa8")
    below.set_ylabel("loss without it, minus loss")
    below.set_xlabel("layer of the base")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Measure, record, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("--task", default="robot")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", default="injection")
    options = parser.parse_args()
    quiet_libraries()
    prepare_cpu(options.threads)
    tokenizer, task = load_tokenizer_of(options.adapter, None), get_task(options.task)
    rows = task.load("validation", limit=options.rows, seed=0)
    data: Any = baselines.encode_examples(task, rows, tokenizer, max_length=512)
    model = shadowpeft.load(options.adapter)
    record = {
        "task": options.task,
        "split": "validation",
        **layers(model, data, tokenizer.pad_token_id, Console(stderr=True)),
        **stamp(),
        "versions": environment(),
    }
    write_json(DOCS / "records" / f"{options.out}.json", record)
    draw(record, DOCS / f"{options.out}.png")
    print(
        *(f"{key} {record[key]:.4f}" for key in ("loss", "loss_without_corrections", "loss_with_state_zero")), sep=", "
    )
    for each in record["layers"]:
        print(
            f"{each['layer']:3d}  correction {each['correction']:.3f}  state {each['state']:.3f}  "
            f"loss without {each['loss_without']:+.4f}"
        )


if __name__ == "__main__":
    main()
