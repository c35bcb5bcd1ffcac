"""Who of several sources brings a run of pieces first, and when another one should be asked.

The rule: only bytes count as progress, and only enough of them; while a piece is being proven no
source is late, because the work is ours.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from p2pcache.core.plan import Run
from p2pcache.mirror.active import ActiveBlob
from p2pcache.ports import Peer

# How often a race that is stalled with no further source to ask looks again.
_STALL_POLL_S: Final = 1.0


class Race:
    """One run, and the sources that are reading it at once."""

    def __init__(self, blob: ActiveBlob, run: Run[Peer]) -> None:
        self.blob = blob
        self._run = run
        self._futures = [blob.inflight[piece] for piece in run.pieces]
        self._news = asyncio.Event()
        self._progress_at = time.monotonic()
        self._hedge_after_s = 0.0
        self._proofs = 0
        self.patience_s = 0.0
        """A source that makes no progress is never overtaken sooner than this."""

    @property
    def is_over(self) -> bool:
        """Every piece has come, or never will."""
        return all(future.done() for future in self._futures)

    def open_pieces(self) -> range:
        """The stretch of the run that still lacks pieces."""
        pieces = self._run.pieces
        lacking = [p for p, future in zip(pieces, self._futures, strict=True) if not future.done()]
        return range(lacking[0], lacking[-1] + 1) if lacking else pieces[:0]

    def expect(self, hedge_after_s: float) -> None:
        """A source begins, which should show progress within *hedge_after_s*."""
        self._hedge_after_s = hedge_after_s
        self._progress_at = time.monotonic()
        self._news.set()  # whoever waits has to wait for so long, and no longer

    def tell(self, *, progress: bool = False) -> None:
        """Something happened: bytes came, or a source ended."""
        if progress:
            self._progress_at = time.monotonic()
        self._news.set()

    @contextmanager
    def proving(self) -> Iterator[None]:
        """Meanwhile the work is ours: no source is late."""
        self._proofs += 1
        try:
            yield
        finally:
            self._proofs -= 1
            self.tell(progress=True)

    @property
    def is_stalled(self) -> bool:
        """No source has made progress for longer than it should take."""
        return not self._proofs and self._left_s() <= 0

    def _left_s(self) -> float:
        patience = max(self._hedge_after_s, self.patience_s)
        return self._progress_at + patience - time.monotonic()

    async def wait_for_news(self) -> None:
        """Return when something happened or the race is stalled; at most a moment later."""
        left = _STALL_POLL_S if self._proofs else self._left_s()
        with suppress(TimeoutError):
            async with asyncio.timeout(left if left > 0 else _STALL_POLL_S):
                await self._news.wait()
        self._news.clear()
