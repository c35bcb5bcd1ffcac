"""The zstd side: the footer, the TOC's frame, streams of frames."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Iterator

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcache.core.errors import FormatError
from p2pcache.core.ranges import ByteRange
from p2pcache.core.zstdchunked import find_toc, make_decompressor, unpack_toc, zstd_streams

fast = settings(max_examples=80, deadline=None)

compress = zstandard.ZstdCompressor().compress


def footer(start: int, length: int, magic: bytes = b"GnUlInUx") -> bytes:
    return struct.pack("<QQQQ", start, length, 999, 1) + magic


def skippable(data: bytes) -> bytes:
    return b"\x50\x2a\x4d\x18" + struct.pack("<I", len(data)) + data


def read_all(data: bytes, limit: int = 1 << 20) -> bytes:
    parts = []
    for stream in zstd_streams(memoryview(data), make_decompressor()):
        while part := stream.read(limit):
            assert len(part) <= limit
            parts.append(part)
    return b"".join(parts)


@fast
@given(st.integers(8, 10_000), st.integers(1, 500), st.integers(0, 100))
def test_footer_says_where_the_toc_is(start, length, rest):
    size = start + length + rest + 40
    assert find_toc(b"12345678901" + footer(start, length), size) == ByteRange(
        start, start + length
    )


def test_without_a_length_the_toc_runs_to_the_footer():
    # As the Go reader has it: a size of 0 or less is replaced.
    assert find_toc(footer(100, 0), 1000) == ByteRange(100, 960)


@pytest.mark.parametrize(
    ("start", "length"), [(7, 10), (0, 0), (960, 1), (960, 0), (900, 61), (2**64 - 1, 2**64 - 1)]
)
def test_toc_outside_the_blob_is_refused(start, length):
    with pytest.raises(FormatError, match="of 1000 bytes"):
        find_toc(footer(start, length), 1000)


@pytest.mark.parametrize("tail", [b"", footer(8, 8)[1:], footer(8, 8, b"GNUlInUx"), bytes(40)])
def test_other_bytes_are_no_footer(tail):
    assert find_toc(tail, 1000) is None


@fast
@given(st.binary(max_size=60), st.integers(1, 300))
def test_any_tail_gives_a_range_none_or_our_error(data, size):
    for tail in (data, data + b"GnUlInUx"):
        try:
            found = find_toc(tail, size)
        except FormatError:
            continue
        assert found is None or found.stop <= size - 40


@fast
@given(st.binary(max_size=200), st.integers(0, 200))
def test_toc_document_is_what_the_frame_holds(document, limit):
    frame = memoryview(compress(document))
    if len(document) <= limit:
        assert unpack_toc(frame, limit) == document
    else:
        with pytest.raises(FormatError, match="too large"):
            unpack_toc(frame, limit)


def test_a_bomb_is_refused_at_the_limit():
    frame = compress(bytes(16 << 20))
    with pytest.raises(FormatError, match="too large"):
        unpack_toc(memoryview(frame), 1 << 20)


@fast
@given(st.binary(max_size=200))
def test_any_bytes_are_a_toc_or_our_error(data):
    for frame in (data, compress(b"x" * 50)[:-8] + data):
        with contextlib.suppress(FormatError):
            assert len(unpack_toc(memoryview(frame), 100)) <= 100


@fast
@given(st.lists(st.binary(max_size=50), min_size=1, max_size=5), st.integers(1, 60))
def test_stream_reads_frame_after_frame_and_skips_skippable_ones(parts, limit):
    data = b"".join(compress(part) + skippable(b"junk") for part in parts)
    assert read_all(data, limit) == b"".join(parts)


@fast
@given(st.binary(max_size=400))
def test_any_bytes_are_streams_or_our_error(data):
    for junk in (data, b"\x28\xb5\x2f\xfd" + data, compress(b"x" * 50)[:6] + data):
        with contextlib.suppress(FormatError):
            read_all(junk)


def frames() -> Iterator[tuple[bytes, bytes]]:
    """Frames with every kind of header, and with blocks of every kind."""
    text, noise = b"lorem ipsum " * 3000, random.Random(0).randbytes(300_000)
    for plain in (b"", b"x", text, noise, bytes(300_000), noise + bytes(200_000) + text):
        for checksum in (False, True):
            for size in (False, True):
                compressor = zstandard.ZstdCompressor(
                    write_checksum=checksum, write_content_size=size
                )
                yield plain, compressor.compress(plain)
                writer = compressor.compressobj()
                yield plain, writer.compress(plain) + writer.flush()


def test_frames_end_where_the_library_says():
    for plain, frame in frames():
        assert read_all(frame + frame) == plain + plain


def test_frames_that_are_cut_off_are_refused():
    # The library alone takes the end of its input for the end of the frame.
    for _, frame in frames():
        for lacking in (1, 4, len(frame) // 2, len(frame) - 5):
            with pytest.raises(FormatError):
                read_all(frame[:-lacking])


def test_a_frame_that_claims_a_checksum_is_held_to_it():
    # klauspost's decoder is: without this a lazy client would refuse what we had let pass.
    frame = bytearray(compress(b"data" * 10))
    frame[4] |= 4
    with pytest.raises(FormatError, match="cut off"):
        read_all(bytes(frame))
    with pytest.raises(FormatError, match="not zstd"):
        read_all(bytes(frame) + compress(b"next"))


def test_endless_empty_frames_and_blocks_are_not_followed():
    assert read_all(skippable(b"") * 5000 + compress(b"x")) == b""
    with pytest.raises(FormatError, match="too many blocks"):
        read_all(b"\x28\xb5\x2f\xfd\x00\x00" + bytes(3) * 50_000)


def test_one_decompressor_serves_streams_in_turn():
    shared = make_decompressor()
    first = next(zstd_streams(memoryview(compress(b"a" * 1000)), shared))
    assert first.read(10) == b"a" * 10
    second = next(zstd_streams(memoryview(compress(b"b" * 1000)), shared))
    assert second.read(2000) == b"b" * 1000


def test_a_frame_that_wants_too_large_a_window_is_refused():
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = writer.compress(b"x" * 100) + writer.flush()
    with pytest.raises(FormatError, match="too much memory"):
        read_all(frame)
