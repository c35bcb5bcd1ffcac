"""Getting pieces: one fetch however many readers wait, proof, and the way to the disk.

Who is asked is `pursuit`'s business. The rules kept here: a piece from a peer becomes readable only
when proven or when the whole blob is; a fetch belongs to the mirror and not to a reader, so that a
reader who leaves cancels nothing; every reader's wait ends, with bytes or with an error.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final

from p2pcache.core.errors import (
    BlobUnavailable,
    FormatError,
    IntegrityError,
    SourceError,
    StoreError,
)
from p2pcache.core.layout import PieceState
from p2pcache.core.pacing import Priority
from p2pcache.core.proof import find_flaw
from p2pcache.core.toc import Toc, open_tail
from p2pcache.metrics import Metrics
from p2pcache.mirror.active import ActiveBlob, Origin, PieceData, TocUnusable
from p2pcache.mirror.attempt import Attempt, Sources
from p2pcache.mirror.budget import ByteBudget
from p2pcache.mirror.pursuit import Pursuit
from p2pcache.ports import Neighbours, Upstream
from p2pcache.tasks import shared_future

logger = logging.getLogger(__name__)

MAX_BYTES_IN_FLIGHT: Final = 256 << 20


class Fetcher:
    """Fetches pieces of active blobs. Owned by the mirror; its tasks live in *tasks*."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        neighbours: Neighbours,
        upstream: Upstream,
        metrics: Metrics,
        proofs: ThreadPoolExecutor,
    ) -> None:
        self._tasks = tasks
        self._neighbours = neighbours
        self._metrics = metrics
        self._proofs = proofs
        self._budget = ByteBudget(MAX_BYTES_IN_FLIGHT)
        self._sources = Sources(neighbours, upstream, self._budget)
        self.on_complete: Callable[[ActiveBlob], None] = lambda blob: None
        """Called when the last piece of a blob has been stored."""

    def start(
        self,
        blob: ActiveBlob,
        pieces: Sequence[int],
        *,
        ask_peers: bool = True,
        priority: Priority = Priority.DEMAND,
    ) -> dict[int, asyncio.Future[PieceData]]:
        """See to it that the absent *pieces* are being fetched; return what to wait for.

        Futures end with the piece, with `BlobUnavailable`, or with `TocUnusable`. With
        *ask_peers* off a new fetch goes to the upstream alone; one under way is shared whoever
        it asks, so look at the origin. One that a peer has ended is not shared then.
        """
        missing = [p for p in pieces if not _is_shared(blob, p, ask_peers)]
        for piece in missing:
            future: asyncio.Future[PieceData] = shared_future()
            blob.inflight[piece] = future
        if missing:
            self._tasks.create_task(self._fetch(blob, missing, ask_peers, priority))
        return {piece: blob.inflight[piece] for piece in pieces}

    async def _fetch(
        self, blob: ActiveBlob, pieces: list[int], ask_peers: bool, priority: Priority
    ) -> None:
        """Fetch *pieces*; end their futures in any case."""
        futures = {piece: blob.inflight[piece] for piece in pieces}
        end: Exception = BlobUnavailable(str(blob.digest), missing=False, reason="stopping")
        try:
            if blob.toc_digest and pieces != [blob.layout.count - 1]:
                await self.toc_of(blob)  # before any memory is claimed: its fetch claims some too
            async with asyncio.TaskGroup() as stores:
                reception = _Reception(self, futures, stores)
                pursuit = Pursuit(
                    blob,
                    futures,
                    self._neighbours,
                    self._sources,
                    reception,
                    ask_peers=ask_peers,
                    priority=priority,
                )
                end = await pursuit.run() or end
        except (TocUnusable, BlobUnavailable) as error:
            logger.info("toc.unavailable", extra={"digest": str(blob.digest), "reason": str(error)})
            end = error
        except Exception:  # the one place where a bug in a fetch ends, and it is logged
            logger.exception("fetch.broken", extra={"digest": str(blob.digest)})
        finally:
            for piece, future in futures.items():
                if blob.inflight.get(piece) is future:
                    del blob.inflight[piece]
                if not future.done():
                    future.set_exception(_same(end))
            self._neighbours.announce(blob.cut, blob.given, blob.fetching)

    async def keep(
        self, blob: ActiveBlob, piece: int, result: PieceData, state: PieceState
    ) -> None:
        """Store a piece. Its memory is let go then: readers find it on disk.

        Not announced piece by piece: whoever knew that it is coming is served all the same.
        """
        if blob.stored is None or result.data is None:
            return
        try:
            await blob.stored.write(piece, result.data, state)
        except StoreError as error:
            self._metrics.unstored_pieces.inc()
            logger.debug("store.refused", extra={"reason": str(error)})
            return
        result.data = None
        result.kept.set_result(True)
        if blob.stored and blob.stored.is_complete:
            self.on_complete(blob)

    def let_go(self, result: PieceData, taken: int) -> None:
        """A piece is on disk, or never will be: give back the *taken* bytes of the budget."""
        self._budget.release(taken)
        if not result.kept.done():
            result.kept.set_result(False)

    def note_failure(self, attempt: Attempt, failure: SourceError) -> None:
        """A source failed: count it, and remember it of the peer."""
        peer = attempt.peer
        reason = type(failure).__name__
        self._metrics.source_failures.labels("peer" if peer else "upstream", reason).inc()
        logger.info(
            "source.failed",
            extra={
                "source": peer.name if peer else "upstream",
                "digest": str(attempt.blob.digest),
                "reason": failure.reason,
            },
        )
        if peer:
            self._neighbours.note(peer, failure)

    def note_hedge(self) -> None:
        """A second source is asked because the first makes no progress."""
        self._metrics.hedges.inc()

    def note_unleased(self, pieces: int) -> None:
        """So many pieces are read from the upstream without anybody's leave."""
        self._metrics.unleased_pieces.inc(pieces)

    async def prove(self, blob: ActiveBlob, piece: int, data: bytes) -> str | None:
        """Return what is wrong with *data* as a piece of a toc layout; None if it is proven."""
        in_thread = asyncio.get_running_loop().run_in_executor
        if piece == blob.layout.count - 1:
            return await in_thread(self._proofs, _tail_flaw, blob, data)
        toc = await self.toc_of(blob)
        return await in_thread(self._proofs, find_flaw, toc, blob.layout.range_of(piece), data)

    async def toc_of(self, blob: ActiveBlob) -> Toc:
        """Return the table of contents of a toc layout, read again if memory let go of it.

        Raises `BlobUnavailable` if that means fetching it, and nobody has it.
        """
        if blob.toc is None:
            tail = blob.layout.count - 1
            data: bytes | None = None
            if blob.stored and tail in blob.stored.held:
                with suppress(StoreError):
                    data = await blob.stored.read(blob.layout.range_of(tail))
            if data is None:
                result = await self.start(blob, [tail])[tail]
                data = result.data
            if data is None:  # stored in the meantime
                return await self.toc_of(blob)
            try:
                blob.toc = await asyncio.get_running_loop().run_in_executor(
                    self._proofs, _open_tail, blob, data
                )
            except FormatError as error:
                raise TocUnusable("store", str(error)) from error
        return blob.toc


