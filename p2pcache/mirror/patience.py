"""When a fetch asks again, when it stops waiting for others, and when it gives up.

Pure: time is an argument, in monotonic seconds of one clock. The rule: all nodes do this at the
same moment, so that whatever is done again and again is done less and less often, and what may
burden others is not done by all of them at once.
"""

from __future__ import annotations

from typing import Final

from p2pcache.core.bounds import FAIL_OPEN_S, RETRY_S
from p2pcache.core.errors import SourceError, SourceUnavailable

# While all sources fail, a blob that a container may already live on is worth more patience than
# one that a client could still get elsewhere. Both stay well below the 30 s after which
# stargz-snapshotter gives a read up.
PATIENCE_S: Final = 12.0
SHORT_PATIENCE_S: Final = 1.0
# Word that a silent source is alive is taken for so long, and not longer: then leave is not waited
# for any more.
MAX_EXCUSED_S: Final = 14.0
# Once trust was lost, it is lost twice as soon the next time, unless others deliver after all.
_LEAST_TRUST: Final = 1 / 8
# The upstream rests for so long after a failure.
_FIRST_REST_S: Final = 0.1
_MAX_REST_S: Final = 2.0
# A peer that is busy is asked again after so long.
_BUSY_S: Final = 0.2
# Coordinators are not asked more often than this by one fetch, and by one that learns nothing new
# from them less and less often.
_MIN_ASK_S: Final = 0.05
_MAX_ASK_S: Final = 1.0
_ASK_GROWTH: Final = 1.5
# Nobody is asked around more often than this.
_FIRST_FIND_S: Final = 0.25
_MAX_FIND_S: Final = 1.0


class Patience:
    """What one fetch has left of it. *spread*, a little above 0, makes nodes differ."""

    def __init__(self, now: float, spread: float) -> None:
        self._ask_at = self._retry_at = now
        """New needs are asked for from the one time on, what nobody had from the other on."""
        self._pause_s, self._busy_s = RETRY_S, _BUSY_S
        self._find_at, self._find_s = now, _FIRST_FIND_S
        self._alive_at = self._came_at = now
        self._trust = 1 + spread
        self._upstream_at, self._rest_s = now, _FIRST_REST_S
        self._failing_since: float | None = None

    # What happened.

    def note_piece(self, now: float, *, from_peer: bool) -> None:
        """A piece came."""
        self.note_bytes(now)
        self._failing_since = None
        self._find_s, self._busy_s = _FIRST_FIND_S, _BUSY_S
        if from_peer:
            self._trust = max(1.0, self._trust)
        else:
            self._rest_s = _FIRST_REST_S

    def note_bytes(self, at: float) -> None:
        """Something came *at* that time."""
        self._came_at = max(self._came_at, at)

    def note_alive(self, now: float) -> None:
        """A coordinator says that somebody is getting it."""
        self._alive_at = now

    def note_leave(self, now: float) -> None:
        """Leave was given. If that does not help, to go without will not either."""
        self._alive_at, self._trust = now, max(1.0, self._trust)

    def note_busy(self, now: float) -> None:
        """A peer was busy."""
        self._ask_at = max(self._ask_at, now + self._busy_s)
        self._busy_s = min(2 * self._busy_s, _MAX_ASK_S)

    def note_room(self, now: float) -> None:
        """A read from the upstream ended: there is room for another lease."""
        self._retry_at = now

    def note_failure(self, failure: SourceError, now: float) -> None:
        """The upstream failed."""
        asked_s = failure.retry_after_s if isinstance(failure, SourceUnavailable) else None
        self._upstream_at = now + min(max(self._rest_s, asked_s or 0.0), _MAX_REST_S)
        self._rest_s = min(2 * self._rest_s, _MAX_REST_S)

    # Asking.

    def may_read(self, now: float) -> bool:
        """The upstream does not rest."""
        return now >= self._upstream_at

    def may_ask(self, now: float, *, is_new: bool) -> bool:
        """Whether to ask the coordinators. *is_new* is a need that they do not know."""
        return now >= self.ask_due(is_new=is_new)

    def ask_due(self, *, is_new: bool) -> float:
        """When to ask the coordinators."""
        return self._ask_at if is_new else max(self._ask_at, self._retry_at)

    def note_asked(self, now: float, retry_s: float, *, of_use: bool) -> None:
        """The coordinators answered; *of_use* if they had word of what nobody had before."""
        self._ask_at = now + _MIN_ASK_S
        if of_use and self._failing_since is None:
            self._pause_s = RETRY_S
        self._retry_at = now + max(retry_s, self._pause_s)
        if now < self._upstream_at:
            self._retry_at = min(self._retry_at, max(self._upstream_at, self._ask_at))

    def note_lacking(self) -> None:
        """They knew nobody: they are asked again later and later."""
        self._pause_s = min(_ASK_GROWTH * self._pause_s, _MAX_ASK_S)

    def may_find(self, now: float) -> bool:
        """Whether to ask around."""
        return now >= self._find_at

    def note_asked_around(self, now: float) -> None:
        """It was asked around."""
        self._find_at = now + self._find_s
        self._find_s = min(2 * self._find_s, _MAX_FIND_S)

    @property
    def upstream_due(self) -> float:
        """When the upstream may be read again."""
        return self._upstream_at

    @property
    def find_due(self) -> float:
        """When to ask around again; infinite while nothing fails."""
        return float("inf") if self._failing_since is None else self._find_at

    # The end of it.

    def is_at_end(self, now: float, came_at: float) -> bool:
        """Nothing came, nor a sign that it will, for too long. Bytes last came at *came_at*."""
        self.note_bytes(came_at)
        return (
            now - max(self._alive_at, self._came_at) > self._trust * FAIL_OPEN_S
            or now - self._came_at > self._trust * MAX_EXCUSED_S
        )

    def lose_trust(self, now: float) -> None:
        """The upstream is read without leave."""
        self._trust = max(self._trust / 2, _LEAST_TRUST)
        self._alive_at = self._came_at = now

    def is_over(self, now: float, patience_s: float) -> bool:
        """Whether all sources have failed for *patience_s*, now being one such moment."""
        if self._failing_since is None:
            self._failing_since = now
        return now - self._failing_since >= patience_s
