"""Nodes that coordinate over a network made of dictionaries, with everything that can go wrong.

    async with cluster(5) as nodes:
        nodes.coordinator(CUT).is_down = True
        located = await nodes[0].locate(CUT, [1, 2])

What passes between nodes is real: the messages are encoded and decoded on their way.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

from p2pcache.core.claims import (
    Claims,
    Cut,
    Grants,
    RegionKey,
    cut_name,
    decode_claims,
    decode_grants,
    encode_claims,
    encode_grants,
)
from p2pcache.core.coordinator import Coordinator
from p2pcache.core.errors import (
    IntegrityError,
    SourceBusy,
    SourceError,
    SourceLacksBlob,
    SourceUnavailable,
)
from p2pcache.core.layout import LayoutKind, PieceMask
from p2pcache.core.model import Digest, Manifest, Repository, Tag
from p2pcache.core.peers import PeerRecord
from p2pcache.core.placement import Member, Placement
from p2pcache.core.ranges import ByteRange
from p2pcache.core.wire import Holding, TagNews
from p2pcache.metrics import Metrics
from p2pcache.peers.coordination import Coordination
from p2pcache.peers.locator import Locator
from p2pcache.ports import Located, Peer, Search
from p2pcache.tasks import cancelled_at_exit

TRIP_S: Final = 0.001
QUESTION_S: Final = 0.4


def a_cut(name: str = "a blob", count: int = 64, *, passes_on: bool = True) -> Cut:
    """A blob that is cut into fixed pieces."""
    return Cut(Digest.of(name.encode()), cut_name(LayoutKind.FIXED, None), count, passes_on)


class FakeContact:
    """How one node reaches another."""

    def __init__(self, owner: FakeNode, node: FakeNode) -> None:
        self.record = PeerRecord()
        self.reading = 0
        self._owner = owner
        self.node = node

    @property
    def name(self) -> str:
        return f"peer {self.node.address}"

    @property
    def address(self) -> str:
        return self.node.address

    @property
    def hedge_after_s(self) -> float:
        return self.record.hedge_after_s

    async def _reach(self, patience_s: float) -> None:
        self.node.asked += 1
        if self.node.is_down:
            raise SourceUnavailable(self.name, "refuses connections")
        if self.node.is_silent or self.node.address in self._owner.cut_off_from:
            await asyncio.sleep(patience_s)
            raise SourceUnavailable(self.name, "no answer")
        await asyncio.sleep(self.node.trip_s)

    async def claim(self, message: Claims, timeout_s: float) -> Grants:
        self.node.messages.append(message)
        if self.node.is_old:
            raise SourceLacksBlob(self.name, "404")
        await self._reach(timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self.node.coordination.handle(decode_claims(encode_claims(message)))
        except TimeoutError as error:
            raise SourceUnavailable(self.name, "no answer") from error
        return decode_grants(encode_grants(answer))

    async def holding(self, digest: Digest) -> Holding | None:
        await self._reach(QUESTION_S)
        self.node.questions[digest] += 1
        return self.node.holdings.get(digest)

    async def manifest(self, digest: Digest) -> Manifest | None:
        await self._reach(QUESTION_S)
        return self.node.manifests.get(digest)

    async def tag(self, repository: Repository, tag: Tag) -> TagNews | None:
        await self._reach(QUESTION_S)
        return self.node.tag

    def read(
        self, digest: Digest, part: ByteRange, *, cut: Cut | None = None
    ) -> AsyncGenerator[bytes, None]:
        raise NotImplementedError

    async def tail(self, digest: Digest, toc_digest: Digest) -> bytes | None:
        raise NotImplementedError


class FakeDirectory:
    """One node's list of members. `show` gives it another one."""

    def __init__(self, node: FakeNode, cluster: Cluster) -> None:
        self._node = node
        self._cluster = cluster
        self._contacts: dict[str, FakeContact] = {}
        self.own_address = node.address
        self.own_zone = node.zone
        self.placement = Placement(())
        self.changed_at = 0.0

    def show(self, placement: Placement) -> None:
        self.placement = placement
        known = {member.address for member in placement.members}
        self._contacts = {a: peer for a, peer in self._contacts.items() if a in known}
        self.changed_at = asyncio.get_running_loop().time()

    def peer(self, address: str) -> FakeContact | None:
        if address not in self._contacts:
            if address == self.own_address or all(
                member.address != address for member in self.placement.members
            ):
                return None
            self._contacts[address] = FakeContact(self._node, self._cluster.by_address[address])
        return self._contacts[address]

    def usable(self) -> list[FakeContact]:
        now = asyncio.get_running_loop().time()
        peers = (self.peer(member.address) for member in self.placement.members)
        return [peer for peer in peers if peer is not None and peer.record.is_usable(now)]

    def note(self, peer: Peer, outcome: float | SourceError) -> None:
        assert isinstance(peer, FakeContact)
        now = asyncio.get_running_loop().time()
        if isinstance(outcome, float):
            peer.record.note_delivery(outcome)
        elif isinstance(outcome, IntegrityError):
            peer.record.note_lie(outcome.reason, now)
        elif not isinstance(outcome, SourceLacksBlob | SourceBusy):
            peer.record.note_failure(outcome.reason, now)


