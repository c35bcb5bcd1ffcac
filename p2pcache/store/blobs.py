"""One blob: what is known of its pieces, and reading, writing, proving and dropping them.

Hides the life of a piece. The rules: states change on the event loop only, after the change is
committed when bytes begin to count, and before the bytes change when they cease to; a piece has at
most one change under way; what is handed out was checked against its hash in this process.
"""

from __future__ import annotations

import asyncio
import errno
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

from p2pcache.core.errors import StoreCorrupt, StoreError, StoreFull, StoreLacksPiece
from p2pcache.core.layout import PieceMask, PieceState
from p2pcache.core.ranges import ByteRange
from p2pcache.store.catalog import BlobRecord, Catalog
from p2pcache.store.disk import PATIENCE_S, committed
from p2pcache.store.files import OpenFile
from p2pcache.store.owner import Owner
from p2pcache.store.rot import CheckedFile, Prefix, piece_hash
from p2pcache.store.writer import Job, Row

# A piece that was checked so recently is not hashed again: rot is slow, reads are not.
RECHECK_AFTER_S: Final = 60.0
# Slower than this, even reading a whole blob to prove it counts as a disk that hangs.
_SLOWEST_DISK: Final = 5 << 20
# Above this, copying on the event loop would hold up everybody else (1 MiB: some 100 µs).
READ_NOW_LIMIT: Final = 1 << 20
# How far apart the pages are that stand for all when a file is sent without copying.
_RESIDENT_STRIDE: Final = 64 << 10
_NEVER: Final = float("-inf")
_HELD: Final = int(PieceState.HELD_UPSTREAM)
# Which bytes are worth more: a write never replaces a piece by one of the same or a lower rank.
_RANK: Final = (0, 2, 1, 3, 3)


