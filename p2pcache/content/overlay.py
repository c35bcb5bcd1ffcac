"""The store with a content store's blobs laid over it.

The rule: what containerd has is served from there and not kept twice. A copy of our own is let go
of, but only when containerd has had the blob for a while: with ``discard_unpacked_layers`` it
throws a layer away as soon as it is unpacked, and ours may be the last copy around.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Final, Protocol, Self

from p2pcache.content.content import Content
from p2pcache.core.layout import Layout, LayoutKind
from p2pcache.core.model import Digest
from p2pcache.ports import StoredBlob
from p2pcache.tasks import cancelled_at_exit

logger = logging.getLogger(__name__)

# Longer than unpacking a large layer takes on a slow disk.
REDUNDANT_AFTER_S: Final = 600.0
_TIDY_EVERY_S: Final = 30.0
# Each is an unlink and a commit: pulls that run at the same time need the disk more.
_DROPS_AT_ONCE: Final = 16


class OwnBlob(StoredBlob, Protocol):
    """A blob in our own store."""

    pins: int
    """Above zero while somebody reads or writes it."""


class OwnStore(Protocol):
    """Our own store, as far as it matters here: a `BlobStore`."""

    @property
    def is_writer(self) -> bool:
        """This process may change it."""

    def find(self, digest: Digest) -> OwnBlob | None:
        """Return what is stored of a blob."""

    async def create(
        self, digest: Digest, layout: Layout, *, toc_digest: Digest | None = None
    ) -> OwnBlob:
        """Return the blob, made if needed. Raises `StoreFull`."""

    async def forget(self, digest: Digest) -> None:
        """Drop all of a blob."""


class Overlay:
    """A `BlobStore`: *content* where it has a blob, else *store*. An async context manager."""

    def __init__(
        self,
        store: OwnStore,
        content: Content,
        *,
        clock: Callable[[], float] | None = None,
        redundant_after_s: float = REDUNDANT_AFTER_S,
    ) -> None:
        self._store = store
        self._content = content
        self._clock = clock or content.clock
        self._redundant_after_s = redundant_after_s

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as resources:
            tasks = await resources.enter_async_context(cancelled_at_exit())
            tasks.create_task(self._tidy_often(), name="content-tidy")
            self._resources = resources.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._resources.__aexit__(kind, error, trace)

    def find(self, digest: Digest) -> StoredBlob | None:
        """Return what is stored of a blob, here or there."""
        return self._content.find(digest) or self._store.find(digest)

    async def create(
        self, digest: Digest, layout: Layout, *, toc_digest: Digest | None = None
    ) -> StoredBlob:
        """Return the blob, made if needed; one with another layout is replaced.

        A blob in the content store is cut into fixed pieces: who expects another layout gets one
        of our own, to go on with until it is looked for again. Raises `StoreFull`.
        """
        if layout.kind is LayoutKind.FIXED:
            blob = await self._content.settle(digest)
            if blob is not None and blob.layout.size == layout.size:
                return blob
        return await self._store.create(digest, layout, toc_digest=toc_digest)

    async def forget(self, digest: Digest) -> None:
        """Drop all that our own store has of a blob. An absent one is no error."""
        await self._store.forget(digest)

    async def tidy(self) -> int:
        """Let go of some copies that nobody uses, as the content store has them too: how many."""
        dropped = 0
        before = self._clock() - self._redundant_after_s
        for blob in self._content.blobs():
            if dropped >= _DROPS_AT_ONCE or not self._store.is_writer:
                break
            if blob.since > before or blob.is_gone:
                continue
            copy = self._store.find(blob.digest)
            if copy is not None and not copy.pins:
                await self._store.forget(blob.digest)
                dropped += 1
        return dropped

    async def _tidy_often(self) -> None:
        while True:
            await asyncio.sleep(_TIDY_EVERY_S)
            try:
                await self.tidy()
            except Exception:  # a bug ends here, logged: copies are kept for longer
                logger.exception("content.tidy.broken")
