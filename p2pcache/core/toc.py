"""The table of contents of a lazily pullable layer: where its members are and what is in them.

Hides the TOC's JSON and how the stargz snapshotter reads it (``estargz.md``, and ``initFields`` of
its Go library). The rule: a `Toc` that exists has been checked. Its members are in order and do not
overlap, every chunk has a digest, and nothing in it is too large to prove in bounded memory.
Whatever cannot be brought into this form is a `FormatError`: the blob is then served like any
other, in pieces of one size.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import msgspec

from p2pcache.core import estargz, zstdchunked
from p2pcache.core.errors import FormatError
from p2pcache.core.layout import Layout, LayoutKind
from p2pcache.core.model import Digest
from p2pcache.core.ranges import ByteRange

FOOTER_PROBE_SIZE: Final = estargz.FOOTER_SIZE
"""How many of a blob's last bytes `find_footer` wants: its longest footer."""

MIN_GROUP_SIZE: Final = 16 << 10
"""Members are grouped until a piece has this many bytes.

A client reads in blocks of its own size, which rarely end where pieces end: what it reads beyond
need grows with the pieces. A start-up of 8.1 MB in 50 requests fetched 1.34 times that with 64 KiB,
1.25 with 32 KiB, 1.19 with 16 KiB and 1.18 with 8 KiB, for about twice the pieces each time.
"""

# Bounds. Past them a blob is not refused, it only loses its TOC layout.
MAX_TOC_COMPRESSED: Final = 64 << 20
MAX_TOC_INFLATED: Final = 512 << 20
MAX_MEMBER_SIZE: Final = 32 << 20
MAX_CHUNK_SIZE: Final = 64 << 20
MAX_MEMBER_INFLATED: Final = 256 << 20
# Entries, and their xattrs. While a TOC is parsed an entry takes up to 400 bytes.
MAX_OBJECTS: Final = 1 << 20


class Compression(Enum):
    """How the members are compressed."""

    GZIP = "gzip"
    ZSTD = "zstd"


@dataclass(frozen=True, slots=True)
class Chunk:
    """File data that has a digest: *size* bytes at *inner_offset* of its member's inflated data."""

    digest: Digest
    size: int
    inner_offset: int


@dataclass(frozen=True, slots=True)
class Member:
    """Compressed bytes that inflate to the *chunks*, in order, with tar headers in between.

    The range runs to where the next member with a chunk starts. Past its last chunk it may hold
    members that the TOC does not list: a layer built in parallel has one at each part's start.
    """

    range: ByteRange
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Footer:
    """Where a layer keeps its TOC.

    *tail* runs from where the members end to the end of the blob; *document* is the compressed
    TOC within it.
    """

    compression: Compression
    tail: ByteRange
    document: ByteRange


@dataclass(frozen=True, slots=True)
class Toc:
    """A checked table of contents. Made by `parse_toc`.

    A node keeps those of many layers, so the members are kept as columns, some 50 bytes each, and
    become values only when asked for; as values they would take ten times that.
    """

    digest: Digest
    compression: Compression
    size: int
    toc_offset: int
    """Where the members end and the tail begins: TOC and footer."""
    _starts: array[int] = field(repr=False)
    """Where each member starts."""
    _chunks_before: array[int] = field(repr=False)
    """How many chunks come before each member's, and at the end how many there are."""
    _inner_offsets: array[int] = field(repr=False)
    _chunk_sizes: array[int] = field(repr=False)
    _digests: bytes = field(repr=False)
    """The sha256 of every chunk, 32 bytes each."""

    @property
    def members(self) -> Sequence[Member]:
        """All of them, in order. Makes one value per member and chunk: for tools and tests."""
        return self.members_in(ByteRange(0, self.size))

    @property
    def member_count(self) -> int:
        """How many members there are: by this the memory that it takes is known."""
        return len(self._starts)

    def members_in(self, part: ByteRange) -> Sequence[Member]:
        """The members that lie wholly within *part*, in order."""
        first = bisect_left(self._starts, part.start)
        last = bisect_left(self._starts, part.stop)
        if last > first and self._stop_of(last - 1) > part.stop:
            last -= 1
        return [self._member(i) for i in range(first, last)]

    def layout(self) -> Layout:
        """Cut the blob along its members: the same pieces on every node.

        Consecutive members share a piece until it has `MIN_GROUP_SIZE` bytes; one that is larger
        has a piece of its own. The tar headers before the first member go with it, so that every
        piece has a chunk to prove it by. The tail is the last piece: its proof is the TOC's own
        digest. A layer without any file data is one piece, for the same reason.
        """
        pieces = array("Q", [0])
        if self._starts:
            for i in range(1, len(self._starts)):
                start = self._starts[i]
                is_full = start - pieces[-1] >= MIN_GROUP_SIZE
                if is_full or self._stop_of(i) - start >= MIN_GROUP_SIZE:
                    pieces.append(start)
            pieces.append(self.toc_offset)
        return Layout(LayoutKind.TOC, self.size, pieces)

    def _stop_of(self, i: int) -> int:
        return self._starts[i + 1] if i + 1 < len(self._starts) else self.toc_offset

    def _member(self, i: int) -> Member:
        return Member(
            ByteRange(self._starts[i], self._stop_of(i)),
            tuple(
                Chunk(
                    Digest("sha256", self._digests[32 * k : 32 * k + 32].hex()),
                    self._chunk_sizes[k],
                    self._inner_offsets[k],
                )
                for k in range(self._chunks_before[i], self._chunks_before[i + 1])
            ),
        )


