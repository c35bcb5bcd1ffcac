"""How a blob is cut into pieces, and sets of those pieces.

A piece is the unit of fetching, proving, storing and sharing. The rule that every node keeps:
a blob's pieces cover it in order without gaps, and depend on nothing but the blob itself, so that
all nodes number them alike.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Final

from p2pcache.core.ranges import ByteRange

FIXED_PIECE_SIZE: Final = 1 << 20


class LayoutKind(Enum):
    """The rule that cut the blob."""

    TOC = "toc"
    """Along the members that an eStargz or zstd:chunked table of contents lists."""
    FIXED = "fixed"
    """Into pieces of one size: anything without a trusted table of contents."""


class PieceState(IntEnum):
    """What the store has of a piece, and where it came from."""

    ABSENT = 0
    STAGED_UPSTREAM = 1
    """On disk, read from the upstream by this node, not proven: served, never advertised."""
    STAGED_PEER = 2
    """On disk, from a peer, not proven: neither served nor advertised."""
    HELD_UPSTREAM = 3
    """Proven, and bit for bit what the upstream sent."""
    HELD_PEER = 4
    """Every chunk in it is proven; the bytes around the chunks are a peer's."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The pieces of one blob: piece *i* is the bytes from ``starts[i]`` to the next start."""

    kind: LayoutKind
    size: int
    starts: Sequence[int] = field(repr=False)

    def __post_init__(self) -> None:
        if self.size < 0 or (self.size == 0) != (len(self.starts) == 0):
            raise ValueError(f"not a layout: {len(self.starts)} pieces for {self.size} bytes")
        if self.starts and (self.starts[0] != 0 or self.starts[-1] >= self.size):
            raise ValueError("not a layout: pieces must start at 0 and end within the blob")

    @classmethod
    def fixed(cls, size: int) -> Layout:
        """Cut *size* bytes into pieces of 1 MiB."""
        return cls(LayoutKind.FIXED, size, array("Q", range(0, size, FIXED_PIECE_SIZE)))

    @property
    def count(self) -> int:
        """How many pieces there are."""
        return len(self.starts)

    def range_of(self, piece: int) -> ByteRange:
        """The bytes of *piece*."""
        stop = self.starts[piece + 1] if piece + 1 < len(self.starts) else self.size
        return ByteRange(self.starts[piece], stop)

    def span(self, pieces: range) -> ByteRange:
        """The bytes of the consecutive *pieces*, at least one."""
        return ByteRange(self.starts[pieces.start], self.range_of(pieces.stop - 1).stop)

    def covering(self, wanted: ByteRange) -> range:
        """The pieces that hold the *wanted* bytes, which must lie within the blob."""
        if wanted.stop > self.size:
            raise ValueError(f"{wanted} reaches past {self.size} bytes")
        first = bisect_right(self.starts, wanted.start) - 1
        last = bisect_right(self.starts, wanted.stop - 1) - 1
        return range(first, last + 1)


@dataclass(frozen=True, slots=True)
class PieceMask:
    """A set of piece numbers below *count*: bit *i* of *bits* stands for piece *i*."""

    count: int
    bits: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.bits < (1 << self.count):
            raise ValueError(f"not a mask of {self.count} pieces")

    @classmethod
    def full(cls, count: int) -> PieceMask:
        """All *count* pieces."""
        return cls(count, (1 << count) - 1)

    @classmethod
    def of(cls, count: int, pieces: Iterable[int]) -> PieceMask:
        """The given *pieces*."""
        flags = bytearray((count + 7) // 8)
        for piece in pieces:
            flags[piece >> 3] |= 1 << (piece & 7)
        return cls(count, int.from_bytes(flags, "little"))

    @classmethod
    def from_bytes(cls, count: int, data: bytes) -> PieceMask:
        """The inverse of `to_bytes`. Raises `ValueError` if *data* does not fit *count*."""
        if len(data) != (count + 7) // 8:
            raise ValueError(f"{len(data)} bytes are not a mask of {count} pieces")
        return cls(count, int.from_bytes(data, "little"))

    def to_bytes(self) -> bytes:
        """Little-endian bits, one per piece, padded to whole bytes."""
        return self.bits.to_bytes((self.count + 7) // 8, "little")

    def __contains__(self, piece: int) -> bool:
        return bool(self.bits >> piece & 1)

    def __len__(self) -> int:
        return self.bits.bit_count()

    def __or__(self, other: PieceMask) -> PieceMask:
        return PieceMask(self.count, self.bits | other.bits)

    def __and__(self, other: PieceMask) -> PieceMask:
        return PieceMask(self.count, self.bits & other.bits)

    def __sub__(self, other: PieceMask) -> PieceMask:
        return PieceMask(self.count, self.bits & ~other.bits)

    def __iter__(self) -> Iterator[int]:
        bits = self.bits
        while bits:
            low = bits & -bits
            yield low.bit_length() - 1
            bits ^= low

    @property
    def is_full(self) -> bool:
        """Every piece is in it."""
        return self.bits == (1 << self.count) - 1

    def run_length(self, first: int) -> int:
        """How many consecutive pieces from *first* on are in it."""
        lacking = ~(self.bits >> first)
        return (lacking & -lacking).bit_length() - 1

    def covers(self, pieces: range) -> bool:
        """All of the consecutive *pieces* are in it."""
        wanted = (1 << len(pieces)) - 1
        return (self.bits >> pieces.start) & wanted == wanted
