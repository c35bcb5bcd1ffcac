import gzip
import hashlib
import json
import zlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcache.core.errors import FormatError
from p2pcache.core.ranges import ByteRange, multipart_heads
from p2pcache.demo.replay import (
    BLOCK_SIZE,
    FOOTER_SIZE,
    TOC_NAME,
    Blocks,
    find_toc,
    inflate,
    parse_toc,
    split_multipart,
)

SIZES = st.integers(1, 6 * BLOCK_SIZE)


def ranges_within(size: int) -> st.SearchStrategy[ByteRange]:
    ends = st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True)
    return ends.map(lambda pair: ByteRange(min(pair), max(pair)))


BLOCKS = SIZES.flatmap(
    lambda size: st.tuples(st.just(size), st.lists(ranges_within(size), min_size=1, max_size=6))
)


@given(BLOCKS)
def test_missing_blocks_are_those_that_no_earlier_read_brought(case):
    size, wanted = case
    blocks = Blocks(size)
    held: set[int] = set()
    for part in wanted:
        asked = blocks.missing(part)
        numbers = {
            start // BLOCK_SIZE for gap in asked for start in range(gap.start, gap.stop, BLOCK_SIZE)
        }
        needed = set(range(part.start // BLOCK_SIZE, (part.stop - 1) // BLOCK_SIZE + 1))
        assert numbers == needed - held
        assert all(gap.start % BLOCK_SIZE == 0 for gap in asked)
        assert all(gap.stop % BLOCK_SIZE == 0 or gap.stop == size for gap in asked)
        assert all(a.stop < b.start for a, b in pairwise(asked))
        for gap in asked:
            blocks.write(gap, bytes(len(gap)))
        held |= numbers


@given(BLOCKS)
def test_a_read_gives_the_bytes_of_the_blob(case):
    size, wanted = case
    # The block size is no multiple of 251: a block in a wrong place shows.
    blob = (bytes(range(251)) * (size // 251 + 1))[:size]
    blocks = Blocks(size)
    for part in wanted:
        for gap in blocks.missing(part):
            blocks.write(gap, blob[gap.start : gap.stop])
        assert blocks.read(part) == blob[part.start : part.stop]


def test_reads_after_one_another_ask_for_the_hole_between_what_is_there():
    blocks = Blocks(500_000)
    for start in (0, 150_000):
        part = ByteRange(start, start + 1)
        blocks.write(blocks.missing(part)[0], bytes(BLOCK_SIZE))
    assert blocks.missing(ByteRange(0, 260_000)) == (
        ByteRange(50_000, 150_000),
        ByteRange(200_000, 300_000),
    )


def footer(offset: int) -> bytes:
    """Spelled out from the format's description: an empty gzip member with an extra field."""
    head = bytes.fromhex("1f8b08040000000000ff1a0053471600")
    return head + b"%016xSTARGZ" % offset + bytes.fromhex("010000ffff0000000000000000")


@given(st.integers(0, 2**63))
def test_the_footer_says_where_the_toc_starts(offset):
    assert len(footer(offset)) == FOOTER_SIZE
    assert zlib.decompress(footer(offset), wbits=31) == b""
    assert find_toc(footer(offset)) == offset


@given(
    st.binary(max_size=60) | st.integers(0, 50).map(lambda i: footer(9)[:i] + footer(9)[i + 1 :])
)
def test_any_other_footer_is_refused(data):
    with pytest.raises(FormatError):
        find_toc(data)


def toc_member(document: bytes, name: str = TOC_NAME) -> bytes:
    header = bytearray(512)
    header[: len(name)] = name.encode()
    header[124:136] = b"%011o\0" % len(document)
    return gzip.compress(bytes(header) + document + bytes(1024))


def digest_of(document: bytes) -> str:
    return f"sha256:{hashlib.sha256(document).hexdigest()}"


def test_chunks_end_where_the_next_member_starts():
    document = json.dumps(
        {
            "version": 1,
            "entries": [
                {"name": "lib/", "type": "dir"},
                {"name": "lib/a", "type": "reg", "size": 10, "offset": 100, "chunkSize": 6},
                {"name": "lib/a", "type": "chunk", "offset": 200, "chunkOffset": 6},
                {"name": "lib/empty", "type": "reg"},
                {"name": ".prefetch.landmark", "type": "reg", "size": 1, "offset": 300},
                {"name": "lib/b", "type": "reg", "size": 7, "offset": 400},
            ],
        }
    ).encode()
    toc = parse_toc(toc_member(document), 900, digest_of(document))
    assert toc.landmark == 300
    spans = {
        name: [(chunk.start, chunk.stop, chunk.size) for chunk in chunks]
        for name, chunks in toc.files.items()
    }
    assert spans == {"lib/a": [(100, 200, 6), (200, 300, 4)], "lib/b": [(400, 900, 7)]}


def test_a_toc_that_the_manifest_does_not_name_is_refused():
    with pytest.raises(FormatError, match="the manifest names"):
        parse_toc(toc_member(b'{"entries":[]}'), 10, digest_of(b"another"))


def test_a_file_of_another_name_is_not_a_toc():
    with pytest.raises(FormatError):
        parse_toc(toc_member(b'{"entries":[]}', "other.json"), 10, digest_of(b'{"entries":[]}'))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "type", "offset", "size"]), inner, max_size=4)
    ),
    max_leaves=8,
)
ENTRIES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "name": JSON,
            "type": st.sampled_from(["reg", "chunk", "dir"]) | JSON,
            "offset": JSON,
            "size": JSON,
            "chunkSize": JSON,
            "chunkOffset": JSON,
        },
    ),
    max_size=4,
)


