"""Lists that disagree, partitions, slow lines and skewed clocks while all nodes start one image."""

import time

import pytest

from tests.fakes_peer import FakePeer
from tests.integration.storms import AGAIN_WHEN_SLOW, LARGE, storm

pytestmark = [pytest.mark.timeout(120), AGAIN_WHEN_SLOW]

NODES = 5


def disagreeing(dead: str):
    """Each node's list lacks one or two others; one has an address where nobody is.

    Who is next in line for a layer knows those before it. If it did not, it would be its own
    coordinator and never hear of them.
    """

    def lists(number: int, urls: list[str], orders: list[list[int]]) -> list[str]:
        nodes = len(urls)
        others = [(number + step) % nodes for step in range(1, nodes)]
        known = {
            before
            for order in orders
            if number in order[:3]
            for before in order[: order.index(number)]
        }
        lacked = [other for other in others if other not in known][: 1 + number % 2]
        assert lacked
        listed = [url for other, url in enumerate(urls) if other not in lacked]
        return [*listed, dead] if number == 2 else listed

    return lists


async def dead_url() -> str:
    async with FakePeer() as gone:
        return gone.url


async def test_members_disagree_about_who_they_are(tmp_path):
    lists = disagreeing(await dead_url())
    async with storm(tmp_path, NODES, lists=lists) as s:
        async with s.starts():
            pass
        s.check()
        assert s.refusals == s.cuts == 0


async def test_a_partition_that_heals(tmp_path):
    async with storm(tmp_path, 4) as s:
        async with s.starts():
            await s.until(s.has_sent(0.25))
            for line in s.net.between([0, 1], [2, 3]):
                line.silence()
            await s.until(s.has_sent(0.6))
            for line in s.net.between([0, 1], [2, 3]):
                line.heal()
        s.check()
        assert s.refusals == s.cuts == 0


async def test_clocks_that_differ_by_minutes(tmp_path):
    def skewed(seconds: float):
        return lambda: time.time() + seconds  # noqa: TID251 - what a node's clock is wrong about

    ahead = [0.0, 900.0, -900.0, 240.0, -3600.0]
    async with storm(
        tmp_path,
        NODES,
        settings=lambda n: {"wall_clock": skewed(ahead[n]), "cluster_secret": b"s" * 32},
    ) as s:
        async with s.starts():
            pass
        s.check(max_ratio=1.05)
        assert s.refusals == s.cuts == 0
        assert sum(s.count("source_failures")) == 0


async def test_one_node_on_a_line_a_hundred_times_slower(tmp_path):
    async with storm(tmp_path, NODES, **LARGE) as s:
        slow = s.net.bound(4, bytes_per_s=80e3)
        async with s.starts() as starts:
            await starts.over_but(4)
            slow.lift()  # it is waited for no longer than the others needed
        s.check()
        assert s.refusals == s.cuts == 0


async def test_several_at_once(tmp_path):
    lists = disagreeing(await dead_url())
    async with storm(tmp_path, 6, lists=lists, **LARGE) as s:
        # Not one of those that stand in for the one that is killed: that would be two deaths.
        number = next(n for n in reversed(s.order(s.lazy)) if n not in s.order(s.plain)[:3])
        slow = s.net.bound(number, bytes_per_s=80e3)
        async with s.starts() as starts:
            await s.until(s.has_sent(0.3))
            s.kill(s.coordinator(s.plain), starts)
            await starts.over_but(number)
            slow.lift()
        s.check()
        assert s.refusals == s.cuts == 0
