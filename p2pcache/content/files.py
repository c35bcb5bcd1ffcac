"""Files that belong to another program: what state they are in, and which of their bytes are right.

The rule: a proof is of one state of a file, and is void once the state is another. All of this
blocks, and belongs on a thread, except `OpenFile.is_in`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import xxhash

from p2pcache.core.errors import StoreError
from p2pcache.core.layout import FIXED_PIECE_SIZE, Layout
from p2pcache.core.model import Digest
from p2pcache.core.ranges import ByteRange

# Another program may put anything there: follow no link, wait for no pipe.
_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True, slots=True)
class FileState:
    """What changes when a file is written to or another one takes its place.

    The time of change cannot be set back by whoever writes to the file, as that of modification
    can.
    """

    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """The state that a stat(2) tells."""
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Proof:
    """A file in this state matched its digest; *hashes* has the xxh3_64 of each fixed piece."""

    state: FileState
    hashes: array[int]


class OpenFile:
    """A descriptor that lives as long as somebody refers to this. Raises `OSError`."""

    __slots__ = ("fd",)

    def __init__(self, path: str) -> None:
        self.fd = -1
        self.fd = os.open(path, _FLAGS)
        if not stat.S_ISREG(os.fstat(self.fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def is_in(self, state: FileState) -> bool:
        """Say whether it is still in *state*: its bytes are the same. Never waits."""
        try:
            status = os.fstat(self.fd)
        except OSError:  # A network file system may lose it.
            return False
        if not status.st_nlink:
            # Removed, which is a change, but not one of its bytes.
            return (status.st_ino, status.st_size, status.st_mtime_ns) == (
                state.inode,
                state.size,
                state.modified_ns,
            )
        return FileState.of(status) == state


class FileChanged(Exception):
    """The file was not in the state that it was expected in."""


def prove(
    path: str, digest: Digest, state: FileState, pause: Callable[[int], bool]
) -> Proof | None:
    """Read all of a file: its proof, or None if its bytes are not what *digest* names.

    *pause* is called after so many bytes; it may wait, and ends the work by returning False.
    Raises `FileChanged`, also when it was ended, and `OSError`.
    """
    file = OpenFile(path)
    if not file.is_in(state):
        raise FileChanged
    whole = hashlib.new(digest.algorithm)
    hashes = array("Q")
    buffer = memoryview(bytearray(min(FIXED_PIECE_SIZE, state.size)))
    for position in range(0, state.size, FIXED_PIECE_SIZE):
        piece = buffer[: min(FIXED_PIECE_SIZE, state.size - position)]
        if os.preadv(file.fd, (piece,), position) != len(piece) and not _fill(
            file, piece, position
        ):
            raise FileChanged
        whole.update(piece)
        hashes.append(xxhash.xxh3_64_intdigest(piece))
        if not pause(len(piece)):
            raise FileChanged
    if not file.is_in(state):
        raise FileChanged
    return Proof(state, hashes) if whole.hexdigest() == digest.encoded else None


def _fill(file: OpenFile, piece: memoryview, position: int) -> bool:
    """Read *piece* in as many steps as it takes; False if the file ends before."""
    done = 0
    while done < len(piece):
        count = os.preadv(file.fd, (piece[done:],), position + done)
        if not count:
            return False
        done += count
    return True


def read(
    file: OpenFile, layout: Layout, proof: Proof, part: ByteRange, unchecked: list[int]
) -> tuple[bytes, list[int]]:
    """Return *part*, and those of the pieces in *unchecked*, which it touches, that are rotten.

    The very bytes that were checked are returned. Raises `FileChanged`, and `StoreError`.
    """
    span = layout.span(layout.covering(part)) if unchecked else part
    rotten: list[int] = []
    try:
        buffer = memoryview(bytearray(len(span)))
        if not _fill(file, buffer, span.start):
            raise FileChanged
        for piece in unchecked:
            here = layout.range_of(piece)
            data = buffer[here.start - span.start : here.stop - span.start]
            if xxhash.xxh3_64_intdigest(data) != proof.hashes[piece]:
                rotten.append(piece)
        if not file.is_in(proof.state):
            raise FileChanged
    except OSError as error:
        if error.errno != errno.EIO:
            raise StoreError(f"cannot read: {error.strerror}") from error
        return b"", unchecked or list(layout.covering(part))  # A dead block is as good as rotten.
    return bytes(buffer[part.start - span.start : part.stop - span.start]), rotten
