"""Makes lazily pullable layers: eStargz, and zstd:chunked as the stargz snapshotter writes it.

For the demo and for tests, so it works in memory, on one core, and knows the entries that a root
file system needs. The rule: the same entries and options give the same bytes (with the same
version of zlib or zstd), and the Go library that the stargz snapshotter uses reads them.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Final, Protocol

import zstandard

from p2pcache.core import zstdchunked
from p2pcache.core.estargz import TOC_NAME
from p2pcache.core.model import Digest
from p2pcache.core.toc import Compression

TOC_DIGEST_ANNOTATION: Final = "containerd.io/snapshot/stargz/toc.digest"
UNCOMPRESSED_SIZE_ANNOTATION: Final = "io.containers.estargz.uncompressed-size"

DEFAULT_CHUNK_SIZE: Final = 4 << 20

# estargz.md, "Prioritized Files and Landmark Files": what the snapshotter fetches ahead ends here,
# or is nothing.
PREFETCH_LANDMARK: Final = ".prefetch.landmark"
NO_PREFETCH_LANDMARK: Final = ".no.prefetch.landmark"
_LANDMARK_DATA: Final = b"\x0f"


class EntryType(Enum):
    """What an entry is. The values are those of the TOC."""

    FILE = "reg"
    DIRECTORY = "dir"
    SYMLINK = "symlink"
    HARDLINK = "hardlink"


_TAR_TYPES: Final = {
    EntryType.FILE: tarfile.REGTYPE,
    EntryType.DIRECTORY: tarfile.DIRTYPE,
    EntryType.SYMLINK: tarfile.SYMTYPE,
    EntryType.HARDLINK: tarfile.LNKTYPE,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the layer's tar. *name* is relative to the root."""

    name: str
    data: bytes = field(default=b"", repr=False)
    type: EntryType = EntryType.FILE
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    """Seconds since 1970."""
    link_name: str = ""


@dataclass(frozen=True, slots=True)
class BuiltLayer:
    """A layer's blob, and what an image says of it."""

    blob: bytes = field(repr=False)
    digest: Digest
    toc_digest: Digest
    diff_id: Digest
    """The digest of the uncompressed tar, for the image's config."""
    uncompressed_size: int
    compression: Compression

    @property
    def annotations(self) -> dict[str, str]:
        """What the layer's descriptor must carry for a snapshotter to pull it lazily."""
        return {
            TOC_DIGEST_ANNOTATION: str(self.toc_digest),
            UNCOMPRESSED_SIZE_ANNOTATION: str(self.uncompressed_size),
        }


def build_layer(
    entries: Iterable[Entry],
    *,
    compression: Compression = Compression.GZIP,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    min_chunk_size: int = 0,
    prioritized: Sequence[str] = (),
    level: int = 6,
) -> BuiltLayer:
    """Return a layer of these *entries*: parents before children, every name once.

    Files are cut into chunks of *chunk_size* bytes. A member is ended only when it has at least
    *min_chunk_size* compressed bytes, so that small files share one (which snapshotters before
    0.13 cannot read). The *prioritized* names come first, with their parents and the targets of
    hard links, and are what a snapshotter fetches ahead. Raises `ValueError` on entries that make
    no tar.
    """
    if chunk_size <= 0 or min_chunk_size < 0:
        raise ValueError(f"not a chunk size: {chunk_size}, {min_chunk_size}")
    writer = _Writer(compression, level)
    toc: list[dict[str, Any]] = []
    for entry in _arrange(list(entries), prioritized):
        writer.write(_tar_header(entry))
        record = _record(entry)
        toc.append(record)
        for start in range(0, len(entry.data), chunk_size):
            data = entry.data[start : start + chunk_size]
            if start:
                record = {"name": entry.name, "type": "chunk", "chunkOffset": start}
                toc.append(record)
            is_landmark = entry.name in (PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK)
            offset, inner_offset = writer.start_chunk(0 if is_landmark else min_chunk_size)
            record["offset"] = offset
            if inner_offset:
                record["innerOffset"] = inner_offset
            if len(data) == chunk_size:
                record["chunkSize"] = chunk_size
            record["chunkDigest"] = str(Digest.of(data))
            writer.write(data)
        writer.write(_padding(len(entry.data)))
    document = json.dumps({"version": 1, "entries": toc}, indent="\t").encode()
    return writer.finish(document)


def _arrange(entries: list[Entry], prioritized: Sequence[str]) -> list[Entry]:
    by_name = {_clean(entry.name): entry for entry in entries}
    if len(by_name) != len(entries):
        raise ValueError("an entry's name appears twice")
    for entry in entries:
        if entry.data and entry.type is not EntryType.FILE:
            raise ValueError(f"{entry.name!r} is no file, but has data")
        if entry.type is EntryType.HARDLINK:
            target = by_name.get(_clean(entry.link_name))
            if target is None or target.type is not EntryType.FILE:
                raise ValueError(f"{entry.name!r} is a hard link to no file")
    first: dict[str, Entry] = {}

    def move(name: str) -> None:
        """Put what *name* needs, then itself, first: a tar must be readable in order."""
        entry = by_name.get(name)
        if entry is None or name in first:
            return
        move(name.rpartition("/")[0])
        if entry.type is EntryType.HARDLINK:
            move(_clean(entry.link_name))
        first[name] = entry

    for name in map(_clean, prioritized):
        if name not in by_name:
            raise ValueError(f"no entry named {name!r} to prioritize")
        move(name)
    landmark = Entry(PREFETCH_LANDMARK if prioritized else NO_PREFETCH_LANDMARK, _LANDMARK_DATA)
    rest = [entry for name, entry in by_name.items() if name not in first]
    return [*first.values(), landmark, *rest]


