"""Getting a manifest that all nodes want, among scripted peers, on a clock that jumps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from benchmarks.simulation.clock import VirtualLoop
from p2pcache.core.bounds import FAIL_OPEN_S, HOLD_S, RENEW_S, STALL_S
from p2pcache.core.claims import Cut
from p2pcache.core.errors import IntegrityError, SourceBusy, SourceError, SourceUnavailable
from p2pcache.core.layout import PieceMask
from p2pcache.core.model import Digest
from p2pcache.metrics import Metrics
from p2pcache.mirror.obtaining import obtain
from p2pcache.ports import Lead, Located, Peer, Search
from tests.fakes_sources import FakeNeighbours, FakePeer, now

CUT = Cut.of_manifest(Digest.of(b"a manifest"))
ALL, NONE = PieceMask(1, 1), PieceMask(1)
LEASE = Located([], ALL, 0.0)
LATER = Located([], NONE, 0.25)


def run(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main)


def leads(*peers: Peer, waits: bool = False) -> Located:
    return Located([Lead(peer, ALL, not waits) for peer in peers], NONE, 0.0)


class Small:
    """A thing, and how each source gives it: an error, None, or text after a delay."""

    def __init__(self, *answers: Located | Callable[[Search], Located]) -> None:
        self.neighbours = FakeNeighbours()
        self.neighbours.answers = list(answers)
        self.metrics = Metrics()
        self.peers: dict[str, tuple[float, str | SourceError | None]] = {}
        self.asked: list[tuple[float, str]] = []
        self.upstream: tuple[float, str | SourceError] = (0.01, "upstream")
        self.going = self.most = 0

    def peer(self, name: str, delay_s: float, outcome: str | SourceError | None) -> FakePeer:
        self.peers[name] = delay_s, outcome
        return FakePeer(name, b"")

    async def _from_peer(self, peer: Peer) -> str | None:
        self.asked.append((now(), peer.name))
        self.going += 1
        self.most = max(self.most, self.going)
        try:
            delay_s, outcome = self.peers[peer.name]
            await asyncio.sleep(delay_s)
            if isinstance(outcome, SourceError):
                raise outcome
            return outcome
        finally:
            self.going -= 1

    async def _from_upstream(self) -> str:
        self.asked.append((now(), "upstream"))
        delay_s, outcome = self.upstream
        await asyncio.sleep(delay_s)
        if isinstance(outcome, SourceError):
            raise outcome
        return outcome

    async def obtain(self) -> str:
        try:
            return await obtain(
                CUT, self.neighbours, self.metrics, self._from_peer, self._from_upstream
            )
        finally:
            assert not self.going
            assert not self.neighbours.announced[-1][2]

    @property
    def unleased(self) -> int:
        return int(self.metrics.unleased_pieces._value.get())


def test_who_has_leave_reads_and_says_so():
    async def main():
        small = Small(LEASE)
        small.upstream = 3.0, "upstream"
        assert await small.obtain() == "upstream"
        renewals = [at for at, _, fetching in small.neighbours.announced if fetching]
        assert len(renewals) == int(3.0 / RENEW_S)
        assert small.neighbours.announced[-1][1:] == (ALL, NONE)
        assert small.unleased == 0

    run(main())


def test_a_peer_that_has_it_gives_it():
    async def main():
        small = Small()
        small.neighbours.answers = [leads(small.peer("a", 0.01, "a"))]
        assert await small.obtain() == "a"
        assert small.neighbours.announced == [(now(), ALL, NONE)]

    run(main())


def test_a_peer_that_is_getting_it_is_waited_for():
    async def main():
        small = Small()
        small.neighbours.answers = [leads(small.peer("a", 4.0, "a"), waits=True)]
        assert await small.obtain() == "a"
        assert [name for _, name in small.asked] == ["a"]
        assert len(small.neighbours.searches) <= 6
        assert small.neighbours.searches[1][1].stalled

    run(main())


def test_a_silent_peer_is_not_waited_for_alone():
    async def main():
        small = Small()
        silent, other = small.peer("silent", 100.0, None), small.peer("other", 0.01, "other")
        small.neighbours.answers = [
            lambda search: leads(other if silent in search.stalled else silent)
        ]
        assert await small.obtain() == "other"
        assert now() == pytest.approx(STALL_S, abs=0.1)

    run(main())


def test_one_that_failed_is_reported_and_the_next_asked_at_once():
    async def main():
        small = Small()
        lies = IntegrityError("liar", "other bytes")
        liar, lost = small.peer("liar", 0.01, lies), small.peer("lost", 0.01, None)
        good = small.peer("good", 0.01, "good")
        small.neighbours.answers = [leads(liar, lost), leads(liar, lost, good)]
        assert await small.obtain() == "good"
        assert set(small.neighbours.searches[1][1].failed) == {liar, lost}
        assert small.neighbours.failures(liar) == [lies]
        assert len(small.asked) == 3
        assert now() < 0.1

    run(main())


def test_a_busy_peer_is_asked_again_but_not_often():
    async def main():
        small = Small()
        busy = small.peer("busy", 0.01, SourceBusy("busy", "is busy"))
        small.neighbours.answers = [leads(busy)]
        assert await small.obtain() == "upstream"
        assert FAIL_OPEN_S <= now() <= 1.25 * FAIL_OPEN_S + 1.5
        assert len(small.asked) <= 16
        assert not small.neighbours.searches[-1][1].failed
        assert small.unleased == 1

    run(main())


def test_a_peer_that_stays_busy_is_one_from_which_nothing_comes():
    async def main():
        small = Small()
        busy = small.peer("busy", 0.01, SourceBusy("busy", "is busy"))
        small.neighbours.answers = [lambda search: LEASE if busy in search.stalled else leads(busy)]
        assert await small.obtain() == "upstream"
        assert 0.5 < now() < 2.0
        assert not small.unleased

    run(main())


def test_one_that_waited_in_vain_has_not_failed():
    async def main():
        small = Small()
        slow = small.peer("slow", HOLD_S, None)
        small.neighbours.answers = [leads(slow, waits=True)]
        assert await small.obtain() == "upstream"
        assert len(small.asked) == 3
        assert not small.neighbours.searches[-1][1].failed

    run(main())


def test_who_is_told_to_wait_asks_less_and_less_often():
    async def main():
        small = Small(LATER)
        assert await small.obtain() == "upstream"
        assert FAIL_OPEN_S <= now() <= 1.25 * FAIL_OPEN_S + 1.1
        assert len(small.neighbours.searches) <= 16

    run(main())


def test_no_more_than_three_peers_at_once():
    async def main():
        small = Small()
        peers = [small.peer(str(i), 100.0, None) for i in range(9)]
        small.neighbours.answers = [leads(*peers)]
        assert await small.obtain() == "upstream"
        assert small.most == 3
        assert len(small.neighbours.searches) <= 24

    run(main())


def test_a_failing_upstream_passes_and_the_lease_is_given_back():
    async def main():
        small = Small(LEASE)
        small.upstream = 0.01, SourceUnavailable("upstream", "503")
        with pytest.raises(SourceUnavailable, match="503"):
            await small.obtain()
        assert small.neighbours.announced[-1][1:] == (NONE, NONE)

    run(main())


def test_cancelled_it_gives_up_what_it_took():
    async def main():
        small = Small()
        small.neighbours.answers = [leads(small.peer("a", 100.0, None), waits=True)]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.5):
                await small.obtain()
        assert small.neighbours.announced[-1][1:] == (NONE, NONE)

    run(main())
