"""Links, latencies and processors: how long things take between simulated nodes.

The rules: a link carries one thing after the other at its bandwidth; a byte is on one link at a
time; the registry has one link for all. Small messages are not queued on links, where real ones
share with bulk transfers, but they do take a processor's time at whoever answers them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

MEMBER_LATENCY_S: Final = (0.0002, 0.001)
ZONE_LATENCY_S: Final = (0.001, 0.002)
"""One way, within a zone and between two."""
UPSTREAM_LATENCY_S: Final = 0.03
"""From a request to the registry to the first byte of its answer."""
MESSAGE_S: Final = 0.00025
CLAIM_S: Final = 0.00005
"""Of the answering process, single-threaded: for each message, and for each claim in it."""
PROOF_S: Final = 0.001
"""Of a thread, one piece after the other."""


@dataclass(slots=True)
class Queue:
    """One thing after the other: a link in one direction, or a processor."""

    rate: float = 1.0
    """Work in a second: bytes, or seconds."""
    free_at: float = 0.0

    def take(self, now: float, work: float) -> float:
        """Queue *work* at *now* and return when it will be done."""
        self.free_at = max(now, self.free_at) + work / self.rate
        return self.free_at


class Latency:
    """Draws how long a message takes from one zone to another."""

    def __init__(self, rng: random.Random) -> None:
        self._draw = rng.uniform

    def between(self, zone: str, other: str) -> float:
        """Return the seconds that this message takes, one way."""
        return self._draw(*(MEMBER_LATENCY_S if zone == other else ZONE_LATENCY_S))
