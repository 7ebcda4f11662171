"""The device-cloud pair as a system (Figure 4, Table 3): requests one by one over HTTP, accuracy and latency of each system.

``scripts/system_test`` starts the two servers; here are the client and what becomes of its measurements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.markdown import table
from shadowpeft.data.actions import REMOTE, written
from shadowpeft.data.tasks import Example, Task
from shadowpeft.errors import ShadowPeftError
from shadowpeft.evaluate import accuracy, rival
from shadowpeft.serve.client import CloudClient
from shadowpeft.serve.router import DEVICE, KNOWN, TAGGED
from shadowpeft.train.progress import label_decades


@dataclass(frozen=True)
class System:
    """A way to have a request answered."""

    title: str
    server: str
    """``edge`` or ``cloud``: which of the two servers the client asks."""
    model: str
    """The model's name there."""
    route: str | None = None
    """For the edge: who answers, instead of the router's choice."""


SYSTEMS = {
    "routed": System("shadow, routed", "edge", "robot"),
    "lora": System("LoRA, always cloud", "cloud", "lora"),
    "dora": System("DoRA, always cloud", "cloud", "dora"),
    "attached": System("shadow, always cloud", "cloud", "robot"),
    "device": System("shadow, always device", "edge", "robot", "device"),
}
COMPARED = ("routed", "lora", "dora")
"""The three of the paper."""
RIVAL = "svc"
TITLES = {**{name: system.title for name, system in SYSTEMS.items()}, RIVAL: f"{rival.TITLE}, always device"}


@dataclass(frozen=True)
class Reply:
    """One answer, as the client saw it."""

    text: str
    milliseconds: float
    """From sending the request, network included, to the whole answer."""
    tokens: int
    where: str
    reason: str
    degraded: bool = False


class Client:
    """Asks the two servers.

    Always-cloud requests go through the class that the edge server has for its own requests to the cloud, with the same
    ``delay`` (seconds) before each; between client and edge there is no network.
    """

    def __init__(
        self, urls: Mapping[str, str], key: str, *, system_message: str | None, max_tokens: int, delay: float
    ) -> None:
        delays = {"edge": 0.0, "cloud": delay}
        self._servers = {
            name: CloudClient(url, key, timeout=120.0, delay=delays[name], hands_on=False) for name, url in urls.items()
        }
        self._lead = [] if system_message is None else [{"role": "system", "content": system_message}]
        self._max_tokens = max_tokens

    async def ask(self, system: System, prompt: str) -> Reply:
        """The answer of ``system`` to a user's message.

        Raises:
            CloudError, CloudRefusedError: if there was none.
        """
        body: dict[str, Any] = {
            "model": system.model,
            "messages": [*self._lead, {"role": "user", "content": prompt}],
            "max_tokens": self._max_tokens,
        }
        if system.route is not None:
            body["route"] = system.route
        began = time.perf_counter()
        answer = await self._servers[system.server].ask("/v1/chat/completions", body)
        milliseconds = 1000 * (time.perf_counter() - began)
        note = answer["shadowpeft"]
        text = answer["choices"][0]["message"]["content"]
        tokens = answer["usage"]["completion_tokens"]
        return Reply(
            text.strip(), milliseconds, tokens, note["where"], note["reason"], bool(note.get("degraded", False))
        )

    async def close(self) -> None:
        """Close the connections."""
        for server in self._servers.values():
            await server.close()


def turn(names: Sequence[str], i: int) -> list[str]:
    """The order in which the systems get request ``i``: each is first, second, ... equally often."""
    start = i % len(names)
    return [*names[start:], *names[:start]]


def ask_rival(prompts: Sequence[str]) -> list[Reply]:
    """The rival's answers (:mod:`shadowpeft.evaluate.rival`), one by one in this process, without a server or a network."""
    model = rival.fit_robot()
    replies = []
    for prompt in prompts:
        began = time.perf_counter()
        (action,), _ = rival.predict(model, [prompt])
        milliseconds = 1000 * (time.perf_counter() - began)
        replies.append(Reply(written(action), milliseconds, 0, DEVICE, TAGGED if action == REMOTE else KNOWN))
    return replies


async def measure(
    ask: Callable[[System, str], Any],
    systems: Mapping[str, System],
    prompts: Sequence[str],
    *,
    warmup: int,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, list[Reply]]:
    """Every prompt to every system, one request at a time; ``warmup`` rounds before are not kept.

    Args:
        ask: :meth:`Client.ask`. progress: called with the number of requests done, warm-up included.
    """
    replies: dict[str, list[Reply]] = {name: [] for name in systems}
    done = 0
    for i in range(-warmup, len(prompts)):
        for name in turn(list(systems), i):
            reply = await ask(systems[name], prompts[i % len(prompts)])
            if i >= 0:
                replies[name].append(reply)
            done += 1
            progress(done)
    return replies


