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
from dataclasses import dataclass
from typing import Final

from p2pcache.core.errors import (
    BlobUnavailable,
    IntegrityError,
    StoreCorrupt,
    StoreError,
)
from p2pcache.core.layout import LayoutKind, PieceMask, PieceState
from p2pcache.core.model import Digest
from p2pcache.core.ranges import ByteRange
from p2pcache.metrics import Metrics
from p2pcache.mirror.active import ActiveBlob, Origin, PieceData, TocUnusable, usable_mask
from p2pcache.mirror.fetching import Fetcher
from p2pcache.ports import Neighbours, Peer
from p2pcache.tasks import shared_future

logger = logging.getLogger(__name__)

# How far ahead of a reader pieces are fetched: two full runs, so that one is on its way while the
# other is being sent.
AHEAD_BYTES: Final = 16 << 20
# One block of an answer: large enough that its overhead vanishes, small enough that many readers
# fit into memory.
BLOCK_BYTES: Final = 1 << 20
# Up to this size a blob without a table of contents is rather taken whole from peers than in
# parts from the upstream. Config blobs and small layers.
SMALL_BLOB_BYTES: Final = 4 << 20

_UNPROVEN_BY_PEER: Final = (PieceState.STAGED_PEER, PieceState.HELD_PEER)
# A blob in which more pieces than this went rotten while it was open is served without the disk.
_MAX_ROTTEN: Final = 64

_PRESENT: Final = tuple(state for state in PieceState if state is not PieceState.ABSENT)
_BY_UPSTREAM: Final = (PieceState.STAGED_UPSTREAM, PieceState.HELD_UPSTREAM)


@dataclass(frozen=True, slots=True)
class Segment:
    """Some consecutive bytes of an answer, and where this request got them from."""

    data: bytes
    origin: Origin


