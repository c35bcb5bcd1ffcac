"""One fetch among scripted peers, coordinators and an upstream, on a clock that jumps."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from benchmarks.simulation.clock import VirtualLoop
from p2pcache.core.bounds import HOLD_S
from p2pcache.core.errors import (
    SourceBusy,
    SourceError,
    SourceUnavailable,
)
from p2pcache.mirror.attempt import LONELY_S, MAX_RIVALS, STUCK_S
from p2pcache.mirror.pursuit import MAX_BUSY
from p2pcache.ports import Located, Search
from tests.fakes_sources import PIECE, World, grant_as_asked, now, waiting


def run(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop, debug=False) as runner:
        runner.run(main)


def cut() -> SourceError:
    return SourceUnavailable("x", "connection reset")


# Leave.


def test_leased_pieces_become_few_upstream_reads():
    async def main():
        world = World(8)
        world.neighbours.answers = [world.located(upstream=world.all)]
        assert await world.fetch() == {}
        assert [part for _, part in world.upstream.reads] == [world.layout.span(range(8))]
        assert len(world.neighbours.searches) == 1

    run(main())


def test_long_leases_are_cut_at_the_horizon():
    async def main():
        world = World(64)
        world.neighbours.answers = [grant_as_asked(world)]
        assert await world.fetch() == {}
        sizes = [len(part) for _, part in world.upstream.reads]
        assert sum(sizes) == 4 << 20
        assert sizes[0] == 1 << 20  # before anything was measured

    run(main())


def test_who_is_alone_reads_in_long_runs():
    async def main():
        world = World(64)
        world.neighbours.answers = [world.located(upstream=world.all)]
        assert await world.fetch() == {}
        assert [len(part) for _, part in world.upstream.reads] == [4 << 20]

    run(main())


def test_without_a_coordinator_the_upstream_is_read_at_once():
    async def main():
        world = World(4)
        world.neighbours.answers = [world.located(upstream=world.all)]
        assert await world.fetch() == {}
        assert now() < 0.1

    run(main())


def test_a_fetch_without_peers_asks_nobody():
    async def main():
        world = World(4)
        assert await world.fetch(ask_peers=False) == {}
        assert not world.neighbours.searches

    run(main())


def test_appetite_bounds_what_is_leased_from_a_slow_upstream():
    async def main():
        world = World(256)  # 16 MiB
        world.upstream.bytes_per_s = 500_000
        world.neighbours.answers = [grant_as_asked(world)]
        assert await world.fetch() == {}
        assert world.upstream.most_bytes <= 3 << 20
        assert len(world.neighbours.searches) <= 4 * now()

    run(main())


def test_a_reader_waits_no_longer_because_others_of_the_node_have_much_under_way():
    async def main():
        world = World(300)
        world.upstream.bytes_per_s = 200_000
        world.neighbours.answers = [grant_as_asked(world)]
        async with asyncio.TaskGroup() as tasks:
            fetcher = world.start(tasks, range(200))
            await asyncio.sleep(2.0)
            small = [world.start(tasks, [250 + i]) for i in range(10)]
            assert small
            await asyncio.wait([world.futures[250 + i] for i in range(10)], timeout=2.0)
            assert all(world.futures[250 + i].done() for i in range(10))
        world.check_tidy(fetcher)

    run(main())


def test_fetches_that_begin_together_share_the_appetite():
    async def main():
        world = World(640, piece_size=256 << 10)
        world.upstream.bytes_per_s = 100_000
        leased: list[int] = []

        def answer(search: Search) -> Located:
            leased.append(search.lease_limit)
            return grant_as_asked(world)(search)

        world.neighbours.answers = [answer]
        async with asyncio.TaskGroup() as tasks:
            for i in range(20):
                world.start(tasks, range(32 * i, 32 * i + 32))
            await asyncio.sleep(0.1)
            assert len(leased) == 20
            assert sum(leased) * (256 << 10) <= (2 << 20) + 20 * (256 << 10)
            world.upstream.bytes_per_s = float("inf")

    run(main())


# Peers.


def test_what_a_peer_holds_is_read_from_it_alone():
    async def main():
        world = World(8)
        peer = world.peer("a")
        world.neighbours.answers = [world.located(world.lead(peer))]
        assert await world.fetch() == {}
        assert len(peer.reads) == 1
        assert not world.upstream.reads
        assert isinstance(world.neighbours.notes[0][1], float)

    run(main())


def test_a_peer_that_gets_the_pieces_late_is_waited_for():
    async def main():
        world = World(4)
        peer = world.peer("a")
        waiting(world, peer, 15.0)
        world.neighbours.answers = [world.located(world.lead(peer, waits=True))]
        assert await world.fetch() == {}
        assert 15.0 <= now() < 15.5
        assert not world.upstream.reads
        assert len(peer.reads) <= 5
        assert len(world.neighbours.searches) <= 20

    run(main())


def test_trust_in_word_that_a_silent_peer_is_alive_ends():
    async def main():
        world = World(4)
        peer = world.peer("a")
        waiting(world, peer, 100.0)
        world.neighbours.answers = [world.located(world.lead(peer, waits=True))]
        assert await world.fetch() == {}
        assert 14.0 <= now() < 25.0
        assert world.upstream.bytes_asked == len(world.data)

    run(main())


def test_a_silent_holder_is_overtaken_by_the_spare_and_reported():
    async def main():
        world = World(4)
        dead, spare, third = world.peer("dead"), world.peer("spare"), world.peer("third")
        dead.silent_after = 0
        spare.silent_after = 2 * PIECE
        world.neighbours.answers = [
            world.located(world.lead(dead), world.lead(spare)),
            lambda search: world.located(world.lead(third)),
        ]
        assert await world.fetch() == {}
        asked = [peer.reads[0][0] for peer in (dead, spare, third)]
        assert asked[1] - asked[0] == pytest.approx(dead.hedge_after_s, abs=0.05)
        # Whoever may have to be sent to the upstream is told of a longer silence only.
        assert asked[2] - asked[1] == pytest.approx(LONELY_S, abs=0.1)
        search = world.neighbours.searches[1][1]
        assert (set(search.failed), set(search.stalled)) == ({dead}, {spare})
        assert list(search.stalled[spare]) == [2, 3]

    run(main())


def test_a_stuck_peer_has_failed():
    async def main():
        world = World(4)
        dead = world.peer("dead")
        dead.silent_after = 0
        world.neighbours.answers = [
            lambda search: (
                world.located(upstream=world.all)
                if dead in search.failed
                else world.located(world.lead(dead))
            )
        ]
        assert await world.fetch() == {}
        assert now() == pytest.approx(dead.hedge_after_s + STUCK_S, abs=0.1)
        assert "stopped sending" in str(world.neighbours.failures(dead)[0])
        # and what it failed to say did not make it look quick
        assert len(world.neighbours.notes) == 1

    run(main())


def test_a_waiting_peer_that_does_not_even_answer_has_failed():
    async def main():
        world = World(4)
        dead = world.peer("dead")
        dead.silent_after = 0
        world.neighbours.answers = [
            lambda search: (
                world.located(upstream=world.all)
                if dead in search.failed
                else world.located(world.lead(dead, waits=True))
            )
        ]
        assert await world.fetch() == {}
        assert now() == pytest.approx(HOLD_S + STUCK_S, abs=0.2)

    run(main())


def test_no_more_than_three_rivals():
    async def main():
        world = World(2)
        peers = [world.peer(str(i)) for i in range(8)]
        counts: list[int] = []

        def count() -> None:
            counts.append(sum(peer.going for peer in peers))

        for peer in peers:
            peer.silent_after = 0
            peer.failing = count

        world.neighbours.answers = [
            lambda search: world.located(
                *(world.lead(p, waits=True) for p in peers if p not in search.failed)
            )
        ]
        assert await world.fetch() == {}
        assert now() < 26.0
        assert max(counts) == MAX_RIVALS

    run(main())


def test_after_a_cut_only_the_rest_is_read_elsewhere():
    async def main():
        world = World(8)
        first, second = world.peer("first"), world.peer("second")
        first.error_after = (3 * PIECE, cut)
        world.neighbours.answers = [world.located(world.lead(first), world.lead(second))]
        assert await world.fetch() == {}
        assert [part for _, part in second.reads] == [world.layout.span(range(3, 8))]

    run(main())


def test_a_source_that_ends_early_without_a_word_has_failed():
    async def main():
        world = World(4)
        short, other = world.peer("short"), world.peer("other")

        async def send(part):
            short.reads.append((now(), part))
            yield world.data[part.start : part.start + PIECE + 10]

        short.send = send  # type: ignore[method-assign]
        world.neighbours.answers = [world.located(world.lead(short), world.lead(other))]
        assert await world.fetch() == {}
        assert len(short.reads) == 1
        assert other.bytes_asked == 3 * PIECE

    run(main())


def test_a_busy_peer_is_left_alone_for_a_moment_and_not_blamed():
    async def main():
        world = World(4)
        busy, other = world.peer("busy"), world.peer("other")
        busy.failing = lambda: SourceBusy("busy", "is busy") if now() < 3.0 else None
        world.neighbours.answers = [world.located(world.lead(busy), retry_s=0.25)]
        assert await world.fetch([0, 1]) == {}
        assert all(not search.failed for _, search in world.neighbours.searches)
        assert 3.0 <= now() < 4.5
        assert len(busy.reads) <= 6
        world.neighbours.answers = [world.located(world.lead(busy), world.lead(other))]
        busy.failing = lambda: SourceBusy("busy", "is busy")
        began = now()
        assert await world.fetch([2, 3]) == {}
        assert now() - began < 0.1

    run(main())


def test_a_peer_that_stays_busy_is_one_from_which_nothing_comes():
    async def main():
        world = World(4)
        busy = world.peer("busy")
        busy.failing = lambda: SourceBusy("busy", "is busy")
        world.neighbours.answers = [
            lambda search: (
                world.located(upstream=search.wanted)
                if busy in search.stalled
                else world.located(world.lead(busy))
            )
        ]
        assert await world.fetch() == {}
        assert 0.5 < now() < 2.0
        assert len(busy.reads) == MAX_BUSY

    run(main())


def test_a_failure_is_told_of_the_pieces_that_are_still_wanted():
    async def main():
        world = World(4)
        bad, good = world.peer("bad"), world.peer("good")
        bad.failing = cut
        searches: list[Search] = []

        def answer(search: Search) -> Located:
            searches.append(search)
            if not search.failed:
                return world.located(world.lead(bad, 0, 1))
            if len(searches) == 2:
                return world.located(world.lead(good, 0, 1), retry_s=0.25)
            return world.located(world.lead(good))

        world.neighbours.answers = [answer]
        assert await world.fetch() == {}
        assert list(searches[1].failed[bad]) == [0, 1]
        assert not searches[2].failed

    run(main())
