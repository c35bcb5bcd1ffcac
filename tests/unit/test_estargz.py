"""The gzip side: footers byte by byte, the TOC's member, streams of members."""

from __future__ import annotations

import contextlib
import gzip
import io
import random
import tarfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcache.core.errors import FormatError
from p2pcache.core.estargz import GzipStream, find_toc, gzip_streams, has_external_toc, unpack_toc
from p2pcache.core.estargz_writer import Entry, build_layer
from p2pcache.core.ranges import ByteRange

fast = settings(max_examples=80, deadline=None)


def gzip_with_extra(extra: bytes) -> bytes:
    """An empty gzip member as Go's writer makes it without compression."""
    header = b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff" + len(extra).to_bytes(2, "little")
    return header + extra + b"\x01\x00\x00\xff\xff" + bytes(8)


def footer(offset: int) -> bytes:
    return gzip_with_extra(b"SG\x16\x00" + b"%016xSTARGZ" % offset)


def legacy_footer(offset: int) -> bytes:
    return gzip_with_extra(b"%016xSTARGZ" % offset)


def toc_member(
    name: str = "stargz.index.json", data: bytes = b"{}", size: int | None = None
) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data) if size is None else size
    return gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + data, mtime=0)


def toc_header(**fields: bytes) -> bytes:
    """The tar header of a TOC, with some fields as no writer makes them."""
    info = tarfile.TarInfo("stargz.index.json")
    info.size = 2
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    for name, value in fields.items():
        start = {"uid": 108, "size": 124, "chksum": 148, "type": 156, "magic": 257, "prefix": 345}
        block[start[name] : start[name] + len(value)] = value
    if "chksum" not in fields:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def read_all(data: bytes, limit: int = 1 << 20) -> bytes:
    parts = []
    for stream in gzip_streams(memoryview(data)):
        while part := stream.read(limit):
            assert len(part) <= limit
            parts.append(part)
    return b"".join(parts)


def test_footer_of_the_specification_is_51_bytes_and_that_of_its_ancestor_47():
    assert (len(footer(0)), len(legacy_footer(0))) == (51, 47)
    assert gzip.decompress(footer(7)) == gzip.decompress(legacy_footer(7)) == b""


@fast
@given(st.integers(0, 10_000), st.integers(1, 500), st.sampled_from([footer, legacy_footer]))
def test_footer_says_where_the_toc_is(offset, length, make):
    tail = make(offset)
    size = offset + length + len(tail)
    padded = (bytes(10) + tail)[-51:]
    assert find_toc(padded, size) == ByteRange(offset, offset + length)


def test_offset_may_be_written_in_capitals():
    tail = gzip_with_extra(b"SG\x16\x00" + b"00000000000000FFSTARGZ")
    assert find_toc(tail, 1000) == ByteRange(255, 1000 - 51)


@pytest.mark.parametrize("digits", [b" 00000000000000f", b"+00000000000000f", b"0_0000000000000f"])
def test_offset_is_sixteen_digits_and_nothing_else(digits):
    assert find_toc(gzip_with_extra(b"SG\x16\x00" + digits + b"STARGZ"), 1000) is None


@pytest.mark.parametrize("offset", [949, 1000, 2**63, 2**64 - 1])
def test_offset_past_the_footer_is_refused(offset):
    with pytest.raises(FormatError, match="of 1000 bytes"):
        find_toc(footer(offset), 1000)


@pytest.mark.parametrize("tail", [b"", bytes(51), footer(3)[1:], b"PK" + footer(3)[2:]])
def test_other_bytes_are_no_footer(tail):
    assert find_toc(tail, 1000) is None


@fast
@given(st.binary(max_size=60), st.integers(1, 100))
def test_any_tail_gives_a_range_none_or_our_error(tail, size):
    try:
        found = find_toc(tail, size)
    except FormatError:
        return
    assert found is None or found.stop < size
    assert has_external_toc(tail) in (True, False)


@fast
@given(st.integers(0, 50), st.binary(min_size=1, max_size=4))
def test_any_damaged_footer_gives_a_range_none_or_our_error(at, junk):
    tail = bytearray(footer(12345))
    tail[at : at + len(junk)] = junk
    try:
        found = find_toc(bytes(tail[:51]), 20_000)
    except FormatError:
        return
    assert found is None or found.stop == 20_000 - 51


def test_external_toc_is_recognised():
    tail = gzip_with_extra(b"SG\x11\x00STARGZEXTERNALTOC")
    assert len(tail) == 46
    assert has_external_toc(b"12345" + tail)
    assert not has_external_toc(tail[1:])
    assert not has_external_toc(footer(0))
    assert find_toc(b"12345" + tail, 1000) is None


def test_toc_document_is_the_first_file_of_its_member():
    assert unpack_toc(memoryview(toc_member(data=b'{"version":1}')), 100) == b'{"version":1}'
    assert unpack_toc(memoryview(toc_member(data=b"")), 100) == b""


