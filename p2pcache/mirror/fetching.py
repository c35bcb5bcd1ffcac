"""Getting pieces: from peers first, the upstream last, one fetch however many readers wait.

Hides the choice of sources, hedging, proof, and storing. The rules it keeps: a piece from a peer
becomes readable only when proven or when the whole blob is; a fetch belongs to the mirror and not
to a reader, so that a reader who leaves cancels nothing; every reader's wait ends, with bytes or
with an error.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from typing import Final

from p2pcache.core.errors import (
    BlobUnavailable,
    FormatError,
    IntegrityError,
    SourceError,
    SourceLacksBlob,
    SourceUnavailable,
    StoreError,
)
from p2pcache.core.layout import PieceMask, PieceState
from p2pcache.core.plan import Run, assign
from p2pcache.core.proof import find_flaw
from p2pcache.core.ranges import ByteRange
from p2pcache.core.toc import Toc, open_tail
from p2pcache.metrics import Metrics
from p2pcache.mirror.active import ActiveBlob, Origin, PieceData, TocUnusable, usable_mask
from p2pcache.mirror.budget import ByteBudget
from p2pcache.mirror.race import Race
from p2pcache.ports import Neighbours, Peer, Upstream
from p2pcache.tasks import shared_future

logger = logging.getLogger(__name__)

# A client that waits is a container that waits: a source that sends nothing for so long is
# overtaken by another one. Peers say themselves how fast they usually are.
UPSTREAM_HEDGE_S: Final = 1.5
# But the upstream is only asked over a peer's head when that peer does more than hiccup: a busy
# machine's is often 50 ms late, and each time the registry would be read as if there were no peers.
MIN_STALL_BEFORE_UPSTREAM_S: Final = 0.25
# Fewer bytes than this are not progress: a source that drips is overtaken like one that stalls.
PROGRESS_BYTES: Final = 16 << 10
# Sources that read the same pieces at once, each because the ones before it had stalled.
_MAX_RIVALS: Final = 3
# What a peer may take for a run. A neighbour slower than this is no help.
_PEER_RUN_S: Final = 3.0
_SLOWEST_PEER: Final = 1 << 20
# A peer that was overtaken after so long a silence has failed rather than been slow.
STUCK_S: Final = 0.5

# While all sources fail, a blob that a container may already live on is worth more patience than
# one that a client could still get elsewhere. Both stay well below the 30 s after which
# stargz-snapshotter gives a read up.
PATIENCE_S: Final = 12.0
SHORT_PATIENCE_S: Final = 1.0
_FIRST_RETRY_S: Final = 0.1
_MAX_RETRY_S: Final = 2.0

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
        self._upstream = upstream
        self._metrics = metrics
        self._proofs = proofs
        self._budget = ByteBudget(MAX_BYTES_IN_FLIGHT)
        self.on_complete: Callable[[ActiveBlob], None] = lambda blob: None
        """Called when the last piece of a blob has been stored."""

    def start(
        self, blob: ActiveBlob, pieces: Sequence[int], *, ask_peers: bool = True
    ) -> dict[int, asyncio.Future[PieceData]]:
        """See to it that the absent *pieces* are being fetched; return what to wait for.

        Futures end with the piece, with `BlobUnavailable`, or with `TocUnusable`. With
        *ask_peers* off a new fetch goes to the upstream alone; one under way is shared whoever
        it asks, so look at the origin. One that a peer has ended is not shared then.
        """
        missing = [p for p in pieces if not _is_shared(blob.inflight.get(p), ask_peers)]
        for piece in missing:
            future: asyncio.Future[PieceData] = shared_future()
            blob.inflight[piece] = future
        if missing:
            self._tasks.create_task(self._fetch(blob, missing, ask_peers))
        return {piece: blob.inflight[piece] for piece in pieces}

    async def _fetch(self, blob: ActiveBlob, pieces: list[int], ask_peers: bool) -> None:
        """Fetch *pieces*, again and again within the patience that the blob deserves."""
        futures = {piece: blob.inflight[piece] for piece in pieces}
        loop = asyncio.get_running_loop()
        patience = PATIENCE_S if blob.stored and len(blob.stored.held) else SHORT_PATIENCE_S
        deadline = loop.time() + patience
        delay = _FIRST_RETRY_S
        try:
            if blob.toc_digest and pieces != [blob.layout.count - 1]:
                await self.toc_of(blob)  # before any memory is claimed: its fetch claims some too
            while True:
                failures = await self._fetch_once(blob, pieces, ask_peers)
                pieces = [piece for piece in pieces if not futures[piece].done()]
                if not pieces:
                    return
                hopeless = all(failure.is_final for failure in failures)
                if hopeless or loop.time() + delay > deadline:
                    for piece in pieces:
                        futures[piece].set_exception(
                            BlobUnavailable.because(str(blob.digest), *failures)
                        )
                    return
                await asyncio.sleep(delay)
                delay = min(2 * delay, _MAX_RETRY_S)
        except TocUnusable as error:
            for future in futures.values():
                if not future.done():
                    future.set_exception(TocUnusable(error.source, error.reason))
        except BlobUnavailable as error:
            logger.info("toc.unavailable", extra={"digest": str(blob.digest), "reason": str(error)})
        except Exception:  # the one place where a bug in a fetch ends, and it is logged
            logger.exception("fetch.broken", extra={"digest": str(blob.digest)})
        finally:
            for piece, future in futures.items():
                if blob.inflight.get(piece) is future:
                    del blob.inflight[piece]
                if not future.done():
                    future.set_exception(
                        BlobUnavailable(str(blob.digest), missing=False, reason="stopping")
                    )

    async def _fetch_once(
        self, blob: ActiveBlob, pieces: list[int], ask_peers: bool
    ) -> list[SourceError]:
        """Ask every source once for what is missing; return why some of them failed."""
        holders: list[tuple[Peer, PieceMask]] = []
        if ask_peers:
            wanted = PieceMask.of(blob.layout.count, pieces)
            offers = await self._neighbours.find(blob.digest, wanted)
            holders = [(offer.peer, mask) for offer in offers if (mask := usable_mask(offer, blob))]
        failures: list[SourceError] = []
        async with asyncio.TaskGroup() as runs:
            for run in assign(pieces, blob.layout, holders):
                runs.create_task(self._fetch_run(blob, run, failures))
        if not failures:
            failures.append(SourceLacksBlob("all peers", "no source holds it"))
        return failures

    async def _fetch_run(
        self, blob: ActiveBlob, run: Run[Peer], failures: list[SourceError]
    ) -> None:
        """Ask the sources of *run* in turn; one that makes no progress is overtaken."""
        taken = await self._budget.acquire(len(blob.layout.span(run.pieces)))
        race = Race(blob, run)
        sources = [*run.peers, None] if blob.repository else list(run.peers)
        try:
            async with asyncio.TaskGroup() as tasks:
                running: set[asyncio.Task[None]] = set()
                while not race.is_over:
                    running = {task for task in running if not task.done()}
                    if sources:
                        race.patience_s = 0.0 if sources[0] else MIN_STALL_BEFORE_UPSTREAM_S
                    if len(running) < _MAX_RIVALS and sources and (not running or race.is_stalled):
                        if running:
                            self._metrics.hedges.inc()
                        attempt = self._attempt(race, sources.pop(0), tasks, failures)
                        running.add(tasks.create_task(attempt))
                    elif not running:
                        break
                    await race.wait_for_news()
                for task in running:
                    task.cancel()
        finally:
            self._budget.release(taken)

    async def _attempt(
        self,
        race: Race,
        peer: Peer | None,
        stores: asyncio.TaskGroup,
        failures: list[SourceError],
    ) -> None:
        """Read the rest of a run from one source, the upstream if *peer* is None."""
        source, label = (peer.name, "peer") if peer else ("upstream", "upstream")
        size = len(race.blob.layout.span(race.open_pieces() or range(1)))
        limit_s = _PEER_RUN_S + size / _SLOWEST_PEER if peer else None
        try:
            try:
                async with asyncio.timeout(limit_s):
                    await self._read_run(race, peer, stores)
            except TimeoutError as late:
                raise SourceUnavailable(source, f"not done within {limit_s:.1f} s") from late
            except BlobUnavailable as lacking:  # the table of contents, to prove a piece with
                raise SourceUnavailable(source, str(lacking)) from lacking
        except SourceError as error:
            failures.append(error)
            reason = type(error).__name__
            self._metrics.source_failures.labels(label, reason).inc()
            logger.info(
                "source.failed",
                extra={"source": source, "digest": str(race.blob.digest), "reason": error.reason},
            )
            if peer:
                self._neighbours.note(peer, error)
        finally:
            race.tell()

    async def _read_run(self, race: Race, peer: Peer | None, stores: asyncio.TaskGroup) -> None:
        blob = race.blob
        pieces = race.open_pieces()
        if not pieces:
            return
        started = time.perf_counter()
        is_silent = True
        uncredited = 0
        race.expect(peer.hedge_after_s if peer else UPSTREAM_HEDGE_S)
        part = blob.layout.span(pieces)
        buffer = bytearray()
        waiting = iter(pieces)
        piece = next(waiting)
        size = len(blob.layout.range_of(piece))
        try:
            async with aclosing(self._read(blob, peer, part)) as blocks:
                async for block in blocks:
                    if peer and is_silent:
                        self._neighbours.note(peer, time.perf_counter() - started)
                    uncredited += len(block)
                    if is_silent or uncredited >= PROGRESS_BYTES:
                        race.tell(progress=True)
                        uncredited = 0
                    is_silent = False
                    buffer += block
                    while len(buffer) >= size:
                        data = bytes(memoryview(buffer)[:size])
                        del buffer[:size]
                        await self._accept(race, piece, data, peer, stores)
                        if race.is_over or (piece := next(waiting, -1)) < 0:
                            return
                        size = len(blob.layout.range_of(piece))
        except asyncio.CancelledError:
            # Overtaken before it said anything. What is not counted is not learned from: a slow
            # peer would be hedged each time, and one that hangs would be asked for ever.
            if peer and is_silent:
                silent_s = time.perf_counter() - started
                stuck = SourceUnavailable(peer.name, f"silent for {silent_s:.2f} s")
                self._neighbours.note(peer, stuck if silent_s >= STUCK_S else silent_s)
            raise

    def _read(
        self, blob: ActiveBlob, peer: Peer | None, part: ByteRange
    ) -> AsyncGenerator[bytes, None]:
        if peer:
            return peer.read(blob.digest, part)
        assert blob.repository is not None
        return self._upstream.read(blob.repository, blob.digest, part, blob.layout.size)

    async def _accept(
        self,
        race: Race,
        piece: int,
        data: bytes,
        peer: Peer | None,
        stores: asyncio.TaskGroup,
    ) -> None:
        """Prove *data*, hand it to the readers, and store it. Raises `IntegrityError`."""
        blob = race.blob
        future = blob.inflight.get(piece)
        if future is None or future.done():
            return
        if blob.toc_digest:
            with race.proving():
                flaw = await self.prove(blob, piece, data)
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
        race.tell(progress=True)
        stores.create_task(self._keep(blob, piece, result, state))

    async def _keep(
        self, blob: ActiveBlob, piece: int, result: PieceData, state: PieceState
    ) -> None:
        """Store a piece. Its memory is let go then: readers find it on disk."""
        if blob.stored is None or result.data is None:
            result.kept.set_result(False)
            return
        try:
            await blob.stored.write(piece, result.data, state)
        except StoreError as error:
            self._metrics.unstored_pieces.inc()
            logger.debug("store.refused", extra={"reason": str(error)})
            result.kept.set_result(False)
            return
        result.data = None
        result.kept.set_result(True)
        if blob.stored and blob.stored.is_complete:
            self.on_complete(blob)

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


def _open_tail(blob: ActiveBlob, data: bytes) -> Toc:
    assert blob.toc_digest is not None
    return open_tail(data, size=blob.layout.size, expected=blob.toc_digest)


def _tail_flaw(blob: ActiveBlob, data: bytes) -> str | None:
    try:
        _open_tail(blob, data)
    except FormatError as error:
        return str(error)
    return None


def _is_shared(future: asyncio.Future[PieceData] | None, ask_peers: bool) -> bool:
    """Say whether a fetch will do for another reader."""
    if future is None or ask_peers or not future.done() or future.exception():
        return future is not None
    return future.result().origin is not Origin.PEER
