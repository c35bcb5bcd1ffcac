"""What a node remembers of each peer: how fast it answers, whether it failed, whether it lied.

Pure: time is an argument, in monotonic seconds. The rule: a peer that delivered wrong bytes is not
asked again for a time that doubles with every lie; a peer that merely failed only for moments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

# A lie may be a bad memory module or an attacker: neither heals within seconds.
_FIRST_BLAME_S: Final = 60.0
_MAX_BLAME_S: Final = 24 * 3600.0
# A refused connection is often a restart of a second or two.
_FIRST_PAUSE_S: Final = 0.5
_MAX_PAUSE_S: Final = 30.0

# How the hedge follows the latency seen: mean plus four deviations, as TCP's retransmission timer
# (RFC 6298) with its gains.
_GAIN: Final = 1 / 8
_DEVIATION_GAIN: Final = 1 / 4
_UNKNOWN_LATENCY_S: Final = 0.1
MIN_HEDGE_S: Final = 0.03
MAX_HEDGE_S: Final = 2.0


@dataclass(slots=True)
class PeerRecord:
    """The record of one peer. Mutable: owned by the locator that asks it."""

    latency_s: float = _UNKNOWN_LATENCY_S
    deviation_s: float = _UNKNOWN_LATENCY_S / 2
    blames: int = 0
    failures: int = 0
    answered_at: float = -math.inf
    """When it last answered a claim or a greeting."""
    shunned_until: float = 0.0
    reason: str = ""
    """Why it is shunned, for people."""

    def is_usable(self, now: float) -> bool:
        """It may be asked."""
        return now >= self.shunned_until

    def note_delivery(self, latency_s: float) -> None:
        """It answers: its first bytes, not yet proven, came after *latency_s*."""
        self.failures = 0
        off = latency_s - self.latency_s
        self.latency_s += _GAIN * off
        self.deviation_s += _DEVIATION_GAIN * (abs(off) - self.deviation_s)

    def note_failure(self, reason: str, now: float) -> None:
        """It did not answer, answered nonsense, or stalled."""
        self.failures += 1
        pause = min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self.failures - 1, 10))
        self._shun(now + pause, reason)

    def note_lie(self, reason: str, now: float) -> None:
        """It delivered wrong bytes."""
        self.blames += 1
        self._shun(now + min(_MAX_BLAME_S, _FIRST_BLAME_S * 2 ** min(self.blames - 1, 20)), reason)

    def _shun(self, until: float, reason: str) -> None:
        if until > self.shunned_until:
            self.shunned_until = until
            self.reason = reason

    @property
    def hedge_after_s(self) -> float:
        """Without progress for so long, another source is asked as well."""
        return min(MAX_HEDGE_S, max(MIN_HEDGE_S, self.latency_s + 4 * self.deviation_s))
