"""One blob in a content store, as the mirror reads it.

The rules: it is whole or it is gone, there is nothing in between; what is handed out was checked in
this process not long ago, in a file that has not changed since it was proven. A blob that is gone
for others is read on to the end by those who have begun, as long as its file is open.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final, Protocol, TypeVar

from p2pcache.content.files import FileChanged, OpenFile, Proof, read
from p2pcache.core.errors import StoreCorrupt, StoreError, StoreFull, StoreLacksPiece
from p2pcache.core.layout import FIXED_PIECE_SIZE, Layout, PieceMask, PieceState
from p2pcache.core.model import Digest
from p2pcache.core.ranges import ByteRange

# A piece that was checked so recently is not hashed again: rot is slow, reads are not.
RECHECK_AFTER_S: Final = 60.0
# So often, while it is read at once, the file is looked at for changes: 1 µs each time.
LOOK_AFTER_S: Final = 1.0
# Above this, copying on the event loop would hold up everybody else (1 MiB: some 100 µs).
READ_NOW_LIMIT: Final = 1 << 20
# How far apart the pages are that stand for all when a file is sent without copying.
_RESIDENT_STRIDE: Final = 64 << 10
_NEVER: Final = float("-inf")
_HELD: Final = PieceState.HELD_UPSTREAM

T = TypeVar("T")


class Owner(Protocol):
    """What a blob needs of the content that it belongs to."""

    clock: Callable[[], float]
    scratch: memoryview
    read_flags: int

    def path_of(self, digest: Digest) -> str:
        """The blob's file."""

    async def in_thread(self, call: Callable[[], T]) -> T:
        """Run *call* on a thread. Raises `StoreError` if it takes too long."""

    def note_open(self, blob: ContentBlob) -> None:
        """The blob has a descriptor open now."""

    def note_closed(self, blob: ContentBlob) -> None:
        """It has none any more."""

    def lose(self, blob: ContentBlob) -> None:
        """Its file is not there any more, or not what was proven."""

    def note_rot(self, blob: ContentBlob, pieces: list[int]) -> None:
        """Pieces did not match their hash: the file is of no use until it changes."""


