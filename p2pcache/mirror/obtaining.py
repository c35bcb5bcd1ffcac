"""Small things that all nodes want at once: a manifest, a table of contents.

They are coordinated like pieces, each as a blob of one piece: one node reads from the upstream, the
others from it, even while it is still reading. The rules: what the caller's functions return is
proven, so that it may be given on at once; a peer from which nothing comes is not waited for alone;
and the coordinators are told how it ended.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from p2pcache.core.bounds import FAIL_OPEN_S, RENEW_S, RETRY_S, STALL_S
from p2pcache.core.claims import Cut
from p2pcache.core.errors import SourceBusy, SourceError
from p2pcache.core.layout import PieceMask
from p2pcache.metrics import Metrics
from p2pcache.ports import Lead, Located, Neighbours, Peer, Search
from p2pcache.tasks import cancelled_at_exit, loop_time

_T = TypeVar("_T")
_ALL: Final = PieceMask(1, 1)
_NONE: Final = PieceMask(1)
# Peers that are asked at once, each because the ones before it are silent.
_MAX_RIVALS: Final = 3
# A peer that is busy for so many times is one from which nothing comes.
_MAX_BUSY: Final = 3
# Who learns nothing new asks less and less often.
_MAX_PAUSE_S: Final = 1.0
_PAUSE_GROWTH: Final = 1.5
# Nodes that began together do not lose patience together: the first one tells the others.
_SPREAD: Final = 0.25


async def obtain(
    cut: Cut,
    neighbours: Neighbours,
    metrics: Metrics,
    from_peer: Callable[[Peer], Awaitable[_T | None]],
    from_upstream: Callable[[], Awaitable[_T]],
) -> _T:
    """Return what *cut* stands for, from a peer if one has it or is getting it.

    *from_peer* returns None if the peer lacks it, and raises `SourceError` if it fails or lies; it
    ends by itself. *from_upstream* is called with a coordinator's leave, or if there is no
    coordinator, or if nothing came for `FAIL_OPEN_S`; its exceptions pass as they are.
    """
    held = _NONE
    try:
        async with cancelled_at_exit() as tasks:
            asking = _Asking(cut, neighbours, from_peer, tasks)
            if not await asking.run():
                metrics.unleased_pieces.inc()
            if asking.found:
                result = asking.found[0]
            else:
                tasks.create_task(_renew(cut, neighbours))
                result = await from_upstream()
        held = _ALL
    finally:
        neighbours.announce(cut, held, _NONE)
    return result


class _Asking(Generic[_T]):
    """The search among peers. Its questions live in *tasks*."""

    def __init__(
        self,
        cut: Cut,
        neighbours: Neighbours,
        from_peer: Callable[[Peer], Awaitable[_T | None]],
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.found: list[_T] = []
        """What peers gave."""
        self._cut = cut
        self._neighbours = neighbours
        self._from_peer = from_peer
        self._tasks = tasks
        self._asked: dict[Peer, asyncio.Task[None]] = {}
        self._failed: dict[Peer, PieceMask] = {}
        self._busy: Counter[Peer] = Counter()
        self._pause_s = RETRY_S

    async def run(self) -> bool:
        """Return once a peer gave it, or the upstream is to be read: False, without leave."""
        give_up_at = loop_time() + FAIL_OPEN_S * (1 + random.uniform(0, _SPREAD))
        while loop_time() < give_up_at:
            located = await self._neighbours.locate(
                Search(self._cut, _ALL, _NONE, _NONE, 1, self._failed, self._stalled())
            )
            if located.upstream or self.found:
                return True
            if await self._try(located, give_up_at):
                return True
        return False

    def _stalled(self) -> dict[Peer, PieceMask]:
        silent = [*self._asked, *(peer for peer, times in self._busy.items() if times >= _MAX_BUSY)]
        return dict.fromkeys(silent, _ALL)

    async def _try(self, located: Located, give_up_at: float) -> bool:
        """Ask whom the coordinators name, one after the other until one is silent.

        Say whether somebody gave it. Takes long enough that asking the coordinators again makes
        sense.
        """
        failed = len(self._failed)
        for lead in located.leads:
            if lead.peer in self._asked or lead.peer in self._failed:
                continue
            if len(self._asked) >= _MAX_RIVALS:
                break
            self._asked[lead.peer] = self._tasks.create_task(self._ask(lead))
            if await self._wait(lead.peer, min(give_up_at, loop_time() + STALL_S)):
                return True
            if lead.peer in self._asked:
                return False
        if len(self._failed) > failed:
            return False  # the coordinators did not know that
        pause_s = max(located.retry_s, self._pause_s)
        self._pause_s = min(_PAUSE_GROWTH * self._pause_s, _MAX_PAUSE_S)
        return await self._wait(None, min(give_up_at, loop_time() + pause_s))

    async def _wait(self, peer: Peer | None, until: float) -> bool:
        """Wait until somebody gave it, or *peer* did not, at most *until* then."""
        while not self.found and (peer is None or peer in self._asked):
            left = until - loop_time()
            if left <= 0:
                break
            if self._asked:
                await asyncio.wait(
                    self._asked.values(), timeout=left, return_when=asyncio.FIRST_COMPLETED
                )
            else:
                await asyncio.sleep(left)
        return bool(self.found)

    async def _ask(self, lead: Lead) -> None:
        peer, began = lead.peer, loop_time()
        try:
            found = await self._from_peer(peer)
            if found is not None:
                self.found.append(found)
            elif lead.holds_all or loop_time() - began < STALL_S:
                self._failed[peer] = _ALL
            # Else it does not have *yet* what it is getting, and has not failed.
        except SourceError as error:
            self._neighbours.note(peer, error)
            if isinstance(error, SourceBusy):
                self._busy[peer] += 1
            else:
                self._failed[peer] = _ALL
        finally:
            del self._asked[peer]


async def _renew(cut: Cut, neighbours: Neighbours) -> None:
    """Say that it is being read, for as long as that takes."""
    while True:
        await asyncio.sleep(RENEW_S)
        neighbours.announce(cut, _NONE, _ALL)
