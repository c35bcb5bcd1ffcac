"""What a fetch tells and proves, what it costs, and how it ends, on a clock that jumps."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Coroutine
from itertools import pairwise
from typing import Any

import pytest

from benchmarks.simulation.clock import VirtualLoop
from p2pcache.core.bounds import RENEW_S
from p2pcache.core.errors import (
    IntegrityError,
    SourceError,
    SourceLacksBlob,
)
from p2pcache.core.estargz_writer import BuiltLayer, Entry, build_layer
from p2pcache.core.layout import PieceState
from p2pcache.mirror.active import TocUnusable
from p2pcache.mirror.attempt import WINDOW_BYTES
from p2pcache.mirror.budget import ByteBudget
from tests.fakes_sources import World, grant_as_asked, now


def run(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop, debug=False) as runner:
        runner.run(main)


def lacks() -> SourceError:
    return SourceLacksBlob("x", "does not hold it")


# What is told.


def test_leases_are_renewed_while_bytes_flow_and_given_up_at_the_end():
    async def main():
        world = World(2, piece_size=4 << 20)
        world.upstream.bytes_per_s = 1 << 20
        world.neighbours.answers = [grant_as_asked(world)]
        assert await world.fetch([0]) == {}
        times = [at for at, _, fetching in world.neighbours.announced if 0 in fetching]
        gaps = [b - a for a, b in pairwise(times)]
        assert times[0] <= RENEW_S
        assert max(gaps) <= RENEW_S
        assert len(times) <= now() / (RENEW_S / 2) + 2
        assert not world.neighbours.announced[-1][2]

    run(main())


def test_leases_of_a_silent_upstream_are_not_renewed():
    async def main():
        world = World(2)
        world.upstream.delay_s = 8.0
        world.neighbours.answers = [grant_as_asked(world)]
        assert await world.fetch() == {}
        assert len([at for at, _, _ in world.neighbours.announced if at < 7.9]) <= 2
        assert len(world.neighbours.searches) <= 7

    run(main())


def test_what_was_just_leased_is_never_given_back_in_between():
    async def main():
        world = World(8)
        world.neighbours.answers = [grant_as_asked(world)]
        world.upstream.delay_s = 0.5
        async with asyncio.TaskGroup() as tasks:
            fetcher = world.start(tasks, [0, 1])
            world.start(tasks, [4, 5])
            while len(world.upstream.reads) < 2:
                if world.blob.sourced:
                    assert all(p in world.blob.fetching for p in world.blob.sourced)
                await asyncio.sleep(0.0001)
        assert all(not (search.wanted & search.fetching) for _, search in world.neighbours.searches)
        world.check_tidy(fetcher)

    run(main())


# Proof, on a real clock: it takes threads.


def lazy_layer() -> BuiltLayer:
    files = [Entry(f"{i}", random.Random(i).randbytes(70_000)) for i in range(6)]
    return build_layer(files)


def spoilt(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


async def test_wrong_bytes_are_told_and_got_elsewhere():
    world = World(layer=lazy_layer())
    liar, other = world.peer("liar"), world.peer("other")
    liar.data = spoilt(liar.data, world.layout.starts[2] + 20_000)
    world.neighbours.answers = [world.located(world.lead(liar), world.lead(other))]
    assert await world.fetch() == {}
    assert [type(failure) for failure in world.neighbours.failures(liar)] == [IntegrityError]
    assert not world.neighbours.failures(other)
    assert len(liar.reads) == 1
    assert [part for _, part in other.reads] == [world.layout.span(range(2, world.layout.count))]
    assert not world.upstream.reads


async def test_one_wrong_delivery_of_the_upstream_is_an_accident():
    world = World(layer=lazy_layer())
    right = world.upstream.data
    world.upstream.data = spoilt(right, world.layout.starts[1] + 20_000)

    def heal() -> None:
        if world.upstream.reads[1:]:
            world.upstream.data = right

    world.upstream.failing = heal
    world.neighbours.answers = [grant_as_asked(world)]
    assert await world.fetch() == {}
    assert len(world.upstream.reads) == 2


async def test_an_upstream_that_contradicts_the_toc_twice_makes_it_unusable():
    world = World(layer=lazy_layer())
    world.upstream.data = spoilt(world.upstream.data, world.layout.starts[1] + 20_000)
    world.neighbours.answers = [grant_as_asked(world)]
    failed = await world.fetch()
    assert {piece: type(error) for piece, error in failed.items()} == {1: TocUnusable}


# Ends.


@pytest.mark.parametrize("after_s", [0.0, 0.0005, 0.0015, 0.01, 0.3, 1.2])
def test_a_cancelled_fetch_gives_everything_back(after_s: float):
    async def main():
        world = World(64, stored=True)
        world.upstream.bytes_per_s = 1 << 20
        peer = world.peer("slow", bytes_per_s=1 << 20)
        world.neighbours.answers = [
            world.located(world.lead(peer, *range(32)), upstream=world.mask(*range(32, 64)))
        ]
        started: list[Any] = []

        async def fetch() -> None:
            async with asyncio.TaskGroup() as tasks:
                started.append(world.start(tasks, range(64)))
                await asyncio.sleep(3600)

        async with asyncio.TaskGroup() as outer:
            task = outer.create_task(fetch())
            await asyncio.sleep(after_s)
            task.cancel()
        if started:
            if world.blob.inflight:  # it was never begun
                assert after_s == 0.0
            else:
                world.check_tidy(started[0])
            assert not peer.going

    run(main())


def test_exceptions_that_nobody_looks_at_are_no_warning(caplog):
    async def main():
        world = World(2)
        world.upstream.failing = lacks
        world.neighbours.answers = [grant_as_asked(world)]
        async with asyncio.TaskGroup() as tasks:
            world.start(tasks, [0, 1])
        world.futures.clear()

    run(main())
    assert "never retrieved" not in caplog.text


def test_a_budget_survives_a_grant_to_one_who_is_being_cancelled():
    async def main():
        budget = ByteBudget(10)
        await budget.acquire(10)
        async with asyncio.TaskGroup() as tasks:
            waiter = tasks.create_task(budget.acquire(5))
            await asyncio.sleep(0)
            waiter.cancel()
            budget.release(10)
        assert await budget.acquire(10) == 10

    run(main())


def test_a_cancelled_waiter_for_much_lets_one_for_little_go_first():
    async def main():
        budget = ByteBudget(10)
        await budget.acquire(6)
        async with asyncio.TaskGroup() as tasks:
            much = tasks.create_task(budget.acquire(8))
            little = tasks.create_task(budget.acquire(3))
            await asyncio.sleep(0)
            much.cancel()
            async with asyncio.timeout(1):
                assert await little == 3

    run(main())


def test_a_piece_larger_than_the_whole_budget_comes(monkeypatch):
    async def main():
        world = World(2, piece_size=9 << 20)
        monkeypatch.setattr("p2pcache.mirror.fetching.MAX_BYTES_IN_FLIGHT", 4 << 20)
        monkeypatch.setattr("tests.fakes_sources.MAX_BYTES_IN_FLIGHT", 4 << 20)
        world.neighbours.answers = [grant_as_asked(world)]
        assert await world.fetch() == {}

    run(main())


def test_no_more_than_the_window_is_under_way():
    async def main():
        world = World(1024)  # 64 MiB
        peer = world.peer("a", bytes_per_s=50 << 20)
        world.neighbours.answers = [lambda search: world.located(world.lead(peer, *search.wanted))]
        assert await world.fetch() == {}
        assert peer.most_bytes <= WINDOW_BYTES

    run(main())


def _cpu_of(pieces: int) -> float:
    spent: list[float] = []

    async def main():
        world = World(pieces, piece_size=4096, stored=True)
        peer = world.peer("a", bytes_per_s=100 << 20)
        peer.block = 4096
        world.neighbours.answers = [lambda search: world.located(world.lead(peer, *search.wanted))]
        began = time.process_time()
        assert await world.fetch() == {}
        spent.append(time.process_time() - began)

    run(main())
    return spent[0]


def test_the_work_grows_with_the_pieces_and_not_with_their_square():
    small = min(_cpu_of(1000) for _ in range(2))
    large = _cpu_of(8000)
    sys.stdout.write(f"1000 pieces {small:.3f} s, 8000 pieces {large:.3f} s")
    assert large < 8 * small * 4


def test_a_piece_that_is_dropped_while_its_fetch_goes_on_is_fetched_anew():
    async def main():
        world = World(2, stored=True)
        peer = world.peer("slow", delay_s=3.0)
        world.neighbours.answers = [
            world.located(world.lead(peer, 1, waits=True), upstream=world.mask(0))
        ]
        async with asyncio.TaskGroup() as tasks:
            fetcher = world.start(tasks, [0, 1])
            first = world.futures[0]
            assert await (await first).kept
            assert world.disk is not None
            world.disk.states[0] = PieceState.ABSENT
            again = fetcher.start(world.blob, [0])[0]
            assert again is not first
            assert (await again).data is not None
        world.check_tidy(fetcher)

    run(main())
