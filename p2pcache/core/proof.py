"""Whether a piece of a lazily pullable layer is what the table of contents says.

The rule of this module is the first of p2pcache: a piece from a peer is worth nothing until
`find_flaw` finds none. What that proves, and what not:

* A chunk is proven as a lazy client will prove it: inflate its member from the start, take *size*
  bytes at *inner_offset*, compare their sha256 with the TOC's. Where this differs it is stricter,
  so that a lazy client never gets from us what it will refuse: a chunk must inflate out of its own
  member's range, and the stream that it is in must end well. Every layer that a writer made does.
* What no chunk covers is not proven: tar headers and padding, members that the TOC does not list
  (one comes before all others, in the first piece), and *how* the bytes were compressed. A lazy
  client reads none of it. But it means that proven pieces do not add up to a proven blob: a blob
  is whole only when its own digest matched.
* The tail is proven by the TOC's digest, that is, again but for its compression.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

from p2pcache.core.errors import FormatError
from p2pcache.core.estargz import GzipStream, gzip_streams
from p2pcache.core.ranges import ByteRange
from p2pcache.core.toc import MAX_MEMBER_INFLATED, Compression, Member, Toc, read_tail
from p2pcache.core.zstdchunked import ZstdStream, make_decompressor, zstd_streams

# How much is inflated at a time: a chunk of the usual size at once, and a bomb not at all.
_BLOCK: Final = 4 << 20

_Stream = GzipStream | ZstdStream
_OpenStreams = Callable[[memoryview], Iterator[_Stream]]


def find_flaw(toc: Toc, part: ByteRange, data: bytes | bytearray | memoryview) -> str | None:
    """Say what is wrong with *data* as the bytes *part* of the blob; None if nothing is.

    *part* must be one or more whole pieces of the TOC's layout, else it is a `ValueError`: a part
    that cuts a member cannot be proven. Takes the CPU for some 6 ms per MiB of *part*, most of it
    without holding the interpreter: the caller moves it to a thread.
    """
    members = toc.members_in(part)
    _check_provable(toc, part, members)
    if len(data) != len(part):
        return f"{len(data)} bytes instead of {len(part)}"
    view = memoryview(data)
    if toc.compression is Compression.GZIP:
        open_streams: _OpenStreams = gzip_streams
    else:
        open_streams = partial(zstd_streams, decompressor=make_decompressor())
    for member in members:
        start, stop = member.range.start - part.start, member.range.stop - part.start
        flaw = _find_member_flaw(member, open_streams(view[start:stop]))
        if flaw is not None:
            return f"member at {member.range.start}: {flaw}"
    if part.stop > toc.toc_offset:
        return _find_tail_flaw(toc, view[toc.toc_offset - part.start :])
    return None


def _check_provable(toc: Toc, part: ByteRange, members: Sequence[Member]) -> None:
    # Without members only the tail is left: alone, or as the whole of a layer without file data.
    first = members[0].range.start if members else toc.toc_offset
    last = members[-1].range.stop if members else toc.size
    if part.start not in (0, first) or part.stop not in (last, toc.size):
        raise ValueError(f"{part} is not made of whole pieces")


def _find_member_flaw(member: Member, streams: Iterator[_Stream]) -> str | None:
    try:
        inflated = _Inflated(streams)
        position = 0
        for chunk in member.chunks:
            for _ in inflated.read(chunk.inner_offset - position):
                pass
            sha256 = hashlib.sha256()
            for block in inflated.read(chunk.size):
                sha256.update(block)
            if sha256.hexdigest() != chunk.digest.encoded:
                return f"the chunk at {chunk.inner_offset} does not match its digest"
            position = chunk.inner_offset + chunk.size
        inflated.finish(MAX_MEMBER_INFLATED - position)
    except FormatError as error:
        return str(error)
    return None


def _find_tail_flaw(toc: Toc, data: memoryview) -> str | None:
    try:
        footer, document = read_tail(data, toc.size)
    except FormatError as error:
        return str(error)
    if footer.compression is not toc.compression or not toc.digest.matches(document):
        return "the TOC does not match its digest"
    return None


class _Inflated:
    """What a member's range inflates to: streams one after the other, of which one is open."""

    def __init__(self, streams: Iterator[_Stream]) -> None:
        self._streams = streams
        self._stream = self._next_stream()

    def read(self, count: int) -> Iterator[bytes]:
        """Yield exactly *count* bytes in blocks. Raises `FormatError` if there are fewer."""
        while count:
            block = self._stream.read(min(count, _BLOCK))
            if block:
                yield block
                count -= len(block)
            else:
                self._stream = self._next_stream()

    def finish(self, limit: int) -> None:
        """See that the open stream ends well within *limit* bytes. Raises `FormatError`."""
        while block := self._stream.read(_BLOCK):
            limit -= len(block)
            if limit < 0:
                raise FormatError("what follows the last chunk is too large")

    def _next_stream(self) -> _Stream:
        stream = next(self._streams, None)
        if stream is None:
            raise FormatError("the data ends early")
        return stream
