"""The gzip side of eStargz: its footers, its TOC member, and reading its members.

Hides the bytes of the eStargz specification (stargz-snapshotter, ``docs/estargz.md``) and of RFC
1952. Two rules. What is read is bounded by the caller, and bad bytes are a `FormatError`, never an
exception of the library that inflates. And nothing passes here that Go's reader might not take: a
client that meets such bytes has cached them and never asks again, so where decoders differ this
one has to be the strictest.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import Final

from zlib_ng import zlib_ng

from p2pcache.core.errors import FormatError
from p2pcache.core.ranges import ByteRange

TOC_NAME: Final = "stargz.index.json"
# RFC 1952, 2.3: an empty member whose header carries an extra field: 10 bytes of header, 2 of
# length, the field, 5 of an empty stored block, 8 of CRC and size.
FOOTER_SIZE: Final = 10 + 2 + (4 + 16 + len("STARGZ")) + 5 + 8
# As written by the first stargz (CRFS): the field is not wrapped in a subfield.
_LEGACY_FOOTER_SIZE: Final = FOOTER_SIZE - 4
# estargz.md, "eStargz with an external TOC": no offset in the field.
_EXTERNAL_FOOTER_SIZE: Final = 10 + 2 + (4 + len("STARGZEXTERNALTOC")) + 5 + 8

# Magic, deflate, FEXTRA; then MTIME, XFL and OS, which say nothing; then the extra field. What
# follows it, an empty block, is not looked at: the Go reader does not either.
_HEADER = rb"\x1f\x8b\x08\x04.{6}"
_FOOTERS: Final = (
    (FOOTER_SIZE, re.compile(_HEADER + rb"\x1a\x00SG\x16\x00([0-9a-fA-F]{16})STARGZ", re.DOTALL)),
    (_LEGACY_FOOTER_SIZE, re.compile(_HEADER + rb"\x16\x00([0-9a-fA-F]{16})STARGZ", re.DOTALL)),
)
_EXTERNAL_FOOTER = re.compile(_HEADER + rb"\x15\x00SG\x11\x00STARGZEXTERNALTOC", re.DOTALL)

# POSIX.1-1988, "ustar": the header of the TOC's file, as narrow as its writers make it. Readers
# differ on what else they let pass: other number formats, GNU and PAX headers, a name in two parts.
_TOC_HEADER = re.compile(
    re.escape(TOC_NAME.encode())
    + rb"\x00{%d}" % (100 - len(TOC_NAME))
    + rb"[0-7 \x00]{56}"  # mode, uid, gid, size, mtime, checksum
    + rb"0.{100}"  # a regular file; the name of a link
    + rb"ustar\x0000.{64}"  # names of user and group
    + rb"[0-7 \x00]{16}"  # device numbers
    + rb"\x00{167}",  # the name's first part, padding
    re.DOTALL,
)

# RFC 1952, 2.3: magic, deflate, no optional fields. No writer of layers sets any, and Go takes only
# short ones.
_MEMBER_START: Final = b"\x1f\x8b\x08\x00"
_ZlibError: type[Exception] = zlib_ng.error  # type: ignore[assignment]  # stub: an instance
# zlib copies what it was given and did not use: never much.
_WINDOW: Final = 256 << 10
# An honest chunk lies in one gzip member. The cap keeps a range of nothing but empty ones cheap.
_MAX_STREAMS: Final = 64


def find_toc(tail: bytes, size: int) -> ByteRange | None:
    """Return the compressed TOC that the last bytes of a *size*-byte blob point at.

    None means that this is no eStargz footer. Raises `FormatError` if it points at nothing.
    """
    for length, pattern in _FOOTERS:
        if len(tail) >= length and (match := pattern.match(tail, len(tail) - length)):
            start, stop = int(match[1], 16), size - length
            if start >= stop:
                raise FormatError(f"the footer says that the TOC starts at {start} of {size} bytes")
            return ByteRange(start, stop)
    return None


def has_external_toc(tail: bytes) -> bool:
    """Say whether this is the footer of a layer whose TOC is kept in another image."""
    start = len(tail) - _EXTERNAL_FOOTER_SIZE
    return start >= 0 and _EXTERNAL_FOOTER.match(tail, start) is not None


def unpack_toc(data: memoryview, limit: int) -> bytes:
    """Return the TOC document, at most *limit* bytes, out of its compressed member.

    The member holds a tar whose only file is the document. Raises `FormatError`.
    """
    stream = GzipStream(data)
    block = _read_exactly(stream, tarfile.BLOCKSIZE)
    if _TOC_HEADER.fullmatch(block) is None:
        raise FormatError(f"the TOC's member does not start with {TOC_NAME}")
    try:
        size = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
    except tarfile.HeaderError as error:
        raise FormatError(f"the TOC's tar header: {error}") from error
    if size > limit:
        raise FormatError(f"a TOC of {size} bytes is too large")
    document = _read_exactly(stream, size)
    # Go reads ahead, and fails if the member does not end well. Only the tar's own end may follow.
    room = tarfile.RECORDSIZE
    while padding := stream.read(room + 1):
        room -= len(padding)
        if room < 0 or any(padding):
            raise FormatError("the TOC's member goes on after the TOC")
    return document


class GzipStream:
    """Reads the gzip member that *data* starts with.

    With zlib-ng, which takes 60 % of zlib's time and is as strict. igzip would take another 15 %
    less, but it inflates streams whose Huffman codes are incomplete, which Go, like zlib, refuses.
    """

    def __init__(self, data: memoryview) -> None:
        if bytes(data[: len(_MEMBER_START)]) != _MEMBER_START:
            raise FormatError("not gzip, or not as layers are written")
        self.rest = data
        """What follows the member, once it has been read to its end."""
        self._inflater = zlib_ng.decompressobj(16 + zlib_ng.MAX_WBITS)

    def read(self, limit: int) -> bytes:
        """Return 1 to *limit* bytes, or none at the member's proper end. Raises `FormatError`."""
        inflated = b""
        while not (inflated or self._inflater.eof):
            window = self.rest[:_WINDOW]
            try:
                inflated = self._inflater.decompress(window, limit)
            except _ZlibError as error:
                raise FormatError(f"not gzip: {error}") from error
            # At the end the one holds the same bytes as the other, or those of an older call.
            is_over = self._inflater.eof
            unused = self._inflater.unused_data if is_over else self._inflater.unconsumed_tail
            self.rest = self.rest[len(window) - len(unused) :]
            # Without input there may still be output: the end of a match that did not fit.
            if not (inflated or is_over or window):
                raise FormatError("gzip that is cut off")
        return inflated


def gzip_streams(data: memoryview) -> Iterator[GzipStream]:
    """Yield the members in *data*, each to be read to its end before the next is asked for."""
    for _ in range(_MAX_STREAMS):
        if not data:
            return
        stream = GzipStream(data)
        yield stream
        data = stream.rest


def _read_exactly(stream: GzipStream, count: int) -> bytes:
    parts = []
    while count:
        part = stream.read(count)
        if not part:
            raise FormatError(f"the TOC's member ends {count} bytes early")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
