"""Which blobs containerd's content store has, and which of them are proven.

The rules: a blob is found only while its file is in the state in which it was proven; finding costs
a look-up in memory. What is asked for is proven first and at full speed, then what has just come;
all else in its own time, the newest first, at a bounded rate, so that a machine with a full disk
does not spend its first hour hashing.
"""

from __future__ import annotations

import asyncio
import errno
import heapq
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from p2pcache.content.blobs import READ_NOW_LIMIT, ContentBlob
from p2pcache.content.candidate import Candidate
from p2pcache.content.files import FileChanged, FileState, Proof, prove
from p2pcache.content.folder import Folder, News, Unreadable
from p2pcache.content.record import Record
from p2pcache.core.errors import StoreError
from p2pcache.core.model import Digest
from p2pcache.tasks import cancelled_at_exit

logger = logging.getLogger(__name__)

RESCAN_S: Final = 60.0
MAX_OPEN_FILES: Final = 256
# A blob of this size is proven in about the time that asking for it elsewhere would take.
SMALL_BYTES: Final = 4 << 20
SMALL_WAIT_S: Final = 0.5
# Some 5 % of one core's hashing: nobody waits for what nobody has asked for.
IDLE_BYTES_PER_S: Final = 64 << 20
# A disk that takes longer over one read is no use to a client that is waiting.
PATIENCE_S: Final = 10.0
_READ_THREADS: Final = 4
_SAVE_EVERY_S: Final = 30.0
_MAX_TRIES: Final = 3
# What is listed is taken in with a turn for everybody else after so many: some milliseconds.
_CHANGES_AT_ONCE: Final = 256

T = TypeVar("T")