def _clean(name: str) -> str:
    return name.strip("/")


def _tar_header(entry: Entry) -> bytes:
    info = tarfile.TarInfo(entry.name)
    info.type = _TAR_TYPES[entry.type]
    info.size = len(entry.data)
    info.mode, info.uid, info.gid, info.mtime = entry.mode, entry.uid, entry.gid, entry.mtime
    info.linkname = entry.link_name
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8")


def _record(entry: Entry) -> dict[str, Any]:
    """Return what the TOC says of an entry, but for where its data is."""
    record: dict[str, Any] = {"name": entry.name, "type": entry.type.value}
    if entry.data:
        record["size"] = len(entry.data)
    if entry.mtime:
        # RFC 3339, in UTC, to the second.
        record["modtime"] = datetime.fromtimestamp(entry.mtime, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if entry.link_name:
        record["linkName"] = entry.link_name
    record |= {key: v for key in ("mode", "uid", "gid") if (v := getattr(entry, key))}
    if entry.type is EntryType.FILE:
        record["digest"] = str(Digest.of(entry.data))
    return record


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


class _Compressor(Protocol):
    """What zlib and zstandard have in common."""

    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self, mode: int = ..., /) -> bytes: ...


class _Writer:
    """Writes the members, and then the tail."""

    def __init__(self, compression: Compression, level: int) -> None:
        self._compression = compression
        self._level = level
        self._blob = bytearray()
        self._diff_id = hashlib.sha256()
        self._size = 0
        self._member = self._open_member()
        self._member_start = 0
        self._size_before_member = 0

    def write(self, data: bytes) -> None:
        """Add *data* to the tar, within the member that is open."""
        self._blob += self._member.compress(data)
        self._diff_id.update(data)
        self._size += len(data)

    def start_chunk(self, min_size: int) -> tuple[int, int]:
        """Return which member the next data goes to, and where in its inflated data.

        Opens a new one if the last has *min_size* bytes.
        """
        if min_size:
            # So that the blob's length shows what the open member has so far.
            is_gzip = self._compression is Compression.GZIP
            self._blob += self._member.flush(
                zlib.Z_SYNC_FLUSH if is_gzip else zstandard.COMPRESSOBJ_FLUSH_BLOCK
            )
        if len(self._blob) - self._member_start >= min_size:
            self._blob += self._member.flush()
            self._member = self._open_member()
            self._member_start, self._size_before_member = len(self._blob), self._size
        return self._member_start, self._size - self._size_before_member

    def finish(self, document: bytes) -> BuiltLayer:
        """Write the TOC and the footer."""
        self._blob += self._member.flush()
        toc_offset = len(self._blob)
        if self._compression is Compression.GZIP:
            info = tarfile.TarInfo(TOC_NAME)
            info.size, info.mode = len(document), 0
            self._member = self._open_member()
            self.write(info.tobuf(tarfile.USTAR_FORMAT) + document + _padding(len(document)))
            # The end of the tar comes with the TOC, and is the only one in the blob.
            self.write(bytes(2 * tarfile.BLOCKSIZE))
            self._blob += self._member.flush() + _gzip_footer(toc_offset)
        else:
            compressed = zstandard.ZstdCompressor(level=self._level).compress(document)
            start = toc_offset + zstdchunked.SKIPPABLE.size
            footer = (start, len(compressed), len(document), 1, zstdchunked.MAGIC)
            self._blob += _skippable(compressed)
            self._blob += _skippable(zstdchunked.FOOTER.pack(*footer))
        return BuiltLayer(
            blob=bytes(self._blob),
            digest=Digest.of(self._blob),
            toc_digest=Digest.of(document),
            diff_id=Digest("sha256", self._diff_id.hexdigest()),
            uncompressed_size=self._size,
            compression=self._compression,
        )

    def _open_member(self) -> _Compressor:
        if self._compression is Compression.GZIP:
            return zlib.compressobj(self._level, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        return zstandard.ZstdCompressor(level=self._level).compressobj()


def _gzip_footer(toc_offset: int) -> bytes:
    """An empty gzip member (RFC 1952) whose extra field says where the TOC starts."""
    value = b"%016xSTARGZ" % toc_offset
    extra = b"SG" + len(value).to_bytes(2, "little") + value
    header = b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff" + len(extra).to_bytes(2, "little")
    return header + extra + b"\x01\x00\x00\xff\xff" + bytes(8)


def _skippable(data: bytes) -> bytes:
    return zstdchunked.SKIPPABLE.pack(zstdchunked.SKIPPABLE_MAGIC, len(data)) + data