class StoredBlob:
    """The pieces of one blob on disk."""

    __slots__ = (
        "__weakref__",
        "_busy",
        "_changes",
        "_checked_until",
        "_count",
        "_file",
        "_hashes",
        "_hashing",
        "_masks",
        "_owner",
        "_prefix",
        "_proving",
        "_starts",
        "_states",
        "_whole",
        "digest",
        "is_gone",
        "last_used",
        "layout",
        "pins",
        "room",
        "row",
        "toc_digest",
    )

    def __init__(self, owner: Owner, row: Row, record: BlobRecord) -> None:
        self._owner = owner
        self.row = row
        self.digest = record.digest
        self.layout = record.layout
        self.toc_digest = record.toc_digest
        self.last_used = record.used
        self.pins = 0
        """Eviction keeps off while this is above zero."""
        self.room = record.stored()
        """The bytes that count against the budget: stored, or being written."""
        self.is_gone = False
        """Evicted, forgotten or replaced: everything is absent, nothing can be written."""
        self._count = record.layout.count
        self._starts = record.layout.starts
        self._hashes = record.hashes
        self._states = record.states
        self._whole = record.is_whole
        self._checked_until = array("d", (_NEVER,)) * self._count
        self._file: OpenFile | None = None
        self._masks: dict[tuple[PieceState, ...], PieceMask] = {}
        self._busy: dict[int, asyncio.Future[StoreFull | None]] = {}
        self._proving: asyncio.Future[None] | None = None
        self._prefix: Prefix | None = None
        self._hashing = False
        # Counts what puts bytes in doubt that have been read already.
        self._changes = 0

    def __repr__(self) -> str:
        return f"<StoredBlob {self.digest.short} {len(self.held)}/{self._count}>"

    @property
    def is_whole(self) -> bool:
        """Its own digest matched: every byte is proven, bit for bit."""
        return self._whole

    @property
    def is_complete(self) -> bool:
        """Every piece is on disk, proven or not."""
        return 0 not in self._states and not self.is_gone

    @property
    def held(self) -> PieceMask:
        """The proven pieces: all of them if whole."""
        return self.pieces_in(PieceState.HELD_UPSTREAM, PieceState.HELD_PEER)

    def pieces_in(self, *states: PieceState) -> PieceMask:
        """The pieces in any of *states*."""
        mask = self._masks.get(states)
        if mask is None:
            digits = bytearray(b"0" * 256)
            for state in states:
                digits[state] = 0x31
            # As a number in base two, the last piece is its first digit.
            bits = int(self._states[::-1].translate(digits), 2) if self._count else 0
            mask = self._masks[states] = PieceMask(self._count, bits)
        return mask

    def state_of(self, piece: int) -> PieceState:
        """The state of one piece."""
        return PieceState(self._states[piece])

    def hash_of(self, piece: int) -> int:
        """The xxh3_64 of a present piece."""
        return self._hashes[piece]

    @contextmanager
    def reading(self) -> Iterator[StoredBlob]:
        """While open, the blob is not evicted."""
        self.pin()
        try:
            yield self
        finally:
            self.unpin()

    def pin(self) -> None:
        """Keep eviction off until `unpin`."""
        self.pins += 1
        if self.pins == 1:
            self._owner.note_pinned(self)

    def unpin(self) -> None:
        """The end of one `pin`."""
        self.pins -= 1
        if not self.pins:
            self._owner.note_unpinned(self)

    def read_held_now(self, start: int, stop: int) -> bytes | None:
        """Return held bytes without waiting, or None if that takes a disk or a check."""
        file = self._file
        size = stop - start
        if file is None or size > READ_NOW_LIMIT or not self._is_checked(start, stop):
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
        """Return a descriptor to send held bytes from before the caller next waits, or None."""
        file = self._file
        owner = self._owner
        if file is None or not owner.read_flags or not self._is_checked(start, stop):
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

    def _is_checked(self, start: int, stop: int) -> bool:
        """Say whether these bytes are held, and were checked not long ago: a use of the blob."""
        now = self._owner.clock()
        starts, states, checked_until = self._starts, self._states, self._checked_until
        piece = bisect_right(starts, start) - 1
        if checked_until[piece] < now or states[piece] < _HELD:
            return False
        piece += 1
        while piece < self._count and starts[piece] < stop:
            if checked_until[piece] < now or states[piece] < _HELD:
                return False
            piece += 1
        self.last_used = now
        return True

    async def read(self, part: ByteRange, *, staged: bool = False) -> bytes:
        """Return bytes whose pieces are present, checked against their hashes.

        Staged pieces only if *staged*. Raises `StoreCorrupt` after dropping a rotten piece,
        `StoreLacksPiece` if one is not there, `StoreError` if the disk fails.
        """
        pieces = self.layout.covering(part)
        lowest = 1 if staged else _HELD
        with self.reading():
            while True:
                for piece in pieces:
                    if self._states[piece] < lowest:
                        raise StoreLacksPiece(str(self.digest), piece)
                now = self.last_used = self._owner.clock()
                unchecked = [p for p in pieces if self._checked_until[p] < now]
                before = self._hashes[pieces.start : pieces.stop]
                changes = self._changes
                file = await self._opened()
                data, rotten = await self._owner.disk.in_thread(
                    partial(file.read, part, pieces, unchecked)
                )
                if (
                    changes == self._changes
                    and before == self._hashes[pieces.start : pieces.stop]
                    and min(self._states[pieces.start : pieces.stop]) >= lowest
                ):
                    break
                # A piece was dropped or replaced meanwhile: these bytes may be a mixture. A piece
                # changes a few times in its life, so this ends.
            if rotten:
                self._owner.note_rot(self, rotten)
                await self.drop(rotten)
                raise StoreCorrupt(str(self.digest), rotten[0])
            self._note_checked(unchecked, now)
            return data

    async def write(self, piece: int, data: bytes | memoryview, state: PieceState) -> None:
        """Store a piece; it survives a crash once this returns.

        What is there stays if it is worth as much: held pieces always, staged ones unless *state*
        is a better one. *data* must not change until this returns, or was cancelled and is settled.
        Raises `StoreFull`.
        """
        part = self.layout.range_of(piece)
        if len(data) != len(part) or state is PieceState.ABSENT:
            raise ValueError(f"{len(data)} bytes, {state.name} for {part}")
        owner = self._owner
        await owner.disk.admit()
        try:
            await self._until_settled(lambda: self._busy.get(piece))
            old = self._states[piece]
            if _RANK[state] <= _RANK[old]:
                owner.disk.leave()
                return
            if self.is_gone:
                raise StoreFull("the blob was evicted")
            # A blob that is being written is pinned: room never comes from itself.
            self.pin()
            try:
                owner.disk.require_writer()
                if not old:
                    owner.take_room(len(part), self)
            except StoreFull:
                self.unpin()
                raise
            change = owner.disk.submit(self._write_job(piece, part, data, state))
        except BaseException:
            owner.disk.leave()
            raise
        if old:
            self._set_absent([piece])
        self._busy[piece] = change
        await committed(change)

    def _write_job(
        self, piece: int, part: ByteRange, data: bytes | memoryview, state: PieceState
    ) -> Job:
        row, files, digest = self.row, self._owner.disk.files, self.digest
        hash_ = 0

        def run(catalog: Catalog) -> None:
            nonlocal hash_
            if not row.is_open:
                raise OSError(errno.EIO, "the blob could not be entered")
            hash_ = piece_hash(data)
            files.write(digest, data, part.start)
            catalog.put_piece(row.number, piece, hash_, state)

        def settle(error: StoreFull | None) -> None:
            self.unpin()
            self._owner.disk.leave()
            del self._busy[piece]
            if self.is_gone:
                return
            if error is not None:
                self._owner.give_room(len(part), self)
                return
            self._hashes[piece] = hash_
            self._states[piece] = state
            self._masks.clear()
            self.last_used = self._owner.clock()
            self._note_checked([piece], self.last_used)

        return Job(run, settle, weight=len(data))

    async def confirm_whole(self) -> bool:
        """Check the digest of a blob whose pieces are all present, and mark it whole if right.

        False changes nothing: what to drop is for the caller to decide. Raises `StoreLacksPiece`,
        `StoreCorrupt` if the disk and not the sender spoiled a piece, and `StoreFull`.
        """
        with self.reading():
            await self._until_settled(lambda: next(iter(self._busy.values()), None))
            if self._whole:
                return True
            self._owner.disk.require_writer()
            if (lacking := self._states.find(0)) >= 0 or self.is_gone:
                raise StoreLacksPiece(str(self.digest), max(lacking, 0))
            # Writes to this blob wait: what is hashed is what becomes held.
            proving = self._proving = asyncio.get_running_loop().create_future()
            try:
                return await self._prove()
            finally:
                self._proving = None
                proving.set_result(None)

    async def _prove(self) -> bool:
        file = await self._opened()
        start = self._prefix or Prefix.empty(self.digest)
        whole, rotten = await self._owner.disk.in_thread(
            lambda: file.hash_on(start, self._count),
            patience_s=PATIENCE_S + self.layout.size / _SLOWEST_DISK,
        )
        if (lacking := self._states.find(0)) >= 0 or self.is_gone:  # `drop` does not wait for us.
            raise StoreLacksPiece(str(self.digest), max(lacking, 0))
        if rotten:
            self._owner.note_rot(self, rotten)
            await self.drop(rotten)
            raise StoreCorrupt(str(self.digest), rotten[0])
        # What was hashed ahead was checked then, and not now.
        self._note_checked(range(start.pieces, self._count), self._owner.clock())
        self._prefix = None
        if not whole.is_all_of(self.digest):
            return False
        row = self.row

        def run(catalog: Catalog) -> None:
            if not row.is_open:
                raise OSError(errno.EIO, "the blob could not be entered")
            catalog.mark_whole(row.number)

        def settle(error: StoreFull | None) -> None:
            if error is not None or self.is_gone:
                return
            # Pieces that were dropped since are absent by now: the rest is proven all the same.
            for piece, state in enumerate(self._states):
                if 0 < state < _HELD:
                    self._states[piece] = state + 2
            self._whole = 0 not in self._states
            self._masks.clear()

        await committed(self._owner.disk.submit(Job(run, settle)))
        return self._whole

    async def hash_ahead(self) -> None:
        """Hash the pieces that have come so far, from the first on without a gap.

        Spares `confirm_whole` reading them again, and its caller the wait. Raises `StoreError`.
        """
        if self._hashing or self._proving or self._whole:
            return
        start = self._prefix or Prefix.empty(self.digest)
        present = PieceMask.full(self._count) - self.pieces_in(PieceState.ABSENT)
        stop = present.run_length(0)
        if stop == self._count or stop <= start.pieces:
            return
        self._hashing = True
        changes, now = self._changes, self._owner.clock()
        try:
            with self.reading():
                file = await self._opened()
                reached, rotten = await self._owner.disk.in_thread(
                    lambda: file.hash_on(start, stop)
                )
        finally:
            self._hashing = False
        if not rotten and changes == self._changes and not self._proving:
            self._prefix = reached
            self._note_checked(range(start.pieces, stop), now)

    async def drop(self, pieces: Iterable[int]) -> None:
        """Forget *pieces*. Absent ones are no error."""
        wanted = set(pieces)
        await self._until_settled(
            lambda: next((f for p, f in self._busy.items() if p in wanted), None), proof=False
        )
        present = [piece for piece in sorted(wanted) if self._states[piece]]
        if not present:
            return
        self._whole = False
        self._set_absent(present)
        self._owner.note_dropped(sum(len(self.layout.range_of(p)) for p in present), self)
        if not self._owner.disk.is_writer:
            return
        row = self.row

        def run(catalog: Catalog) -> None:
            catalog.remove_pieces(row.number, present)

        def cleanup(error: StoreFull | None) -> None:
            # The rows must be gone before other bytes take the place of these. If they are not,
            # nothing more is written here, until a restart finds what does not match.
            row.is_open = row.is_open and error is None

        try:
            await committed(self._owner.disk.submit(Job(run, lambda error: None, cleanup=cleanup)))
        except StoreFull:
            return  # Dropped as far as anybody can see; the hash finds it after a restart.

    def vanish(self) -> None:
        """It is no longer in the store. Called on the event loop, by the store."""
        self.is_gone = True
        self._whole = False
        self._set_absent(range(self._count))
        self._changes += 1
        self._file = None

    def refresh(self, record: BlobRecord) -> None:
        """Take over what another process committed; nothing of it was checked by this one."""
        self._states, self._hashes, self._whole = record.states, record.hashes, record.is_whole
        self.room = record.stored()
        self._masks.clear()
        self.forget_checks()

    def forget_checks(self) -> None:
        """Somebody else may change the bytes from now on: check at every read."""
        self._changes += 1
        self._prefix = None
        self._checked_until = array("d", (_NEVER,)) * self._count

    def close_file(self) -> None:
        """Let the descriptor go. Threads that read from it keep it open until they are done."""
        self._file = None

    @property
    def has_file(self) -> bool:
        """A descriptor is open."""
        return self._file is not None

    def _set_absent(self, pieces: Iterable[int]) -> None:
        self._changes += 1
        self._prefix = None
        for piece in pieces:
            self._states[piece] = 0
            self._checked_until[piece] = _NEVER
        self._masks.clear()

    def _note_checked(self, pieces: Iterable[int], now: float) -> None:
        # Without the lock, another process may change the bytes after any check.
        if self._owner.disk.is_writer:
            for piece in pieces:
                self._checked_until[piece] = now + RECHECK_AFTER_S

    async def _until_settled(
        self, find: Callable[[], asyncio.Future[StoreFull | None] | None], *, proof: bool = True
    ) -> None:
        """Wait until *find* finds no change under way, nor a proof if that matters.

        Raises `StoreFull`.
        """
        while (change := (self._proving if proof else None) or find()) is not None:
            done, _ = await asyncio.wait((change,), timeout=PATIENCE_S)
            if not done:
                raise StoreFull("a change of the blob is still under way")

    async def _opened(self) -> CheckedFile:
        if (file := self._file) is None:
            try:
                file = await self._owner.disk.in_thread(
                    lambda: self._owner.disk.files.open(self.digest)
                )
            except FileNotFoundError as error:
                self._owner.lose(self)
                raise StoreLacksPiece(str(self.digest), 0, "has lost its file") from error
            except OSError as error:
                raise StoreError(f"cannot open {self.digest}: {error.strerror}") from error
            if not self.is_gone:
                self._file = file
                self._owner.note_open(self)
        return CheckedFile(file, self.layout, self._hashes)