class _Reception:
    """Where the pieces of one fetch go. *stores* owns their way to the disk."""

    def __init__(
        self,
        fetcher: Fetcher,
        futures: dict[int, asyncio.Future[PieceData]],
        stores: asyncio.TaskGroup,
    ) -> None:
        self._fetcher = fetcher
        self._futures = futures
        self._stores = stores
        self.note_failure = fetcher.note_failure
        self.note_hedge = fetcher.note_hedge
        self.note_unleased = fetcher.note_unleased

    async def accept(self, attempt: Attempt, piece: int, data: bytes) -> None:
        """Prove *data*, hand it to the readers, and store it. Raises `IntegrityError`."""
        blob, peer = attempt.blob, attempt.peer
        future = self._futures[piece]
        if future.done():
            return
        if blob.toc_digest:
            try:
                with attempt.held_up():
                    flaw = await self._fetcher.prove(blob, piece, data)
            except TocUnusable as error:  # nothing can be proven any more: not the source's fault
                if not future.done():
                    future.set_exception(_same(error))
                return
            if flaw:
                if peer is None:
                    # The same bytes twice: not an accident on the way, the TOC is wrong.
                    found = hashlib.sha256(data).digest()
                    if blob.upstream_flaws.get(piece) == found and not future.done():
                        future.set_exception(TocUnusable("upstream", flaw))
                    blob.upstream_flaws[piece] = found
                source = peer.name if peer else "upstream"
                raise IntegrityError(source, f"piece {piece}: {flaw}")
            state = PieceState.HELD_PEER if peer else PieceState.HELD_UPSTREAM
        else:
            state = PieceState.STAGED_PEER if peer else PieceState.STAGED_UPSTREAM
        if future.done():
            return  # another source was faster while this one was being proven
        if peer:
            blob.contributors[piece] = peer
        result = PieceData(data, Origin.PEER if peer else Origin.UPSTREAM)
        future.set_result(result)
        taken = attempt.release(len(data))
        # Not in the task: one that is cancelled before it began would give nothing back.
        keeping = self._stores.create_task(self._fetcher.keep(blob, piece, result, state))
        keeping.add_done_callback(lambda _: self._fetcher.let_go(result, taken))


def _same(error: Exception) -> Exception:
    """Return another exception of the same meaning: one object must not be raised twice."""
    if isinstance(error, TocUnusable):
        return TocUnusable(error.source, error.reason)
    assert isinstance(error, BlobUnavailable)
    return BlobUnavailable(error.what, missing=error.missing, reason=error.reason)


def _open_tail(blob: ActiveBlob, data: bytes) -> Toc:
    assert blob.toc_digest is not None
    return open_tail(data, size=blob.layout.size, expected=blob.toc_digest)


def _tail_flaw(blob: ActiveBlob, data: bytes) -> str | None:
    try:
        _open_tail(blob, data)
    except FormatError as error:
        return str(error)
    return None


def _is_shared(blob: ActiveBlob, piece: int, ask_peers: bool) -> bool:
    """Say whether there is a fetch of the piece that will do for another reader."""
    future = blob.inflight.get(piece)
    if future is None:
        return False
    if not future.done() or future.exception():
        return True
    result = future.result()
    if result.data is None and blob.state_of(piece) is PieceState.ABSENT:
        return False  # it was stored, and has been dropped since
    return ask_peers or result.origin is not Origin.PEER
