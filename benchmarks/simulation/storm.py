"""All nodes start one image within moments; some die meanwhile. What did it take?

The rule: what a table says of a storm is counted while it runs, at the nodes, and not derived from
what the code under test believes.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Final

from benchmarks.simulation import clock
from benchmarks.simulation.contacts import Cluster, Contacts
from benchmarks.simulation.fetching import Fetcher, Tally
from benchmarks.simulation.image import Image
from benchmarks.simulation.member import WINDOW_S, Member, Registry
from benchmarks.simulation.network import Latency
from p2pcache.core.bounds import SETTLE_S
from p2pcache.core.coordinator import Coordinator
from p2pcache.core.placement import Member as Placed
from p2pcache.core.placement import Placement
from p2pcache.metrics import Metrics
from p2pcache.peers.coordination import Coordination
from p2pcache.peers.locator import Locator
from p2pcache.tasks import cancelled_at_exit

THINK_S: Final = 0.01
"""What a program does between two bursts, on average."""
_SECOND: Final = round(1 / WINDOW_S)


# By then coordinators take it that they know what there is to know: the members have been the same
# for long, and none has just started.
STORM_AT_S: Final = 2 * SETTLE_S


@dataclass(frozen=True, slots=True)
class Setting:
    """One storm."""

    nodes: int
    deaths: float
    zones: int
    spread_s: float
    link_mbit: float
    upstream_mbit: float
    seed: int
    dying_s: float = 0.0
    """Deaths happen at random moments between the start and then."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it. Rates are messages in a second; "busiest" is the member with the highest."""

    nodes: int
    deaths: float
    died: int
    finished: int
    upstream_ratio: float
    peak_rate: float
    """At the busiest member, in its busiest second."""
    mean_rate: float
    """At the member that got most messages, over the storm."""
    average_rate: float
    """Over all members and the storm."""
    messages: int
    claims: int
    wanting_claims: int
    max_hops: int
    mean_hops: float
    last_s: float
    """The longest start of a surviving node."""
    median_s: float
    storm_s: float
    """From the first node's start to the last one's end."""
    wasted_ratio: float
    """Bytes that came to a node that already had them, by all bytes that came."""
    tally: dict[str, int]
    wall_s: float
    processor_s: float
    """What the simulation took: by the clock, and of the processor."""
    time_ratio: float = 0.0
    """The longest start, by that of one node alone."""


@dataclass(slots=True)
class _Start:
    """One node's start of a container."""

    member: Member
    begins_at: float
    ended_at: float | None = None
    is_over: bool = False
    task: asyncio.Task[None] | None = field(default=None, repr=False)


def simulate(setting: Setting, image: Image) -> Outcome:
    """Run one storm."""
    began = time.perf_counter(), time.process_time()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        return clock.run(_Storm(setting, image).run(began))
    finally:
        gc.enable()
        gc.unfreeze()