def summarise(replies: Sequence[Reply], examples: Sequence[Example], task: Task) -> dict[str, Any]:
    """Accuracy with its 95 % interval, latency, and who answered.

    Returns:
        ``accuracy``, ``interval``, ``n``, the parts of ``task.score``, ``p50_ms``, ``p95_ms``, ``mean_ms``, ``tokens`` (mean of
        an answer), ``on_device`` (share) and ``degraded`` (answers that the device gave for want of a cloud).

    Raises:
        ShadowPeftError: if there are none.
    """
    if not replies:
        raise ShadowPeftError("there are no answers to summarise; send at least one request")
    predictions = [task.parse(reply.text) for reply in replies]
    hits = [task.per_example(p, e) == 1.0 for p, e in zip(predictions, examples, strict=True)]
    milliseconds = np.array([reply.milliseconds for reply in replies])
    parts = {name: value for name, value in task.score(predictions, examples).items() if name != "score"}
    return {
        **accuracy(hits),
        "parts": {name: round(value, 4) for name, value in parts.items()},
        "p50_ms": round(float(np.percentile(milliseconds, 50)), 1),
        "p95_ms": round(float(np.percentile(milliseconds, 95)), 1),
        "mean_ms": round(float(milliseconds.mean()), 1),
        "tokens": round(float(np.mean([reply.tokens for reply in replies])), 2),
        "on_device": sum(reply.where == "device" for reply in replies) / len(replies),
        "degraded": sum(reply.degraded for reply in replies),
    }


def record(replies: Mapping[str, Sequence[Reply]]) -> dict[str, list[dict[str, Any]]]:
    """The single answers, for a JSON file."""
    return {
        name: [{**asdict(reply), "milliseconds": round(reply.milliseconds, 1)} for reply in part]
        for name, part in replies.items()
    }


def by_delay(result: Mapping[str, Any]) -> str:
    """Markdown: a row for each delay and system."""
    header = ["network delay, ms", "system", "accuracy", "95 % interval", "p50, ms", "p95, ms", "on the device"]
    rows = [
        [
            f"{delay['milliseconds']:g}",
            TITLES[name],
            f"{row['accuracy']:.1%}",
            "{:.1%} - {:.1%}".format(*row["interval"]),
            f"{row['p50_ms']:.0f}",
            f"{row['p95_ms']:.0f}",
            f"{row['on_device']:.1%}" + (f" ({row['degraded']} for want of a cloud)" if row["degraded"] else ""),
        ]
        for delay in result["delays"]
        for name, row in delay["systems"].items()
    ]
    return "\n".join(table(header, rows)) + "\n"


def side_by_side(asked: Sequence[str], replies: Mapping[str, Sequence[Reply]]) -> str:
    """Markdown: a row for each request, a column for each system."""

    def cell(reply: Reply) -> str:
        return f"{_plain(reply.text) or '(nothing)'} ({reply.where}, {reply.milliseconds:.0f} ms)"

    rows = [[_plain(prompt), *(cell(own[i]) for own in replies.values())] for i, prompt in enumerate(asked)]
    return "\n".join(table(["request", *(TITLES[name] for name in replies)], rows)) + "\n"


def _plain(text: str) -> str:
    for mark in "\\|`*_<>[]":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Accuracy against latency: a marker for each system and delay at its p50, with a line to its p95."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    looks = {
        "routed": ("#3a8a4d", "o"),
        "lora": ("#1f5fa8", "s"),
        "dora": ("#7a4fa3", "D"),
        "attached": ("#9a9a9a", "^"),
        "device": ("#c2571a", "v"),
        RIVAL: ("#000000", "x"),
    }
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for turn_, delay in enumerate(result["delays"]):
        for name, row in delay["systems"].items():
            colour, marker = looks[name]
            value = 100 * row["accuracy"]
            spread = [[max(value - 100 * row["interval"][0], 0)], [max(100 * row["interval"][1] - value, 0)]]
            axes.errorbar(row["p50_ms"], value, yerr=spread, fmt="none", ecolor=colour, alpha=0.35, capsize=3)
            axes.plot([row["p50_ms"], row["p95_ms"]], [value, value], color=colour, alpha=0.35, lw=1)
            label = TITLES[name] if turn_ == 0 else None
            axes.plot(row["p50_ms"], value, marker, color=colour, ms=8, label=label)
            text = f"{delay['milliseconds']:g}"
            aside = 0 if len(result["delays"]) == 1 else 8 * (2 * turn_ / (len(result["delays"]) - 1) - 1)
            axes.annotate(text, (row["p50_ms"], value), (aside, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xscale("log")
    times = [row[key] for delay in result["delays"] for row in delay["systems"].values() for key in ("p50_ms", "p95_ms")]
    label_decades(axes.xaxis, min(times), max(times))
    axes.xaxis.set_tick_params(which="both", labelsize=8)
    axes.set_xlabel("latency of a whole answer, ms: p50 (marker) to p95 (line)")
    axes.set_ylabel("accuracy, %, with 95 % interval")
    axes.set_title(f"{result['n']} robot requests, one by one; beside each marker the network delay in ms")
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