def find_footer(tail: bytes, size: int) -> Footer:
    """Return what the last bytes of a *size*-byte blob say of its TOC.

    *tail* is at least the last `FOOTER_PROBE_SIZE` bytes, or the whole blob. The footers are tried
    in the order of the Go reader. Raises `FormatError` if there is none, or none that we can use.
    """
    if len(tail) < min(size, FOOTER_PROBE_SIZE):
        raise FormatError(f"{len(tail)} bytes are too few to hold a footer")
    if document := estargz.find_toc(tail, size):
        footer = Footer(Compression.GZIP, ByteRange(document.start, size), document)
    elif document := zstdchunked.find_toc(tail, size):
        # The skippable frame's own header comes first, so that no frame is torn apart.
        start = document.start - zstdchunked.SKIPPABLE.size
        footer = Footer(Compression.ZSTD, ByteRange(start, size), document)
    elif estargz.has_external_toc(tail):
        raise FormatError("the layer's TOC is in another image")
    elif tail.endswith(zstdchunked.PODMAN_MAGIC):
        raise FormatError("podman's zstd:chunked, which is not pulled lazily")
    else:
        raise FormatError("neither eStargz nor zstd:chunked")
    if len(footer.tail) > MAX_TOC_COMPRESSED:
        raise FormatError(f"a TOC of {len(footer.tail)} compressed bytes is too large")
    return footer


def read_tail(tail: bytes | bytearray | memoryview, size: int) -> tuple[Footer, bytes]:
    """Return the footer and the TOC document of a *size*-byte blob whose tail this is.

    Raises `FormatError`, also if *tail* does not start where its own footer says.
    """
    footer = find_footer(bytes(tail[-FOOTER_PROBE_SIZE:]), size)
    if len(tail) != len(footer.tail):
        raise FormatError(f"a tail of {len(tail)} bytes, but its footer says {len(footer.tail)}")
    start = footer.document.start - footer.tail.start
    data = memoryview(tail)[start : start + len(footer.document)]
    unpack = estargz if footer.compression is Compression.GZIP else zstdchunked
    return footer, unpack.unpack_toc(data, MAX_TOC_INFLATED)


def open_tail(tail: bytes | bytearray | memoryview, *, size: int, expected: Digest) -> Toc:
    """Return the TOC out of the tail of a *size*-byte blob. Raises `FormatError`.

    *expected* is the TOC-digest annotation of the manifest: it is what makes the TOC trusted.
    """
    footer, document = read_tail(tail, size)
    if not expected.matches(document):
        raise FormatError(f"the TOC is {Digest.of(document)}, not {expected}")
    return parse_toc(
        document, compression=footer.compression, size=size, toc_offset=footer.tail.start
    )


class _Entry(msgspec.Struct, rename="camel", gc=False):
    type: str = ""
    size: int = 0
    offset: int = 0
    inner_offset: int = 0
    chunk_offset: int = 0
    chunk_size: int = 0
    digest: str = ""
    chunk_digest: str = ""


class _Document(msgspec.Struct):
    # Go writes null for none.
    entries: list[_Entry] | None = None


# Where a member starts, where in its inflated data a chunk does, the chunk's size, its sha256.
_Found = tuple[int, int, int, bytes]