@given(JSON | st.fixed_dictionaries({"entries": ENTRIES}), st.integers(0, 1000))
def test_any_document_is_a_toc_or_refused(document, size):
    text = json.dumps(document).encode()
    try:
        toc = parse_toc(toc_member(text), size, digest_of(text))
    except FormatError:
        return
    assert all(
        0 < chunk.start < chunk.stop <= size and chunk.size > 0
        for chunks in toc.files.values()
        for chunk in chunks
    )


@given(st.binary(max_size=200))
def test_any_bytes_are_a_toc_or_refused(member):
    with pytest.raises(FormatError):
        parse_toc(member, 1000, digest_of(b""))


@given(st.lists(st.binary(max_size=40), max_size=4), st.integers(0, 200))
def test_inflating_crosses_members_and_stops_at_the_size(parts, size):
    data = b"".join(map(gzip.compress, parts))
    assert inflate(data, size) == b"".join(parts)[:size]


@given(st.binary(max_size=100), st.integers(0, 1000))
def test_inflating_any_bytes_stays_within_the_size(data, size):
    try:
        assert len(inflate(data, size)) <= size
    except FormatError:
        return


BOUNDARIES = st.text("abcXYZ019'()+_,-./:=?", min_size=1, max_size=70)


@given(BOUNDARIES, st.binary(min_size=1, max_size=80), st.data(), st.booleans())
def test_multipart_gives_back_the_parts_that_were_written(boundary, blob, data, quoted):
    wanted = data.draw(st.lists(ranges_within(len(blob)), min_size=1, max_size=5))
    heads, end = multipart_heads(wanted, len(blob), boundary, "application/octet-stream")
    bodies = [blob[part.start : part.stop] for part in wanted]
    body = b"".join(h + b for h, b in zip(heads, bodies, strict=True)) + end
    shown = f'"{boundary}"' if quoted else boundary
    parts = split_multipart(f"multipart/byteranges; boundary={shown}", body)
    assert parts == list(zip(wanted, bodies, strict=True))


def test_a_part_may_hold_the_boundary():
    blob = b"\r\n--x--\r\n--x\r\n"
    heads, end = multipart_heads([ByteRange(0, len(blob))], len(blob), "x", "a/b")
    body = heads[0] + blob + end
    assert split_multipart("multipart/byteranges; boundary=x", body) == [
        (ByteRange(0, len(blob)), blob)
    ]


@given(st.integers(0, 200))
def test_a_multipart_body_that_was_cut_is_refused(length):
    heads, end = multipart_heads([ByteRange(0, 5), ByteRange(7, 9)], 9, "x", "a/b")
    body = heads[0] + b"01234" + heads[1] + b"78" + end
    length %= len(body) - len("\r\n")
    with pytest.raises(FormatError):
        split_multipart("multipart/byteranges; boundary=x", body[:length])


PIECES = st.sampled_from(
    [b"--x", b"--x--", b"\r\n", b"\r\n\r\n", b"Content-Range: bytes 0-1/9", b"ab", b"\xff", b":"]
)


@given(st.lists(PIECES, max_size=12).map(b"".join), st.sampled_from(["", "; boundary=x"]))
def test_any_multipart_body_is_read_or_refused(body, parameter):
    try:
        parts = split_multipart(f"multipart/byteranges{parameter}", body)
    except FormatError:
        return
    assert all(len(part) == len(data) for part, data in parts)