class Reader:
    """Reads active blobs for clients."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        fetcher: Fetcher,
        neighbours: Neighbours,
        metrics: Metrics,
    ) -> None:
        self._tasks = tasks
        self._fetcher = fetcher
        self._neighbours = neighbours
        self._metrics = metrics

    async def read(
        self, blob: ActiveBlob, parts: Sequence[ByteRange], *, exact: bool
    ) -> AsyncGenerator[Segment, None]:
        """Yield the bytes of *parts*, one part after the other.

        *exact* readers check the blob's own digest, others its chunks. Raises `BlobUnavailable`,
        or `TocUnusable`, in which case the blob must be opened anew.
        """
        ahead = _Ahead({})
        if await self._is_better_whole(blob, exact):
            await self._settle(blob, ahead)
        chunks_suffice = blob.layout.kind is LayoutKind.TOC and not exact
        if len(parts) > 1 and chunks_suffice:
            wanted = sorted({p for part in parts for p in blob.layout.covering(part)})
            ahead.asked |= self._fetcher.start(blob, _absent(blob, wanted, AHEAD_BYTES))
        for part in parts:
            ahead.until = 0
            async for segment in self._read_part(blob, part, chunks_suffice, ahead):
                yield segment

    async def _is_better_whole(self, blob: ActiveBlob, exact: bool) -> bool:
        """Say whether the blob should be gathered from peers and checked before it is served."""
        if blob.is_whole or blob.stored is None:
            return False
        small = blob.layout.kind is LayoutKind.FIXED and blob.layout.size <= SMALL_BLOB_BYTES
        if not exact and not small:
            return False
        if blob.stored.pieces_in(*_UNPROVEN_BY_PEER):
            return True
        absent = PieceMask.full(blob.layout.count) - blob.stored.pieces_in(*_PRESENT)
        if not absent:
            return False
        offers = await self._neighbours.find(blob.digest, absent)
        return any(usable_mask(offer, blob) for offer in offers)

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
            if not chunks_suffice and blob.state_of(piece) in _UNPROVEN_BY_PEER:
                await self._settle(blob, ahead)
                continue
            result = await self._piece(blob, piece, chunks_suffice, ahead)
            if result is None or result.data is None:
                continue  # stored, or gathered, in the meantime
            if not chunks_suffice and result.origin is Origin.PEER:
                ahead.asked.pop(piece, None)
                await self._settle(blob, ahead)
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
        ahead.asked |= self._fetcher.start(blob, wanted, ask_peers=chunks_suffice)
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
        if not chunks_suffice and not ahead.no_room and blob.assembly is not None:
            await self._settle(blob, ahead)
            return None
        future = ahead.asked.get(piece)
        if future is None:  # it was there when we looked ahead, and has been dropped since
            future = self._fetcher.start(blob, [piece], ask_peers=chunks_suffice)[piece]
        try:
            result = await asyncio.shield(future)
        except BlobUnavailable:
            if chunks_suffice or not await self._peers_have_all(blob):
                raise
            await self.gather(blob)
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

    async def gather(self, blob: ActiveBlob) -> None:
        """Return once the blob is whole and checked. Readers who come together share the work.

        Raises `BlobUnavailable`.
        """
        if blob.is_whole:
            return
        self.confirm(blob)
        if blob.assembly is not None:
            await asyncio.shield(blob.assembly)

    async def _settle(self, blob: ActiveBlob, ahead: _Ahead) -> None:
        """Have what peers gave checked with the whole, or let go of it if there is no room."""
        try:
            if not ahead.no_room:
                await self.gather(blob)
                return
        except _NoRoom:
            ahead.no_room = True
        if blob.stored is not None:
            await blob.stored.drop(blob.stored.pieces_in(*_UNPROVEN_BY_PEER))

    async def _gather(self, blob: ActiveBlob, done: asyncio.Future[None]) -> None:
        try:
            await self._fill(blob, ask_peers=True)
            if not await self._confirm(blob):
                await self._replace_doubtful(blob)
            done.set_result(None)
        except BlobUnavailable as error:
            done.set_exception(error)
        except TocUnusable as error:
            done.set_exception(error)
        except (IntegrityError, StoreError) as error:
            done.set_exception(BlobUnavailable(str(blob.digest), missing=False, reason=str(error)))
        except Exception:  # a bug ends here, logged, and the readers get an error
            logger.exception("gather.broken", extra={"digest": str(blob.digest)})
        finally:
            blob.assembly = None
            if not done.done():
                done.set_exception(BlobUnavailable(str(blob.digest), missing=False))

    async def _fill(self, blob: ActiveBlob, *, ask_peers: bool) -> None:
        """Bring every absent piece onto the disk."""
        stored = blob.stored
        if stored is None:
            raise _NoRoom(blob.digest)
        with stored.reading():
            while absent := _absent(blob, range(blob.layout.count), AHEAD_BYTES):
                futures = self._fetcher.start(blob, absent, ask_peers=ask_peers)
                for future in futures.values():
                    result = await asyncio.shield(future)
                    if not await asyncio.shield(result.kept):
                        raise _NoRoom(blob.digest)

    async def _confirm(self, blob: ActiveBlob) -> bool:
        if blob.stored is None or not await blob.stored.confirm_whole():
            return False
        blob.contributors.clear()
        return True

    async def _replace_doubtful(self, blob: ActiveBlob) -> None:
        """The whole did not match: take what peers gave from the upstream, and see who lied."""
        stored = blob.stored
        if stored is None:
            raise BlobUnavailable(str(blob.digest), missing=False, reason="the store let go of it")
        doubtful = stored.pieces_in(*_UNPROVEN_BY_PEER)
        logger.warning(
            "blob.mismatch",
            extra={"digest": str(blob.digest), "pieces_from_peers": len(doubtful)},
        )
        before = {piece: stored.hash_of(piece) for piece in doubtful}
        givers = dict(blob.contributors)
        await stored.drop(doubtful)
        if not doubtful:
            await stored.drop(range(blob.layout.count))
            raise IntegrityError("upstream", f"{blob.digest} does not match what it serves")
        if doubtful.is_full and len(set(givers.values())) == 1 and len(givers) == len(doubtful):
            # All of it came from one peer: no need to look further, even with the upstream down.
            self._blame(next(iter(givers.values())), blob)
            givers = {}
        await self._fill(blob, ask_peers=False)
        for piece, giver in givers.items():
            if piece in before and stored.hash_of(piece) != before[piece]:
                self._blame(giver, blob)
        if not await self._confirm(blob):
            await stored.drop(range(blob.layout.count))
            raise IntegrityError("upstream", f"{blob.digest} does not match what it serves")

    def _blame(self, peer: Peer, blob: ActiveBlob) -> None:
        error = IntegrityError(peer.name, f"its bytes of {blob.digest} do not match the digest")
        self._neighbours.note(peer, error)

    def confirm(self, blob: ActiveBlob) -> None:
        """Check a blob that has just become complete, so that it can be served as whole."""
        if not blob.is_whole and blob.assembly is None:
            blob.assembly = shared_future()
            self._tasks.create_task(self._gather(blob, blob.assembly))


class _NoRoom(BlobUnavailable):
    """The store cannot take the whole blob, so nobody can check it here."""

    def __init__(self, digest: Digest) -> None:
        super().__init__(str(digest), missing=False, reason="no room to gather it")


@dataclass(slots=True)
class _Ahead:
    """What one reader has asked for and not yet read."""

    asked: dict[int, asyncio.Future[PieceData]]
    until: int = 0
    """All absent pieces of the part being read, up to this one, have been asked for."""
    no_room: bool = False
    """The store cannot take the whole blob: an exact reader gets the upstream's bytes alone."""

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
        if stored.state_of(piece) not in _BY_UPSTREAM or blob.layout.starts[piece] > limit:
            break
        count += 1
    return pieces[:count]


def _absent(blob: ActiveBlob, pieces: Sequence[int] | range, limit: int) -> list[int]:
    """Return the first absent ones of *pieces*, up to *limit* bytes but at least one."""
    found: list[int] = []
    size = 0
    for piece in pieces:
        if blob.state_of(piece) is PieceState.ABSENT:
            size += len(blob.layout.range_of(piece))
            if found and size > limit:
                break
            found.append(piece)
    return found
