"""The folder of a content store: what is in it, and hearing when that changes.

Hides inotify(7). The rules: watches are set before the folder is listed, so that nothing comes
between; whatever is doubtful, a folder that moved or news that were lost, ends the watch, and the
caller starts over with a new listing; nobody relies on news alone.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from asyncinotify import Event, Inotify, Mask

from p2pcache.content.files import FileState
from p2pcache.core.errors import BadDigest
from p2pcache.core.model import MAX_BLOB_SIZE, Digest
from p2pcache.tasks import cancelled_at_exit

logger = logging.getLogger(__name__)

_ALGORITHMS: Final = ("sha256", "sha512")
# A blob that arrives is renamed, then given its time and mode; a pull brings several at once.
_SETTLE_S: Final = 0.05
_EVENTS_AT_ONCE: Final = 256
_MAX_NEWS: Final = 4096
_MAX_LISTED: Final = 1 << 16

_ONE_FILE: Final = (
    Mask.MOVED_TO | Mask.MOVED_FROM | Mask.CREATE | Mask.DELETE | Mask.ATTRIB | Mask.CLOSE_WRITE
)
_FOLDER_ITSELF: Final = Mask.DELETE_SELF | Mask.MOVE_SELF | Mask.ONLYDIR
_WAY_THERE: Final = Mask.MOVED_TO | Mask.MOVED_FROM | Mask.CREATE | Mask.DELETE
_ENDS_IT: Final = Mask.DELETE_SELF | Mask.MOVE_SELF | Mask.IGNORED | Mask.UNMOUNT | Mask.Q_OVERFLOW


class Unreadable(Exception):
    """The folder is there, but this process may not look into it."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class Folder:
    """Where containerd's blobs lie: *root* is what ``--containerd-content`` names."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._blobs = self._root / "blobs"

    def path_of(self, digest: Digest) -> str:
        """The file of a blob."""
        return f"{self._blobs}/{digest.algorithm}/{digest.encoded}"

    def list(self) -> dict[Digest, FileState]:
        """Return all blobs and the state of their files. Blocks. Raises `Unreadable`."""
        found: dict[Digest, FileState] = {}
        for algorithm in _ALGORITHMS:
            try:
                with os.scandir(self._blobs / algorithm) as entries:
                    for entry in entries:
                        digest = _digest(algorithm, entry.name)
                        if digest is not None and (state := self.state_of(digest)) is not None:
                            found[digest] = state
                        if len(found) >= _MAX_LISTED:
                            logger.warning("content.too_many", extra={"listed": len(found)})
                            return found
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                path = f"{self._blobs}/{algorithm}"
                raise Unreadable(path, error.strerror or "unreadable") from error
        return found

    def look(self, digests: Iterable[Digest]) -> dict[Digest, FileState | None]:
        """Return the states of some blobs' files; None for those that are not there. Blocks."""
        return {digest: self.state_of(digest) for digest in digests}

    def state_of(self, digest: Digest) -> FileState | None:
        """Return the state of a blob's file; None if there is none that could be served. Blocks."""
        try:
            status = os.lstat(self.path_of(digest))
        except OSError:
            return None
        is_file = stat.S_ISREG(status.st_mode)
        return FileState.of(status) if is_file and 0 < status.st_size <= MAX_BLOB_SIZE else None

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[News]:
        """Hear of changes while the block lasts; they are heard of from its beginning.

        Raises `OSError` if the system has no more watches to give.
        """
        with Inotify(cache_size=_EVENTS_AT_ONCE) as inotify:
            news = News(await asyncio.to_thread(self._set_watches, inotify))
            async with cancelled_at_exit() as tasks:
                tasks.create_task(news.hear(inotify))
                yield news

    def _set_watches(self, inotify: Inotify) -> _Watched:
        """Watch the blobs, and the folders on the way to them as far as there are any."""
        watched = _Watched({}, {})
        for algorithm in _ALGORITHMS:
            if _add(inotify, self._blobs / algorithm, _ONE_FILE | _FOLDER_ITSELF):
                watched.blobs[self._blobs / algorithm] = algorithm
        for folder, awaited in ((self._blobs, _ALGORITHMS), (self._root, (self._blobs.name,))):
            if _add(inotify, folder, _WAY_THERE | _FOLDER_ITSELF):
                watched.ways[folder] = awaited
        if self._root not in watched.ways:
            # Nothing there yet: the deepest folder that exists will tell.
            for folder in self._root.parents:
                if _add(inotify, folder, _WAY_THERE | _FOLDER_ITSELF):
                    watched.ways[folder] = (self._root.relative_to(folder).parts[0],)
                    break
        return watched


@dataclass(frozen=True, slots=True)
class _Watched:
    blobs: dict[Path, str]
    """The folders with blobs, and the algorithm of their digests."""
    ways: dict[Path, tuple[str, ...]]
    """The folders that lead there, and the names in them that matter."""


class News:
    """What changed since it was last asked."""

    def __init__(self, watched: _Watched) -> None:
        self._watched = watched
        self._digests: set[Digest] = set()
        self._is_over = False
        self._came = asyncio.Event()

    async def next(self, timeout_s: float) -> set[Digest] | None:
        """Return the blobs whose files changed, none if nothing did for *timeout_s*.

        None if only a new watch and a new listing can tell.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._came.wait()
                await asyncio.sleep(_SETTLE_S)
        if self._is_over:
            return None
        self._came.clear()
        digests, self._digests = self._digests, set()
        return digests

    async def hear(self, inotify: Inotify) -> None:
        """Take in what the kernel tells, until it must be asked anew."""
        while not self._is_over:
            self._note(await inotify.get())

    def _note(self, event: Event) -> None:
        watch, name = event.watch, str(event.name or "")
        if watch is None or event.mask & _ENDS_IT:
            self._is_over = True
        elif (algorithm := self._watched.blobs.get(watch.path)) is not None:
            digest = _digest(algorithm, name)
            if digest is None:
                return
            self._digests.add(digest)
            self._is_over = len(self._digests) > _MAX_NEWS
        elif name in self._watched.ways[watch.path]:
            self._is_over = True
        else:
            return
        self._came.set()


def _add(inotify: Inotify, folder: Path, mask: Mask) -> bool:
    """Watch *folder*; False if there is none to be watched. Raises `OSError`."""
    try:
        inotify.add_watch(folder, mask)
    except OSError as error:
        # What may not be looked into is told by listing it.
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            return False
        raise
    return True


def _digest(algorithm: str, name: str) -> Digest | None:
    try:
        return Digest.parse(f"{algorithm}:{name}")
    except BadDigest:
        return None
