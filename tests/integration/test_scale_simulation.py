"""The simulated cluster: is it deterministic, and does what runs in it behave at a small scale?"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace
from math import log2

import pytest

from benchmarks.simulation import clock
from benchmarks.simulation.image import READ_PIECES, make_image
from benchmarks.simulation.network import Queue
from benchmarks.simulation.storm import Outcome, Setting, simulate

IMAGE = make_image(7)
SMALL = Setting(
    nodes=24,
    deaths=0.0,
    zones=1,
    spread_s=0.5,
    link_mbit=1000,
    upstream_mbit=1000,
    seed=3,
    dying_s=3.0,
)


@pytest.fixture(scope="module")
def alone() -> Outcome:
    return simulate(replace(SMALL, nodes=1), IMAGE)


def test_the_clock_jumps_and_keeps_the_order_of_both_kinds_of_timers():
    seen: list[str] = []

    async def main() -> float:
        loop = clock.virtual_loop()
        loop.at(3600.0, seen.append, "hour")
        loop.call_later(1800.0, seen.append, "half")
        loop.at(1800.5, seen.append, "after half")
        async with asyncio.timeout(7200):
            await loop.until(3601.0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10):
                await asyncio.Event().wait()
        return loop.time()

    assert clock.run(main()) == pytest.approx(3611.0)
    assert seen == ["half", "after half", "hour"]


def test_a_loop_in_which_nothing_can_happen_is_an_error():
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="nothing will ever happen"):
        clock.run(main())


def test_a_link_carries_one_thing_after_the_other():
    link = Queue(rate=100.0)
    assert link.take(0.0, 50) == 0.5
    assert link.take(0.1, 100) == 1.5
    assert link.take(9.0, 10) == 9.1


def test_an_image_is_read_in_bursts_of_new_pieces():
    bursts = IMAGE.bursts
    read = [(burst.part.index, piece) for burst in bursts for piece in burst.pieces]
    assert len(read) == len(set(read))
    assert sum(burst.part.toc_digest is not None for burst in bursts) == 70
    assert sum(len(b.pieces) for b in bursts if b.part.toc_digest) == READ_PIECES
    assert 19e6 < IMAGE.bytes_needed < 21e6


def test_a_node_alone_reads_everything_from_the_upstream(alone: Outcome):
    assert alone.upstream_ratio == 1.0
    assert alone.messages == 0
    assert (alone.max_hops, alone.mean_hops) == (1, 1.0)


def test_a_storm_reads_the_upstream_once_and_is_repeated_exactly(alone: Outcome):
    outcome = simulate(SMALL, IMAGE)
    assert outcome.finished == SMALL.nodes
    assert outcome.upstream_ratio <= 1.05
    assert outcome.max_hops <= 4 * log2(SMALL.nodes)
    assert outcome.last_s <= 1.3 * alone.last_s
    assert outcome.tally["unleased"] == 0
    again = simulate(SMALL, IMAGE)
    took = {"wall_s": 0.0, "processor_s": 0.0}
    assert asdict(again) | took == asdict(outcome) | took


def test_survivors_of_a_storm_with_deaths_finish():
    outcome = simulate(replace(SMALL, deaths=0.25), IMAGE)
    assert outcome.died == 6
    assert outcome.finished == SMALL.nodes - 6
    assert outcome.upstream_ratio < 1.5


def test_zones_read_the_upstream_once_between_them():
    outcome = simulate(replace(SMALL, zones=3), IMAGE)
    assert outcome.finished == SMALL.nodes
    assert outcome.upstream_ratio <= 1.05


def test_nobody_waits_in_a_circle_through_two_zones(alone: Outcome):
    # Small zones with deaths: their trees are cut and grow together again all the time.
    setting = replace(SMALL, nodes=120, deaths=0.1, zones=8, spread_s=2.0, dying_s=5.0, seed=9)
    outcome = simulate(setting, IMAGE)
    assert outcome.finished == 108
    assert outcome.last_s <= 4 * alone.last_s