class ContentBlob:
    """A whole blob that lies in another program's folder: a `StoredBlob` that is never written."""

    __slots__ = (
        "__weakref__",
        "_checked_until",
        "_file",
        "_full",
        "_is_removed",
        "_look_at",
        "_owner",
        "digest",
        "is_gone",
        "last_used",
        "layout",
        "pins",
        "proof",
        "since",
        "toc_digest",
    )

    def __init__(self, owner: Owner, digest: Digest, proof: Proof) -> None:
        self._owner = owner
        self.digest = digest
        self.layout = Layout.fixed(proof.state.size)
        self.toc_digest: Digest | None = None
        self.proof = proof
        self.since = self.last_used = owner.clock()
        """*since*: found from then on, on this machine's monotonic clock."""
        self.pins = 0
        self.is_gone = False
        """Nothing of it is held any more."""
        self._is_removed = False
        self._full = PieceMask.full(self.layout.count)
        self._checked_until = array("d", (_NEVER,)) * self.layout.count
        self._look_at = _NEVER
        self._file: OpenFile | None = None

    def __repr__(self) -> str:
        return f"<ContentBlob {self.digest.short} {'gone' if self.is_gone else 'whole'}>"

    @property
    def is_whole(self) -> bool:
        """Its own digest matched: every byte is proven, bit for bit."""
        return not self.is_gone

    @property
    def is_complete(self) -> bool:
        """Every piece is there."""
        return not self.is_gone

    @property
    def held(self) -> PieceMask:
        """The proven pieces: all, or none if it is gone."""
        return PieceMask(self.layout.count) if self.is_gone else self._full

    def pieces_in(self, *states: PieceState) -> PieceMask:
        """The pieces in any of *states*."""
        state = PieceState.ABSENT if self.is_gone else _HELD
        return self._full if state in states else PieceMask(self.layout.count)

    def state_of(self, piece: int) -> PieceState:
        """The state of one piece."""
        return PieceState.ABSENT if self.is_gone else _HELD

    def hash_of(self, piece: int) -> int:
        """The xxh3_64 of a piece."""
        return self.proof.hashes[piece]

    @contextmanager
    def reading(self) -> Iterator[ContentBlob]:
        """While open, the blob keeps its descriptor, even if its file is removed."""
        self.pins += 1
        try:
            yield self
        finally:
            self.pins -= 1
            if self._is_removed and not self.pins:
                self.vanish()

    def read_held_now(self, start: int, stop: int) -> bytes | None:
        """Return the bytes without waiting, or None if that takes a disk or a check."""
        size = stop - start
        if size > READ_NOW_LIMIT or (file := self._checked(start, stop)) is None:
            return None
        owner = self._owner
        view = owner.scratch[:size]
        try:
            if os.preadv(file.fd, (view,), start, owner.read_flags) != size:
                return None
        except BlockingIOError:
            return None  # Not in the page cache.
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL) or not owner.read_flags:
                return None  # The waiting way finds out what is wrong.
            owner.read_flags = 0  # A file system without RWF_NOWAIT: rather wait than hop threads.
            return self.read_held_now(start, stop)
        return bytes(view)

    def file_held_now(self, start: int, stop: int) -> int | None:
        """Return a descriptor to send the bytes from before the caller next waits, or None."""
        owner = self._owner
        if not owner.read_flags or (file := self._checked(start, stop)) is None:
            return None
        # A look at some of the pages: what was read or written together is let go of together.
        byte = owner.scratch[:1]
        try:
            for position in (*range(start, stop, _RESIDENT_STRIDE), stop - 1):
                if not os.preadv(file.fd, (byte,), position, owner.read_flags):
                    return None
        except OSError:
            return None  # Not in the page cache, or worse: the waiting way finds out.
        return file.fd

    def _checked(self, start: int, stop: int) -> OpenFile | None:
        """Return the file if these bytes were checked not long ago: a use of the blob."""
        file = self._file
        if file is None:
            return None
        now = self._owner.clock()
        checked_until = self._checked_until
        for piece in range(start // FIXED_PIECE_SIZE, (stop - 1) // FIXED_PIECE_SIZE + 1):
            if checked_until[piece] < now:
                return None
        if self._look_at < now:
            if not file.is_in(self.proof.state):
                self._owner.lose(self)
                return None
            self._look_at = now + LOOK_AFTER_S
        self.last_used = now
        return file

    async def read(self, part: ByteRange, *, staged: bool = False) -> bytes:
        """Return bytes, checked against the hashes of their pieces. *staged* changes nothing.

        Raises `StoreCorrupt` if a piece is rotten, `StoreLacksPiece` if the file is not there any
        more or has changed, `StoreError` if the disk fails.
        """
        pieces = self.layout.covering(part)
        with self.reading():
            if self.is_gone:
                raise StoreLacksPiece(str(self.digest), pieces.start)
            now = self.last_used = self._owner.clock()
            unchecked = [piece for piece in pieces if self._checked_until[piece] < now]
            file = await self._opened()
            call = partial(read, file, self.layout, self.proof, part, unchecked)
            try:
                data, rotten = await self._owner.in_thread(call)
            except FileChanged:
                self._owner.lose(self)
                raise StoreLacksPiece(str(self.digest), pieces.start, "has changed") from None
            if rotten:
                self._owner.note_rot(self, rotten)
                raise StoreCorrupt(str(self.digest), rotten[0])
            for piece in unchecked:
                self._checked_until[piece] = now + RECHECK_AFTER_S
            return data

    async def write(self, piece: int, data: bytes, state: PieceState) -> None:
        """Do nothing, since all is held. Raises `StoreFull` once it is gone."""
        if self.is_gone:
            raise StoreFull(f"{self.digest} has left the content store")

    async def hash_ahead(self) -> None:
        """Do nothing: it was hashed before anybody could find it."""

    async def confirm_whole(self) -> bool:
        """True: it was found whole before anybody could ask. Raises `StoreLacksPiece` if gone."""
        if self.is_gone:
            raise StoreLacksPiece(str(self.digest), 0)
        return True

    async def drop(self, pieces: Iterable[int]) -> None:
        """Take the whole file out of use until it changes. No pieces are no error."""
        dropped = sorted(pieces)
        if dropped and not self.is_gone:
            self._owner.note_rot(self, dropped)

    def remove(self) -> None:
        """Its file was removed: only those who have begun to read it read on."""
        self._is_removed = True
        if self._file is None or not self.pins:
            self.vanish()

    def vanish(self) -> None:
        """Nothing of it is held from now on."""
        self.is_gone = True
        self.close_file()

    def close_file(self) -> None:
        """Let the descriptor go. Threads that read from it keep it open until they are done."""
        if self._file is not None:
            self._file = None
            self._owner.note_closed(self)

    async def _opened(self) -> OpenFile:
        if (file := self._file) is not None:
            return file
        path = self._owner.path_of(self.digest)
        try:
            file = await self._owner.in_thread(partial(OpenFile, path))
        except FileNotFoundError as error:
            self._owner.lose(self)
            raise StoreLacksPiece(str(self.digest), 0, "is not there any more") from error
        except OSError as error:
            raise StoreError(f"cannot open {self.digest}: {error.strerror}") from error
        if not self.is_gone:
            # It may be another file than the one that was checked: to be looked at before use.
            self._look_at = _NEVER
            self._file = file
            self._owner.note_open(self)
        return file
