"""What a fetch sees of the world, scripted, in-process and on the loop's own clock.

    world = World(pieces=8)
    peer = world.peer("a", delay_s=2.0)
    world.answers = [Located([Lead(peer, world.mask(0, 1), True)], world.mask(2), 0.25)]
    assert await world.fetch() == {}

Nothing here opens a socket or starts a thread, so that it runs on a loop whose clock jumps.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from p2pcache.core.bounds import HOLD_S
from p2pcache.core.claims import Cut
from p2pcache.core.errors import SourceError, SourceLacksBlob
from p2pcache.core.estargz_writer import BuiltLayer
from p2pcache.core.layout import Layout, LayoutKind, PieceMask, PieceState
from p2pcache.core.model import Digest, Manifest, Repository, Tag
from p2pcache.core.ranges import ByteRange
from p2pcache.core.toc import FOOTER_PROBE_SIZE, Toc, find_footer, open_tail
from p2pcache.core.wire import TagNews
from p2pcache.metrics import Metrics
from p2pcache.mirror.active import ActiveBlob, PieceData
from p2pcache.mirror.fetching import MAX_BYTES_IN_FLIGHT, Fetcher
from p2pcache.ports import Lead, Located, Offer, Peer, Search

PIECE = 64 << 10
REPOSITORY = Repository("docker.io", "library/alpine")
_BLOCK = 64 << 10


def now() -> float:
    """The loop's time."""
    return asyncio.get_running_loop().time()


class Source:
    """How bytes come: after *delay_s*, at *bytes_per_s*, and what goes wrong with them."""

    def __init__(
        self, data: bytes, *, delay_s: float = 0.001, bytes_per_s: float = float("inf")
    ) -> None:
        self.data: bytes = data
        self.delay_s = delay_s
        self.bytes_per_s = bytes_per_s
        self.block = _BLOCK
        self.silent_after: int | None = None
        """It goes silent for ever after so many bytes of an answer."""
        self.error_after: tuple[int, Callable[[], SourceError]] | None = None
        """It fails after so many bytes of an answer."""
        self.failing: Callable[[], SourceError | None] = lambda: None
        """Asked when a read begins."""
        self.reads: list[tuple[float, ByteRange]] = []
        self.going = 0
        """Reads under way, and how many bytes they are for."""
        self.going_bytes = self.most_bytes = 0

    async def send(self, part: ByteRange) -> AsyncGenerator[bytes, None]:
        self.reads.append((now(), part))
        self.going += 1
        self.going_bytes += len(part)
        self.most_bytes = max(self.most_bytes, self.going_bytes)
        try:
            if (error := self.failing()) is not None:
                raise error
            await asyncio.sleep(self.delay_s)
            for start in range(part.start, part.stop, self.block):
                block = self.data[start : min(start + self.block, part.stop)]
                sent = start - part.start
                if self.silent_after is not None and sent >= self.silent_after:
                    await asyncio.sleep(600)
                if self.error_after is not None and sent >= self.error_after[0]:
                    raise self.error_after[1]()
                await asyncio.sleep(len(block) / self.bytes_per_s)
                yield block
        finally:
            self.going -= 1
            self.going_bytes -= len(part)

    @property
    def bytes_asked(self) -> int:
        return sum(len(part) for _, part in self.reads)


