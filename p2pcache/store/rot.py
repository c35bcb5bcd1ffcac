"""Which bytes of a data file are those that were written.

Hides the hash, and how the blame for a bad read is laid on pieces. The rule: the very bytes that
were checked are handed out; nothing is read again after the check. All of this blocks, and belongs
on a thread.
"""

from __future__ import annotations

import errno
import hashlib
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import xxhash

from p2pcache.core.errors import StoreError
from p2pcache.core.layout import Layout
from p2pcache.core.model import Digest
from p2pcache.core.ranges import ByteRange
from p2pcache.store.files import OpenFile

_DIGEST_BLOCK: Final = 4 << 20


def piece_hash(data: bytes | memoryview) -> int:
    """Return the xxh3_64 of a piece."""
    return xxhash.xxh3_64_intdigest(data)


@dataclass(frozen=True, slots=True)
class Prefix:
    """The hash of a blob's first *pieces*, so that it need not be read from the start again."""

    hash: hashlib._Hash
    pieces: int = 0

    @classmethod
    def empty(cls, digest: Digest) -> Prefix:
        """Nothing has been hashed yet."""
        return cls(hashlib.new(digest.algorithm))

    def is_all_of(self, digest: Digest) -> bool:
        """What was hashed has *digest*."""
        return self.hash.hexdigest() == digest.encoded


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """A blob's file beside the *hashes* that its pieces should have, one per piece.

    Methods raise `StoreError`, but not for a dead block: the piece is as good as rotten.
    """

    file: OpenFile
    layout: Layout
    hashes: array[int]

    def read(self, part: ByteRange, pieces: range, unchecked: list[int]) -> tuple[bytes, list[int]]:
        """Return *part*, which lies in *pieces*, and those of *unchecked* that are rotten."""
        if not unchecked:
            data = self._pread(part)
            # Shorter than it should be: find out where.
            return data, [] if len(data) == len(part) else self._find_rot(pieces)
        # Whole pieces, read once: what is checked is what is handed out.
        span = self.layout.span(pieces)
        data = self._pread(span)
        if len(data) != len(span):
            return b"", self._find_rot(pieces)
        rotten = self._rotten(memoryview(data), span.start, unchecked)
        if len(span) == len(part):
            return data, rotten
        return data[part.start - span.start : part.stop - span.start], rotten

    def hash_on(self, prefix: Prefix, stop: int) -> tuple[Prefix, list[int]]:
        """Read on from *prefix* to piece *stop*: the longer prefix, and which pieces are rotten."""
        whole = prefix.hash.copy()
        rotten = []
        for pieces in _runs(self.layout, range(prefix.pieces, stop), _DIGEST_BLOCK):
            span = self.layout.span(pieces)
            data = memoryview(self._pread(span))
            whole.update(data)
            rotten += self._rotten(data, span.start, pieces)
        return Prefix(whole, stop), rotten

    def _find_rot(self, pieces: range) -> list[int]:
        """Say which of *pieces*, read one by one, are to blame for a read that came short."""
        return [
            piece
            for piece in pieces
            if self._rotten(
                memoryview(self._pread(part := self.layout.range_of(piece))), part.start, (piece,)
            )
        ] or list(pieces)

    def _rotten(self, data: memoryview, base: int, pieces: Iterable[int]) -> list[int]:
        """Those of *pieces* that do not match their hash, *data* being the bytes from *base* on."""
        wrong = []
        for piece in pieces:
            part = self.layout.range_of(piece)
            stored = data[part.start - base : part.stop - base]
            if len(stored) != len(part) or piece_hash(stored) != self.hashes[piece]:
                wrong.append(piece)
        return wrong

    def _pread(self, part: ByteRange) -> bytes:
        """Read *part*: shorter where the file ends or the disk cannot read on."""
        fd = self.file.fd
        try:
            data = os.pread(fd, len(part), part.start)
            while data and len(data) < len(part):
                more = os.pread(fd, len(part) - len(data), part.start + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            if error.errno != errno.EIO:
                raise StoreError(f"cannot read: {error.strerror}") from error
            return b""
        return data


def _runs(layout: Layout, wanted: range, size: int) -> Iterator[range]:
    """Cut the *wanted* pieces into runs of about *size* bytes, at least one piece each."""
    first = wanted.start
    while first < wanted.stop:
        stop = layout.starts[first] + size
        after = bisect_right(layout.starts, stop) - 1 if stop < layout.size else layout.count
        after = min(max(after, first + 1), wanted.stop)
        yield range(first, after)
        first = after
