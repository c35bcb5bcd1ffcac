"""Many nodes that fetch one blob at once, with a real coordinator, on a clock that jumps.

Fixed layout: what a node did not read itself it gives to nobody, so that each piece has one giver.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import pytest

from benchmarks.simulation.clock import VirtualLoop
from p2pcache.core.bounds import ANNOUNCE_S, HOLD_S
from p2pcache.core.claims import Claim, Cut, RegionKey, region_mask, region_pieces
from p2pcache.core.coordinator import Coordinator
from p2pcache.core.errors import BlobUnavailable, SourceLacksBlob, SourceUnavailable
from p2pcache.core.layout import PieceMask
from p2pcache.core.model import Digest
from p2pcache.core.ranges import ByteRange
from p2pcache.mirror.active import Origin
from p2pcache.ports import Lead, Located, Search
from tests.fakes_sources import FakeNeighbours, FakePeer, FakeUpstream, World, now

SIZE = 256 << 10
BLOCK = 16 << 10
PIECES = 128


class Line(FakeUpstream):
    """A registry behind one line that all nodes share."""

    def __init__(self, data: bytes, bytes_per_s: float) -> None:
        super().__init__(data)
        self._free_at = 0.0
        self._bytes_per_s = bytes_per_s
        self.sent = 0
        self.requests = 0
        self.failing_until = 0.0

    async def send(self, part: ByteRange) -> AsyncGenerator[bytes, None]:
        self.requests += 1
        await asyncio.sleep(0.02)
        if now() < self.failing_until:
            raise SourceUnavailable("upstream", "503", retry_after_s=2.0)
        for start in range(part.start, part.stop, BLOCK):
            block = self.data[start : min(start + BLOCK, part.stop)]
            self._free_at = max(self._free_at, now()) + len(block) / self._bytes_per_s
            await asyncio.sleep(self._free_at - now())
            self.sent += len(block)
            yield block


class Node:
    """One member: what it fetches, and what it gives."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.world = World(PIECES, piece_size=SIZE, stored=True, data=cluster.data)
        self.world.upstream = cluster.line
        self.world.neighbours = Voice(self)
        self.is_frozen = False

    async def give(self, part: ByteRange) -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0.002)
        blob = self.world.blob
        for piece in blob.layout.covering(part):
            if self.is_frozen:
                await asyncio.sleep(600)
            fetch = blob.inflight.get(piece)
            if piece not in blob.given and fetch is not None:
                try:
                    async with asyncio.timeout(HOLD_S):
                        result = await asyncio.shield(fetch)
                except (TimeoutError, BlobUnavailable):
                    raise SourceLacksBlob(self.name, "not yet") from None
                if result.origin is not Origin.UPSTREAM:
                    raise SourceLacksBlob(self.name, "may not give it")
            elif piece not in blob.given:
                raise SourceLacksBlob(self.name, "does not hold it")
            here = blob.layout.range_of(piece)
            yield self.cluster.data[here.start : here.stop]


class Door(FakePeer):
    """A node, as others see it."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.name, b"")
        self.send = node.give  # type: ignore[method-assign]


class Voice(FakeNeighbours):
    """What a node says to the one coordinator, and hears from it."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._node = node
        self._said: dict[int, tuple[int, int]] = {}
        self._told: tuple[Cut, PieceMask, PieceMask] | None = None

    def _claim(self, cut: Cut, index: int, held: int, fetching: int, **more: Any) -> Claim:
        key = RegionKey(cut.digest, cut.name, index)
        return Claim(key, held, fetching, passes_on=cut.passes_on, **more)

    async def locate(self, search: Search) -> Located:
        self.searches.append((now(), search))
        cluster = self._node.cluster
        await asyncio.sleep(0.002)
        leads: list[Lead] = []
        leased = PieceMask(search.cut.count)
        limit, retry_s = search.lease_limit, 0.0
        for index in search.cut.regions(search.wanted):
            claim = self._claim(
                search.cut,
                index,
                region_mask(search.held, index),
                region_mask(search.fetching, index),
                wanted=region_mask(search.wanted, index),
                lease_limit=limit,
                failed=tuple((p.name, region_mask(m, index)) for p, m in search.failed.items()),
                stalled=tuple((p.name, region_mask(m, index)) for p, m in search.stalled.items()),
            )
            grant = cluster.coordinator.answer(self._node.name, claim, now())
            limit -= grant.leased.bit_count()
            leased |= region_pieces(search.cut.count, index, grant.leased)
            retry_s = max(retry_s, grant.retry_s)
            for source in grant.sources:
                pieces = region_pieces(search.cut.count, index, source.mask)
                door = cluster.doors[source.address]
                leads.append(Lead(door, pieces, not source.mask & ~source.held))
        return Located(leads, leased, retry_s)

    def announce(self, cut: Cut, held: PieceMask, fetching: PieceMask) -> None:
        super().announce(cut, held, fetching)
        if self._told is None:
            asyncio.get_running_loop().call_later(ANNOUNCE_S, self._tell)
        self._told = cut, held, fetching

    def _tell(self) -> None:
        assert self._told is not None
        (cut, held, fetching), self._told = self._told, None
        if self._node.is_frozen:
            return
        for index in cut.regions(PieceMask.full(cut.count)):
            state = region_mask(held, index), region_mask(fetching, index)
            if state[1] or state != self._said.get(index, (0, 0)):
                self._said[index] = state
                claim = self._claim(cut, index, *state)
                self._node.cluster.coordinator.answer(self._node.name, claim, now())


