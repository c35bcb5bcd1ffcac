"""What the HTTP side calls: manifests, tags, blobs, as values and streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, nullcontext, suppress

from p2pcache.core.bounds import HOLD_S
from p2pcache.core.errors import BlobUnavailable, SourceError, SourceLacksBlob, StoreError
from p2pcache.core.layout import LayoutKind
from p2pcache.core.model import BlobFacts, Digest, Manifest, Repository
from p2pcache.core.ranges import ByteRange
from p2pcache.metrics import Metrics
from p2pcache.mirror.active import ActiveBlob, Origin, TocUnusable, cut_of, given_pieces
from p2pcache.mirror.fetching import Fetcher
from p2pcache.mirror.gathering import Gatherer
from p2pcache.mirror.manifests import Manifests
from p2pcache.mirror.opening import Opener
from p2pcache.mirror.reading import Reader, Segment
from p2pcache.ports import BlobStore, Forwarded, Memory, Neighbours, StoredBlob, Upstream


class Mirror:
    """One node's reads. Fetches belong to *tasks*: they outlive the readers that began them."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        store: BlobStore,
        memory: Memory,
        neighbours: Neighbours,
        upstream: Upstream,
        metrics: Metrics,
        proofs: ThreadPoolExecutor,
        *,
        tag_max_age_s: float,
        now: Callable[[], float],
    ) -> None:
        self.manifests = Manifests(
            tasks, memory, neighbours, upstream, metrics, tag_max_age_s=tag_max_age_s, now=now
        )
        self._store = store
        self._memory = memory
        self._neighbours = neighbours
        self._upstream = upstream
        self._opener = Opener(tasks, store, memory, neighbours, upstream, metrics, proofs)
        self._fetcher = Fetcher(tasks, neighbours, upstream, metrics, proofs)
        gatherer = Gatherer(tasks, self._fetcher, neighbours)
        self._reader = Reader(self._fetcher, gatherer, neighbours, upstream, metrics)
        self._fetcher.on_complete = gatherer.confirm

    def facts(self, digest: Digest) -> BlobFacts | None:
        """What manifests said of a blob."""
        return self._memory.facts(digest)

    async def size_of(self, digest: Digest, repository: Repository | None) -> int:
        """Return the size of a blob that can be served. Raises `BlobUnavailable`."""
        stored = self._store.find(digest)
        if stored is not None and stored.held:
            return stored.layout.size
        facts = self._memory.facts(digest)
        # Nothing here yet: a client that is told 200 stays with this mirror for good, so make
        # sure that somebody has it before saying so.
        if repository is None and facts and facts.repositories:
            repository = facts.repositories[0]
        error: SourceError = SourceLacksBlob("upstream", "the registry is unknown")
        if repository is not None:
            try:
                return await self._upstream.blob_size(repository, digest)
            except SourceError as failure:
                error = failure
        if await self._neighbours.find(digest, None):
            return (await self._opener.open(digest, repository)).layout.size
        raise BlobUnavailable.because(str(digest), error)

    async def forward(
        self,
        repository: Repository,
        kind: str,
        query: Sequence[tuple[str, str]],
        accept: Sequence[str],
    ) -> Forwarded:
        """Return the upstream's answer to ``tags/list`` or ``referrers/DIGEST``.

        Raises `BlobUnavailable`.
        """
        try:
            return await self._upstream.forward(repository, kind, query, accept)
        except SourceError as error:
            raise BlobUnavailable.because(str(repository), error) from error

    # -- what peers ask for (`p2pcache.ports.Giver`) ------------------------------------------

    def will_give(self, digest: Digest, cut: str, pieces: range) -> bool:
        """Say whether this node has or is fetching all of these consecutive pieces."""
        blob = self._opener.find(digest)
        if blob is None or blob.cut.name != cut:
            stored = self._stored(digest, cut)
            return stored is not None and given_pieces(stored).covers(pieces)
        if pieces.stop > blob.layout.count:
            return False
        given = blob.given
        return all(piece in given or piece in blob.inflight for piece in pieces)

    async def piece(self, digest: Digest, cut: str, piece: int) -> bytes | None:
        """Return a piece once it is here and may be given on; None if that does not happen soon."""
        blob = self._opener.find(digest)
        if blob is not None and blob.cut.name == cut and piece not in blob.given:
            fetch = blob.inflight.get(piece)
            if fetch is None:
                return None
            try:
                async with asyncio.timeout(HOLD_S):
                    result = await asyncio.shield(fetch)
            except (TimeoutError, BlobUnavailable, TocUnusable):
                return None
            if result.data is not None:
                is_proven = blob.layout.kind is LayoutKind.TOC
                return result.data if is_proven or result.origin is Origin.UPSTREAM else None
        stored = self._stored(digest, cut)
        if stored is None or piece not in given_pieces(stored):
            return None
        with suppress(StoreError):
            return await stored.read(stored.layout.range_of(piece), staged=True)
        return None

    def _stored(self, digest: Digest, cut: str) -> StoredBlob | None:
        """What the store has of a blob that is cut so, whether it is being read now or not."""
        stored = self._store.find(digest)
        return stored if stored is not None and cut_of(stored).name == cut else None

    async def tail(self, digest: Digest, toc_digest: Digest) -> bytes | None:
        """Return the table of contents with what follows it, waiting for it if need be."""
        opening = self._opener.under_way(digest)
        if opening is not None:
            with suppress(TimeoutError, BlobUnavailable):
                async with asyncio.timeout(HOLD_S):
                    await asyncio.shield(opening)
        stored = self._store.find(digest)
        if stored is None or stored.toc_digest != toc_digest:
            return None
        last = stored.layout.count - 1
        if last not in stored.held:
            return None
        with suppress(StoreError):
            return await stored.read(stored.layout.range_of(last))
        return None

    async def manifest(self, digest: Digest) -> Manifest | None:
        """Return a manifest, waiting for it if it is being fetched."""
        fetch = self.manifests.under_way(digest)
        if fetch is None:
            return await self._memory.manifest(digest)
        with suppress(TimeoutError, BlobUnavailable):
            async with asyncio.timeout(HOLD_S):
                return await asyncio.shield(fetch)
        return None

    @asynccontextmanager
    async def open(self, digest: Digest, repository: Repository | None) -> AsyncIterator[OpenBlob]:
        """Open a blob for one answer. Raises `BlobUnavailable`."""
        blob = await self._opener.open(digest, repository)
        blob.readers += 1
        try:
            with blob.stored.reading() if blob.stored else nullcontext():
                yield OpenBlob(blob, self._opener, self._reader)
        finally:
            blob.readers -= 1


