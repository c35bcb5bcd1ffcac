"""One source, asked for some consecutive pieces.

Hides how a stream of bytes becomes pieces, what counts as progress, and what the attempts of a
fetch leave to be done. The rule: only bytes are progress, and only enough of them; while a piece is
being proven, or a limit of this node is waited for, no source is late, because the delay is ours.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Final, Protocol

from p2pcache.core.bounds import HOLD_S, STALL_S
from p2pcache.core.errors import BlobUnavailable, SourceError, SourceUnavailable
from p2pcache.core.layout import Layout, PieceMask
from p2pcache.core.pacing import Priority
from p2pcache.core.plan import MAX_RUN_BYTES
from p2pcache.mirror.active import ActiveBlob
from p2pcache.mirror.appetite import Appetite
from p2pcache.mirror.budget import ByteBudget
from p2pcache.ports import Neighbours, Peer, Upstream
from p2pcache.tasks import loop_time

# A client that waits is a container that waits: an upstream that sends nothing for so long is
# doubted. Peers say themselves how fast they usually are.
UPSTREAM_STALL_S: Final = 1.5
# But a busy machine is often 50 ms late, and if each such hiccup were followed up the registry
# would be read as if there were no peers.
MIN_STALL_S: Final = 0.25
# Another holder is asked then. If there is none the coordinator would have the upstream read, so it
# is not told before a silence for which no busy machine is an excuse.
LONELY_S: Final = 1.0
# Fewer bytes than this are not progress: a source that drips is overtaken like one that stalls.
PROGRESS_BYTES: Final = 16 << 10
# What a peer may take for a run before it is no help any more.
_PEER_RUN_S: Final = 3.0
_SLOWEST_PEER: Final = 1 << 20
# A peer that was overtaken after so long a silence has failed rather than been slow.
STUCK_S: Final = 1.0
# A source that is said to be alive is not doubted for `STALL_S`; from the third time on for twice
# as long: of those who wait for one slow read, each asks about it again and again.
_QUICK_EXCUSES: Final = 2


# What one fetch has under way at once: two full runs, so that one comes while the other is stored.
WINDOW_BYTES: Final = 2 * MAX_RUN_BYTES
# Sources that are asked for the same piece at once, each because the ones before it stalled.
MAX_RIVALS: Final = 3
UPSTREAM: Final = "upstream"
"""The name of the one source that is no peer."""


class Reception(Protocol):
    """Where pieces go, and news of how they came."""

    async def accept(self, attempt: Attempt, piece: int, data: bytes) -> None:
        """Prove *data*, hand it to the readers, and store it. Raises `IntegrityError`."""

    def note_failure(self, attempt: Attempt, failure: SourceError) -> None:
        """A source failed."""

    def note_hedge(self) -> None:
        """A second source is asked because the first makes no progress."""

    def note_unleased(self, pieces: int) -> None:
        """So many pieces are read from the upstream without anybody's leave."""


class Attempt:
    """One source reading *pieces* of a blob; the upstream if *peer* is None."""

    def __init__(
        self,
        blob: ActiveBlob,
        pieces: range,
        peer: Peer | None,
        *,
        holds_all: bool,
        priority: Priority = Priority.DEMAND,
    ) -> None:
        self.priority = priority
        self.blob = blob
        self.pieces = pieces
        self.peer = peer
        self.bits = ((1 << len(pieces)) - 1) << pieces.start
        self.size = len(blob.layout.span(pieces))
        self.task: asyncio.Task[None] | None = None
        self.taken = 0
        """What is left of the bytes that it took from the budget."""
        self.failure: SourceError | None = None
        self.waits = not holds_all
        self._ours = 0
        self._began_at: float | None = None
        self.progress_at = loop_time()
        """When it last had enough to show, or was begun."""
        self.came_at = 0.0
        """When it last had enough to show, if ever."""
        self._excuses = 0
        self._excused_until = 0.0

    @property
    def is_over(self) -> bool:
        """It delivers no more."""
        return self.task is not None and self.task.done()

    @property
    def name(self) -> str:
        """The source, for logs."""
        return self.peer.name if self.peer else UPSTREAM

    @property
    def is_held_up(self) -> bool:
        """It waits for this node itself."""
        return self._ours > 0

    @property
    def patience_s(self) -> float:
        """Without progress for so long, another source should be asked as well."""
        if self.peer is None:
            return UPSTREAM_STALL_S
        if self.waits:
            return STALL_S
        return max(MIN_STALL_S, self.peer.hedge_after_s)

    @property
    def doubtful_at(self) -> float:
        """The monotonic time from which on it counts as stalled, unless something comes."""
        if self._ours or self._began_at is None:
            return float("inf")
        due = self.progress_at + self.patience_s
        if self.peer is not None and not self.waits:
            # It may deliver, and yet be so slow that it is no help.
            due = min(due, self._began_at + _PEER_RUN_S + self.size / _SLOWEST_PEER)
        return max(due, self._excused_until)

    @property
    def missed_at(self) -> float:
        """The monotonic time from which on the coordinators are told that nothing comes of it."""
        if self.peer is None or self.waits:
            return self.doubtful_at
        return max(self.doubtful_at, self.progress_at + LONELY_S)

    @property
    def stuck_at(self) -> float:
        """The monotonic time from which on it counts as failed."""
        if self.peer is None or self._ours or self._began_at is None:
            return float("inf")
        # One that holds the request says so after HOLD_S; this one does not even do that.
        return self.progress_at + (HOLD_S if self.waits else self.patience_s) + STUCK_S

    def excuse(self, now: float) -> None:
        """A coordinator says that it is alive, or that nobody else is to do it."""
        self._excuses += 1
        self._excused_until = now + STALL_S * (1 if self._excuses <= _QUICK_EXCUSES else 2)

    def begin(self) -> None:
        """From now on it may be late."""
        self._began_at = self.progress_at = loop_time()

    @property
    def age_s(self) -> float:
        """How long ago it began."""
        return 0.0 if self._began_at is None else loop_time() - self._began_at

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """Meanwhile the delay is ours: it is not late."""
        self._ours += 1
        try:
            yield
        finally:
            self._ours -= 1
            self.progress_at = loop_time()

    def release(self, count: int) -> int:
        """Return how many bytes of the budget are free once *count* bytes are dealt with."""
        count = min(count, self.taken)
        self.taken -= count
        return count