class Cluster:
    def __init__(self, nodes: int, bytes_per_s: float = 12.5e6) -> None:
        self.data = b"".join(bytes([i % 251]) * SIZE for i in range(PIECES))
        self.digest = Digest.of(self.data)
        self.line = Line(self.data, bytes_per_s)
        self.coordinator = Coordinator()
        self.nodes = [Node(self, f"n{i}") for i in range(nodes)]
        self.doors = {node.name: Door(node) for node in self.nodes}

    async def storm(self, *, but: int = 0) -> list[dict[int, BaseException]]:
        """All but the last few nodes fetch everything."""
        nodes = self.nodes[: len(self.nodes) - but]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(node.world.fetch()) for node in nodes]
        return [task.result() for task in tasks]

    @property
    def ratio(self) -> float:
        return self.line.sent / len(self.data)

    @property
    def asked_per_s(self) -> float:
        """Questions of one node per second."""
        asked = sum(len(node.world.neighbours.searches) for node in self.nodes)
        return asked / len(self.nodes) / now()

    @property
    def figures(self) -> str:
        return f"ratio {self.ratio:.3f} in {now():.1f} s, asked {self.asked_per_s:.1f}/s"

    @property
    def unleased(self) -> int:
        return sum(node.world.unleased for node in self.nodes)


def say(figures: str) -> None:
    sys.stdout.write(figures + "\n")


def run(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main)


@pytest.mark.parametrize("nodes", [2, 16])
def test_all_of_them_read_the_upstream_once(nodes: int):
    async def main():
        cluster = Cluster(nodes)
        assert not any(await cluster.storm())
        say(f"{nodes}: {cluster.figures}")
        assert cluster.ratio <= 1.02
        assert now() <= 1.3 * len(cluster.data) / 12.5e6 + 0.3
        assert cluster.asked_per_s < 16
        assert not cluster.unleased

    run(main())


def test_a_slow_line_is_not_overtaken():
    async def main():
        cluster = Cluster(16, bytes_per_s=1.25e6)
        assert not any(await cluster.storm())
        say(f"slow: {cluster.figures}")
        assert cluster.ratio <= 1.05
        assert now() <= 1.3 * len(cluster.data) / 1.25e6
        assert cluster.asked_per_s < 4

    run(main())


def test_an_upstream_that_fails_for_ten_seconds_is_not_stampeded():
    async def main():
        cluster = Cluster(16)
        cluster.line.failing_until = 10.0
        assert not any(await cluster.storm())
        say(f"503: {cluster.figures} {cluster.line.requests} requests, {cluster.unleased} unleased")
        assert cluster.ratio <= 1.1
        assert now() < 10 + 2.7 * 1.3 + 2.5
        assert cluster.asked_per_s < 8

    run(main())


def test_a_node_that_freezes_holds_up_nobody_for_long():
    async def main():
        cluster = Cluster(16)
        frozen = cluster.nodes[-1]

        async def freeze() -> None:
            async with asyncio.TaskGroup() as tasks:
                frozen.world.start(tasks, range(PIECES))
                await asyncio.sleep(0.5)
                frozen.is_frozen = True
                raise asyncio.CancelledError

        async with asyncio.TaskGroup() as group:
            group.create_task(freeze())
            storm = group.create_task(cluster.storm(but=1))
        assert not any(storm.result())
        say(f"frozen: {cluster.figures}")
        assert cluster.ratio <= 1.5
        assert now() < 10

    run(main())
