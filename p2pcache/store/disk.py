"""The disk, as this process may use it.

Hides which process writes, and the threads. The rules: whoever has the lock writes; everybody else
reads what the catalogue held when they looked, and takes over when the lock is free. Nobody waits
for the disk without a limit, and no more writes wait than memory can bear.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self, TypeVar

from p2pcache.core.errors import StoreError, StoreFull
from p2pcache.core.model import Digest
from p2pcache.store.catalog import Catalog, CatalogUnusable, Contents, open_catalog, peek
from p2pcache.store.files import DataFiles, WriterLock
from p2pcache.store.writer import Job, Writer

logger = logging.getLogger(__name__)

# A disk that takes longer over one read or write is no use to a client that is waiting.
PATIENCE_S: Final = 10.0
_READ_THREADS: Final = 8
# Writes that wait for a commit: their bytes are in memory.
_QUEUED_WRITES: Final = 128
_UNSAVED: Final = 4096
_LOCK_POLL_S: Final = 0.1
_DISK_RETRY_S: Final = 5.0
_USES_EVERY_S: Final = 30.0

T = TypeVar("T")


class Keeper(Protocol):
    """Who keeps things on the disk, and is told what becomes of it. Called on the event loop."""

    def adopt(self, contents: Contents) -> None:
        """The catalogue holds *contents*; if this process is the writer now, they are its own."""

    def save_uses(self) -> None:
        """Submit what was used of late: it is time, or the last moment."""

    def distrust(self) -> None:
        """Another process may write from now on."""


class Disk:
    """One store directory. An async context manager; its methods belong to one event loop."""

    def __init__(self, root: Path, keeper: Keeper) -> None:
        self.files = DataFiles(root)
        self._root = root
        self._keeper = keeper
        self._admission = asyncio.Semaphore(_QUEUED_WRITES)
        self._can_write = asyncio.Event()
        self._lock: WriterLock | None = None
        self._writer: Writer | None = None
        self._last_writer: Writer | None = None
        self._next_row = 1
        self._why_reader = "the store is not open"
        self._has_lock = False
        self._released = False
        self._unsaved: deque[Callable[[Catalog], None]] = deque(maxlen=_UNSAVED)

    async def __aenter__(self) -> Self:
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

    @property
    def is_writer(self) -> bool:
        """This process has the lock, and the catalogue is open for writing."""
        return self._writer is not None

    async def until_writer(self) -> None:
        """Wait until this process writes. The caller bounds the wait."""
        await self._can_write.wait()

    def release(self) -> None:
        """Let another process write, for good, as soon as what is queued is committed."""
        self._released = True
        self._why_reader = "the store was handed over"
        self._stop_writing()

    def require_writer(self) -> None:
        """Raise `StoreFull` unless this process has the lock."""
        if self._writer is None:
            raise StoreFull(self._why_reader)

    def next_row(self) -> int:
        """Return a row number for a blob: one that was never used, if this process writes."""
        row = self._next_row
        self._next_row += 1
        return row

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

    async def persist(self, run: Callable[[Catalog], None]) -> None:
        """Commit *run* if that is possible, and remember it for the day it becomes so if not."""
        if self._writer is None:
            self._unsaved.append(run)
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

    async def in_thread(self, call: Callable[[], T], *, patience_s: float = PATIENCE_S) -> T:
        """Run *call*, which only reads, on a thread. Raises `StoreError` if it takes too long."""
        running = asyncio.get_running_loop().run_in_executor(self._threads, call)
        try:
            async with asyncio.timeout(patience_s):
                return await running
        except TimeoutError:
            raise StoreError("the disk does not answer") from None

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
        self._writer = Writer(catalog, self._wrote_last)
        for run in self._unsaved:
            self.submit(Job(run, lambda error: None))
        self._unsaved.clear()
        self._keeper.adopt(contents)
        self._can_write.set()
        if self._released:  # Meanwhile.
            self._stop_writing()

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
            self._keeper.adopt(await asyncio.to_thread(peek, self._root))
        except CatalogUnusable as error:
            logger.info("store.reads_nothing", extra={"reason": str(error)})

    async def _tend(self) -> None:
        """Look for the lock while another process has it; else save when blobs were used."""
        while True:
            if self._writer is not None or self._released:
                await asyncio.sleep(_USES_EVERY_S)
            else:
                await asyncio.sleep(_DISK_RETRY_S if self._has_lock else _LOCK_POLL_S)
            if self._writer is not None:
                self._keeper.save_uses()
            elif not self._released and self._lock is not None:
                self._has_lock = self._has_lock or self._lock.acquire()
                if self._has_lock:
                    await self._become_writer()

    def _stop_writing(self) -> None:
        if self._writer is None:
            return
        self._keeper.save_uses()
        self._writer.stop()
        self._writer, self._last_writer = None, self._writer
        self._can_write.clear()
        self._keeper.distrust()

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


async def committed(change: asyncio.Future[StoreFull | None]) -> None:
    """Wait for a submitted job. Raises `StoreFull`.

    Whoever gives up waiting, for impatience or because it is cancelled, takes nothing back: the
    job runs all the same, and its `settle` is called.
    """
    done, _ = await asyncio.wait((change,), timeout=PATIENCE_S)
    if not done:
        raise StoreFull("the disk does not keep up")
    if (error := change.result()) is not None:
        raise StoreFull(str(error))
