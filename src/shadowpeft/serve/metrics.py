"""What ``/metrics`` tells Prometheus. Every server has a registry of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """The server's counters.

    Args:
        everywhere: labels that every line carries, such as which of several servers it comes from.
    """

    def __init__(self, everywhere: dict[str, str] | None = None) -> None:
        self.registry = CollectorRegistry()
        self.everywhere = everywhere or {}

        def new(kind: Any, name: str, text: str, labels: tuple[str, ...] = (), **options: Any) -> Any:
            return kind(f"shadowpeft_{name}", text, labels, registry=self.registry, **options)

        self.requests = new(Counter, "requests", "Requests by route and status.", ("path", "status"))
        self.latency = new(
            Histogram, "answer_seconds", "From the request to the end of its answer.", ("where",), buckets=_SECONDS
        )
        self.first = new(
            Histogram, "first_token_seconds", "From the request to its first token.", ("where",), buckets=_SECONDS
        )
        self.routed = new(Counter, "routed", "Answers by who gave them and why.", ("where", "reason"))
        self.tokens = new(Counter, "tokens", "Tokens read and made.", ("kind",))
        self.disconnected = new(Counter, "disconnected", "Clients that left before they had their whole answer.")
        self.swaps = new(Counter, "swaps", "Adapters replaced, rolled back, added, removed, or refused.", ("result",))
        self.cloud_failures = new(
            Counter,
            "cloud_failures",
            "Exchanges with the cloud that failed: connection, timeout, status, answer.",
            ("kind",),
        )
        self._share = new(Gauge, "on_device_share", "Share of all answers that were given on the device.")
        self._new = new
        self._answers = [0, 0]

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for."""
        self._new(Gauge, name, text).set_function(value)

    def total(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A count that is read when it is asked for; its name ends with ``_total``, as every counter's."""
        self.registry.register(_Total(f"shadowpeft_{name}", text, value))

    def answered(self, where: str, reason: str, seconds: float) -> None:
        """Count one finished answer."""
        self.routed.labels(where, reason).inc()
        self.latency.labels(where).observe(seconds)
        self._answers[0] += 1
        self._answers[1] += where == "device"
        self._share.set(self._answers[1] / self._answers[0])

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self)  # type: ignore[arg-type]

    def collect(self) -> Iterator[Any]:
        """The registry's families, with the labels that every line carries."""
        for family in self.registry.collect():
            labelled = copy.copy(family)
            labelled.samples = [s._replace(labels={**s.labels, **self.everywhere}) for s in family.samples]
            yield labelled


class _Total(Collector):
    """A counter whose value somebody else keeps."""

    def __init__(self, name: str, text: str, value: Callable[[], float]) -> None:
        self.name, self.help, self.value = name, text, value

    def collect(self) -> Iterator[Metric]:
        """The one family."""
        yield CounterMetricFamily(self.name, self.help, value=self.value())
