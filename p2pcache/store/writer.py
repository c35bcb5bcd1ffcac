"""The one thread that changes the disk.

Hides group commit. The rules: jobs run in the order in which they were submitted; whatever is
queued when the thread comes round shares one transaction; a job is settled, on the event loop, only
once that transaction is committed.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Final

from p2pcache.core.errors import StoreFull
from p2pcache.store.catalog import Catalog

logger = logging.getLogger(__name__)

# One transaction takes at most so much, lest the first job wait for a long tail of others.
_BATCH_JOBS: Final = 256
_BATCH_BYTES: Final = 8 << 20


class Row:
    """A blob's row in the catalogue. *is_open* belongs to the writer's thread.

    It is true while pieces may be written under this row: not before the blob is entered, not once
    it is taken out, and not when pieces could not be taken out.
    """

    __slots__ = ("is_open", "number")

    def __init__(self, number: int, *, is_open: bool) -> None:
        self.number = number
        self.is_open = is_open


@dataclass(slots=True, eq=False)
class Job:
    """A change. *run* and *cleanup* are called on the writer's thread, *settle* on the event loop.

    *run* makes the change: bytes first, then rows. It may raise `OSError`, before any row.
    *cleanup* is called after the commit, or after its failure, and before any later job runs.
    *settle* is told whether the change will outlive the process.
    """

    run: Callable[[Catalog], None]
    settle: Callable[[StoreFull | None], None]
    cleanup: Callable[[StoreFull | None], None] | None = None
    weight: int = 0
    error: StoreFull | None = None


class Writer:
    """Runs jobs until closed. Owns *catalog*; *at_end* is called when nothing more is written."""

    def __init__(self, catalog: Catalog, at_end: Callable[[], None]) -> None:
        self._catalog = catalog
        self._at_end = at_end
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._failing = False
        # A daemon: a disk that hangs for good must not keep the process from ending.
        self._thread = threading.Thread(target=self._main, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue *job*; its *settle* is called whatever happens."""
        self._jobs.put(job)

    def stop(self) -> None:
        """Run what is queued, then let go of the catalogue. Nothing may be submitted any more."""
        self._jobs.put(None)

    async def join(self, patience_s: float) -> None:
        """Wait for the end, after `stop`. Gives up after *patience_s*."""
        await asyncio.to_thread(self._thread.join, patience_s)
        if self._thread.is_alive():
            logger.error("store.writer.stuck", extra={"waited_s": patience_s})

    def _main(self) -> None:
        open_ = True
        while open_:
            first = self._jobs.get()
            batch, open_ = ([first], True) if first is not None else ([], False)
            weight = first.weight if first is not None else 0
            while (
                open_
                and len(batch) < _BATCH_JOBS
                and weight < _BATCH_BYTES
                and batch[-1].cleanup is None
            ):
                try:
                    job = self._jobs.get_nowait()
                except Empty:
                    break
                if job is None:
                    open_ = False
                else:
                    batch.append(job)
                    weight += job.weight
            if batch:
                try:
                    self._commit(batch)
                except Exception:
                    # A bug. The store must say so and go on: those who wait would wait for ever.
                    logger.exception("store.writer.failed")
                    for job in batch:
                        job.error = job.error or StoreFull("the writer failed")
                self._loop.call_soon_threadsafe(_settle, batch)
        try:
            self._catalog.close()
        except sqlite3.Error as error:
            logger.warning("store.catalog.close_failed", extra={"reason": str(error)})
        self._at_end()

    def _commit(self, batch: list[Job]) -> None:
        try:
            with self._catalog.transaction():
                for job in batch:
                    try:
                        job.run(self._catalog)
                    except OSError as error:
                        job.error = StoreFull(error.strerror or type(error).__name__)
        except sqlite3.Error as error:
            # SQLITE_FULL, most of all. Nothing of the batch is kept.
            full = StoreFull(f"the catalogue takes no more: {error}")
            for job in batch:
                job.error = job.error or full
            if not self._failing:
                logger.warning("store.commit.failed", extra={"reason": str(error)})
            self._failing = True
        else:
            self._failing = False
        if (cleanup := batch[-1].cleanup) is not None:
            try:
                cleanup(batch[-1].error)
            except OSError as error:
                batch[-1].error = StoreFull(error.strerror or type(error).__name__)


def _settle(batch: list[Job]) -> None:
    for job in batch:
        job.settle(job.error)