def find_needy(pieces: int, attempts: Sequence[Attempt], layout: Layout) -> tuple[int, int]:
    """Return those of *pieces* for which a source is to be sought now, and the crowded ones.

    Sought is for what nobody is getting, or nobody from whom anything comes, as far as the window
    has room. No more peers are asked for a crowded piece than have been.
    """
    now = loop_time()
    covered = 0
    room = WINDOW_BYTES
    rivals = [pieces] + [0] * MAX_RIVALS
    for attempt in attempts:
        if now < attempt.doubtful_at:
            covered |= attempt.bits
            room -= attempt.size
        for number in range(MAX_RIVALS, 0, -1):
            rivals[number] |= rivals[number - 1] & attempt.bits
    needy = pieces & ~covered if room > 0 else 0
    crowded = needy & rivals[MAX_RIVALS]
    found = 0
    for piece in PieceMask(layout.count, needy & ~crowded):
        room -= len(layout.range_of(piece))
        if room < 0 and (found or covered):
            break
        found |= 1 << piece
    return found, crowded


class Sources:
    """Carries attempts out. One for all fetches of a node."""

    def __init__(self, neighbours: Neighbours, upstream: Upstream, budget: ByteBudget) -> None:
        self._neighbours = neighbours
        self._upstream = upstream
        self.budget = budget
        self.appetite = Appetite()

    async def carry_out(self, attempt: Attempt, reception: Reception) -> None:
        """Read until all pieces came or the source failed: then its *failure* is set."""
        attempt.taken = await self.budget.acquire(attempt.size)
        try:
            attempt.begin()
            if attempt.peer is None:
                with self._measured():
                    await self._read(attempt, reception)
            else:
                await self._read(attempt, reception)
        except SourceError as error:
            attempt.failure = error
        except BlobUnavailable as lacking:  # the table of contents, to prove a piece with
            attempt.failure = SourceUnavailable(attempt.name, str(lacking))
        finally:
            self.budget.release(attempt.release(attempt.taken))

    @contextmanager
    def _measured(self) -> Iterator[None]:
        self.appetite.begin(loop_time())
        try:
            yield
        finally:
            self.appetite.end(loop_time())

    async def _read(self, attempt: Attempt, reception: Reception) -> None:
        blob, peer = attempt.blob, attempt.peer
        started = time.perf_counter()  # finer than the loop's clock: peers are compared by it
        is_silent = True
        uncredited = 0
        buffer = bytearray()
        waiting = iter(attempt.pieces)
        piece = next(waiting)
        size = len(blob.layout.range_of(piece))
        try:
            async with aclosing(self._blocks(attempt)) as blocks:
                async for block in blocks:
                    now = loop_time()
                    if peer is None:
                        self.appetite.note(len(block), now)
                    elif is_silent and not attempt.waits:
                        self._neighbours.note(peer, time.perf_counter() - started)
                    uncredited += len(block)
                    if is_silent or uncredited >= PROGRESS_BYTES:
                        attempt.came_at = attempt.progress_at = now
                        uncredited = 0
                    is_silent = False
                    buffer += block
                    while len(buffer) >= size:
                        data = bytes(memoryview(buffer)[:size])
                        del buffer[:size]
                        await reception.accept(attempt, piece, data)
                        if (piece := next(waiting, -1)) < 0:
                            return
                        size = len(blob.layout.range_of(piece))
            raise SourceUnavailable(attempt.name, "ended early")
        except asyncio.CancelledError:
            # Overtaken before it said anything. What is not counted is not learned from: a slow
            # peer would be hedged each time. One that was hardly begun tells nothing.
            late = loop_time() >= attempt.progress_at + attempt.patience_s
            if peer and is_silent and late and not attempt.waits and attempt.failure is None:
                self._neighbours.note(peer, time.perf_counter() - started)
            raise

    def _blocks(self, attempt: Attempt) -> AsyncGenerator[bytes, None]:
        blob, part = attempt.blob, attempt.blob.layout.span(attempt.pieces)
        if attempt.peer:
            return attempt.peer.read(blob.digest, part, cut=blob.cut)
        assert blob.repository is not None
        return self._upstream.read(
            blob.repository,
            blob.digest,
            part,
            blob.layout.size,
            priority=attempt.priority,
            pausing=attempt.held_up,
        )
