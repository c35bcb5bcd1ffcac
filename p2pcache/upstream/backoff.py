"""When not to ask a host: after it said so, or after it failed again and again.

The rule it keeps: a host that asked for quiet is not asked before the time is up, and a host that
keeps failing is tried by one request at a time.
"""

from __future__ import annotations

import random
from typing import Final

# So many failures in a row, over all requests, are no accident.
FAILURES_TO_CLOSE: Final = 6
_FIRST_S: Final = 1.0
_LONGEST_S: Final = 30.0
# The request that tries a failing host again gets this long before another may.
_TRIAL_S: Final = 5.0


class Gate:
    """Decides whether one host may be asked. *now* is monotonic seconds."""

    def __init__(self) -> None:
        self._failures = 0
        self._quiet_until = 0.0
        self._retry_at = 0.0

    def enter(self, now: float) -> float:
        """Return 0.0 if the host may be asked, else the seconds until it may."""
        wait = max(self._quiet_until, self._retry_at) - now
        if wait > 0:
            return wait
        if self._failures >= FAILURES_TO_CLOSE:
            self._retry_at = now + _TRIAL_S
        return 0.0

    def succeeded(self) -> None:
        """The host answered. A wait that it asked for still holds."""
        self._failures = 0
        self._retry_at = 0.0

    def failed(self, now: float) -> bool:
        """The host did not answer, or answered that it is broken. Return True if that closes it."""
        self._failures += 1
        excess = self._failures - FAILURES_TO_CLOSE
        if excess < 0:
            return False
        pause = min(_LONGEST_S, _FIRST_S * 2 ** min(excess, 10))
        # Jitter, or all nodes that lost a registry at once come back at once.
        self._retry_at = now + pause * random.uniform(0.5, 1.0)
        return excess == 0

    def quiet(self, now: float, wait_s: float) -> None:
        """The host asked not to be asked for *wait_s* seconds."""
        self._quiet_until = max(self._quiet_until, now + wait_s)