class _Storm:
    def __init__(self, setting: Setting, image: Image) -> None:
        self._setting = setting
        self._image = image
        self._metrics = Metrics()
        self._rng = random.Random(setting.seed)
        self._tally = Tally()
        self._starts: list[_Start] = []
        self._is_over = asyncio.Event()

    async def run(self, began: tuple[float, float]) -> Outcome:
        setting, loop = self._setting, clock.virtual_loop()
        members = self._members(loop)
        placement = Placement(Placed(m.address, m.zone) for m in members)
        cluster = Cluster({m.address: m for m in members}, placement, loop)
        registry = Registry(loop, setting.upstream_mbit)
        async with asyncio.TaskGroup() as lives:
            for member in members:
                start = _Start(member, STORM_AT_S + self._rng.uniform(0, setting.spread_s))
                self._starts.append(start)
                start.task = lives.create_task(self._live(start, cluster, registry))
            self._doom(loop)
            await asyncio.sleep(0)  # all have come to life
            loop.now = STORM_AT_S
        return self._outcome(registry, *began)

    async def _live(self, start: _Start, cluster: Cluster, registry: Registry) -> None:
        """Coordinate for others until all starts have ended, and meanwhile start a container."""
        loop, member = cluster.loop, start.member
        rng = random.Random(f"{self._setting.seed} {member.address}")
        contacts = Contacts(member, cluster)
        try:
            async with cancelled_at_exit() as tasks:
                coordination = Coordination(tasks, contacts, Coordinator(), self._metrics, rng)
                member.coordination = coordination
                locator = Locator(
                    tasks, contacts, coordination.handle, self._metrics, rng, own_id=member.address
                )
                tasks.create_task(locator.run())
                fetcher = Fetcher(loop, member, registry, locator, self._tally)
                await loop.until(start.begins_at)
                for burst in self._image.bursts:
                    await fetcher.fetch(burst)
                    await loop.until(loop.now + rng.expovariate(1 / THINK_S))
                start.ended_at = loop.now
                self._end_if_over()
                await self._is_over.wait()
        finally:
            start.is_over = True
            self._end_if_over()

    def _end_if_over(self) -> None:
        if all(start.is_over or start.ended_at is not None for start in self._starts):
            self._is_over.set()

    def _members(self, loop: clock.VirtualLoop) -> list[Member]:
        setting = self._setting
        latency = Latency(random.Random(setting.seed + 1))
        members = []
        for number in range(setting.nodes):
            address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}:29901"
            zone = f"zone-{number % setting.zones}" if setting.zones > 1 else ""
            parts = self._image.parts
            members.append(Member(loop, latency, address, zone, parts, setting.link_mbit))
        return members

    def _doom(self, loop: clock.VirtualLoop) -> None:
        rng, setting = self._rng, self._setting
        for start in rng.sample(self._starts, round(setting.deaths * setting.nodes)):
            dies_at = STORM_AT_S + rng.uniform(0, setting.dying_s)
            loop.at(dies_at, _kill, start, rng.random() < 0.5)

    def _outcome(self, registry: Registry, began: float, processor_began: float) -> Outcome:
        setting, image = self._setting, self._image
        members = [start.member for start in self._starts]
        ended = [s for s in self._starts if s.ended_at is not None and not s.member.is_dead]
        lasted = sorted((s.ended_at or 0.0) - s.begins_at for s in ended)
        storm_s = max(s.ended_at or 0.0 for s in ended) - STORM_AT_S
        totals = [sum(member.traffic.messages.values()) for member in members]
        hops = [h for s in ended for state in s.member.parts for h in state.hops.values()]
        came = sum(m.traffic.peer_bytes + m.traffic.upstream_bytes for m in members)
        return Outcome(
            nodes=setting.nodes,
            deaths=setting.deaths,
            died=sum(member.is_dead for member in members),
            finished=len(ended),
            upstream_ratio=registry.bytes / image.bytes_needed,
            peak_rate=max(_peak(member.traffic.messages) for member in members),
            mean_rate=max(totals) / storm_s,
            average_rate=sum(totals) / len(totals) / storm_s,
            messages=sum(totals),
            claims=sum(member.traffic.claims for member in members),
            wanting_claims=sum(member.traffic.wanting for member in members),
            max_hops=max(hops),
            mean_hops=sum(hops) / len(hops),
            last_s=lasted[-1],
            median_s=lasted[len(lasted) // 2],
            storm_s=storm_s,
            wasted_ratio=sum(member.traffic.wasted_bytes for member in members) / came,
            tally=asdict(self._tally),
            wall_s=time.perf_counter() - began,
            processor_s=time.process_time() - processor_began,
        )


def _kill(start: _Start, resets: bool) -> None:
    start.member.die(resets=resets)
    assert start.task is not None
    start.task.cancel()


def _peak(messages: Mapping[int, int]) -> float:
    """Return the most messages in any second, to the precision of a window."""
    return max(
        (sum(messages.get(w, 0) for w in range(first, first + _SECOND)) for first in messages),
        default=0,
    )
