"""The zstd side: the dialect of zstd:chunked that the stargz snapshotter writes and reads.

Hides the frames (RFC 8878) and the footer in a skippable one. Podman's dialect looks alike, but
has a longer footer, another magic, and a TOC that the stargz snapshotter cannot read; no lazy
client asks for ranges of it, so its layers are plain blobs to us. The rule is that of
`p2pcache.core.estargz`: bounded by the caller, and bad bytes are a `FormatError`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

import zstandard

from p2pcache.core.errors import FormatError
from p2pcache.core.ranges import ByteRange

MAGIC: Final = b"GnUlInUx"
PODMAN_MAGIC: Final = b"GNUlInUx"
# Where the compressed TOC starts, its length, the length of the document, the manifest type, magic.
FOOTER: Final = struct.Struct("<QQQQ8s")
# RFC 8878, 3.1.2: the magic and the length of a skippable frame, which wraps TOC and footer.
SKIPPABLE: Final = struct.Struct("<4sI")
SKIPPABLE_MAGIC: Final = b"\x50\x2a\x4d\x18"

# What zstd's own tool accepts. The known writers use 8 MiB, but a frame that states its size needs
# a window as large as that: at least the largest chunk that is proven in memory.
_MAX_WINDOW: Final = 128 << 20
_BLOCK: Final = 1 << 20
_FRAME_MAGIC: Final = b"\x28\xb5\x2f\xfd"
# An honest chunk lies in one frame, in blocks of 128 KiB. The caps keep a range of nothing but
# empty frames or blocks cheap.
_MAX_STREAMS: Final = 64
_MAX_BLOCKS: Final = 16 << 10


def find_toc(tail: bytes, size: int) -> ByteRange | None:
    """Return the compressed TOC that the last bytes of a *size*-byte blob point at.

    None means that this is no zstd:chunked footer. Raises `FormatError` if it points at nothing.
    """
    if len(tail) < FOOTER.size or not tail.endswith(MAGIC):
        return None
    start, length = FOOTER.unpack(tail[-FOOTER.size :])[:2]
    stop = start + length if length else size - FOOTER.size
    if not SKIPPABLE.size <= start < stop <= size - FOOTER.size:
        raise FormatError(f"the footer says that the TOC is at {start}..{stop} of {size} bytes")
    return ByteRange(start, stop)


def unpack_toc(data: memoryview, limit: int) -> bytes:
    """Return the TOC document, at most *limit* bytes. Raises `FormatError`."""
    parts = []
    room = limit
    for stream in zstd_streams(data, make_decompressor()):
        while part := stream.read(min(_BLOCK, room + 1)):
            room -= len(part)
            if room < 0:
                raise FormatError(f"a TOC of more than {limit} bytes is too large")
            parts.append(part)
    return b"".join(parts)


class ZstdStream:
    """Reads one zstd frame, all of *frame*."""

    def __init__(self, frame: memoryview, decompressor: zstandard.ZstdDecompressor) -> None:
        self._reader = decompressor.stream_reader(frame)

    def read(self, limit: int) -> bytes:
        """Return 1 to *limit* bytes, or none at the frame's proper end. Raises `FormatError`."""
        try:
            return self._reader.read(limit)
        except zstandard.ZstdError as error:
            raise FormatError(f"not zstd: {error}") from error


def make_decompressor() -> zstandard.ZstdDecompressor:
    """Return what inflates streams, one at a time.

    Making one takes as long as inflating a small frame, so it is made once for many.
    """
    return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)


def zstd_streams(
    data: memoryview, decompressor: zstandard.ZstdDecompressor
) -> Iterator[ZstdStream]:
    """Yield the frames in *data*, each to be read before the next; skip the skippable ones.

    Raises `FormatError` at one that is cut off: the library takes its end for a proper one.
    """
    for _ in range(_MAX_STREAMS):
        if not data:
            return
        length = _frame_length(data)
        if bytes(data[:4]) == _FRAME_MAGIC:
            yield ZstdStream(data[:length], decompressor)
        data = data[length:]


def _frame_length(data: memoryview) -> int:
    """Return how long the frame at the start of *data* is (RFC 8878, 3.1)."""
    magic = bytes(data[:4])
    if magic == SKIPPABLE_MAGIC:
        length = SKIPPABLE.size + int.from_bytes(data[4:8], "little")
    elif magic == _FRAME_MAGIC:
        length = _blocks_end(data)
    else:
        raise FormatError("not zstd")
    if length > len(data):
        raise FormatError("zstd that is cut off")
    return length


def _blocks_end(data: memoryview) -> int:
    # 3.1.1.1: a descriptor, and what it says follows: window, dictionary, content size.
    descriptor = data[4] if len(data) > 4 else 0
    is_single_segment = descriptor >> 5 & 1
    position = 5 + (1 - is_single_segment) + (0, 1, 2, 4)[descriptor & 3]
    position += (is_single_segment, 2, 4, 8)[descriptor >> 6]
    for _ in range(_MAX_BLOCKS):
        # 3.1.1.2: the last one is marked; one of type 1 is a single byte to be repeated.
        header = int.from_bytes(data[position : position + 3], "little")
        position += 3 + (1 if header >> 1 & 3 == 1 else header >> 3)
        if header & 1:
            return position + 4 * (descriptor >> 2 & 1)
        if position >= len(data):
            raise FormatError("zstd that is cut off")
    raise FormatError("zstd in too many blocks")
