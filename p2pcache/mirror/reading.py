"""From pieces to the bytes of an answer.

Two kinds of reader want different things. A lazy snapshotter asks for bounded ranges and checks
every chunk itself: proven chunks are enough for it. Whoever reads to the end (containerd) will
check the blob's own digest, and one wrong bit, even in padding, is a failure it does not recover
from: it gets only bytes that this node read from the upstream itself, or that the whole blob's
digest has vouched for. The rule: a peer's bytes pass to the first kind piece by piece, and to the
second only after the whole was checked.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from p2pcache.core.errors import (
    BlobUnavailable,
    SourceError,
    StoreCorrupt,
    StoreError,
)
from p2pcache.core.layout import LayoutKind, PieceMask, PieceState
from p2pcache.core.ranges import ByteRange
from p2pcache.metrics import Metrics
from p2pcache.mirror.active import (
    BY_UPSTREAM,
    UNPROVEN_BY_PEER,
    ActiveBlob,
    Origin,
    PieceData,
    TocUnusable,
    usable_mask,
)
from p2pcache.mirror.fetching import Fetcher
from p2pcache.mirror.gathering import Gatherer, NoRoom, first_absent
from p2pcache.ports import Neighbours, Upstream
from p2pcache.tasks import cancelled_at_exit

logger = logging.getLogger(__name__)

# How far ahead of a reader pieces are fetched: two full runs, so that one is on its way while the
# other is being sent.
AHEAD_BYTES: Final = 16 << 20
# A reader that waits for the whole gets so much this often, so that it goes on waiting.
SIGN_EVERY_S: Final = 20.0
SIGN_BYTES: Final = 64 << 10
# One block of an answer: large enough that its overhead vanishes, small enough that many readers
# fit into memory.
BLOCK_BYTES: Final = 1 << 20
# Up to this size a blob without a table of contents is rather gathered from peers than read in
# parts from the upstream, even for a part. Config blobs and small layers.
SMALL_BLOB_BYTES: Final = 4 << 20

# A blob in which more pieces than this went rotten while it was open is served without the disk.
_MAX_ROTTEN: Final = 64

_PRESENT: Final = tuple(state for state in PieceState if state is not PieceState.ABSENT)


@dataclass(frozen=True, slots=True)
class Segment:
    """Some consecutive bytes of an answer, and where this request got them from."""

    data: bytes
    origin: Origin


class Reader:
    """Reads active blobs for clients."""

    def __init__(
        self,
        fetcher: Fetcher,
        gatherer: Gatherer,
        neighbours: Neighbours,
        upstream: Upstream,
        metrics: Metrics,
    ) -> None:
        self._fetcher = fetcher
        self._gatherer = gatherer
        self._upstream = upstream
        self._neighbours = neighbours
        self._metrics = metrics

    async def read(
        self, blob: ActiveBlob, parts: Sequence[ByteRange], *, exact: bool
    ) -> AsyncGenerator[Segment, None]:
        """Yield the bytes of *parts*, one part after the other.

        *exact* readers check the blob's own digest, others its chunks. Raises `BlobUnavailable`,
        or `TocUnusable`, in which case the blob must be opened anew.
        """
        chunks_suffice = blob.layout.kind is LayoutKind.TOC and not exact
        # A part of a blob that only the whole can prove is not worth fetching all of it.
        shares = chunks_suffice or exact or blob.layout.size <= SMALL_BLOB_BYTES
        ahead = _Ahead({}, shares)
        if shares and not chunks_suffice and self._has_doubtful(blob):
            await self._settle(blob, ahead)
        if len(parts) > 1 and chunks_suffice:
            wanted = sorted({p for part in parts for p in blob.layout.covering(part)})
            ahead.asked |= self._fetcher.start(blob, first_absent(blob, wanted, AHEAD_BYTES))
        for part in parts:
            ahead.until = 0
            async with aclosing(self._read_part(blob, part, chunks_suffice, ahead)) as segments:
                async for segment in segments:
                    yield segment

    def _has_doubtful(self, blob: ActiveBlob) -> bool:
        """Say whether there are pieces that only the whole can prove."""
        stored = blob.stored
        return (
            stored is not None and not stored.is_whole and bool(stored.pieces_in(*UNPROVEN_BY_PEER))
        )

    async def _read_part(
        self, blob: ActiveBlob, part: ByteRange, chunks_suffice: bool, ahead: _Ahead
    ) -> AsyncGenerator[Segment, None]:
        position = part.start
        while position < part.stop:
            pieces = blob.layout.covering(ByteRange(position, part.stop))
            present = _present_run(blob, pieces, chunks_suffice)
            if present.stop < pieces.stop:
                self._look_ahead(blob, pieces, chunks_suffice, ahead)
            if present:
                stop = min(blob.layout.span(present).stop, part.stop, position + BLOCK_BYTES)
                data = await self._read_present(blob, ByteRange(position, stop), chunks_suffice)
                if data is not None:
                    yield Segment(data, ahead.origin_of(pieces.start))
                    position = stop
                continue
            piece = pieces.start
            if not chunks_suffice and self._awaits_whole(blob, piece, ahead):
                signs = self._settle_meanwhile(blob, part, position, ahead)
                async with aclosing(signs):
                    async for segment in signs:
                        yield segment
                        position += len(segment.data)
                continue
            result = await self._piece(blob, piece, chunks_suffice, ahead)
            if result is None or result.data is None:
                continue  # stored, or gathered, in the meantime
            if not chunks_suffice and result.origin is Origin.PEER:
                ahead.asked.pop(piece, None)
                ahead.awaits_whole = True
                continue
            here = blob.layout.range_of(piece)
            stop = min(here.stop, part.stop)
            yield Segment(result.data[position - here.start : stop - here.start], result.origin)
            position = stop
            if stop == here.stop:
                ahead.asked.pop(
                    piece, None
                )  # lets go of its memory where the store did not take it

    def _look_ahead(
        self, blob: ActiveBlob, pieces: range, chunks_suffice: bool, ahead: _Ahead
    ) -> None:
        """Start fetching what this reader will want next, in strides of half the horizon.

        Strides keep runs long: asking for one more piece whenever one was sent would make every
        upstream request a small one.
        """
        starts, first = blob.layout.starts, pieces.start
        near = ahead.until < pieces.stop and (
            ahead.until <= first or starts[ahead.until] - starts[first] < AHEAD_BYTES // 2
        )
        if not near or (not chunks_suffice and blob.assembly is not None):
            return
        horizon = min(starts[first] + AHEAD_BYTES, blob.layout.range_of(pieces.stop - 1).stop)
        until = blob.layout.covering(ByteRange(starts[first], horizon)).stop
        candidates = range(max(first, ahead.until), until)
        wanted = [p for p in candidates if blob.state_of(p) is PieceState.ABSENT]
        ahead.asked |= self._fetcher.start(blob, wanted, ask_peers=ahead.asks_peers)
        ahead.until = until

    async def _read_present(
        self, blob: ActiveBlob, part: ByteRange, chunks_suffice: bool
    ) -> bytes | None:
        """Return bytes from the store; None if they turned out to be rotten or gone."""
        stored = blob.stored
        assert stored is not None
        if chunks_suffice or stored.is_whole:
            data = stored.read_held_now(part.start, part.stop)
            if data is not None:
                return data
        try:
            return await stored.read(part, staged=not chunks_suffice)
        except StoreCorrupt as error:
            self._metrics.rotten_pieces.inc()
            blob.rotten += 1
            if blob.rotten > _MAX_ROTTEN:
                blob.stored = None  # the disk spoils what it is given: go on without it
            logger.warning("store.rotten", extra={"digest": str(blob.digest), "piece": error.piece})
        except StoreError as error:
            logger.warning(
                "store.unreadable", extra={"digest": str(blob.digest), "reason": str(error)}
            )
            blob.stored = None
        return None

    async def _piece(
        self, blob: ActiveBlob, piece: int, chunks_suffice: bool, ahead: _Ahead
    ) -> PieceData | None:
        """Wait for an absent *piece*; None if it or the whole blob came onto the disk instead."""
        future = ahead.asked.get(piece)
        if future is None:  # it was there when we looked ahead, and has been dropped since
            future = self._fetcher.start(blob, [piece], ask_peers=ahead.asks_peers)[piece]
        try:
            result = await asyncio.shield(future)
        except BlobUnavailable:
            if chunks_suffice or not await self._peers_have_all(blob):
                raise
            await self._gatherer.gather(blob)
            return None
        if result.data is None and blob.state_of(piece) is PieceState.ABSENT:
            ahead.asked.pop(piece, None)  # stored and dropped again: fetch it anew
        return result

    async def _peers_have_all(self, blob: ActiveBlob) -> bool:
        """Say whether peers can complete a blob that the upstream does not deliver."""
        if blob.stored is None or blob.is_whole:
            return False
        absent = PieceMask.full(blob.layout.count) - blob.stored.pieces_in(*_PRESENT)
        offers = await self._neighbours.find(blob.digest, absent)
        found = PieceMask(blob.layout.count)
        for offer in offers:
            found |= usable_mask(offer, blob) or found
        return not absent - found

    def _awaits_whole(self, blob: ActiveBlob, piece: int, ahead: _Ahead) -> bool:
        """Say whether the next *piece* can only be served once the whole was checked."""
        if ahead.awaits_whole or blob.state_of(piece) in UNPROVEN_BY_PEER:
            return True
        return not ahead.no_room and blob.assembly is not None

    async def _settle_meanwhile(
        self, blob: ActiveBlob, part: ByteRange, position: int, ahead: _Ahead
    ) -> AsyncGenerator[Segment, None]:
        """Wait for the whole, and now and then yield a few bytes of *part* from *position* on.

        A client from which nothing is heard for long takes it that nothing comes: containerd has
        limits of 30 s for the headers and of minutes for progress. What it gets meanwhile this node
        reads from the upstream itself, so little of it that it does not count.
        """
        ahead.awaits_whole = False
        async with cancelled_at_exit() as tasks:
            settled = tasks.create_task(self._settled(blob, ahead))
            while True:
                done, _ = await asyncio.wait((settled,), timeout=SIGN_EVERY_S)
                if done:
                    break
                stop = min(part.stop, position + SIGN_BYTES)
                data = await self._read_sign(blob, ByteRange(position, stop))
                if data:
                    yield Segment(data, Origin.UPSTREAM)
                    position += len(data)
                if position == part.stop:
                    return
        if (failure := settled.result()) is not None:
            raise failure

    async def _settled(
        self, blob: ActiveBlob, ahead: _Ahead
    ) -> BlobUnavailable | TocUnusable | None:
        try:
            await self._settle(blob, ahead)
        except (BlobUnavailable, TocUnusable) as error:
            return error
        return None

    async def _read_sign(self, blob: ActiveBlob, part: ByteRange) -> bytes:
        """Read a few bytes from the upstream; none if it does not deliver them."""
        if blob.repository is None:
            return b""
        try:
            async with aclosing(
                self._upstream.read(blob.repository, blob.digest, part, blob.layout.size)
            ) as blocks:
                return b"".join([block async for block in blocks])
        except SourceError as error:
            logger.info("sign.failed", extra={"digest": str(blob.digest), "reason": error.reason})
            return b""

    async def _settle(self, blob: ActiveBlob, ahead: _Ahead) -> None:
        """Have what peers gave checked with the whole, or let go of it if there is no room."""
        try:
            if not ahead.no_room:
                await self._gatherer.gather(blob)
                return
        except NoRoom:
            ahead.no_room = True
        if blob.stored is not None:
            await blob.stored.drop(blob.stored.pieces_in(*UNPROVEN_BY_PEER))


@dataclass(slots=True)
class _Ahead:
    """What one reader has asked for and not yet read."""

    asked: dict[int, asyncio.Future[PieceData]]
    shares: bool
    """Peers are of use to it, piece by piece or once the blob is whole."""
    until: int = 0
    """All absent pieces of the part being read, up to this one, have been asked for."""
    awaits_whole: bool = False
    """What came next came from a peer: only the whole can prove it."""
    no_room: bool = False
    """The store cannot take the whole blob: an exact reader gets the upstream's bytes alone."""

    @property
    def asks_peers(self) -> bool:
        """What it fetches may come from peers."""
        return self.shares and not self.no_room

    def origin_of(self, piece: int) -> Origin:
        """Where this request got a stored piece from: it may have fetched it a moment ago."""
        future = self.asked.get(piece)
        if future is None or not future.done() or future.exception():
            return Origin.LOCAL
        return future.result().origin


def _present_run(blob: ActiveBlob, pieces: range, chunks_suffice: bool) -> range:
    """Return how far *pieces*, from the first on, can be read from the store, about a block."""
    stored = blob.stored
    if stored is None:
        return pieces[:0]
    if stored.is_whole:
        return pieces
    if chunks_suffice:
        return pieces[: stored.held.run_length(pieces.start)]
    limit = blob.layout.starts[pieces.start] + 2 * BLOCK_BYTES
    count = 0
    for piece in pieces:
        if stored.state_of(piece) not in BY_UPSTREAM or blob.layout.starts[piece] > limit:
            break
        count += 1
    return pieces[:count]
