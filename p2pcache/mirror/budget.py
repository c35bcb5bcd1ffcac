"""A bound on the bytes that fetches hold in memory at once.

Hides the queue. The rule: first come, first served, so that a large fetch is not starved by small
ones; who is cancelled while waiting gives back what it was granted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress


class ByteBudget:
    """A bound on bytes in memory: first come, first served."""

    def __init__(self, total: int) -> None:
        self._free = self._total = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def acquire(self, count: int) -> int:
        """Wait for *count* bytes, or all there are if that is less; return how many were taken."""
        count = min(count, self._total)
        if not self._waiting and self._free >= count:
            self._free -= count
            return count
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (count, future)
        self._waiting.append(entry)
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.release(count)
            else:
                with suppress(ValueError):  # passed over since it was cancelled
                    self._waiting.remove(entry)
                self.release(0)  # the next in the queue may want less
            raise
        return count

    def release(self, count: int) -> None:
        """Give *count* bytes back."""
        self._free += count
        while self._waiting and self._waiting[0][0] <= self._free:
            size, future = self._waiting.popleft()
            if not future.done():
                self._free -= size
                future.set_result(None)
