"""One fetch: from pieces that are absent to pieces in hand.

Hides who is asked, when another one is asked as well, and when to give up. The rules: the
coordinators are asked where pieces are, and the upstream is read only with their leave, as long as
one of them can be reached and somebody is alive who is getting the pieces; a source from which
nothing comes is overtaken and never waited for alone; whatever is done again and again is done at
a bounded rate, because all nodes do it at the same moment; every fetch ends, with its pieces or
with an error, within the patience that its reader has.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Final

from p2pcache.core.bounds import RENEW_S, STALL_S
from p2pcache.core.errors import (
    BlobUnavailable,
    IntegrityError,
    SourceBusy,
    SourceError,
    SourceLacksBlob,
    SourceUnavailable,
)
from p2pcache.core.layout import PieceMask
from p2pcache.core.pacing import Priority
from p2pcache.core.plan import MAX_RUN_BYTES, assign
from p2pcache.mirror.active import ActiveBlob, Origin, PieceData, usable_mask
from p2pcache.mirror.appetite import FIRST_BYTES
from p2pcache.mirror.attempt import UPSTREAM, Attempt, Reception, Sources, find_needy
from p2pcache.mirror.patience import PATIENCE_S, SHORT_PATIENCE_S, Patience
from p2pcache.ports import Lead, Located, Neighbours, Peer, Search
from p2pcache.tasks import loop_time

# Nodes that began together do not lose patience together: the first one tells the others.
_SPREAD: Final = 0.25
# A peer that is busy for so many times in a row is one from which nothing comes: somebody else may
# be given leave to read instead.
MAX_BUSY: Final = 3
_TICK_S: Final = 1.0


class Pursuit:
    """Fetches the pieces of *futures*, which *reception* fulfils. With *ask_peers* off, from the
    upstream alone and without asking anybody's leave."""

    def __init__(
        self,
        blob: ActiveBlob,
        futures: dict[int, asyncio.Future[PieceData]],
        neighbours: Neighbours,
        sources: Sources,
        reception: Reception,
        *,
        ask_peers: bool,
        priority: Priority,
    ) -> None:
        self._priority = priority
        self._blob = blob
        self._futures = futures
        self._neighbours = neighbours
        self._sources = sources
        self._reception = reception
        self._ask_peers = ask_peers
        self._open = PieceMask.of(blob.layout.count, futures).bits
        self._news = asyncio.Event()
        self._attempts: list[Attempt] = []
        self._leads: list[Lead] = []
        self._tried: dict[Peer, int] = {}
        """The pieces that each peer was asked for, since the coordinators last named anybody."""
        self._failed: dict[Peer, int] = {}
        self._liars: set[Peer] = set()
        self._busy: Counter[Peer] = Counter()
        """How often each peer was busy, and nothing else, so far."""
        self._failures: dict[str, SourceError] = {}
        """Of each source that was asked and is not being asked again now, how it failed."""
        self._lacking = 0
        """The pieces that are needed and have no source yet."""
        self._later = 0
        """Those of which the coordinators said so, too."""
        now = loop_time()
        self._patience = Patience(now, random.uniform(0, _SPREAD))
        self._is_alone = not ask_peers
        """Nobody waits for what this node reads from the upstream."""
        self._tell_at = now + RENEW_S / 2
        self._end: BlobUnavailable | None = None
        for piece, future in futures.items():
            future.add_done_callback(partial(self._close, 1 << piece))

    def _close(self, bits: int, future: asyncio.Future[PieceData]) -> None:
        self._open &= ~bits
        is_here = not (future.cancelled() or future.exception())
        from_peer = is_here and future.result().origin is not Origin.UPSTREAM
        self._patience.note_piece(loop_time(), from_peer=from_peer)
        self._news.set()

    async def run(self) -> BlobUnavailable | None:
        """Return once every future is done, or with the reason why some never will be."""
        async with asyncio.TaskGroup() as tasks:
            try:
                while self._open and self._end is None:
                    self._news.clear()
                    self._review()
                    self._lacking = 0
                    needy, crowded = find_needy(self._open, self._attempts, self._blob.layout)
                    if needy | crowded:
                        self._lacking = await self._provide(needy, crowded, tasks)
                    if self._open and self._end is None:
                        await self._wait()
            finally:
                for attempt in self._attempts:
                    if attempt.task is not None:
                        attempt.task.cancel()
        return self._end

    # -- what is under way -------------------------------------------------------------------

    def _review(self) -> None:
        """Take note of attempts that ended, and end those that are of no more use."""
        now = loop_time()
        going: list[Attempt] = []
        for attempt in self._attempts:
            assert attempt.task is not None
            if attempt.is_over:
                self._note_open(attempt)
                self._note_end(attempt, now)
                if attempt.peer is None:
                    self._patience.note_room(now)
            elif not attempt.bits & self._open:
                attempt.task.cancel()
            elif now >= attempt.stuck_at:
                attempt.failure = SourceUnavailable(attempt.name, "stopped sending")
                self._note_end(attempt, now)
                attempt.task.cancel()
            else:
                going.append(attempt)
        self._attempts = going
        if self._ask_peers and now >= self._tell_at:
            self._tell(now)

    def _note_open(self, attempt: Attempt) -> None:
        """The callbacks of the last pieces may be still to come."""
        for piece in attempt.pieces:
            if self._futures[piece].done():
                self._open &= ~(1 << piece)

    def _note_end(self, attempt: Attempt, now: float) -> None:
        failure, peer = attempt.failure, attempt.peer
        self._patience.note_bytes(attempt.came_at)
        if failure is None:
            if peer:
                self._busy.pop(peer, None)
            return
        self._reception.note_failure(attempt, failure)
        self._failures[attempt.name] = failure
        if peer is None:
            self._patience.note_failure(failure, now)
        elif isinstance(failure, SourceBusy):
            self._patience.note_busy(now)
            self._busy[peer] += 1
        elif not _waited_in_vain(attempt, failure):
            self._failed[peer] = self._failed.get(peer, 0) | attempt.bits & self._open
            if isinstance(failure, IntegrityError):
                self._liars.add(peer)

    def _tell(self, now: float) -> None:
        """Let the coordinators know that what was taken over is being done, and what is here."""
        since, self._tell_at = self._tell_at - RENEW_S / 2, now + RENEW_S / 2
        if any(a.progress_at > since or a.is_held_up for a in self._attempts):
            self._announce()

    def _announce(self) -> None:
        self._neighbours.announce(self._blob.cut, self._blob.given, self._blob.fetching)

    # -- who is asked next -------------------------------------------------------------------

    async def _provide(self, needy: int, crowded: int, tasks: asyncio.TaskGroup) -> int:
        """Find sources for the *needy* pieces and ask them; return what has none."""
        if self._ask_peers:
            came_at = max((a.came_at for a in self._attempts), default=0.0)
            if self._patience.is_at_end(loop_time(), came_at):
                needy = self._help_itself(needy | crowded, tasks) & ~crowded
            needy = self._start(needy, self._spares(), tasks)
            hoped_for = needy & self._hoped_for()
            needy &= ~hoped_for
            is_new = bool(needy & ~self._later)
            if needy and self._patience.may_ask(loop_time(), is_new=is_new):
                needy = await self._locate(needy, tasks)
        else:
            needy = self._read_upstream(needy, tasks)
        return await self._despair(needy, tasks) if needy else 0

    def _hoped_for(self) -> int:
        """The pieces of holders that have not been silent for so long yet that it would matter."""
        now = loop_time()
        bits = 0
        for attempt in self._attempts:
            if now < attempt.missed_at:
                bits |= attempt.bits
        return bits

    def _spares(self) -> list[tuple[Peer | None, int]]:
        tried, failed = self._tried, self._failed
        return [
            (lead.peer, lead.pieces.bits & ~tried.get(lead.peer, 0) & ~failed.get(lead.peer, 0))
            for lead in self._leads
        ]

    async def _locate(self, needy: int, tasks: asyncio.TaskGroup) -> int:
        """Ask the coordinators; return what has no source yet."""
        blob, neighbours = self._blob, self._neighbours
        count = blob.layout.count
        own = needy & self._read_now()
        fresh = PieceMask(count, needy & ~own if self._may_read() else 0)
        now = loop_time()
        is_idle = all(now >= a.doubtful_at for a in self._attempts)
        stalled = {
            a.peer: PieceMask(count, a.bits & needy)
            for a in self._attempts
            if a.peer and a.bits & needy
        }
        for peer, times in self._busy.items():
            if times >= MAX_BUSY:
                stalled[peer] = PieceMask(count, needy)
        failed = {p: PieceMask(count, b & needy) for p, b in self._failed.items() if b & needy}
        with self._sources.appetite.asking(blob.layout, fresh, idle=is_idle) as limit:
            located = await neighbours.locate(
                Search(
                    blob.cut,
                    PieceMask(count, needy),
                    blob.given,
                    PieceMask(count, blob.fetching.bits & ~needy),
                    limit + own.bit_count(),
                    failed,
                    stalled,
                )
            )
            self._is_alone = len(located.upstream) > limit + own.bit_count()
        before = needy
        needy = self._excuse(needy & self._open, located)
        self._leads = list(located.leads)
        leased, going = needy & located.upstream.bits, len(self._attempts)
        needy = needy & ~leased | self._read_upstream(leased, tasks)
        needy = self._start(needy, self._spares(), tasks)
        if len(self._attempts) > going:
            self._announce()  # at once: what the mirror does not mention soon, it does not do
        of_use = bool(before & self._later & ~needy)
        self._patience.note_asked(loop_time(), located.retry_s, of_use=of_use)
        self._later = needy
        if needy:
            self._patience.note_lacking()
        return needy

    def _excuse(self, needy: int, located: Located) -> int:
        """Wait on for sources of *needy* pieces that are named again: nobody knows better ones.

        Return what is needed from others.
        """
        now = loop_time()
        named: dict[Peer | None, int] = {None: located.upstream.bits}
        for lead in located.leads:
            named[lead.peer] = named.get(lead.peer, 0) | lead.pieces.bits
            if not lead.holds_all:
                self._patience.note_alive(now)
        if located.upstream.bits & needy:
            self._patience.note_leave(now)
        self._tried = {}
        excused = 0
        for attempt in self._attempts:
            if attempt.peer:
                self._tried[attempt.peer] = self._tried.get(attempt.peer, 0) | attempt.bits
            if same := attempt.bits & needy & named.get(attempt.peer, 0):
                attempt.excuse(now)
                excused |= same
        return needy & ~excused

    def _help_itself(self, needy: int, tasks: asyncio.TaskGroup) -> int:
        """Read from the upstream without leave, no more than with it; return what is left."""
        layout = self._blob.layout
        wanted = PieceMask(layout.count, needy & ~self._read_now())
        with self._sources.appetite.asking(layout, wanted, idle=True) as limit:
            bits = PieceMask.of(layout.count, list(wanted)[:limit]).bits
        left = self._read_upstream(bits, tasks)
        if taken := bits & ~left:
            self._reception.note_unleased(taken.bit_count())
            self._announce()  # so that others wait for it
            self._patience.lose_trust(loop_time())
        return needy & ~taken

    def _may_read(self) -> bool:
        return self._blob.repository is not None and self._patience.may_read(loop_time())

    def _read_now(self) -> int:
        """The pieces that are being read from the upstream."""
        bits = 0
        for attempt in self._attempts:
            if attempt.peer is None:
                bits |= attempt.bits
        return bits

    def _read_upstream(self, bits: int, tasks: asyncio.TaskGroup) -> int:
        """Read *bits* from the upstream; return them if that makes no sense now."""
        bits &= ~self._read_now()
        return self._start(bits, [(None, bits)], tasks) if self._may_read() else bits

    def _start(
        self, bits: int, sources: Iterable[tuple[Peer | None, int]], tasks: asyncio.TaskGroup
    ) -> int:
        """Ask the first source of each piece in *bits*; return the pieces that have none."""
        blob = self._blob
        count = blob.layout.count
        holders = [(peer, PieceMask(count, mask & bits)) for peer, mask in sources if mask & bits]
        if not holders:
            return bits
        largest = MAX_RUN_BYTES
        if not self._is_alone and holders[0][0] is None:
            largest = max(FIRST_BYTES, min(largest, self._sources.appetite.horizon // 2))
        waiting = {lead.peer for lead in self._leads if not lead.holds_all}
        for run in assign(PieceMask(count, bits), blob.layout, holders, max_bytes=largest):
            if run.peers:
                peer = run.peers[0]
                self._ask(self._attempt(run.pieces, peer, holds_all=peer not in waiting), tasks)
                bits &= ~self._attempts[-1].bits
        return bits

    def _attempt(self, pieces: range, peer: Peer | None, *, holds_all: bool) -> Attempt:
        return Attempt(self._blob, pieces, peer, holds_all=holds_all, priority=self._priority)

    def _ask(self, attempt: Attempt, tasks: asyncio.TaskGroup) -> None:
        if any(a.bits & attempt.bits for a in self._attempts):
            self._reception.note_hedge()
        if attempt.peer:
            self._tried[attempt.peer] = self._tried.get(attempt.peer, 0) | attempt.bits
        else:
            self._sources.appetite.take(attempt.size)
        self._failures.pop(attempt.name, None)
        # At once, and not when the task begins: whoever speaks to the coordinators in between would
        # give the lease back.
        sourced = self._blob.sourced
        for piece in attempt.pieces:
            sourced[piece] = sourced.get(piece, 0) + 1
        attempt.task = tasks.create_task(self._sources.carry_out(attempt, self._reception))
        attempt.task.add_done_callback(partial(self._put_down, attempt))
        self._attempts.append(attempt)

    def _put_down(self, attempt: Attempt, _: asyncio.Task[None]) -> None:
        sourced = self._blob.sourced
        for piece in attempt.pieces:
            if sourced[piece] == 1:
                del sourced[piece]
            else:
                sourced[piece] -= 1
        if attempt.peer is None:
            self._sources.appetite.give_back(attempt.size)
        self._news.set()

    # -- when nobody delivers ----------------------------------------------------------------

    async def _despair(self, needy: int, tasks: asyncio.TaskGroup) -> int:
        """Nobody has the *needy* pieces just now: ask around, and give up when that is enough.

        Return what has no source.
        """
        if self._blob.repository is None:
            unknown = SourceLacksBlob(UPSTREAM, "the registry is unknown")
            self._failures.setdefault(UPSTREAM, unknown)
        upstream = self._failures.get(UPSTREAM)
        now = loop_time()
        if upstream is None or any(now < a.doubtful_at for a in self._attempts):
            return needy
        if self._ask_peers and self._patience.may_find(now):
            needy, has_found = await self._ask_around(needy, tasks)
            if has_found or not needy:
                return needy
        failures = self._failures.values()
        is_over = self._patience.is_over(loop_time(), self._patience_with(upstream))
        if is_over or all(failure.is_final for failure in failures):
            self._end = BlobUnavailable.because(str(self._blob.digest), *failures)
        return needy

    async def _ask_around(self, needy: int, tasks: asyncio.TaskGroup) -> tuple[int, bool]:
        blob = self._blob
        offers = await self._neighbours.find(blob.digest, PieceMask(blob.layout.count, needy))
        self._patience.note_asked_around(loop_time())
        needy &= self._open
        being_asked = {a.peer for a in self._attempts}
        found: list[tuple[Peer | None, int]] = []
        for offer in offers:
            mask = usable_mask(offer, blob)
            if mask and offer.peer not in being_asked:
                found.append((offer.peer, mask.bits & ~self._failed.get(offer.peer, 0)))
        left = self._start(needy, found, tasks)
        if left == needy:
            # There is nobody else: those that failed may have recovered, but for liars.
            self._failed = {p: bits for p, bits in self._failed.items() if p in self._liars}
        return left, left != needy

    def _patience_with(self, upstream: SourceError) -> float:
        stored = self._blob.stored
        is_worth_it = (
            (stored is not None and len(stored.held) > 0)
            or (isinstance(upstream, SourceUnavailable) and upstream.retry_after_s is not None)
            or any(isinstance(failure, SourceBusy) for failure in self._failures.values())
        )
        return PATIENCE_S if is_worth_it else SHORT_PATIENCE_S

    async def _wait(self) -> None:
        """Return when something happened, or is due."""
        now = loop_time()
        due = now + _TICK_S
        for attempt in self._attempts:
            doubtful_at = attempt.doubtful_at
            for moment in (doubtful_at, attempt.missed_at):
                due = min(due, moment if now < moment else due)
            due = min(due, attempt.stuck_at)
        if self._ask_peers and self._attempts:
            due = min(due, self._tell_at)
        if self._lacking and self._ask_peers:
            is_new = bool(self._lacking & ~self._later)
            due = min(due, self._patience.ask_due(is_new=is_new))
            if now < self._patience.find_due:
                due = min(due, self._patience.find_due)
        elif self._lacking and now < self._patience.upstream_due:
            due = min(due, self._patience.upstream_due)
        with suppress(TimeoutError):
            async with asyncio.timeout(min(max(due - now, 0.01), _TICK_S)):
                await self._news.wait()


def _waited_in_vain(attempt: Attempt, failure: SourceError) -> bool:
    """The peer said that it does not have what it is fetching *yet*: it has not failed."""
    return attempt.waits and attempt.age_s > STALL_S and isinstance(failure, SourceLacksBlob)