class Content:
    """The blobs in a content store that are proven whole. An async context manager.

    *record* is a file of our own, for what was proven. All methods belong to one event loop.
    """

    def __init__(
        self,
        root: Path,
        record: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        rescan_s: float = RESCAN_S,
        idle_bytes_per_s: float = IDLE_BYTES_PER_S,
        max_open_files: int = MAX_OPEN_FILES,
    ) -> None:
        self.clock = clock
        self.scratch = memoryview(bytearray(READ_NOW_LIMIT))
        self.read_flags: int = getattr(os, "RWF_NOWAIT", 0)
        self.on_change: Callable[[Digest, int, bool], None] = lambda digest, size, is_added: None
        """Called with digest, size, and whether the blob is found from now on or is no more."""
        self._folder = Folder(root)
        self._record = Record(record)
        self._rescan_s = rescan_s
        self._idle_bytes_per_s = idle_bytes_per_s
        self._max_open_files = max_open_files
        # Every file there is, in the state in which we last saw it: what is in neither of the next
        # two is of no use as long as it stays in that state.
        self._known: dict[Digest, FileState] = {}
        self._blobs: dict[Digest, ContentBlob] = {}
        self._candidates: dict[Digest, Candidate] = {}
        # Whose turn it is; some may have gone, or been taken from the other one, meanwhile.
        self._asked: deque[Candidate] = deque()
        self._idle: list[tuple[int, Digest, Candidate]] = []
        self._has_asked = asyncio.Event()
        self._has_any = asyncio.Event()
        self._is_listed = asyncio.Event()
        self._open: set[ContentBlob] = set()
        self._bytes = 0
        self._complaints: set[str] = set()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as resources:
            self._readers = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="content-read")
            provers = [
                ThreadPoolExecutor(1, thread_name_prefix="content-asked"),
                ThreadPoolExecutor(1, thread_name_prefix="content-idle", initializer=_yield_cpu),
            ]
            for threads in (self._readers, *provers):
                resources.push_async_callback(asyncio.to_thread, threads.shutdown)
            resources.callback(self._close_files)
            for digest, proof in await self._in_reader(self._record.load):
                self._record.put(digest, proof)
            self._record.is_changed = False
            resources.push_async_callback(self._save)
            tasks = await resources.enter_async_context(cancelled_at_exit())
            tasks.create_task(self._follow(), name="content-follow")
            tasks.create_task(self._save_often(), name="content-save")
            for threads, only_asked in zip(provers, (True, False), strict=True):
                tasks.create_task(self._prove_all(threads, only_asked=only_asked))
            resources.callback(self._stop_proving)
            self._resources = resources.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._resources.__aexit__(kind, error, trace)

    def find(self, digest: Digest) -> ContentBlob | None:
        """Return a blob that is proven. One that is not yet is proven next for being asked for."""
        blob = self._blobs.get(digest)
        if blob is None and (candidate := self._candidates.get(digest)) is not None:
            self._ask(candidate)
        return blob

    async def settle(self, digest: Digest) -> ContentBlob | None:
        """`find`, but wait a moment for a small blob to be proven."""
        blob = self.find(digest)
        candidate = self._candidates.get(digest)
        if blob is None and candidate is not None and candidate.state.size <= SMALL_BYTES:
            with suppress(TimeoutError):
                async with asyncio.timeout(SMALL_WAIT_S):
                    await candidate.until_done()
            blob = self._blobs.get(digest)
        return blob

    def blobs(self) -> list[ContentBlob]:
        """All proven blobs: a copy, so that it may be walked at leisure."""
        return list(self._blobs.values())

    @property
    def blob_count(self) -> int:
        """How many blobs are proven."""
        return len(self._blobs)

    @property
    def size(self) -> int:
        """The bytes of all proven blobs. They count against no budget of ours."""
        return self._bytes

    @property
    def unproven_count(self) -> int:
        """How many files wait to be proven."""
        return len(self._candidates)

    async def until_listed(self) -> None:
        """Wait until the folder was listed for the first time. The caller bounds the wait."""
        await self._is_listed.wait()

    # Following the folder

    async def _follow(self) -> None:
        while True:
            try:
                await self._follow_once()
            except Exception:  # a bug ends here, logged: the node serves without the folder's news
                logger.exception("content.broken")
                await asyncio.sleep(self._rescan_s)

    async def _follow_once(self) -> None:
        try:
            async with self._folder.watch() as news:
                await self._list()
                await self._hear(news)
            return
        except OSError as error:
            self._complain(
                "content.unwatched",
                reason=error.strerror,
                hint=f"it is listed every {self._rescan_s:.0f} s instead; "
                "raise fs.inotify.max_user_instances and max_user_watches",
            )
        await self._list()
        await asyncio.sleep(self._rescan_s)

    async def _hear(self, news: News) -> None:
        """Take in news until it is time to list all again."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._rescan_s
        while (left := until - loop.time()) > 0:
            digests = await news.next(left)
            if digests is None:
                return
            if digests:
                found = await self._in_reader(partial(self._folder.look, digests))
                self._apply(found, are_fresh=True)

    async def _list(self) -> None:
        try:
            changes = await self._in_reader(partial(_differences, self._folder, dict(self._known)))
        except Unreadable as error:
            self._complain(
                "content.unreadable",
                path=error.path,
                reason=error.reason,
                hint="let this user read and enter it: mount the content folder itself, read-only",
            )
            changes = dict.fromkeys(self._known)
        todo = list(changes.items())
        for first in range(0, len(todo), _CHANGES_AT_ONCE):
            self._apply(dict(todo[first : first + _CHANGES_AT_ONCE]))
            await asyncio.sleep(0)
        self._is_listed.set()

    def _apply(
        self, changes: Mapping[Digest, FileState | None], *, are_fresh: bool = False
    ) -> None:
        """These files are in other states than before, or not there any more.

        Fresh ones have come just now: they are in the page cache, and other nodes will want them.
        """
        for digest, state in changes.items():
            if self._known.get(digest) == state:
                continue
            self._let_go(digest, state)
            if state is None:
                continue
            self._known[digest] = state
            proof = self._record.proof_of(digest, state)
            if proof is not None:
                self._add(digest, proof)
            else:
                candidate = self._candidates[digest] = Candidate(digest, state)
                if are_fresh:
                    candidate.urge()
                    self._asked.append(candidate)
                    self._has_asked.set()
                else:
                    heapq.heappush(self._idle, (-state.modified_ns, digest, candidate))
                self._has_any.set()

    def _add(self, digest: Digest, proof: Proof) -> None:
        blob = self._blobs[digest] = ContentBlob(self, digest, proof)
        self._bytes += blob.layout.size
        self.on_change(digest, blob.layout.size, True)

    def _let_go(self, digest: Digest, now: FileState | None) -> None:
        """The file is in another state *now*: forget what was known of it."""
        self._known.pop(digest, None)
        candidate = self._candidates.pop(digest, None)
        if candidate is not None:
            candidate.stop()
        blob = self._blobs.pop(digest, None)
        if blob is None:
            return
        if now is not None and now.inode == blob.proof.state.inode:
            blob.vanish()
        else:
            blob.remove()
        self._bytes -= blob.layout.size
        self.on_change(digest, blob.layout.size, False)

    # Proving

    def _ask(self, candidate: Candidate) -> None:
        """Somebody wants it: prove it next."""
        if candidate.is_asked:
            return
        candidate.is_asked = True
        candidate.urge()
        if not candidate.is_running:
            self._asked.appendleft(candidate)
            self._has_asked.set()
            self._has_any.set()

    async def _prove_all(self, threads: ThreadPoolExecutor, *, only_asked: bool) -> None:
        has_work = self._has_asked if only_asked else self._has_any
        while True:
            candidate = self._next(only_asked=only_asked)
            if candidate is None:
                has_work.clear()
                await has_work.wait()
                continue
            candidate.start()
            try:
                await self._prove(threads, candidate)
            except Exception:  # a bug ends here, logged: the file is not served
                logger.exception("content.proof.broken", extra={"digest": str(candidate.digest)})
            finally:
                candidate.finish()
                if self._candidates.get(candidate.digest) is candidate:
                    del self._candidates[candidate.digest]

    def _next(self, *, only_asked: bool) -> Candidate | None:
        """Return what is to be proven now: who was asked for first, else the newest."""
        while self._asked:
            candidate = self._asked.popleft()
            if self._is_waiting(candidate):
                return candidate
        while self._idle and not only_asked:
            _, _, candidate = heapq.heappop(self._idle)
            if self._is_waiting(candidate):
                return candidate
        return None

    def _is_waiting(self, candidate: Candidate) -> bool:
        return not candidate.is_running and self._candidates.get(candidate.digest) is candidate

    async def _prove(self, threads: ThreadPoolExecutor, candidate: Candidate) -> None:
        digest, state = candidate.digest, candidate.state
        path = self._folder.path_of(digest)
        rate = self._idle_bytes_per_s
        call = partial(prove, path, digest, state, partial(candidate.pause, rate))
        has_changed = is_final = False
        proof = None
        try:
            proof = await asyncio.get_running_loop().run_in_executor(threads, call)
        except FileChanged:
            has_changed = True
        except OSError as error:
            # What is forbidden stays so until the file changes; a dead block stays dead.
            is_final = error.errno in (errno.EACCES, errno.EPERM, errno.EIO)
            if error.errno in (errno.EACCES, errno.EPERM):
                self._complain(
                    "content.file.unreadable",
                    path=path,
                    reason=error.strerror,
                    hint="let this user read the files in it",
                )
        else:
            is_final = True
            if proof is None:
                logger.warning("content.mismatch", extra={"digest": str(digest), "path": path})
        if self._candidates.get(digest) is not candidate:
            return
        del self._candidates[digest]
        if proof is not None:
            self._record.put(digest, proof)
            self._add(digest, proof)
        elif not is_final:
            del self._known[digest]  # The next listing sees it as new.
        if has_changed:
            await self._prove_again(candidate)

    async def _prove_again(self, before: Candidate) -> None:
        """The file was not in the state in which it was seen: look what has become of it."""
        # One that is written to all the time waits until nothing else is to be done.
        is_urgent = before.is_urgent and before.tries < _MAX_TRIES
        found = await self._in_reader(partial(self._folder.look, (before.digest,)))
        self._apply(found, are_fresh=is_urgent)
        candidate = self._candidates.get(before.digest)
        if candidate is not None:
            candidate.tries = before.tries + 1

    def _stop_proving(self) -> None:
        for candidate in self._candidates.values():
            candidate.stop()

    # What blobs need

    def path_of(self, digest: Digest) -> str:
        """The blob's file."""
        return self._folder.path_of(digest)

    async def in_thread(self, call: Callable[[], T]) -> T:
        """Run *call* on a thread. Raises `StoreError` if it takes too long."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._in_reader(call)
        except TimeoutError:
            raise StoreError("the disk does not answer") from None

    def note_open(self, blob: ContentBlob) -> None:
        """The blob has a descriptor open now."""
        self._open.add(blob)
        if len(self._open) <= self._max_open_files:
            return
        idle = sorted((b for b in self._open if not b.pins), key=lambda b: b.last_used)
        for other in idle[: max(1, self._max_open_files // 8)]:
            other.close_file()

    def note_closed(self, blob: ContentBlob) -> None:
        """It has none any more."""
        self._open.discard(blob)

    def lose(self, blob: ContentBlob) -> None:
        """Its file is not there any more, or not what was proven."""
        blob.vanish()
        if self._blobs.get(blob.digest) is blob:
            # Unknown from now on: news that are on their way, or the next listing, tell the rest.
            self._let_go(blob.digest, None)

    def note_rot(self, blob: ContentBlob, pieces: list[int]) -> None:
        """Pieces did not match their hash: the file is of no use until it changes."""
        logger.warning("content.rot", extra={"digest": str(blob.digest), "pieces": pieces[:10]})
        self.lose(blob)
        if self._record.proof_of(blob.digest, blob.proof.state) is not None:
            self._record.forget(blob.digest)
            self._known.setdefault(blob.digest, blob.proof.state)

    # Our own things

    async def _in_reader(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, call)

    async def _save_often(self) -> None:
        while True:
            await asyncio.sleep(_SAVE_EVERY_S)
            try:
                await self._save()
            except Exception:  # a bug ends here, logged: proofs are made again after a restart
                logger.exception("content.save.broken")

    async def _save(self) -> None:
        if self._record.is_changed:
            await self._in_reader(partial(self._record.save, self._record.snapshot()))

    def _close_files(self) -> None:
        for blob in list(self._open):
            blob.close_file()

    def _complain(self, event: str, **facts: str | None) -> None:
        """Say once what somebody has to put right."""
        if event not in self._complaints:
            self._complaints.add(event)
            logger.warning(event, extra=facts)


def _differences(folder: Folder, known: dict[Digest, FileState]) -> dict[Digest, FileState | None]:
    """Return what a new listing says otherwise than *known*. Blocks. Raises `Unreadable`."""
    found = folder.list()
    changes: dict[Digest, FileState | None] = dict.fromkeys(known.keys() - found.keys())
    changes |= {digest: state for digest, state in found.items() if known.get(digest) != state}
    return changes


def _yield_cpu() -> None:
    """Let every other thread of the machine go before this one."""
    with suppress(OSError):
        # On Linux this is about one thread, though it says process: setpriority(2).
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