class OpenBlob:
    """A blob while one answer is made from it."""

    def __init__(self, blob: ActiveBlob, opener: Opener, reader: Reader) -> None:
        self._blob = blob
        self._opener = opener
        self._reader = reader

    @property
    def size(self) -> int:
        """In bytes."""
        return self._blob.layout.size

    @property
    def is_whole(self) -> bool:
        """It is stored, and its own digest matched."""
        return self._blob.is_whole

    def file_now(self, start: int, stop: int) -> int | None:
        """Return a descriptor to send held bytes from; see `StoredBlob.file_held_now`."""
        stored = self._blob.stored
        return stored.file_held_now(start, stop) if stored and stored.is_whole else None

    async def read(
        self, parts: Sequence[ByteRange], *, exact: bool
    ) -> AsyncGenerator[Segment, None]:
        """Yield the bytes of *parts* in order; see `Reader.read`. Raises `BlobUnavailable`."""
        served = 0
        try:
            async with aclosing(self._reader.read(self._blob, parts, exact=exact)) as segments:
                async for segment in segments:
                    served += len(segment.data)
                    yield segment
            return
        except TocUnusable:
            self._opener.forsake_toc(self._blob)
        # What was served is right whatever the table of contents says: go on where that ended.
        rest = _after(parts, served)
        self._blob = await self._opener.open(self._blob.digest, self._blob.repository)
        async with aclosing(self._reader.read(self._blob, rest, exact=exact)) as segments:
            async for segment in segments:
                yield segment


def _after(parts: Sequence[ByteRange], served: int) -> list[ByteRange]:
    """Return what is left of *parts* once their first *served* bytes have gone out."""
    rest: list[ByteRange] = []
    for part in parts:
        skipped = min(served, len(part))
        served -= skipped
        if skipped < len(part):
            rest.append(ByteRange(part.start + skipped, part.stop))
    return rest
