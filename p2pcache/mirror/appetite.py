"""How much of the upstream this node takes upon itself at once.

What one node has leased the others wait for. So it leases about as much as it reads in a second:
much over a fast line, one piece at a time over a slow one or where many nodes share the line. The
rule: what is asked for counts at once, so that fetches that begin together share the room; and a
fetch that has nothing under way gets a little in any case, because its reader waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from p2pcache.core.layout import Layout

MIN_BYTES: Final = 256 << 10
"""What a fetch that has nothing under way may lease however much others have."""
MAX_BYTES: Final = 16 << 20
# Before anything was measured: enough to measure it by, and so little that many nodes which
# begin together on a slow line are done with it before leases lapse of old age.
FIRST_BYTES: Final = 1 << 20
_HORIZON_S: Final = 1.0
_SAMPLE_S: Final = 0.5
_GAIN: Final = 0.5


class Appetite:
    """The bytes under way from the upstream, and how fast they come. Times are monotonic."""

    def __init__(self) -> None:
        self._taken = 0
        self._reads = 0
        self._rate: float | None = None
        self._came = 0
        self._since = 0.0

    @property
    def horizon(self) -> int:
        """The bytes that may be under way at once."""
        if self._rate is None:
            return FIRST_BYTES
        return int(min(MAX_BYTES, max(MIN_BYTES, self._rate * _HORIZON_S)))

    @property
    def room(self) -> int:
        """How many more bytes may be leased now."""
        return max(0, self.horizon - self._taken)

    def take(self, size: int) -> None:
        """*size* bytes are to be read, or may be."""
        self._taken += size

    def give_back(self, size: int) -> None:
        """*size* bytes have been read, or will not be."""
        self._taken -= size

    @contextmanager
    def asking(self, layout: Layout, wanted: Iterable[int], *, idle: bool) -> Iterator[int]:
        """Yield how many of the *wanted* pieces, the first ones, to lease at most.

        They are taken for the time of the block. *idle* is a fetch that has nothing under way: its
        first piece is never put off.
        """
        left = max(self.room, MIN_BYTES) if idle else self.room
        count = size = 0
        for piece in wanted:
            length = len(layout.range_of(piece))
            if size + length > left and not (idle and not count):
                break
            count += 1
            size += length
        self.take(size)
        try:
            yield count
        finally:
            self.give_back(size)

    def begin(self, now: float) -> None:
        """A read begins to be waited for."""
        if not self._reads:
            self._came, self._since = 0, now
        self._reads += 1

    def note(self, count: int, now: float) -> None:
        """So many bytes came."""
        self._came += count
        if now - self._since >= _SAMPLE_S:
            self._sample(now)

    def end(self, now: float) -> None:
        """A read is over."""
        self._reads -= 1
        if self._came >= FIRST_BYTES and (self._rate is None or not self._reads):
            self._sample(now)

    def _sample(self, now: float) -> None:
        rate = self._came / max(now - self._since, 1e-3)
        self._rate = rate if self._rate is None else self._rate + _GAIN * (rate - self._rate)
        self._came, self._since = 0, now
