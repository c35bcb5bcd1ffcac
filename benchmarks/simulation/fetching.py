"""How a simulated node gets the pieces of one burst: the mirror's pursuit in small.

The rules are the mirror's: sources come from the locator, and the upstream is read with its leave;
a source that shows no progress in time is doubted and another one asked as well, unless the
coordinator says that it is alive; whoever failed is reported with the next question; who is told
of no source waits and asks again; and after `FAIL_OPEN_S` without a sign of life the upstream is
read without leave. Left out: priorities, budgets, and the upstream's own failures.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from benchmarks.simulation.clock import VirtualLoop
from benchmarks.simulation.contacts import Contact
from benchmarks.simulation.image import Burst
from benchmarks.simulation.member import Member, PartState, Reading, Registry
from p2pcache.core.bounds import FAIL_OPEN_S, HOLD_S, RENEW_S, RETRY_S, STALL_S
from p2pcache.core.errors import SourceBusy, SourceError, SourceLacksBlob, SourceUnavailable
from p2pcache.core.layout import PieceMask
from p2pcache.ports import Lead, Neighbours, Peer, Search

UPSTREAM_STALL_S: Final = 1.5
MIN_STALL_S: Final = 0.25
STUCK_S: Final = 1.0
"""As in the mirror: when a source without progress is doubted, and how much later it has failed."""
MAX_EXCUSED_S: Final = 18.0
"""Word that a silent source is alive is taken for so long."""
MIN_ASK_S: Final = 0.05
MAX_ASK_S: Final = 1.0
ASK_GROWTH: Final = 1.5
"""The coordinators are not asked more often than this by one fetch, and by one to which they name
nobody less and less often."""
QUICK_EXCUSES: Final = 2
"""So many times word that a source is alive is taken for `STALL_S`, then for twice as long."""
MAX_RIVALS: Final = 3
"""So many sources are asked for a piece at once."""
_NEVER: Final = float("inf")


@dataclass(slots=True)
class Tally:
    """What fetches ran into, all nodes together."""

    locates: int = 0
    unknown: int = 0
    """Of these, the ones that found no source for some of the pieces."""
    hedges: int = 0
    """A source was doubted, and the coordinator asked again."""
    failures: int = 0
    """Of peers, to deliver."""
    unleased: int = 0
    """Pieces read from the upstream without leave, because there had been no sign of life."""


@dataclass(slots=True)
class Fetcher:
    """What the fetches of one node share."""

    loop: VirtualLoop
    member: Member
    registry: Registry
    locator: Neighbours
    tally: Tally
    failed: dict[int, dict[Contact, int]] = field(default_factory=dict)
    """By part: who did not deliver what, not yet reported."""

    async def fetch(self, burst: Burst) -> None:
        """Return once all pieces of *burst* are held, and have been announced."""
        state = self.member.parts[burst.part.index]
        wanted = sum(1 << piece for piece in burst.pieces)
        await _Fetch(self, state, wanted).run()


@dataclass(slots=True, eq=False)
class _Attempt:
    """A reading, and what is thought of it."""

    reading: Reading
    contact: Contact | None
    waits: bool
    patience_s: float
    started_at: float
    excused_until: float = 0.0
    excuses: int = 0

    @property
    def doubtful_at(self) -> float:
        return max(self.reading.progress_at + self.patience_s, self.excused_until)

    @property
    def stuck_at(self) -> float:
        if self.contact is None:
            return _NEVER
        return self.reading.progress_at + (HOLD_S if self.waits else self.patience_s) + STUCK_S

    def excuse(self, now: float) -> None:
        self.excuses += 1
        self.excused_until = now + STALL_S * (1 if self.excuses <= QUICK_EXCUSES else 2)


class _Fetch:
    """One burst of one node."""

    def __init__(self, fetcher: Fetcher, state: PartState, wanted: int) -> None:
        self._all = fetcher
        self._loop = fetcher.loop
        self._state = state
        self._wanted = wanted
        self._attempts: list[_Attempt] = []
        self._spares: Sequence[Lead] = ()
        self._news: asyncio.Future[None] = self._loop.create_future()
        self._came_at = self._alive_at = self._told_at = self._loop.now
        self._ask_at = 0.0
        self._pause_s = RETRY_S

    async def run(self) -> None:
        """Fetch, then announce what is held."""
        state = self._state
        state.coming |= self._wanted & ~state.held
        while left := self._wanted & ~state.held:
            self._review()
            lacking = left & ~self._covered()
            if not self._is_at_end():
                lacking &= ~self._crowded(left)
            if lacking and self._spares:
                spares, self._spares = self._spares, ()
                lacking = self._follow(spares, lacking)
            if lacking and self._loop.now >= self._ask_at:
                await self._locate(lacking)
                continue
            if self._loop.now >= self._told_at + RENEW_S / 2:
                if self._alive_at > self._told_at:
                    self._announce()
                self._told_at = self._loop.now
            await self._wait(self._ask_at if lacking else _NEVER)
        for attempt in self._attempts:
            attempt.reading.close()
        self._attempts.clear()
        self._announce()

    async def _locate(self, lacking: int) -> None:
        """Ask where the pieces in *lacking* are, and ask whoever is named."""
        fetcher, part = self._all, self._state.part
        count = part.cut.count
        failed = fetcher.failed.pop(part.index, {})
        stalled: dict[Peer, PieceMask] = {
            a.contact: PieceMask(count, a.reading.left & lacking)
            for a in self._attempts
            if a.contact and a.reading.left & lacking
        }
        fetcher.tally.locates += 1
        fetcher.tally.hedges += bool(stalled)
        located = await fetcher.locator.locate(
            Search(
                cut=part.cut,
                wanted=PieceMask(count, lacking),
                held=PieceMask(count, self._state.held),
                fetching=PieceMask(count, self._covered() & ~lacking),
                lease_limit=lacking.bit_count(),
                failed={contact: PieceMask(count, mask) for contact, mask in failed.items()},
                stalled=stalled,
            )
        )
        lacking &= ~self._state.held
        lacking &= ~self._excuse(located.leads)
        if own := located.upstream.bits & lacking & ~self._from_upstream():
            self._read(None, own, UPSTREAM_STALL_S)
        lacking &= ~located.upstream.bits
        lacking = self._follow(located.leads, lacking)
        self._spares = located.leads
        self._ask_at = self._loop.now + MIN_ASK_S
        if lacking:
            fetcher.tally.unknown += 1
            self._ask_at = self._loop.now + max(located.retry_s, self._pause_s)
            self._pause_s = min(ASK_GROWTH * self._pause_s, MAX_ASK_S)
            if self._is_at_end():
                fetcher.tally.unleased += lacking.bit_count()
                self._read(None, lacking, UPSTREAM_STALL_S)

    def _is_at_end(self) -> bool:
        """Nothing came, nor a sign that it will, for too long."""
        now = self._loop.now
        return now - self._alive_at >= FAIL_OPEN_S or now - self._came_at >= MAX_EXCUSED_S

    def _excuse(self, leads: Sequence[Lead]) -> int:
        """Wait on for doubted sources that are named again; return what they are to deliver."""
        excused = 0
        for lead in leads:
            for attempt in self._attempts:
                if attempt.contact is lead.peer and attempt.reading.left & lead.pieces.bits:
                    attempt.excuse(self._loop.now)
                    self._alive_at = self._loop.now
                    excused |= attempt.reading.left & lead.pieces.bits
        return excused

    def _follow(self, leads: Sequence[Lead], lacking: int) -> int:
        """Ask the leads for what is *lacking*; return what none of them is asked for."""
        for lead in leads:
            contact = lead.peer
            assert isinstance(contact, Contact)
            pieces = lead.pieces.bits & lacking
            if pieces and not any(
                a.contact is contact and a.reading.left & pieces for a in self._attempts
            ):
                patience_s = max(MIN_STALL_S, contact.hedge_after_s) if lead.holds_all else STALL_S
                self._read(contact, pieces, patience_s, waits=not lead.holds_all)
                lacking &= ~pieces
        return lacking

    def _read(
        self, contact: Contact | None, pieces: int, patience_s: float, *, waits: bool = False
    ) -> None:
        now = self._loop.now
        source = contact.member if contact else None
        reading = Reading(
            self._all.member, source, self._state.part, pieces, self._ended, self._came, now
        )
        self._attempts.append(_Attempt(reading, contact, waits, patience_s, now))
        if contact and source:
            contact.reading += 1
            source.serve(reading)
        else:
            self._all.registry.serve(reading)

    def _came(self, reading: Reading) -> None:
        """A piece came, or was proven."""
        self._came_at = self._alive_at = self._loop.now
        if reading.is_silent:
            reading.is_silent = False
            for attempt in self._attempts:
                if attempt.reading is reading and attempt.contact and not attempt.waits:
                    self._all.locator.note(attempt.contact, self._loop.now - attempt.started_at)

    def _ended(self, reading: Reading, error: SourceError | None) -> None:
        self._alive_at = max(self._alive_at, reading.progress_at)
        for attempt in list(self._attempts):
            if attempt.reading is reading:
                self._let_go(attempt)
                waited = attempt.waits and self._loop.now > attempt.started_at + STALL_S
                if error and attempt.contact and not (waited and _lacks(error)):
                    self._blame(attempt.contact, reading.left, error)
        self._tell()

    def _blame(self, contact: Contact, pieces: int, error: SourceError) -> None:
        self._all.tally.failures += 1
        self._all.locator.note(contact, error)
        if not isinstance(error, SourceBusy):
            failed = self._all.failed.setdefault(self._state.part.index, {})
            failed[contact] = failed.get(contact, 0) | pieces

    def _let_go(self, attempt: _Attempt) -> None:
        attempt.reading.close()
        self._attempts.remove(attempt)
        if attempt.contact:
            attempt.contact.reading -= 1

    def _review(self) -> None:
        """Let go of readings whose pieces came otherwise, and of those that are stuck."""
        now = self._loop.now
        for attempt in list(self._attempts):
            reading = attempt.reading
            reading.left &= ~self._state.held
            if not reading.left:
                self._let_go(attempt)
            elif attempt.contact and now >= attempt.stuck_at:
                self._let_go(attempt)
                silent = SourceUnavailable(attempt.contact.name, "stopped sending")
                self._blame(attempt.contact, reading.left, silent)

    def _covered(self) -> int:
        """The pieces that somebody is getting from whom they may be expected."""
        mask, now = 0, self._loop.now
        for attempt in self._attempts:
            if now < attempt.doubtful_at:
                mask |= attempt.reading.left
        return mask

    def _crowded(self, pieces: int) -> int:
        """Those of *pieces* for which no more sources are asked."""
        rivals = [pieces] + [0] * MAX_RIVALS
        for attempt in self._attempts:
            for number in range(MAX_RIVALS, 0, -1):
                rivals[number] |= rivals[number - 1] & attempt.reading.left
        return rivals[MAX_RIVALS]

    def _from_upstream(self) -> int:
        mask = 0
        for attempt in self._attempts:
            if attempt.contact is None:
                mask |= attempt.reading.left
        return mask

    def _announce(self) -> None:
        cut = self._state.part.cut
        coming = self._covered() & ~self._state.held
        self._told_at = self._loop.now
        self._all.locator.announce(
            cut, PieceMask(cut.count, self._state.held), PieceMask(cut.count, coming)
        )

    def _tell(self) -> None:
        if not self._news.done():
            self._news.set_result(None)

    async def _wait(self, deadline: float) -> None:
        """Return when something came or ended, or a source is to be doubted or let go."""
        now = self._loop.now
        if self._attempts:
            deadline = min(deadline, self._told_at + RENEW_S / 2)
        for attempt in self._attempts:
            doubtful_at = attempt.doubtful_at
            deadline = min(deadline, doubtful_at if now < doubtful_at else attempt.stuck_at)
        if not self._news.done():
            self._loop.at(max(deadline, now), _wake, self._news)
            await self._news
        self._news = self._loop.create_future()


def _lacks(error: SourceError) -> bool:
    return isinstance(error, SourceLacksBlob)


def _wake(news: asyncio.Future[None]) -> None:
    if not news.done():
        news.set_result(None)