class FakeNode:
    """One node: the real locator and coordination, and what it would give."""

    def __init__(self, cluster: Cluster, address: str, zone: str) -> None:
        self.address = address
        self.zone = zone
        self.is_down = False
        self.is_silent = False
        self.is_old = False
        self.trip_s = TRIP_S
        self.cut_off_from: set[str] = set()
        self.asked = 0
        """Requests to it."""
        self.messages: list[Claims] = []
        self.questions: Counter[Digest] = Counter()
        self.holdings: dict[Digest, Holding] = {}
        self.manifests: dict[Digest, Manifest] = {}
        self.tag: TagNews | None = None
        self.metrics = Metrics()
        self.directory = FakeDirectory(self, cluster)
        self._tasks = cluster.tasks
        self._rng = random.Random(address)
        self.restart()
        self.locator = Locator(
            cluster.tasks,
            self.directory,
            lambda message: self.coordination.handle(message),
            self.metrics,
            self._rng,
            own_id=address,
        )

    def restart(self) -> None:
        """Forget all that it knew as a coordinator."""
        self.knowledge = Coordinator()
        self.coordination = Coordination(
            self._tasks, self.directory, self.knowledge, self.metrics, self._rng
        )

    def contact(self, other: FakeNode) -> FakeContact:
        peer = self.directory.peer(other.address)
        assert peer is not None
        return peer

    async def locate(
        self,
        cut: Cut,
        wanted: Iterable[int],
        *,
        held: Iterable[int] = (),
        fetching: Iterable[int] = (),
        limit: int = 64,
        failed: Mapping[FakeNode, Iterable[int]] | None = None,
    ) -> Located:
        """Look for pieces, and check that the answer makes sense."""
        mask = PieceMask.of(cut.count, wanted)
        located = await self.locator.locate(
            Search(
                cut,
                mask,
                PieceMask.of(cut.count, held),
                PieceMask.of(cut.count, fetching),
                limit,
                {
                    self.contact(node): PieceMask.of(cut.count, pieces)
                    for node, pieces in (failed or {}).items()
                },
            )
        )
        for lead in located.leads:
            assert lead.pieces
            assert not lead.pieces - mask
            assert not lead.pieces & located.upstream
        assert not located.upstream - mask
        return located

    def announce(self, cut: Cut, held: Iterable[int] = (), fetching: Iterable[int] = ()) -> None:
        self.locator.announce(cut, PieceMask.of(cut.count, held), PieceMask.of(cut.count, fetching))

    def hold(self, cut: Cut, pieces: Iterable[int], *, whole: bool = False) -> None:
        """Answer that it holds them, when asked: not announced."""
        self.holdings[cut.digest] = Holding(
            self.address,
            cut.count << 20,
            LayoutKind.FIXED,
            None,
            PieceMask.full(cut.count) if whole else PieceMask.of(cut.count, pieces),
            whole,
        )


class Cluster:
    """All nodes. They agree about the members, unless a test has some of them see others."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.tasks = tasks
        self.by_address: dict[str, FakeNode] = {}

    def __getitem__(self, number: int) -> FakeNode:
        return list(self.by_address.values())[number]

    def __iter__(self) -> Iterator[FakeNode]:
        return iter(list(self.by_address.values()))

    def join(self, address: str, zone: str = "") -> FakeNode:
        """Add a node, of which nobody knows yet."""
        node = self.by_address[address] = FakeNode(self, address, zone)
        self.tasks.create_task(node.locator.run())
        return node

    def agree(self, nodes: Iterable[FakeNode] | None = None) -> Placement:
        """Let every one of the *nodes* know them all, and nobody else."""
        nodes = list(nodes if nodes is not None else self)
        placement = Placement(Member(node.address, node.zone) for node in nodes)
        for node in nodes:
            node.directory.show(placement)
        return placement

    def coordinators(self, cut: Cut, index: int = 0, zone: str = "") -> list[FakeNode]:
        """Who coordinates a region, in order, as the first node sees it."""
        key = RegionKey(cut.digest, cut.name, index, zone)
        members = self[0].directory.placement.coordinators(key)
        return [self.by_address[member.address] for member in members]

    @property
    def placement(self) -> Placement:
        """The members, as the first node sees them."""
        return self[0].directory.placement

    def others(self, *nodes: FakeNode) -> list[FakeNode]:
        return [node for node in self if node not in nodes]

    @property
    def messages(self) -> list[Claims]:
        """Everything that went over the network to coordinators."""
        return [message for node in self for message in node.messages]

    def forget_messages(self) -> None:
        for node in self:
            node.messages.clear()


@asynccontextmanager
async def cluster(count: int, zones: Iterable[str] = ("",)) -> AsyncIterator[Cluster]:
    """Run *count* nodes, in turn in each of the *zones*, which has been going on for long."""
    names = list(zones)
    async with cancelled_at_exit() as tasks:
        nodes = Cluster(tasks)
        for number in range(count):
            nodes.join(f"10.0.0.{number}:29901", names[number % len(names)])
        nodes.agree()
        await asyncio.sleep(100)  # virtual: they have settled
        yield nodes