class FakeUpstream(Source):
    """A registry with one blob."""

    def read(
        self,
        repository: Repository,
        digest: Digest,
        part: ByteRange,
        size: int,
        *,
        priority: object = None,
        pausing: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> AsyncGenerator[bytes, None]:
        return self.send(part)

    async def manifest(self, *args: Any, **kwargs: Any) -> Manifest:
        raise NotImplementedError

    async def resolve(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    async def blob_size(self, *args: Any) -> int:
        raise NotImplementedError

    async def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class FakePeer(Source):
    """A peer with one blob."""

    def __init__(self, name: str, data: bytes, **how: float) -> None:
        super().__init__(data, **how)
        self.name = name
        self.hedge_after_s = 0.3

    def read(
        self, digest: Digest, part: ByteRange, *, cut: Cut | None = None
    ) -> AsyncGenerator[bytes, None]:
        return self.send(part)

    async def tail(self, digest: Digest, toc_digest: Digest) -> bytes | None:
        raise NotImplementedError

    async def manifest(self, digest: Digest) -> Manifest | None:
        raise NotImplementedError


class FakeNeighbours:
    """Coordinators that say what the script says, the last line of it for ever."""

    def __init__(self) -> None:
        self.answers: list[Located | Callable[[Search], Located]] = []
        self.searches: list[tuple[float, Search]] = []
        self.announced: list[tuple[float, PieceMask, PieceMask]] = []
        self.offers: Sequence[Offer] = ()
        self.finds: list[float] = []
        self.notes: list[tuple[Peer, float | SourceError]] = []
        self.delay_s = 0.001

    async def locate(self, search: Search) -> Located:
        self.searches.append((now(), search))
        await asyncio.sleep(self.delay_s)
        answer = self.answers[0]
        if len(self.answers) > 1:
            del self.answers[0]
        return answer if isinstance(answer, Located) else answer(search)

    def announce(self, cut: Cut, held: PieceMask, fetching: PieceMask) -> None:
        self.announced.append((now(), held, fetching))

    async def find(self, digest: Digest, wanted: PieceMask | None) -> Sequence[Offer]:
        self.finds.append(now())
        await asyncio.sleep(self.delay_s)
        return self.offers

    async def manifest(self, digest: Digest) -> Manifest | None:
        return None

    async def tag(self, repository: Repository, tag: Tag) -> TagNews | None:
        return None

    def note(self, peer: Peer, outcome: float | SourceError) -> None:
        self.notes.append((peer, outcome))

    def failures(self, peer: Peer) -> list[SourceError]:
        return [o for p, o in self.notes if p is peer and isinstance(o, SourceError)]


def grant_as_asked(world: World) -> Callable[[Search], Located]:
    """A coordinator that leases as many as are wanted at once, and holds the leases."""

    def answer(search: Search) -> Located:
        bits = list(search.wanted)[: search.lease_limit]
        return world.located(upstream=PieceMask.of(search.wanted.count, bits), retry_s=0.25)

    return answer


def waiting(world: World, peer: FakePeer, until: float) -> None:
    """A peer that gets its pieces at *until*, and holds each request for `HOLD_S` at most."""

    async def send(part: ByteRange) -> AsyncGenerator[bytes, None]:
        peer.reads.append((now(), part))
        left = until - now()
        await asyncio.sleep(min(max(left, 0.0), HOLD_S))
        if left > HOLD_S:
            raise SourceLacksBlob(peer.name, "does not hold it")
        yield world.data[part.start : part.stop]

    peer.send = send  # type: ignore[method-assign]


def parse_layer(layer: BuiltLayer) -> Toc:
    """Return the table of contents of *layer*."""
    size = len(layer.blob)
    footer = find_footer(layer.blob[-FOOTER_PROBE_SIZE:], size)
    return open_tail(layer.blob[footer.tail.start :], size=size, expected=layer.toc_digest)


class MemoryBlob:
    """A stored blob without a disk."""

    def __init__(self, layout: Layout, digest: Digest) -> None:
        self.layout, self.digest, self.toc_digest = layout, digest, None
        self.states = bytearray(layout.count)
        self.data: dict[int, bytes] = {}
        self.is_whole = False

    @property
    def is_complete(self) -> bool:
        return 0 not in self.states

    @property
    def held(self) -> PieceMask:
        return self.pieces_in(PieceState.HELD_UPSTREAM, PieceState.HELD_PEER)

    def pieces_in(self, *states: PieceState) -> PieceMask:
        flags = bytes(0x31 if state in states else 0x30 for state in range(256))
        return PieceMask(self.layout.count, int(self.states[::-1].translate(flags) or b"0", 2))

    def state_of(self, piece: int) -> PieceState:
        return PieceState(self.states[piece])

    async def write(self, piece: int, data: bytes, state: PieceState) -> None:
        await asyncio.sleep(0.001)
        self.states[piece] = state
        self.data[piece] = data


class World:
    """One node that fetches a blob, and all that it can ask: *pieces* of fixed layout, or a *layer*
    with its table of contents, which takes a loop on which threads work."""

    def __init__(
        self,
        pieces: int = 8,
        *,
        piece_size: int = PIECE,
        known: bool = True,
        stored: bool = False,
        data: bytes | None = None,
        layer: BuiltLayer | None = None,
    ) -> None:
        self.data = data or b"".join(
            (i % 251).to_bytes(1, "little") * piece_size for i in range(pieces)
        )
        self.layout = Layout(
            LayoutKind.FIXED, len(self.data), array("Q", range(0, len(self.data), piece_size))
        )
        toc: Toc | None = None
        if layer is not None:
            self.data = layer.blob
            toc = parse_layer(layer)
            self.layout = toc.layout()
        self.upstream = FakeUpstream(self.data)
        self.neighbours = FakeNeighbours()
        self.metrics = Metrics()
        digest = Digest.of(b"a blob")
        self.disk = MemoryBlob(self.layout, digest) if stored else None
        self.blob = ActiveBlob(
            digest,
            self.layout,
            REPOSITORY if known else None,
            cast(Any, self.disk),
            layer.toc_digest if layer else None,
            toc,
        )
        self.proofs = ThreadPoolExecutor(1)
        self.futures: dict[int, asyncio.Future[PieceData]] = {}
        self.fetcher: Fetcher | None = None

    @property
    def unleased(self) -> int:
        """Pieces read without leave."""
        return int(self.metrics.unleased_pieces._value.get())

    def hold(self, piece: int) -> None:
        """Have the store hold *piece*."""
        assert self.disk is not None
        self.disk.states[piece] = PieceState.HELD_UPSTREAM

    def peer(self, name: str, **how: float) -> FakePeer:
        return FakePeer(name, self.data, **how)

    def mask(self, *pieces: int) -> PieceMask:
        return PieceMask.of(self.layout.count, pieces)

    @property
    def all(self) -> PieceMask:
        return PieceMask.full(self.layout.count)

    @property
    def none(self) -> PieceMask:
        return PieceMask(self.layout.count)

    def lead(self, peer: Peer, *pieces: int, waits: bool = False) -> Lead:
        return Lead(peer, self.mask(*pieces) if pieces else self.all, not waits)

    def located(
        self, *leads: Lead, upstream: PieceMask | None = None, retry_s: float = 0.0
    ) -> Located:
        return Located(leads, upstream or self.none, retry_s)

    async def fetch(
        self, pieces: Iterable[int] | None = None, *, ask_peers: bool = True
    ) -> dict[int, BaseException]:
        """Fetch; return what failed. Checks that all else came right and nothing is left over."""
        wanted = list(range(self.layout.count) if pieces is None else pieces)
        self.fetcher = None
        async with asyncio.TaskGroup() as tasks:
            fetcher = self.start(tasks, wanted, ask_peers=ask_peers)
        self.check_tidy(fetcher)
        failed: dict[int, BaseException] = {}
        for piece, future in self.futures.items():
            error = future.exception()
            if error is not None:
                failed[piece] = error
            elif (data := future.result().data) is not None:
                part = self.layout.range_of(piece)
                assert data == self.data[part.start : part.stop]
        return failed

    def start(
        self, tasks: asyncio.TaskGroup, wanted: Sequence[int], *, ask_peers: bool = True
    ) -> Fetcher:
        if self.fetcher is None:
            self.fetcher = Fetcher(
                tasks,
                self.neighbours,
                self.upstream,
                self.metrics,
                self.proofs,
            )
        self.futures |= self.fetcher.start(self.blob, wanted, ask_peers=ask_peers)
        return self.fetcher

    def check_tidy(self, fetcher: Fetcher) -> None:
        assert fetcher._budget._free == MAX_BYTES_IN_FLIGHT
        assert not fetcher._budget._waiting
        assert fetcher._sources.appetite._taken == 0
        assert not self.blob.sourced
        assert not self.blob.inflight
        assert not self.upstream.going
        assert all(future.done() for future in self.futures.values())
