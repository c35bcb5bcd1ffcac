"""From a digest to a blob that can be read: its size, where it comes from, how it is cut.

The rule: the toc layout is used only with a table of contents that matches the digest in a
manifest which matched its own digest. Everything else is cut into fixed pieces.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Final

from p2pcache.core.claims import Cut
from p2pcache.core.errors import (
    BlobUnavailable,
    FormatError,
    IntegrityError,
    SourceError,
    SourceLacksBlob,
    StoreError,
    StoreFull,
)
from p2pcache.core.layout import Layout, PieceState
from p2pcache.core.model import MAX_BLOB_SIZE, BlobFacts, Digest, Repository
from p2pcache.core.ranges import ByteRange
from p2pcache.core.toc import FOOTER_PROBE_SIZE, Toc, find_footer, open_tail
from p2pcache.metrics import Metrics
from p2pcache.mirror.active import ActiveBlob
from p2pcache.mirror.obtaining import obtain
from p2pcache.ports import BlobStore, Memory, Neighbours, Peer, Upstream
from p2pcache.tasks import shared_future

logger = logging.getLogger(__name__)

# Blobs kept ready though nobody reads them; their tables of contents are the memory that counts.
_MAX_IDLE_BLOBS: Final = 256
_MAX_IDLE_MEMBERS: Final = 60_000

# The last bytes of a layer hold its footer, and of a small layer the whole table of contents.
_TAIL_GUESS: Final = 64 << 10


class Opener:
    """Opens blobs, and keeps the open ones. Concurrent callers share the work."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        store: BlobStore,
        memory: Memory,
        neighbours: Neighbours,
        upstream: Upstream,
        metrics: Metrics,
        proofs: ThreadPoolExecutor,
    ) -> None:
        self._tasks = tasks
        self._store = store
        self._memory = memory
        self._neighbours = neighbours
        self._upstream = upstream
        self._metrics = metrics
        self._proofs = proofs
        self._active: OrderedDict[Digest, ActiveBlob] = OrderedDict()
        self._opening: dict[Digest, asyncio.Future[ActiveBlob]] = {}
        self._unusable_tocs: OrderedDict[Digest, None] = OrderedDict()

    def under_way(self, digest: Digest) -> asyncio.Future[ActiveBlob] | None:
        """Return the end of an opening, if the blob is just being opened."""
        return self._opening.get(digest)

    def find(self, digest: Digest) -> ActiveBlob | None:
        """Return the blob if it is open and still of use."""
        blob = self._active.get(digest)
        if blob is None or self._is_outdated(blob):
            return None
        self._active.move_to_end(digest)
        return blob

    async def open(self, digest: Digest, repository: Repository | None) -> ActiveBlob:
        """Return the blob, found out about if need be. Raises `BlobUnavailable`.

        *repository* is where the client says that it is; one that manifests told of is used
        where the client says nothing.
        """
        blob = self.find(digest)
        if blob is None:
            opening = self._opening.get(digest)
            if opening is None:
                opening = shared_future()
                self._opening[digest] = opening
                self._tasks.create_task(self._open(digest, repository, opening))
            blob = await asyncio.shield(opening)
        if blob.repository is None:
            blob.repository = repository
        if blob.stored is None:  # there was no room; there may be now
            with suppress(StoreFull):
                blob.stored = await self._store.create(
                    digest, blob.layout, toc_digest=blob.toc_digest
                )
        return blob

    def forsake_toc(self, blob: ActiveBlob) -> None:
        """The blob cannot be proven by its table of contents: cut it into fixed pieces instead."""
        if blob.digest in self._unusable_tocs:
            return  # another reader came first, and may read it anew already
        self._metrics.layout_fallbacks.inc()
        logger.warning("toc.forsaken", extra={"digest": str(blob.digest)})
        self._note_unusable(blob.digest)
        self._active.pop(blob.digest, None)

    def _note_unusable(self, digest: Digest) -> None:
        self._unusable_tocs[digest] = None
        while len(self._unusable_tocs) > _MAX_IDLE_BLOBS:
            self._unusable_tocs.popitem(last=False)

    def _is_outdated(self, blob: ActiveBlob) -> bool:
        """The store has evicted or replaced it, or a manifest has told more about it."""
        if self._store.find(blob.digest) is not blob.stored and blob.stored is not None:
            return True
        return (
            blob.toc_digest is None
            and not blob.is_whole
            and self._toc_digest(self._memory.facts(blob.digest), blob.digest) is not None
        )

    def _toc_digest(self, facts: BlobFacts | None, digest: Digest) -> Digest | None:
        return facts.toc_digest if facts and digest not in self._unusable_tocs else None

    async def _open(
        self, digest: Digest, repository: Repository | None, done: asyncio.Future[ActiveBlob]
    ) -> None:
        try:
            facts = self._memory.facts(digest)
            if repository is None and facts and facts.repositories:
                repository = facts.repositories[0]
            blob = self._from_store(digest, repository, facts)
            if blob is None:
                blob = await self._find_out(digest, repository, facts)
            self._active[digest] = blob
            self._let_idle_go()
            done.set_result(blob)
        except (BlobUnavailable, StoreError) as error:
            if isinstance(error, StoreError):
                error = BlobUnavailable(str(digest), missing=False, reason=str(error))
            done.set_exception(error)
        except Exception:  # a bug ends here, logged, and the readers get an error
            logger.exception("open.broken", extra={"digest": str(digest)})
        finally:
            del self._opening[digest]
            if not done.done():
                done.set_exception(BlobUnavailable(str(digest), missing=False))

    def _from_store(
        self, digest: Digest, repository: Repository | None, facts: BlobFacts | None
    ) -> ActiveBlob | None:
        stored = self._store.find(digest)
        if stored is None:
            return None
        toc_digest = self._toc_digest(facts, digest)
        # Pieces proven by one table of contents outrank another image's claim of another one.
        proven = stored.toc_digest is not None and digest not in self._unusable_tocs and stored.held
        usable = proven or (
            stored.is_whole
            or stored.toc_digest == toc_digest
            or (facts is None and stored.toc_digest is not None)
        )
        if not usable:
            return None
        return ActiveBlob(digest, stored.layout, repository, stored, stored.toc_digest, None)

    async def _find_out(
        self, digest: Digest, repository: Repository | None, facts: BlobFacts | None
    ) -> ActiveBlob:
        toc_digest = self._toc_digest(facts, digest)
        if toc_digest and facts:
            try:
                return await self._open_with_toc(digest, repository, facts.size, toc_digest)
            except FormatError as error:
                logger.warning("toc.unusable", extra={"digest": str(digest), "reason": str(error)})
                self._metrics.layout_fallbacks.inc()
                self._note_unusable(digest)
        size = facts.size if facts else await self._size_of(digest, repository)
        if size > MAX_BLOB_SIZE:
            raise BlobUnavailable(str(digest), missing=True, reason=f"{size} bytes are too many")
        return await self._make(digest, Layout.fixed(size), repository, None)

    async def _size_of(self, digest: Digest, repository: Repository | None) -> int:
        """Return the size of a blob that no manifest told of.

        A peer's word is taken only if the upstream has none; if it is wrong, the whole will not
        match its digest.
        """
        error: SourceError = SourceLacksBlob("all peers", "not held, and its registry is unknown")
        if repository:
            try:
                return await self._upstream.blob_size(repository, digest)
            except SourceError as failure:
                error = failure
        for offer in await self._neighbours.find(digest, None):
            if offer.holding.is_whole:
                return offer.holding.size
        raise BlobUnavailable.because(str(digest), error)

    async def _open_with_toc(
        self,
        digest: Digest,
        repository: Repository | None,
        size: int,
        toc_digest: Digest,
    ) -> ActiveBlob:
        """Read and prove the table of contents: one node from the upstream, the others from it.

        Raises `FormatError` if it is what the manifest promises and yet of no use, or if the
        upstream serves another one.
        """
        tail = _Tail(digest, size, toc_digest)
        try:
            toc, data, state = await obtain(
                Cut.of_tail(digest, toc_digest),
                self._neighbours,
                self._metrics,
                lambda peer: self._tail_from_peer(tail, peer),
                lambda: self._proven_from_upstream(tail, repository),
            )
        except BlobUnavailable:
            found = await self._ask_around(tail)
            if found is None:
                raise
            toc, data, state = found
        layout = toc.layout()
        blob = await self._make(digest, layout, repository, toc_digest)
        blob.toc = toc
        if blob.stored:
            try:
                await blob.stored.write(layout.count - 1, data, state)
            except StoreFull:
                self._metrics.unstored_pieces.inc()
        return blob

    async def _ask_around(self, tail: _Tail) -> _ProvenTail | None:
        """Find a peer that nobody told of, while the upstream fails."""
        for offer in await self._neighbours.find(tail.digest, None):
            if offer.holding.toc_digest not in (None, tail.toc_digest):
                continue  # it was told of another table of contents: no lie, but no help
            try:
                found = await self._tail_from_peer(tail, offer.peer, offer.holding.toc_offset)
            except SourceError as error:
                self._neighbours.note(offer.peer, error)
            else:
                if found is not None:
                    return found
        return None

    async def _tail_from_peer(
        self, tail: _Tail, peer: Peer, offset: int | None = None
    ) -> _ProvenTail | None:
        """Read the table of contents from a peer; from *offset* on if it said where it starts."""
        if offset is None:
            data = await peer.tail(tail.digest, tail.toc_digest)
            if data is None:
                return None
        else:
            data = await _collect(peer.read(tail.digest, ByteRange(offset, tail.size)))
        try:
            return await self._prove_tail(data, tail), data, PieceState.HELD_PEER
        except FormatError as error:
            reason = f"table of contents of {tail.digest}: {error}"
            raise IntegrityError(peer.name, reason) from error

    async def _proven_from_upstream(
        self, tail: _Tail, repository: Repository | None
    ) -> _ProvenTail:
        data = await self._tail_from_upstream(tail.digest, repository, tail.size)
        try:
            toc = await self._prove_tail(data, tail)
        except FormatError:
            # The same bytes twice: not an accident on the way, the image is wrong.
            again = await self._tail_from_upstream(tail.digest, repository, tail.size)
            if again == data:
                raise
            data = again
            toc = await self._prove_tail(data, tail)
        return toc, data, PieceState.HELD_UPSTREAM

    async def _prove_tail(self, data: bytes, tail: _Tail) -> Toc:
        return await asyncio.get_running_loop().run_in_executor(
            self._proofs, lambda: open_tail(data, size=tail.size, expected=tail.toc_digest)
        )

    async def _tail_from_upstream(
        self, digest: Digest, repository: Repository | None, size: int
    ) -> bytes:
        if repository is None:
            raise BlobUnavailable(str(digest), missing=True, reason="its registry is unknown")
        guess = max(0, size - max(_TAIL_GUESS, FOOTER_PROBE_SIZE))
        try:
            end = await _collect(
                self._upstream.read(repository, digest, ByteRange(guess, size), size)
            )
            start = find_footer(end[-FOOTER_PROBE_SIZE:], size).tail.start
            if start >= guess:
                return end[start - guess :]
            rest = await _collect(
                self._upstream.read(repository, digest, ByteRange(start, guess), size)
            )
        except SourceError as error:
            raise BlobUnavailable.because(str(digest), error) from error
        return rest + end

    async def _make(
        self,
        digest: Digest,
        layout: Layout,
        repository: Repository | None,
        toc_digest: Digest | None,
    ) -> ActiveBlob:
        try:
            stored = await self._store.create(digest, layout, toc_digest=toc_digest)
        except StoreFull:
            self._metrics.unstored_pieces.inc()
            stored = None
        return ActiveBlob(digest, layout, repository, stored, toc_digest, None)

    def _let_idle_go(self) -> None:
        """Forget idle blobs, the longest unused first; those that are being read stay."""
        members = sum(blob.toc.member_count for blob in self._active.values() if blob.toc)
        for digest, blob in list(self._active.items())[:-1]:
            if len(self._active) <= _MAX_IDLE_BLOBS and members <= _MAX_IDLE_MEMBERS:
                return
            if not blob.readers and not blob.inflight and blob.assembly is None:
                members -= blob.toc.member_count if blob.toc else 0
                del self._active[digest]


@dataclass(frozen=True, slots=True)
class _Tail:
    """A table of contents that is looked for."""

    digest: Digest
    """Of the blob whose end it is."""
    size: int
    """Of that blob."""
    toc_digest: Digest


_ProvenTail = tuple[Toc, bytes, PieceState]


async def _collect(blocks: AsyncGenerator[bytes, None]) -> bytes:
    async with aclosing(blocks):
        return b"".join([block async for block in blocks])
