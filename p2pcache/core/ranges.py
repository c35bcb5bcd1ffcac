"""Byte ranges, and the HTTP headers that speak of them (RFC 9110, section 14).

HTTP counts ranges by their last byte; everywhere else in p2pcache a range stops *before* ``stop``.
The conversion happens here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from p2pcache.core.errors import BadRange, FormatError, RangeNotSatisfiable
from p2pcache.core.model import MAX_BLOB_SIZE

# stargz-snapshotter asks for many chunks in one header, so one range is not enough; without a cap
# one header buys unbounded work (compare CVE-2025-62727).
MAX_RANGES: Final = 256

_SPEC = re.compile(r"(\d{1,19})-(\d{0,19})|-(\d{1,19})", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class ByteRange:
    """The bytes of one blob from *start* up to, not including, *stop*. Never empty."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"not a byte range: {self.start}..{self.stop}")

    def __len__(self) -> int:
        return self.stop - self.start

    def overlap(self, other: ByteRange) -> ByteRange | None:
        """The bytes that both have, or None."""
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return ByteRange(start, stop) if start < stop else None

    @property
    def header(self) -> str:
        """The value of a Range header that asks for exactly these bytes."""
        return f"bytes={self.start}-{self.stop - 1}"

    def content_range(self, size: int) -> str:
        """The value of a Content-Range header for these bytes of a blob of *size* bytes."""
        return f"bytes {self.start}-{self.stop - 1}/{size}"


@dataclass(frozen=True, slots=True)
class RequestedRanges:
    """What a Range header asks of a blob whose size is known.

    *parts* stand in the order of the header and may overlap: one part of the answer each, because
    clients such as podman count them. *open_ended* tells ``bytes=N-``, which containerd uses to
    read on to the end, from a range with a last byte, which lazy snapshotters use.
    """

    parts: tuple[ByteRange, ...]
    open_ended: bool


def parse_range(header: str, size: int) -> RequestedRanges | None:
    """Return the parts of a *size*-byte blob that *header* asks for, clamped to the blob.

    Parts past the end are left out. ``None`` means a unit other than bytes: serve the whole blob.
    Raises `BadRange` if malformed or more than `MAX_RANGES`, `RangeNotSatisfiable` if all of it is
    past the end.
    """
    unit, equals, specs = header.partition("=")
    if unit.strip().lower() != "bytes":
        return None
    wanted = [spec for spec in map(str.strip, specs.split(",", MAX_RANGES)) if spec]
    if not equals or not 0 < len(wanted) <= MAX_RANGES:
        raise BadRange(f"expected 1 to {MAX_RANGES} ranges")
    parts = [part for spec in wanted if (part := _resolve(spec, size)) is not None]
    if not parts:
        raise RangeNotSatisfiable(size)
    return RequestedRanges(tuple(parts), open_ended=len(wanted) == 1 and wanted[0].endswith("-"))


def _resolve(spec: str, size: int) -> ByteRange | None:
    """Resolve ``first-last``, ``first-`` or ``-length``; None if it is past the end."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise BadRange(f"not a range: {spec[:50]!r}")
    first, last, suffix = match.groups()
    if suffix:
        start, stop = max(0, size - int(suffix)), size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            raise BadRange(f"range ends before it starts: {spec!r}")
    return ByteRange(start, stop) if start < stop else None


def parse_content_range(header: str) -> tuple[ByteRange, int]:
    """Return the range of a 206 answer and the size of the whole. Raises `FormatError`.

    An unknown size (``*``) is refused: no registry that serves blobs sends it.
    """
    match = _CONTENT_RANGE.fullmatch(header.strip())
    if match is None:
        raise FormatError(f"not a Content-Range: {header[:80]!r}")
    first, last, size = map(int, match.groups())
    if not first <= last < size <= MAX_BLOB_SIZE:
        raise FormatError(f"not a Content-Range: {header[:80]!r}")
    return ByteRange(first, last + 1), size


def multipart_heads(
    parts: Sequence[ByteRange], size: int, boundary: str, media_type: str
) -> tuple[list[bytes], bytes]:
    """Return what stands before each part of a ``multipart/byteranges`` body, and its end.

    RFC 9110, section 14.6. The lengths of these and of the parts add up to Content-Length.
    """
    heads = [
        (
            f"{'' if i == 0 else chr(13) + chr(10)}--{boundary}\r\n"
            f"Content-Type: {media_type}\r\n"
            f"Content-Range: {part.content_range(size)}\r\n\r\n"
        ).encode("ascii")
        for i, part in enumerate(parts)
    ]
    return heads, f"\r\n--{boundary}--\r\n".encode("ascii")
