"""The store: which blobs there are, the budget and eviction.

Hides who has to go. The rules: nothing that is read or written is evicted, and of the rest what was
used longest ago goes first; bytes count from before they are written until nobody can find them.
"""

from __future__ import annotations

import logging
import os
import time
from array import array
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from p2pcache.core.errors import StoreFull
from p2pcache.core.layout import Layout, LayoutKind
from p2pcache.core.model import Digest
from p2pcache.store.blobs import READ_NOW_LIMIT, StoredBlob
from p2pcache.store.catalog import BlobRecord, Catalog, Contents
from p2pcache.store.disk import Disk, committed
from p2pcache.store.memory import ImageMemory
from p2pcache.store.writer import Job, Row

logger = logging.getLogger(__name__)

# Each blob costs an inode and some memory, however small it is.
MAX_BLOBS: Final = 1 << 17
MAX_OPEN_FILES: Final = 512
# Manifests may take this part of the budget.
_MANIFEST_SHARE: Final = 8


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What the store has and has done since it was opened."""

    held_pieces: int
    evicted_blobs: int
    evicted_bytes: int
    rotten_pieces: int


class Store:
    """Blobs on disk within *budget* bytes, and `memory`. An async context manager.

    All methods belong to the event loop that opened it.
    """

    def __init__(
        self,
        root: Path,
        budget: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_open_files: int = MAX_OPEN_FILES,
        max_blobs: int = MAX_BLOBS,
    ) -> None:
        self.budget = budget
        self.clock = clock
        self.disk = Disk(root, self)
        self.scratch = memoryview(bytearray(READ_NOW_LIMIT))
        # Absent where there is no Linux: rather wait for a disk than hop threads for every read.
        self.read_flags: int = getattr(os, "RWF_NOWAIT", 0)
        self.on_change: Callable[[StoredBlob], None] = lambda blob: None
        """Called on the event loop, when a blob has left the store or lost some of its pieces."""
        self.memory = ImageMemory(self.disk.persist, manifest_bytes=budget // _MANIFEST_SHARE)
        self._max_open_files = max_open_files
        self._max_blobs = max_blobs
        self._blobs: dict[Digest, StoredBlob] = {}
        self._pinned: set[StoredBlob] = set()
        self._open: set[StoredBlob] = set()
        # Eviction candidates, the least recently used last, as of when the list was made.
        self._candidates: list[tuple[float, StoredBlob]] = []
        self._room = 0
        # Added to a use, as the clock has it, this orders uses over restarts.
        self._use_offset = 0.0
        self._uses_saved_at = float("-inf")
        self._evicted_blobs = self._evicted_bytes = self._rotten_pieces = 0

    async def __aenter__(self) -> Self:
        await self.disk.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self.disk.__aexit__(kind, error, trace)
        finally:
            for blob in self._open:
                blob.close_file()
            self._open.clear()

    def find(self, digest: Digest) -> StoredBlob | None:
        """Return what is stored of a blob."""
        return self._blobs.get(digest)

    def blobs(self) -> list[StoredBlob]:
        """All blobs: a copy, so that it may be walked at leisure."""
        return list(self._blobs.values())

    async def create(
        self, digest: Digest, layout: Layout, *, toc_digest: Digest | None = None
    ) -> StoredBlob:
        """Return the blob, made if needed; one with another layout is replaced.

        Raises `StoreFull`.
        """
        await self.disk.admit()
        try:
            while (old := self._blobs.get(digest)) is not None:
                if _fits(old, layout, toc_digest):
                    self.disk.leave()
                    return old
                self.disk.require_writer()
                await self.forget(digest)
            self.disk.require_writer()
            if len(self._blobs) >= self._max_blobs:
                self._evict_one()
        except BaseException:
            self.disk.leave()
            raise
        row = self.disk.next_row()
        blob = StoredBlob(
            self,
            Row(row, is_open=False),
            BlobRecord(
                row,
                digest,
                Layout(layout.kind, layout.size, array("Q", layout.starts)),
                toc_digest,
                False,
                self.clock(),
                array("Q", bytes(8 * layout.count)),
                bytearray(layout.count),
            ),
        )
        self._blobs[digest] = blob
        blob.pin()
        await committed(self.disk.submit(self._create_job(blob)))
        return blob

    def _create_job(self, blob: StoredBlob) -> Job:
        row, used = blob.row, blob.last_used + self._use_offset

        def run(catalog: Catalog) -> None:
            catalog.add_blob(row.number, blob.digest, blob.layout, blob.toc_digest, used)

        def cleanup(error: StoreFull | None) -> None:
            if error is None:
                self.disk.files.create(blob.digest)
                row.is_open = True

        def settle(error: StoreFull | None) -> None:
            blob.unpin()
            self.disk.leave()
            if error is not None and not blob.is_gone:
                del self._blobs[blob.digest]
                self._let_go(blob)

        return Job(run, settle, cleanup)

    async def forget(self, digest: Digest) -> None:
        """Drop all of a blob, even while it is read. An absent one is no error."""
        blob = self._blobs.pop(digest, None)
        if blob is None:
            return
        self._let_go(blob)
        if self.is_writer:
            try:
                await committed(self.disk.submit(self._remove_job([blob])))
            except StoreFull as error:
                # The file is gone all the same, and a row without one is dropped at the next open.
                logger.debug("store.forget.uncommitted", extra={"reason": str(error)})

    @property
    def blob_count(self) -> int:
        """How many blobs the store knows, with or without pieces."""
        return len(self._blobs)

    @property
    def used(self) -> int:
        """The bytes that count against the budget."""
        return self._room + self.memory.manifest_bytes

    def stats(self) -> StoreStats:
        """Counts for metrics and status. Takes time in proportion to the number of blobs."""
        return StoreStats(
            held_pieces=sum(len(blob.held) for blob in self._blobs.values()),
            evicted_blobs=self._evicted_blobs,
            evicted_bytes=self._evicted_bytes,
            rotten_pieces=self._rotten_pieces,
        )

    # Hand-over

    @property
    def is_writer(self) -> bool:
        """This process has the lock, and the catalogue is open for writing."""
        return self.disk.is_writer

    async def until_writer(self) -> None:
        """Wait until this process writes the store. The caller bounds the wait."""
        await self.disk.until_writer()

    def release_writer(self) -> None:
        """Let another process write: give up the lock as soon as what is queued is committed.

        For a process that begins to drain. Reads go on; writes raise `StoreFull`.
        """
        self.disk.release()

    def adopt(self, contents: Contents) -> None:
        """Make the blobs in memory those of *contents*, keeping what others refer to."""
        now = self.clock()
        self._use_offset = max((record.used for record in contents.blobs), default=now) - now
        found: dict[Digest, StoredBlob] = {}
        for record in contents.blobs:
            record.used -= self._use_offset
            blob = self._blobs.get(record.digest)
            if blob is not None and blob.row.number == record.row:
                blob.refresh(record)
            else:
                blob = StoredBlob(self, Row(record.row, is_open=True), record)
            found[record.digest] = blob
        before, self._blobs = self._blobs, found
        for digest, blob in before.items():
            if found.get(digest) is not blob:
                self._let_go(blob)
        self._room = sum(blob.room for blob in found.values())
        self.memory.absorb(contents)
        if self.is_writer:
            # What is being read stays for now: the next write makes room.
            if self.used > self.budget:
                with suppress(StoreFull):
                    self._evict(self.used - self.budget)
            logger.info("store.open", extra={"blobs": len(self._blobs), "used": self.used})

    def save_uses(self) -> None:
        """Commit when blobs were used, as far as that is news."""
        since, self._uses_saved_at = self._uses_saved_at, self.clock()
        uses = [
            (blob.last_used + self._use_offset, blob.row.number)
            for blob in self._blobs.values()
            if blob.last_used >= since
        ]
        if uses:
            self.disk.submit(Job(lambda catalog: catalog.put_uses(uses), lambda error: None))

    def distrust(self) -> None:
        """Another process may write from now on: nothing counts as checked any more."""
        for blob in self._blobs.values():
            blob.forget_checks()

    # Budget and eviction

    def take_room(self, size: int, blob: StoredBlob) -> None:
        """Count *size* bytes for *blob*, evicting others. Raises `StoreFull`."""
        if (excess := self.used + size - self.budget) > 0:
            self._evict(excess)
        blob.room += size
        self._room += size

    def give_room(self, size: int, blob: StoredBlob) -> None:
        """Count *size* bytes less."""
        blob.room -= size
        self._room -= size

    def note_pinned(self, blob: StoredBlob) -> None:
        """The blob is read or written from now on."""
        self._pinned.add(blob)

    def note_unpinned(self, blob: StoredBlob) -> None:
        """Nobody reads or writes it any more."""
        self._pinned.discard(blob)

    def note_dropped(self, size: int, blob: StoredBlob) -> None:
        """Count *size* bytes less, of pieces that are absent from now on."""
        self.give_room(size, blob)
        self.on_change(blob)

    def _evict(self, size: int) -> None:
        """Make room for *size* bytes, or raise `StoreFull` and evict nothing."""
        if self._room - sum(b.room for b in self._pinned) < size:
            raise StoreFull("no room within the budget")
        victims: list[StoredBlob] = []
        freed = 0
        while freed < size and (blob := self._next_victim()) is not None:
            freed += blob.room
            victims.append(blob)
            del self._blobs[blob.digest]
            self._let_go(blob)
        self._note_evicted(victims, freed)

    def _evict_one(self) -> None:
        """Make room for one more blob, or raise `StoreFull`."""
        blob = self._next_victim()
        if blob is None:
            raise StoreFull("too many blobs")
        freed = blob.room
        del self._blobs[blob.digest]
        self._let_go(blob)
        self._note_evicted([blob], freed)

    def _next_victim(self) -> StoredBlob | None:
        """The least recently used blob that nobody reads or writes."""
        for _ in range(2):
            while self._candidates:
                used, blob = self._candidates.pop()
                # One that was used since the list was made is newer than all that is left of it.
                if not blob.is_gone and not blob.pins and blob.last_used == used:
                    return blob
            self._candidates = sorted(
                ((b.last_used, b) for b in self._blobs.values() if not b.pins),
                key=lambda candidate: -candidate[0],
            )
        return None

    def _note_evicted(self, blobs: list[StoredBlob], freed: int) -> None:
        self._evicted_blobs += len(blobs)
        self._evicted_bytes += freed
        # Not awaited: whatever is written next comes after it.
        self.disk.submit(self._remove_job(blobs))
        logger.info("store.evicted", extra={"blobs": len(blobs), "bytes": freed})

    def _let_go(self, blob: StoredBlob) -> None:
        """Stop counting a blob that has just left the store."""
        self._room -= blob.room
        blob.room = 0
        blob.vanish()
        self._open.discard(blob)
        self.on_change(blob)

    def _remove_job(self, blobs: Iterable[StoredBlob]) -> Job:
        rows = [blob.row for blob in blobs]
        digests = [blob.digest for blob in blobs]

        def run(catalog: Catalog) -> None:
            for row in rows:
                row.is_open = False
            catalog.remove_blobs([row.number for row in rows])

        def cleanup(error: StoreFull | None) -> None:
            # Even if the rows are still there, because a full disk takes no deletion either: a row
            # without a file is dropped at the next open, and this is how the disk gets room.
            for digest in digests:
                try:
                    self.disk.files.remove(digest)
                except OSError as failure:
                    logger.warning(
                        "store.unlink.failed",
                        extra={"digest": str(digest), "reason": failure.strerror},
                    )

        return Job(run, lambda error: None, cleanup)

    # What blobs need

    def note_open(self, blob: StoredBlob) -> None:
        """The blob has a descriptor open now."""
        self._open.add(blob)
        if len(self._open) <= self._max_open_files:
            return
        idle = sorted((b for b in self._open if not b.pins), key=lambda b: b.last_used)
        for other in idle[: max(1, self._max_open_files // 8)]:
            other.close_file()
            self._open.discard(other)

    def note_rot(self, blob: StoredBlob, pieces: list[int]) -> None:
        """Pieces did not match their hash."""
        self._rotten_pieces += len(pieces)
        logger.warning("store.rot", extra={"digest": str(blob.digest), "pieces": pieces[:10]})

    def lose(self, blob: StoredBlob) -> None:
        """The blob's file is not there."""
        if blob.is_gone:
            return
        logger.warning("store.file.lost", extra={"digest": str(blob.digest)})
        del self._blobs[blob.digest]
        self._let_go(blob)
        if self.is_writer:
            self.disk.submit(self._remove_job([blob]))


def _fits(blob: StoredBlob, layout: Layout, toc_digest: Digest | None) -> bool:
    """What is stored under *blob*'s layout is of use to somebody who expects *layout*."""
    return (
        blob.layout.kind is layout.kind
        and blob.layout.size == layout.size
        and (layout.kind is LayoutKind.FIXED or toc_digest in (None, blob.toc_digest))
        and (blob.layout.starts == layout.starts or list(blob.layout.starts) == list(layout.starts))
    )
