"""The table of contents: what is accepted, how it is cut into pieces, where it is found."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcache.core import toc as toc_module
from p2pcache.core.errors import FormatError
from p2pcache.core.estargz_writer import BuiltLayer, Entry, EntryType, build_layer
from p2pcache.core.layout import LayoutKind
from p2pcache.core.model import Digest
from p2pcache.core.ranges import ByteRange
from p2pcache.core.toc import (
    FOOTER_PROBE_SIZE,
    MIN_GROUP_SIZE,
    Chunk,
    Compression,
    Member,
    Toc,
    find_footer,
    open_tail,
    parse_toc,
    read_tail,
)

fast = settings(max_examples=60, deadline=None)
SIZE, TOC_OFFSET = 20_000, 10_000


def sha256(data: bytes = b"x") -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def reg(offset: int, size: int = 10, **more: object) -> dict[str, object]:
    entry = {"name": "f", "type": "reg", "size": size, "offset": offset, "chunkDigest": sha256()}
    return entry | more


def chunk(offset: int, chunk_offset: int = 10, **more: object) -> dict[str, object]:
    entry = {"type": "chunk", "offset": offset, "chunkOffset": chunk_offset}
    return entry | {"chunkDigest": sha256()} | more


def parse(*entries: object, size: int = SIZE, toc_offset: int = TOC_OFFSET) -> Toc:
    document = json.dumps({"version": 1, "entries": entries}).encode()
    return parse_toc(document, compression=Compression.GZIP, size=size, toc_offset=toc_offset)


def spans(toc: Toc) -> list[tuple[int, int]]:
    return [(m.range.start, m.range.stop) for m in toc.members]


def chunks(toc: Toc) -> list[tuple[int, int, int]]:
    return [(m.range.start, c.inner_offset, c.size) for m in toc.members for c in m.chunks]


# What is accepted, by what initFields and ChunkEntryForOffset of the Go reader make of it.


def test_members_end_at_the_next_and_the_last_at_the_tail():
    toc = parse(reg(100), {"name": "d", "type": "dir"}, reg(300), reg(1000))
    assert spans(toc) == [(100, 300), (300, 1000), (1000, TOC_OFFSET)]


def test_members_are_values_with_their_chunks():
    assert parse(reg(100)).members == [
        Member(ByteRange(100, TOC_OFFSET), (Chunk(Digest.parse(sha256()), 10, 0),))
    ]


def test_chunks_without_a_size_run_to_the_end_of_the_file():
    toc = parse(reg(100, 25, chunkSize=10), chunk(200, 10, chunkSize=10), chunk(300, 20))
    assert chunks(toc) == [(100, 0, 10), (200, 0, 10), (300, 0, 5)]


def test_last_chunk_of_full_size_may_say_so():
    toc = parse(reg(100, 20, chunkSize=10), chunk(200, 10, chunkSize=10))
    assert chunks(toc) == [(100, 0, 10), (200, 0, 10)]


def test_a_chunk_belongs_to_the_last_file_even_past_other_entries():
    toc = parse(reg(100, 15, chunkSize=10), {"name": "d", "type": "dir"}, chunk(200))
    assert chunks(toc) == [(100, 0, 10), (200, 0, 5)]


def test_empty_files_and_other_entries_have_no_member():
    others = [{"name": "x", "type": t, "offset": 5} for t in ("dir", "symlink", "hardlink", "new")]
    assert parse(reg(700, 0), *others).members == []


def test_go_writes_null_for_no_entries_at_all():
    document = b'{"version":1,"entries":null}'
    toc = parse_toc(document, compression=Compression.GZIP, size=9, toc_offset=0)
    assert toc.members == []


def test_several_chunks_share_a_member():
    toc = parse(reg(0, innerOffset=512), reg(0, innerOffset=1536), reg(400))
    assert spans(toc) == [(0, 400), (400, TOC_OFFSET)]
    assert chunks(toc) == [(0, 512, 10), (0, 1536, 10), (400, 0, 10)]


def test_two_files_at_one_place_are_one_chunk():
    assert chunks(parse(reg(100), reg(100), reg(200))) == [(100, 0, 10), (200, 0, 10)]


def test_entries_out_of_order_are_sorted():
    assert spans(parse(reg(300), reg(100))) == [(100, 300), (300, TOC_OFFSET)]


def test_a_file_of_one_chunk_may_have_only_its_own_digest():
    entry = reg(100, digest=sha256(b"y"), chunkDigest="")
    assert parse(entry).members[0].chunks[0].digest == Digest.of(b"y")


def test_the_digest_is_that_of_the_document():
    document = b' {"entries": [] } '
    toc = parse_toc(document, compression=Compression.ZSTD, size=2, toc_offset=1)
    assert toc.digest == Digest.of(document)


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([reg(-1)], "a chunk of 10 bytes at -1"),
        ([reg(TOC_OFFSET)], "the tail starts at"),
        ([reg(100, innerOffset=-1)], "100\\+-1"),
        ([reg(100, -5)], "a chunk of -5 bytes"),
        ([reg(100, chunkSize=-5)], "a chunk of -5 bytes"),
        ([reg(100), chunk(200, 10)], "a chunk of 0 bytes"),
        ([reg(100), chunk(200, 50)], "a chunk of -40 bytes"),
        ([reg(-3, -3), chunk(200, chunkSize=1)], "a chunk of -3"),
        ([chunk(200, chunkSize=10)], "without a file"),
        ([reg(100), reg(100, 20)], "chunks overlap at 100"),
        ([reg(100), reg(100, chunkDigest=sha256(b"y"))], "chunks overlap"),
        ([reg(100), reg(100, innerOffset=9)], "chunks overlap"),
        ([reg(100, chunkDigest="")], "no sha256 digest"),
        ([reg(100, 20, chunkSize=10, digest=sha256(), chunkDigest="")], "no sha256 digest"),
        ([reg(100, 20), chunk(200, digest=sha256(), chunkDigest="")], "no sha256 digest"),
        ([reg(100, chunkDigest="sha512:" + "0" * 128)], "no sha256 digest"),
        ([reg(100, chunkDigest="sha256:" + "A" * 64)], "no sha256 digest"),
        ([reg(100, chunkDigest="sha256:" + "0 " * 32)], "no sha256 digest"),
        ([reg(100, chunkDigest="sha256:" + "g" * 64)], "no sha256 digest"),
        ([reg(100, (64 << 20) + 1)], "too large to prove"),
        ([reg(100, innerOffset=256 << 20)], "too large to prove"),
        ([reg(100, innerOffset=2**62)], "too large to prove"),
        ([reg(100, innerOffset=2**70)], "too large to prove"),
        ([None], "not a TOC"),
        (["x"], "not a TOC"),
        ([{"type": "reg", "size": "10"}], "not a TOC"),
    ],
)
def test_what_cannot_be_proven_is_refused(entries, why):
    with pytest.raises(FormatError, match=why):
        parse(*entries)


@pytest.mark.parametrize("entries", [[reg(100)], [reg(33 << 20)], [reg(5), reg(40 << 20)]])
def test_a_member_too_large_for_memory_is_refused(entries):
    # So are the headers before the first one: they are in its piece.
    with pytest.raises(FormatError, match="too large to prove"):
        parse(*entries, size=50 << 20, toc_offset=45 << 20)


@pytest.mark.parametrize(("size", "toc_offset"), [(10, 10), (10, 11), (10, -1), (0, 0)])
def test_the_tail_lies_in_the_blob(size, toc_offset):
    with pytest.raises(FormatError, match="a tail at"):
        parse(size=size, toc_offset=toc_offset)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"entries":[{}]} x',
        b'{"entries":[{"type":"\xff"}]}',
        b'{"entries":[{"size":' + b"9" * 10_000 + b"}]}",
        b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"entries":[{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}]}",
    ],
)
def test_bad_documents_are_refused(document):
    with pytest.raises(FormatError, match="not a TOC"):
        parse_toc(document, compression=Compression.GZIP, size=10, toc_offset=5)


def test_a_document_of_junk_entries_is_refused_before_it_is_decoded():
    document = b'{"entries":[' + b"{}," * toc_module.MAX_OBJECTS + b"{}]}"
    with pytest.raises(FormatError, match="objects is too large"):
        parse_toc(document, compression=Compression.GZIP, size=10, toc_offset=5)


numbers = st.integers(-2, 30) | st.sampled_from([10**5, 2**31, 2**63, 2**64])
odd_entries: st.SearchStrategy[dict[str, object]] = st.fixed_dictionaries(
    {"type": st.sampled_from(["reg", "chunk", "dir"])},
    optional=dict.fromkeys(("size", "offset", "innerOffset", "chunkOffset", "chunkSize"), numbers)
    | {key: st.sampled_from(["", sha256(), "sha256:", "x"]) for key in ("digest", "chunkDigest")},
)
scalars = st.none() | st.booleans() | numbers | st.text(max_size=5)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=2), max_leaves=3)


@fast
@given(st.lists(odd_entries | values, max_size=8), st.integers(0, 40))
def test_any_entries_are_a_sound_toc_or_our_error(entries, toc_offset):
    try:
        toc = parse(*entries, size=50, toc_offset=toc_offset)
    except FormatError:
        return
    members = toc.members
    assert all(a.range.stop == b.range.start for a, b in pairwise(members))
    assert not members or members[-1].range.stop == toc_offset
    for member in members:
        ends = [0, *(c.inner_offset + c.size for c in member.chunks)]
        assert all(
            c.inner_offset >= end and c.size > 0
            for c, end in zip(member.chunks, ends, strict=False)
        )


@fast
@given(st.binary(max_size=60) | values.map(lambda v: json.dumps(v).encode()))
def test_any_document_is_a_toc_or_our_error(document):
    with contextlib.suppress(FormatError):
        parse_toc(document, compression=Compression.GZIP, size=10, toc_offset=5)


# How it is cut.

offsets = st.lists(st.integers(1, 300_000), unique=True, max_size=30)


@fast
@given(offsets)
def test_pieces_follow_members_and_each_can_be_proven(offsets):
    toc = parse(*map(reg, offsets), size=400_100, toc_offset=400_000)
    layout = toc.layout()
    assert layout.kind is LayoutKind.TOC
    starts = [layout.range_of(i).start for i in range(layout.count)]
    assert set(starts) <= {0, 400_000, *offsets}
    found = [toc.members_in(layout.range_of(i)) for i in range(layout.count)]
    assert [m for members in found for m in members] == toc.members
    if offsets:
        assert all(found[:-1])
        assert layout.range_of(layout.count - 1) == ByteRange(400_000, 400_100)
        for a, b in pairwise(found[:-1]):
            # Two pieces are two because one is full or the next member is large.
            first, last = layout.covering(a[0].range)[0], b[0].range
            assert max(len(layout.range_of(first)), len(last)) >= MIN_GROUP_SIZE
    else:
        assert layout.count == 1


def test_small_members_share_a_piece_and_a_large_one_has_its_own():
    ends = [0, 25, 7_525, 17_525, 17_550, 67_550, 67_575]
    toc = parse(*map(reg, ends[1:]), size=67_700, toc_offset=67_600)
    assert list(toc.layout().starts) == [0, 17_525, 17_550, 67_550, 67_600]


@fast
@given(offsets, st.integers(0, 400_098), st.integers(1, 400_000))
def test_members_in_a_part_are_those_wholly_within_it(offsets, start, length):
    toc = parse(*map(reg, offsets), size=400_100, toc_offset=400_000)
    part = ByteRange(start, min(start + length, 400_100))
    expected = [m for m in toc.members if part.start <= m.range.start and m.range.stop <= part.stop]
    assert list(toc.members_in(part)) == expected


# Where it is.

ENTRIES = [Entry("d", type=EntryType.DIRECTORY), Entry("d/a", b"a" * 3000), Entry("b", b"b")]


@pytest.fixture(params=list(Compression), ids=lambda c: c.value, scope="module")
def layer(request):
    return build_layer(ENTRIES, compression=request.param, chunk_size=1000)


def tail_of(layer: BuiltLayer) -> bytes:
    footer = find_footer(layer.blob[-FOOTER_PROBE_SIZE:], len(layer.blob))
    assert footer.compression is layer.compression
    return layer.blob[footer.tail.start :]


def test_open_tail_returns_the_toc_that_the_writer_wrote(layer):
    toc = open_tail(tail_of(layer), size=len(layer.blob), expected=layer.toc_digest)
    assert toc.digest == layer.toc_digest
    assert toc.toc_offset == len(layer.blob) - len(tail_of(layer))
    assert sum(c.size for m in toc.members for c in m.chunks) == 1 + 3000 + 1


def test_zstd_members_end_before_the_skippable_frame_of_the_toc():
    layer = build_layer(ENTRIES, compression=Compression.ZSTD)
    footer = find_footer(layer.blob, len(layer.blob))
    assert layer.blob[footer.tail.start :].startswith(b"\x50\x2a\x4d\x18")
    assert footer.document.start == footer.tail.start + 8


def test_another_toc_digest_is_refused(layer):
    with pytest.raises(FormatError, match="not sha256:"):
        open_tail(tail_of(layer), size=len(layer.blob), expected=Digest.of(b""))


def test_a_tail_that_starts_elsewhere_is_refused(layer):
    tail = tail_of(layer)
    for wrong in (tail[1:], b"x" + tail):
        with pytest.raises(FormatError, match="footer says"):
            open_tail(wrong, size=len(layer.blob), expected=layer.toc_digest)
    with pytest.raises(FormatError):
        open_tail(tail, size=len(layer.blob) - 1, expected=layer.toc_digest)


@fast
@given(st.data())
def test_any_damaged_tail_is_the_same_toc_or_our_error(data):
    layer = build_layer(ENTRIES, compression=data.draw(st.sampled_from(Compression)))
    tail = bytearray(tail_of(layer))
    tail[data.draw(st.integers(0, len(tail) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        toc = open_tail(tail, size=len(layer.blob), expected=layer.toc_digest)
    except FormatError:
        return
    assert toc.digest == layer.toc_digest


@fast
@given(st.binary(max_size=80), st.integers(0, 200))
def test_any_tail_is_a_footer_or_our_error(data, size):
    for tail in (data, data + b"GnUlInUx"):
        try:
            footer = find_footer(tail, size)
        except FormatError:
            continue
        assert footer.tail.stop == size
        assert footer.tail.start <= footer.document.start < footer.document.stop < size
        with contextlib.suppress(FormatError):
            read_tail(tail, size)


def extra(field: bytes) -> bytes:
    head = b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff" + len(field).to_bytes(2, "little")
    return head + field + b"\x01\x00\x00\xff\xff" + bytes(8)


@pytest.mark.parametrize(
    ("tail", "why"),
    [
        (b"12345" + extra(b"SG\x11\x00STARGZEXTERNALTOC"), "in another image"),
        (bytes(43) + b"GNUlInUx", "podman"),
        (bytes(51), "neither eStargz nor"),
        (bytes(50), "too few"),
        (extra(b"SG\x16\x00%016xSTARGZ" % 5), "too large"),
        (bytes(11) + struct.pack("<QQQQ", 8, 65 << 20, 0, 1) + b"GnUlInUx", "too large"),
    ],
)
def test_layers_without_a_usable_toc_say_why(tail, why):
    with pytest.raises(FormatError, match=why):
        find_footer(tail, 100 << 20)


def test_a_blob_smaller_than_the_probe_may_be_given_whole():
    with pytest.raises(FormatError, match="neither"):
        find_footer(b"tiny", 4)


def test_footers_are_tried_in_the_order_of_the_go_reader():
    # The last 8 bytes of a gzip footer are CRC and size, which the Go reader does not look at.
    tail = extra(b"SG\x16\x00%016xSTARGZ" % 5)[:-8] + b"GnUlInUx"
    assert find_footer(tail, 1000).compression is Compression.GZIP


def test_a_large_toc_is_small_in_memory():
    toc = parse(
        *({"name": f"usr/share/{i}"} | reg(100 * i) for i in range(1, 5001)),
        size=10**6,
        toc_offset=600_000,
    )
    columns = (toc._starts, toc._chunks_before, toc._inner_offsets, toc._chunk_sizes)
    assert sum(len(c) * c.itemsize for c in columns) + len(toc._digests) <= 5001 * 53