_decode = msgspec.json.Decoder(_Document).decode


def parse_toc(document: bytes, *, compression: Compression, size: int, toc_offset: int) -> Toc:
    """Return the TOC that the JSON *document* spells, for a blob of *size* bytes.

    Members end at *toc_offset* or before. Raises `FormatError`.
    """
    if not 0 <= toc_offset < size:
        raise FormatError(f"a tail at {toc_offset} of {size} bytes")
    found = _find_chunks(document)
    # The Go reader takes entries in any order, and for a member's end the start of the entry after
    # it, or the end of the blob. Writers list them in the order of the blob, so sorting changes
    # nothing; where one did not, it is what makes the ranges disjoint.
    found.sort()
    starts, chunks_before = array("Q"), array("I")
    inner_offsets, chunk_sizes, digests = array("I"), array("I"), bytearray()
    previous: _Found | None = None
    for chunk in found:
        # Two files may name the same bytes: the snapshotter's reader checks each for itself.
        if chunk == previous:
            continue
        offset, inner_offset, chunk_size, sha256 = chunk
        if offset >= toc_offset:
            raise FormatError(f"a member at {offset}, but the tail starts at {toc_offset}")
        if inner_offset + chunk_size > MAX_MEMBER_INFLATED or chunk_size > MAX_CHUNK_SIZE:
            raise FormatError(f"the chunk at {offset}+{inner_offset} is too large to prove")
        if not starts or offset != starts[-1]:
            _check_member(starts[-1] if starts else 0, offset)
            starts.append(offset)
            chunks_before.append(len(chunk_sizes))
        elif inner_offset < inner_offsets[-1] + chunk_sizes[-1]:
            raise FormatError(f"chunks overlap at {offset}+{inner_offset}")
        inner_offsets.append(inner_offset)
        chunk_sizes.append(chunk_size)
        digests += sha256
        previous = chunk
    if starts:
        _check_member(starts[-1], toc_offset)
    chunks_before.append(len(chunk_sizes))
    return Toc(
        digest=Digest.of(document),
        compression=compression,
        size=size,
        toc_offset=toc_offset,
        _starts=starts,
        _chunks_before=chunks_before,
        _inner_offsets=inner_offsets,
        _chunk_sizes=chunk_sizes,
        _digests=bytes(digests),
    )


def _find_chunks(document: bytes) -> list[_Found]:
    """Return every chunk of every regular file, as ``initFields`` of the Go reader sees them."""
    # Before they take memory: an entry that is not an object stops the decoder where it stands.
    if document.count(b"{") > MAX_OBJECTS:
        raise FormatError(f"a TOC of more than {MAX_OBJECTS} objects is too large")
    found: list[_Found] = []
    file_size: int | None = None
    try:
        for entry in _decode(document).entries or ():
            if entry.type == "reg":
                file_size = entry.size
                if file_size:
                    found.append(_chunk_of(entry, entry.chunk_size or file_size, file_size))
            elif entry.type == "chunk":
                if file_size is None:
                    raise FormatError("a chunk without a file")
                # The specification has the last chunk leave out its size; the writer leaves it
                # out only if it is not full.
                chunk_size = entry.chunk_size or file_size - entry.chunk_offset
                found.append(_chunk_of(entry, chunk_size, file_size))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"not a TOC: {error}") from error
    return found


def _chunk_of(entry: _Entry, chunk_size: int, file_size: int) -> _Found:
    if entry.offset < 0 or entry.inner_offset < 0 or chunk_size <= 0 or file_size < 0:
        raise FormatError(f"a chunk of {chunk_size} bytes at {entry.offset}+{entry.inner_offset}")
    text = entry.chunk_digest
    # An old writer gives files of one chunk only the digest of the file, which then is the chunk's.
    if not text and entry.type == "reg" and chunk_size == file_size:
        text = entry.digest
    try:
        sha256 = bytes.fromhex(text[7:])
    except ValueError:
        sha256 = b""
    # fromhex takes spaces and capitals, which the Go reader does not.
    if len(sha256) != 32 or text != f"sha256:{sha256.hex()}":
        raise FormatError(f"the chunk at {entry.offset} has no sha256 digest: {text[:80]!r}")
    return entry.offset, entry.inner_offset, chunk_size, sha256


def _check_member(start: int, stop: int) -> None:
    if stop - start > MAX_MEMBER_SIZE:
        raise FormatError(f"the member at {start}..{stop} is too large to prove")
