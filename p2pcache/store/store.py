"""The store: opening, hand-over between two processes, the budget and eviction.

Hides which process writes. The rule: whoever has the lock writes; everybody else serves what the
catalogue held when they looked, checks every byte of it, and takes over when the lock is free.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from p2pcache.core.errors import StoreError, StoreFull
from p2pcache.core.layout import Layout, LayoutKind
from p2pcache.core.model import Digest
from p2pcache.store.blobs import PATIENCE_S, READ_NOW_LIMIT, Row, StoredBlob, committed
from p2pcache.store.catalog import (
    BlobRecord,
    Catalog,
    CatalogUnusable,
    Contents,
    open_catalog,
    peek,
)
from p2pcache.store.files import DataFiles, WriterLock
from p2pcache.store.memory import ImageMemory
from p2pcache.store.writer import Job, Writer

logger = logging.getLogger(__name__)

# Each blob costs an inode and some memory, however small it is.
MAX_BLOBS: Final = 1 << 17
MAX_OPEN_FILES: Final = 512
_READ_THREADS: Final = 8
# Writes that wait for a commit: their bytes are in memory.
_QUEUED_WRITES: Final = 128
_UNSAVED: Final = 4096
_LOCK_POLL_S: Final = 0.1
_DISK_RETRY_S: Final = 5.0
_USES_EVERY_S: Final = 30.0
# Manifests may take this part of the budget.
_MANIFEST_SHARE: Final = 8

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What the store has and has done since it was opened."""

    budget: int
    used: int
    blobs: int
    whole_blobs: int
    held_pieces: int
    staged_pieces: int
    evicted_blobs: int
    evicted_bytes: int
    rotten_pieces: int
    is_writer: bool


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
        self.files = DataFiles(root)
        self.scratch = memoryview(bytearray(READ_NOW_LIMIT))
        # Absent where there is no Linux: rather wait for a disk than hop threads for every read.
        self.read_flags: int = getattr(os, "RWF_NOWAIT", 0)
        self.memory = ImageMemory(self._persist, manifest_bytes=budget // _MANIFEST_SHARE)
        self._root = root
        self._max_open_files = max_open_files
        self._max_blobs = max_blobs
        self._blobs: dict[Digest, StoredBlob] = {}
        self._pinned: set[StoredBlob] = set()
        self._open: set[StoredBlob] = set()
        # Eviction candidates, the least recently used last, as of when the list was made.
        self._candidates: list[tuple[float, StoredBlob]] = []
        self._room = 0
        self._lock: WriterLock | None = None
        self._writer: Writer | None = None
        self._last_writer: Writer | None = None
        self._next_row = 1
        self._why_reader = "the store is not open"
        self._has_lock = False
        self._released = False
        self._unsaved: deque[Callable[[Catalog], None]] = deque(maxlen=_UNSAVED)
        # Added to a use, as the clock has it, this orders uses over restarts.
        self._use_offset = 0.0
        self._uses_saved_at = float("-inf")
        self._evicted_blobs = self._evicted_bytes = self._rotten_pieces = 0

    async def __aenter__(self) -> Self:
        self._admission = asyncio.Semaphore(_QUEUED_WRITES)
        self._can_write = asyncio.Event()
        self._threads = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="store-read")
        self._tasks = asyncio.TaskGroup()
        try:
            self._lock = await asyncio.to_thread(self._prepare)
            if self._lock.acquire():
                self._has_lock = True
                await self._become_writer()
            else:
                self._why_reader = "another process writes this store"
                logger.info("store.waits_for_lock", extra={"root": str(self._root)})
            if not self.is_writer:
                await self._look_in()
            await self._tasks.__aenter__()
        except BaseException:
            await self._close()
            raise
        self._tending = self._tasks.create_task(self._tend(), name="store-tend")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tending.cancel()
        try:
            # The group needs to hear of a cancellation only: that may have been its own doing.
            if isinstance(error, asyncio.CancelledError):
                await self._tasks.__aexit__(kind, error, trace)
            else:
                await self._tasks.__aexit__(None, None, None)
        finally:
            await self._close()

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
        await self.admit()
        try:
            while (old := self._blobs.get(digest)) is not None:
                if _fits(old, layout, toc_digest):
                    self.leave()
                    return old
                self.require_writer()
                await self.forget(digest)
            self.require_writer()
            if len(self._blobs) >= self._max_blobs:
                self._evict_one()
        except BaseException:
            self.leave()
            raise
        blob = StoredBlob(
            self,
            Row(self._next_row, is_open=False),
            BlobRecord(
                self._next_row,
                digest,
                Layout(layout.kind, layout.size, array("Q", layout.starts)),
                toc_digest,
                False,
                self.clock(),
                array("Q", bytes(8 * layout.count)),
                bytearray(layout.count),
            ),
        )
        self._next_row += 1
        self._blobs[digest] = blob
        blob.pin()
        await committed(self.submit(self._create_job(blob)))
        return blob

    def _create_job(self, blob: StoredBlob) -> Job:
        row, used = blob.row, blob.last_used + self._use_offset

        def run(catalog: Catalog) -> None:
            catalog.add_blob(row.number, blob.digest, blob.layout, blob.toc_digest, used)

        def cleanup(error: StoreFull | None) -> None:
            if error is None:
                self.files.create(blob.digest)
                row.is_open = True

        def settle(error: StoreFull | None) -> None:
            blob.unpin()
            self.leave()
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
        if self._writer is not None:
            try:
                await committed(self.submit(self._remove_job([blob])))
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
        blobs = self._blobs.values()
        return StoreStats(
            budget=self.budget,
            used=self.used,
            blobs=len(blobs),
            whole_blobs=sum(blob.is_whole for blob in blobs),
            held_pieces=sum(len(blob.held) for blob in blobs),
            staged_pieces=sum(len(blob.staged) for blob in blobs),
            evicted_blobs=self._evicted_blobs,
            evicted_bytes=self._evicted_bytes,
            rotten_pieces=self._rotten_pieces,
            is_writer=self.is_writer,
        )

    # Hand-over

    @property
    def is_writer(self) -> bool:
        """This process has the lock, and the catalogue is open for writing."""
        return self._writer is not None

    async def until_writer(self) -> None:
        """Wait until this process writes the store. The caller bounds the wait."""
        await self._can_write.wait()

    def release_writer(self) -> None:
        """Let another process write: give up the lock as soon as what is queued is committed.

        For a process that begins to drain. Reads go on; writes raise `StoreFull`.
        """
        self._released = True
        self._why_reader = "the store was handed over"
        self._stop_writing()

    def require_writer(self) -> None:
        """Raise `StoreFull` unless this process has the lock."""
        if self._writer is None:
            raise StoreFull(self._why_reader)

    def _prepare(self) -> WriterLock:
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            return WriterLock(self._root)
        except OSError as error:
            raise StoreError(f"cannot use {self._root}: {error.strerror}") from error

    async def _become_writer(self) -> None:
        """Open the catalogue for writing; if the disk does not let us, say so and stay a reader."""
        opening = asyncio.get_running_loop().run_in_executor(self._threads, self._open_and_repair)
        try:
            catalog, contents = await asyncio.shield(opening)
        except asyncio.CancelledError:
            # The thread goes on; the lock must not be given up under it.
            await asyncio.wait((opening,), timeout=PATIENCE_S)
            if opening.done() and opening.exception() is None:
                opening.result()[0].close()
            raise
        except (OSError, sqlite3.Error) as error:
            reason = f"the catalogue cannot be opened: {error}"
            if reason != self._why_reader:
                logger.warning("store.open.failed", extra={"reason": str(error)})
            self._why_reader = reason
            return
        self._adopt(contents)
        self._writer = Writer(catalog, self._wrote_last)
        for run in self._unsaved:
            self.submit(Job(run, lambda error: None))
        self._unsaved.clear()
        if self.used > self.budget:
            self._evict(self.used - self.budget)
        self._can_write.set()
        logger.info("store.open", extra={"blobs": len(self._blobs), "used": self.used})

    def _open_and_repair(self) -> tuple[Catalog, Contents]:
        """Open the catalogue and make it agree with the data files. On a thread."""
        catalog, contents = open_catalog(self._root)
        try:
            names = self.files.encoded_names()
            lost = [blob for blob in contents.blobs if blob.digest.encoded not in names]
            names.difference_update(blob.digest.encoded for blob in contents.blobs)
            if lost or names:
                logger.info("store.repaired", extra={"lost": len(lost), "orphans": len(names)})
            if lost:
                with catalog.transaction():
                    catalog.remove_blobs([blob.row for blob in lost])
                gone = {blob.row for blob in lost}
                contents.blobs = [blob for blob in contents.blobs if blob.row not in gone]
            for name in names:
                self.files.remove(Digest("sha256" if len(name) == 64 else "sha512", name))
            self._next_row = catalog.last_row() + 1
        except BaseException:
            catalog.close()
            raise
        return catalog, contents

    async def _look_in(self) -> None:
        """Serve what another process's catalogue holds."""
        try:
            self._adopt(await asyncio.to_thread(peek, self._root))
        except CatalogUnusable as error:
            logger.info("store.reads_nothing", extra={"reason": str(error)})

    def _adopt(self, contents: Contents) -> None:
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
        for digest, blob in self._blobs.items():
            if found.get(digest) is not blob:
                self._let_go(blob)
        self._blobs = found
        self._room = sum(blob.room for blob in found.values())
        self.memory.absorb(contents)

    async def _tend(self) -> None:
        """Look for the lock while another process has it; else save when blobs were used."""
        while True:
            if self._writer is not None or self._released:
                await asyncio.sleep(_USES_EVERY_S)
            else:
                await asyncio.sleep(_DISK_RETRY_S if self._has_lock else _LOCK_POLL_S)
            if self._writer is not None:
                self._save_uses()
            elif not self._released and self._lock is not None:
                self._has_lock = self._has_lock or self._lock.acquire()
                if self._has_lock:
                    await self._become_writer()

    def _save_uses(self) -> None:
        since, self._uses_saved_at = self._uses_saved_at, self.clock()
        uses = [
            (blob.last_used + self._use_offset, blob.row.number)
            for blob in self._blobs.values()
            if blob.last_used >= since
        ]
        if uses:
            self.submit(Job(lambda catalog: catalog.put_uses(uses), lambda error: None))

    def _stop_writing(self) -> None:
        if self._writer is None:
            return
        self._save_uses()
        self._writer.stop()
        self._writer, self._last_writer = None, self._writer
        self._can_write.clear()
        for blob in self._blobs.values():
            blob.forget_checks()

    def _wrote_last(self) -> None:
        """Nothing will be written any more. On the writer's thread."""
        self.files.close()
        if self._lock is not None:
            self._lock.release()

    async def _close(self) -> None:
        self._released = True
        self._why_reader = "the store is closed"
        if self._writer is None and self._lock is not None and self._has_lock:
            self._lock.release()  # The catalogue could not be opened.
        self._stop_writing()
        if self._last_writer is not None:
            await self._last_writer.join(PATIENCE_S)
        await asyncio.to_thread(self._threads.shutdown)
        for blob in self._open:
            blob.close_file()
        self._open.clear()

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
        self.submit(self._remove_job(blobs))
        logger.info("store.evicted", extra={"blobs": len(blobs), "bytes": freed})

    def _let_go(self, blob: StoredBlob) -> None:
        """Stop counting a blob that has just left the store."""
        self._room -= blob.room
        blob.room = 0
        blob.vanish()
        self._open.discard(blob)

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
                    self.files.remove(digest)
                except OSError as failure:
                    logger.warning(
                        "store.unlink.failed",
                        extra={"digest": str(digest), "reason": failure.strerror},
                    )

        return Job(run, lambda error: None, cleanup)

    # What blobs and the memory need

    def submit(self, job: Job) -> asyncio.Future[StoreFull | None]:
        """Queue *job*; the future is done after its `settle`. Raises `StoreFull`."""
        self.require_writer()
        assert self._writer is not None
        change: asyncio.Future[StoreFull | None] = asyncio.get_running_loop().create_future()
        settle = job.settle

        def settle_and_tell(error: StoreFull | None) -> None:
            settle(error)
            change.set_result(error)

        job.settle = settle_and_tell
        self._writer.submit(job)
        return change

    async def admit(self) -> None:
        """Wait for a place in the writer's queue. Raises `StoreFull`."""
        if self._admission.locked():
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self._admission.acquire()
            except TimeoutError:
                raise StoreFull("the disk does not keep up") from None
        else:
            await self._admission.acquire()

    def leave(self) -> None:
        """Give the place up."""
        self._admission.release()

    async def in_thread(self, call: Callable[[], T], *, patience_s: float = PATIENCE_S) -> T:
        """Run *call*, which only reads, on a thread. Raises `StoreError` if it takes too long."""
        running = asyncio.get_running_loop().run_in_executor(self._threads, call)
        try:
            async with asyncio.timeout(patience_s):
                return await running
        except TimeoutError:
            raise StoreError("the disk does not answer") from None

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
        if self._writer is not None:
            self.submit(self._remove_job([blob]))

    async def _persist(self, run: Callable[[Catalog], None]) -> None:
        if self._writer is None:
            self._unsaved.append(run)  # For the day this process gets the lock.
            return
        try:
            await self.admit()
            if self._writer is None:
                self.leave()
                self._unsaved.append(run)
                return
            await committed(self.submit(Job(run, lambda error: self.leave())))
        except StoreFull as error:
            logger.debug("store.memory.uncommitted", extra={"reason": str(error)})


def _fits(blob: StoredBlob, layout: Layout, toc_digest: Digest | None) -> bool:
    """What is stored under *blob*'s layout is of use to somebody who expects *layout*."""
    return (
        blob.layout.kind is layout.kind
        and blob.layout.size == layout.size
        and (layout.kind is LayoutKind.FIXED or toc_digest in (None, blob.toc_digest))
        and (blob.layout.starts == layout.starts or list(blob.layout.starts) == list(layout.starts))
    )