@pytest.mark.parametrize(
    ("member", "why"),
    [
        (toc_member(name="other.json"), "does not start with"),
        (toc_member(data=bytes(101)), "101 bytes is too large"),
        (toc_member(data=b"{}", size=60), "58 bytes early"),
        (gzip.compress(bytes(512)), "does not start with"),
        (gzip.compress(toc_header(chksum=b"0000000\0")), "tar header: bad checksum"),
        (gzip.compress(b"short"), "early"),
        (toc_member()[:30], "cut off"),
        (toc_member()[:-1], "cut off"),
        (toc_member(data=b"{}x", size=2), "goes on after"),
        (toc_member(data=b"{}" + bytes(10_241), size=2), "goes on after"),
        (b"", "not gzip"),
        (b"not gzip at all", "not gzip"),
        (gzip.compress(b"one") + toc_member(), "early"),
    ],
)
def test_bad_toc_members_are_refused(member, why):
    with pytest.raises(FormatError, match=why):
        unpack_toc(memoryview(member), 100)


@pytest.mark.parametrize(
    "fields",
    [
        {"type": b"x"},
        {"type": b"L"},
        {"type": b"\0"},
        {"magic": b"ustar  \0"},
        {"size": b"\x80" + bytes(10) + b"\x02"},
        {"uid": b"0o0000\0"},
        {"uid": b"+000000\0"},
        {"prefix": b"usr"},
    ],
)
def test_tar_headers_that_readers_take_differently_are_refused(fields):
    assert unpack_toc(memoryview(gzip.compress(toc_header() + b"{}")), 100) == b"{}"
    with pytest.raises(FormatError, match="does not start with"):
        unpack_toc(memoryview(gzip.compress(toc_header(**fields) + b"{}")), 100)


# Deflate streams that spell "abab" with Huffman codes that leave bit patterns unused: RFC 1951,
# 3.2.7, does not forbid it, but Go ("corrupt input") and zlib refuse them. igzip does not.
INCOMPLETE = {
    "literals": bytes.fromhex("05e0010400000040")
    + bytes(13)
    + bytes.fromhex("18")
    + bytes(19)
    + bytes.fromhex("8418"),
    "code-lengths": bytes.fromhex("05e001080000008020")
    + bytes(24)
    + bytes.fromhex("60")
    + bytes(39)
    + bytes.fromhex("8434"),
    "distances": bytes.fromhex("05e101040000008020")
    + bytes(12)
    + bytes.fromhex("68")
    + bytes(19)
    + bytes.fromhex("f04b03"),
}


@pytest.mark.parametrize("deflated", list(INCOMPLETE.values()), ids=list(INCOMPLETE))
def test_streams_that_go_refuses_are_refused(deflated):
    trailer = zlib.crc32(b"abab").to_bytes(4, "little") + (4).to_bytes(4, "little")
    member = gzip.compress(b"")[:10] + deflated + trailer
    with pytest.raises(FormatError, match="not gzip"):
        GzipStream(memoryview(member)).read(4)


@pytest.mark.parametrize("flags", [1, 2, 4, 8, 16, 0x20])
def test_optional_header_fields_are_refused(flags):
    # Go takes a file name of up to 511 bytes, zlib one of any length, igzip flags without meaning.
    member = bytearray(gzip.compress(b"data"))
    member[3] = flags
    with pytest.raises(FormatError, match="not as layers are written"):
        GzipStream(memoryview(member)).read(4)


def test_output_larger_than_its_input_comes_out_in_parts():
    data = bytes(100_000)
    stream = GzipStream(memoryview(gzip.compress(data)))
    assert [len(stream.read(1000)) for _ in range(101)] == [1000] * 100 + [0]


def test_members_longer_than_a_window_are_read_to_the_end():
    data = random.Random(0).randbytes(700_000)
    assert read_all(gzip.compress(data, 1)) == data


@fast
@given(st.binary(max_size=200))
def test_any_bytes_are_a_toc_member_or_our_error(data):
    for member in (data, gzip.compress(data), toc_member()[:40] + data):
        with contextlib.suppress(FormatError):
            assert len(unpack_toc(memoryview(member), 100)) <= 100


@fast
@given(st.lists(st.binary(max_size=50), min_size=1, max_size=5), st.integers(1, 60))
def test_stream_reads_member_after_member(parts, limit):
    data = b"".join(gzip.compress(part) for part in parts)
    assert read_all(data, limit) == b"".join(parts)


@fast
@given(st.binary(max_size=300))
def test_any_bytes_are_a_stream_or_our_error(data):
    with contextlib.suppress(FormatError):
        read_all(data)


@fast
@given(st.binary(max_size=300), st.integers(1, 320))
def test_members_that_are_cut_off_are_refused(data, lacking):
    member = gzip.compress(data)
    assert read_all(member) == data
    with pytest.raises(FormatError):
        read_all(member[:-lacking] or b"?")


@pytest.mark.parametrize("at", [-8, -1])
def test_a_wrong_crc_or_length_is_refused(at):
    member = bytearray(gzip.compress(b"data"))
    member[at] ^= 1
    with pytest.raises(FormatError, match="not gzip"):
        read_all(bytes(member))


def test_a_bomb_costs_what_is_asked_of_it():
    bomb = gzip.compress(bytes(20 << 20))
    stream = GzipStream(memoryview(bomb))
    assert stream.read(1000) == bytes(1000)
    assert len(stream.read(1 << 20)) <= 1 << 20


def test_endless_empty_members_are_not_followed():
    assert read_all(gzip.compress(b"") * 5000 + gzip.compress(b"x")) == b""


def test_a_layer_is_a_tar_for_any_other_reader():
    layer = build_layer([Entry("a", b"hello"), Entry("b", b"x" * 9000)], chunk_size=1000)
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(layer.blob))) as tar:
        assert tar.getnames() == [".no.prefetch.landmark", "a", "b", "stargz.index.json"]
