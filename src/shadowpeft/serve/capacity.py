"""Answers that a server gives and that are needed, and when the device's share pays: the arithmetic of docs/deployment.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shadowpeft.errors import ConfigError


def answers_per_second(rows: int, prefill_ms: float, step_ms: float, new_tokens: float) -> float:
    """``1000 rows / (rows prefill + tokens step)``: the engine reads each prompt, then makes a token a step for all rows.

    Args:
        rows: requests that run at the same time. prefill_ms: to read one prompt. step_ms: one step of so many rows, all in
            one batch; for ``k`` batches, which each have a pass of their own, ``k`` times that of ``rows / k`` rows.
        new_tokens: of an answer, on average.
    """
    _positive(rows=rows, step_ms=step_ms, new_tokens=new_tokens)
    return 1000 * rows / (rows * prefill_ms + new_tokens * step_ms)


def replicas(requests_per_second: float, share: float, per_replica: float, load: float = 0.7) -> int:
    """Replicas for what the devices hand on, each kept at ``load`` of its answers per second so that queues stay short.

    Args:
        share: of the requests, answered on the device.
    """
    _positive(per_replica=per_replica, load=load)
    return math.ceil(round(requests_per_second * (1 - share) / (per_replica * load), 9))


def memory_bytes(base: int, adapters: int, caches: int, rows: int, tokens: int) -> int:
    """Of one replica.

    Args:
        base: bytes of the base. adapters: of all adapters. caches: of one token in the base's cache and the shadow's.
        rows: requests that run at the same time. tokens: prompt and answer of the longest.
    """
    return base + adapters + rows * tokens * caches


@dataclass(frozen=True)
class Route:
    """Milliseconds of one request on its ways.

    Attributes:
        kept: on the device, for an answer that stays there. lost: on the device, before the request is handed on.
        network: there and back. cloud: in the cloud.
    """

    kept: float
    lost: float
    network: float
    cloud: float

    def milliseconds(self, share: float) -> float:
        """``s kept + (1 - s)(lost + network + cloud)``: mean latency where a share ``s`` stays on the device."""
        return share * self.kept + (1 - share) * (self.lost + self.network + self.cloud)

    def break_even(self) -> float:
        """``lost / (network + cloud + lost - kept)``: the share above which this is faster than always asking the cloud.

        Infinite if no share is: the device takes as long for an answer as network and cloud do.
        """
        saved = self.network + self.cloud + self.lost - self.kept
        share = self.lost / saved if saved > 0 else math.inf
        return share if share <= 1 else math.inf


def cost_break_even(device_cost: float, replica_cost_per_hour: float, per_replica: float, load: float = 0.7) -> float:
    """``3600 load X e / g``: the share above which a request costs less than in the cloud alone; infinite if no share does.

    Args:
        device_cost: ``e``, of one request on the device, in the currency of the next. replica_cost_per_hour: ``g``.
        per_replica: ``X``, answers per second.
    """
    _positive(replica_cost_per_hour=replica_cost_per_hour, per_replica=per_replica, load=load)
    share = 3600 * load * per_replica * device_cost / replica_cost_per_hour
    return share if share <= 1 else math.inf


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{name} is {value} but must be greater than 0; measure it with scripts/capacity.py")
