"""Data files and the lock: the only code of the store that names paths or opens descriptors.

The rule: a descriptor is closed by whoever drops the last reference to it, so no thread ever reads
from a number that has come to mean another file.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Final

from p2pcache.core.model import Digest

# Descriptors that the writer keeps open: several blobs grow at once, each in many small writes.
_OPEN_FOR_WRITING: Final = 64
_ENCODED = re.compile(r"[0-9a-f]{64}|[0-9a-f]{128}", re.ASCII)


class OpenFile:
    """A descriptor that lives as long as somebody refers to this."""

    __slots__ = ("fd",)

    def __init__(self, path: str, flags: int) -> None:
        self.fd = -1
        self.fd = os.open(path, flags, 0o600)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class DataFiles:
    """One sparse file per blob. Everything that changes a file runs on the writer's thread."""

    def __init__(self, root: Path) -> None:
        self._root = root / "data"
        self._written: OrderedDict[Digest, OpenFile] = OrderedDict()

    def open(self, digest: Digest) -> OpenFile:
        """Open a blob for reading. Raises `OSError`."""
        return OpenFile(self._path_of(digest), os.O_RDONLY)

    def create(self, digest: Digest) -> None:
        """Make the blob's file, empty. Raises `OSError`."""
        self._written.pop(digest, None)
        self._open_for_writing(digest, os.O_TRUNC)

    def write(self, digest: Digest, data: bytes | memoryview, offset: int) -> None:
        """Put *data* at *offset*. Raises `OSError`, having written any part of it."""
        file = self._written.get(digest)
        if file is None:
            file = self._open_for_writing(digest, 0)
        else:
            self._written.move_to_end(digest)
        rest = memoryview(data)
        while rest:
            done = os.pwrite(file.fd, rest, offset)
            rest, offset = rest[done:], offset + done

    def remove(self, digest: Digest) -> None:
        """Unlink the blob's file. An absent one is no error; those who have it open read on."""
        self._written.pop(digest, None)
        Path(self._path_of(digest)).unlink(missing_ok=True)

    def encoded_names(self) -> set[str]:
        """The encoded digests of all blobs that have a file."""
        if not self._root.is_dir():
            return set()
        return {
            entry.name
            for folder in os.scandir(self._root)
            if folder.is_dir(follow_symlinks=False)
            for entry in os.scandir(folder.path)
            if _ENCODED.fullmatch(entry.name)
        }

    def close(self) -> None:
        """Let go of the writer's descriptors."""
        self._written.clear()

    def _path_of(self, digest: Digest) -> str:
        # The length tells sha256 from sha512.
        return f"{self._root}/{digest.encoded[:2]}/{digest.encoded}"

    def _open_for_writing(self, digest: Digest, flags: int) -> OpenFile:
        path = self._path_of(digest)
        try:
            file = OpenFile(path, os.O_RDWR | os.O_CREAT | flags)
        except FileNotFoundError:
            Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = OpenFile(path, os.O_RDWR | os.O_CREAT | flags)
        self._written[digest] = file
        if len(self._written) > _OPEN_FOR_WRITING:
            self._written.popitem(last=False)
        return file


class WriterLock:
    """Who may write a store directory. The kernel lets go of it when the process dies."""

    def __init__(self, root: Path) -> None:
        self._file: OpenFile | None = OpenFile(f"{root}/lock", os.O_RDWR | os.O_CREAT)

    def acquire(self) -> bool:
        """Take the lock if it is free; never waits. True if this process has it now."""
        if self._file is None:
            return False
        try:
            fcntl.flock(self._file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Give the lock up for good."""
        self._file = None
