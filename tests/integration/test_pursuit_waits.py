"""A fetch that has to wait: how often it asks, when it stops, and an upstream that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from benchmarks.simulation.clock import VirtualLoop
from p2pcache.core.bounds import FAIL_OPEN_S
from p2pcache.core.errors import (
    BlobUnavailable,
    SourceError,
    SourceLacksBlob,
    SourceUnavailable,
)
from p2pcache.core.layout import LayoutKind
from p2pcache.core.wire import Holding
from p2pcache.mirror.patience import PATIENCE_S, SHORT_PATIENCE_S
from p2pcache.ports import Located, Offer, Search
from tests.fakes_sources import FakePeer, World, grant_as_asked, now, waiting


def run(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop, debug=False) as runner:
        runner.run(main)


def lacks() -> SourceError:
    return SourceLacksBlob("x", "does not hold it")


def cut() -> SourceError:
    return SourceUnavailable("x", "connection reset")


def offer(peer: FakePeer, world: World) -> Offer:
    holding = Holding(
        node="n",
        size=world.layout.size,
        kind=LayoutKind.FIXED,
        toc_digest=None,
        toc_offset=None,
        is_whole=True,
        held=world.all,
    )
    return Offer(peer, holding)


# Asking again.


def test_who_is_told_to_wait_asks_again_but_not_often():
    async def main():
        world = World(64)

        def answer(search: Search) -> Located:
            if now() < 7.0:
                return world.located(retry_s=0.25)
            return world.located(upstream=search.wanted)

        world.neighbours.answers = [answer]
        assert await world.fetch() == {}
        assert 7.0 <= now() < 8.5
        assert len(world.neighbours.searches) <= 14

    run(main())


def test_pieces_without_a_source_are_not_asked_for_with_every_piece_that_comes():
    async def main():
        world = World(128)
        peer = world.peer("a", bytes_per_s=4 << 20)
        first = world.mask(*range(64))

        def answer(search: Search) -> Located:
            if search.wanted & first:
                return world.located(world.lead(peer, *range(64)), retry_s=0.25)
            return world.located(retry_s=0.25)

        world.neighbours.answers = [
            answer,
            answer,
            answer,
            answer,
            answer,
            world.located(upstream=world.all),
        ]
        assert await world.fetch() == {}
        assert len(world.neighbours.searches) <= 4 * now() + 4

    run(main())


def test_a_stalled_upstream_read_does_not_ask_all_the_time():
    async def main():
        world = World(4)
        world.upstream.delay_s = 10.0
        world.neighbours.answers = [grant_as_asked(world)]
        assert await world.fetch() == {}
        assert len(world.upstream.reads) == 1
        assert len(world.neighbours.searches) <= 8
        # The leases of what is being read are not given back by asking for less.
        limits = [search.lease_limit for _, search in world.neighbours.searches]
        assert min(limits) >= 4, limits

    run(main())


def test_without_any_sign_the_upstream_is_read_without_leave():
    async def main():
        world = World(4)
        world.neighbours.answers = [world.located(retry_s=0.25)]
        assert await world.fetch() == {}
        assert FAIL_OPEN_S <= now() < 1.25 * FAIL_OPEN_S + 1.1
        assert world.unleased == 4

    run(main())


def test_nodes_do_not_lose_patience_together():
    async def main():
        worlds = [World(2) for _ in range(16)]
        for world in worlds:
            world.neighbours.answers = [world.located(retry_s=0.25)]
        async with asyncio.TaskGroup() as tasks:
            for world in worlds:
                tasks.create_task(world.fetch())
        times = sorted(world.upstream.reads[0][0] for world in worlds)
        assert times[-1] - times[0] > 0.5

    run(main())


def test_trust_is_lost_sooner_again_but_not_for_ever():
    async def main():
        world = World(96)  # more than one window of leases
        world.upstream.bytes_per_s = 4 << 20
        world.neighbours.answers = [world.located(retry_s=0.25)]
        assert await world.fetch() == {}
        assert now() < 25.0

    run(main())


# An upstream that fails.


def test_while_the_upstream_rests_no_lease_is_asked_for():
    async def main():
        world = World(4, stored=True)
        world.hold(3)
        world.upstream.failing = lambda: cut() if now() < 5.0 else None
        world.neighbours.answers = [grant_as_asked(world)]
        assert await world.fetch([0, 1, 2]) == {}
        limits = [search.lease_limit for _, search in world.neighbours.searches]
        assert 0 in limits
        assert 5.0 <= now() < 7.5
        assert len(world.upstream.reads) <= 8
        assert len(limits) <= 4 * now()

    run(main())


@pytest.mark.parametrize("ask_peers", [True, False])
def test_a_throttled_upstream_is_waited_for(ask_peers: bool):
    async def main():
        world = World(4)
        world.upstream.failing = lambda: (
            SourceUnavailable("upstream", "503", retry_after_s=5.0) if now() < 10.0 else None
        )
        world.neighbours.answers = [grant_as_asked(world)]
        assert await world.fetch(ask_peers=ask_peers) == {}
        assert now() < PATIENCE_S
        assert len(world.upstream.reads) <= 7
        assert not world.unleased

    run(main())


def test_a_failing_upstream_is_given_up_soon_where_nothing_is_lost():
    async def main():
        world = World(4)
        world.upstream.failing = cut
        world.neighbours.answers = [grant_as_asked(world)]
        failed = await world.fetch()
        assert set(failed) == {0, 1, 2, 3}
        assert all(isinstance(e, BlobUnavailable) and not e.missing for e in failed.values())
        assert SHORT_PATIENCE_S <= now() < 2 * SHORT_PATIENCE_S
        assert len(world.neighbours.finds) <= 4

    run(main())


def test_a_missing_blob_is_missing_at_once():
    async def main():
        world = World(2)
        world.upstream.failing = lacks
        world.neighbours.answers = [grant_as_asked(world)]
        failed = await world.fetch()
        assert all(isinstance(e, BlobUnavailable) and e.missing for e in failed.values())
        assert now() < 0.1

    run(main())


def test_a_peer_nobody_told_of_is_found_while_the_upstream_fails():
    async def main():
        world = World(4)
        peer = world.peer("found")
        world.neighbours.offers = [offer(peer, world)]
        world.upstream.failing = cut
        world.neighbours.answers = [grant_as_asked(world)]
        assert await world.fetch() == {}
        assert now() < 0.1
        assert peer.bytes_asked == len(world.data)

    run(main())


def test_a_found_peer_that_failed_is_tried_again():
    async def main():
        world = World(4, stored=True)
        world.hold(3)
        peer = world.peer("found")
        peer.failing = lambda: cut() if now() < 4.0 else None
        world.neighbours.offers = [offer(peer, world)]
        world.upstream.failing = cut
        world.neighbours.answers = [grant_as_asked(world)]
        assert await world.fetch([0, 1, 2]) == {}
        assert 4.0 <= now() < 7.0
        assert len(peer.reads) <= 12
        assert len(world.neighbours.finds) <= 12

    run(main())


def test_an_earlier_failure_of_the_upstream_is_no_reason_to_give_up():
    async def main():
        world = World(4)
        peer = world.peer("lessee")
        world.upstream.failing = cut
        waiting(world, peer, 6.0)
        # First it gets leave, and fails; then somebody else is reading, slowly.
        world.neighbours.answers = [
            world.located(upstream=world.all),
            world.located(world.lead(peer, waits=True)),
        ]
        assert await world.fetch() == {}
        assert len(world.upstream.reads) == 1

    run(main())


def test_without_a_repository_only_peers_are_asked():
    async def main():
        world = World(4, known=False)
        peer = world.peer("a")
        world.neighbours.answers = [world.located(world.lead(peer))]
        assert await world.fetch([0]) == {}
        assert world.neighbours.searches[0][1].lease_limit == 0
        world.neighbours.answers = [world.located(retry_s=0.25)]
        began = now()
        failed = await world.fetch([1])
        assert isinstance(failed[1], BlobUnavailable)
        assert failed[1].missing
        assert now() - began < 0.1
        assert not world.upstream.reads

    run(main())
