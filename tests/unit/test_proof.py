"""Proof: right bytes pass, wrong bytes are named, nothing else is raised."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from dataclasses import replace

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcache.core.estargz_writer import BuiltLayer, Entry, EntryType, build_layer
from p2pcache.core.model import Digest
from p2pcache.core.proof import find_flaw
from p2pcache.core.ranges import ByteRange
from p2pcache.core.toc import Compression, Toc, find_footer, open_tail, parse_toc

fast = settings(max_examples=80, deadline=None)

noise = random.Random(0).randbytes(400_000)
ENTRIES = [
    Entry("d", type=EntryType.DIRECTORY),
    Entry("empty"),
    Entry("small", b"hello" * 20),
    Entry("large", noise[:150_000]),
    Entry("text", b"lorem ipsum " * 3000),
    Entry("other", noise[150_000:300_000]),
]


def toc_of(layer: BuiltLayer) -> Toc:
    footer = find_footer(layer.blob, len(layer.blob))
    tail = layer.blob[footer.tail.start :]
    return open_tail(tail, size=len(layer.blob), expected=layer.toc_digest)


LAYERS = [
    (layer, toc_of(layer))
    for compression in Compression
    for min_chunk_size in (0, 20_000)
    for layer in [
        build_layer(
            ENTRIES, compression=compression, chunk_size=40_000, min_chunk_size=min_chunk_size
        )
    ]
]
NAMES = ["gzip", "gzip-shared", "zstd", "zstd-shared"]
layers = pytest.mark.parametrize(("layer", "toc"), LAYERS, ids=NAMES)
any_layer = st.sampled_from(LAYERS)


def bytes_of(layer: BuiltLayer, part: ByteRange) -> bytes:
    return layer.blob[part.start : part.stop]


def matches(toc: Toc, part: ByteRange, data: bytes) -> bool:
    """The slow model: inflate each member from its start, look at each chunk."""
    for member in toc.members_in(part):
        packed = data[member.range.start - part.start : member.range.stop - part.start]
        last = member.chunks[-1]
        needed = last.inner_offset + last.size
        if toc.compression is Compression.GZIP:
            plain = zlib.decompressobj(31).decompress(packed, needed)
        else:
            plain = zstandard.ZstdDecompressor().stream_reader(packed).read(needed)
        for chunk in member.chunks:
            found = plain[chunk.inner_offset : chunk.inner_offset + chunk.size]
            if Digest.of(found) != chunk.digest:
                return False
    return True


@layers
def test_every_piece_and_the_whole_are_proven(layer, toc):
    layout = toc.layout()
    assert layout.count > 3
    for i in range(layout.count):
        part = layout.range_of(i)
        assert find_flaw(toc, part, bytes_of(layer, part)) is None
        assert find_flaw(toc, part, memoryview(bytearray(bytes_of(layer, part)))) is None
    assert find_flaw(toc, ByteRange(0, toc.size), layer.blob) is None


@fast
@given(any_layer, st.data())
def test_a_changed_byte_is_a_flaw_or_inflates_to_the_same_chunks(case, data):
    layer, toc = case
    layout = toc.layout()
    part = layout.range_of(data.draw(st.integers(0, layout.count - 1)))
    wrong = bytearray(bytes_of(layer, part))
    wrong[data.draw(st.integers(0, len(wrong) - 1))] ^= data.draw(st.integers(1, 255))
    if find_flaw(toc, part, wrong) is None and part.stop <= toc.toc_offset:
        assert matches(toc, part, bytes(wrong))


@pytest.mark.parametrize(("layer", "toc"), [LAYERS[0], LAYERS[2]], ids=["gzip", "zstd"])
def test_every_changed_byte_of_stored_payload_is_a_flaw(layer, toc):
    # Noise does not compress: the payload's bytes stand in the blob as they are.
    payload = noise[:150_000]
    start = layer.blob.index(payload[1000:1100])
    layout = toc.layout()
    for at in range(start, start + 100):
        part = layout.range_of(layout.covering(ByteRange(at, at + 1))[0])
        wrong = bytearray(bytes_of(layer, part))
        wrong[at - part.start] ^= 1
        assert find_flaw(toc, part, wrong)


@fast
@given(any_layer, st.data())
def test_any_bytes_of_the_right_length_are_judged_and_nothing_is_raised(case, data):
    layer, toc = case
    layout = toc.layout()
    part = layout.range_of(data.draw(st.integers(0, layout.count - 1)))
    right = bytes_of(layer, part)
    junk = data.draw(st.binary(min_size=1, max_size=40))
    at = data.draw(st.integers(0, max(0, len(right) - len(junk))))
    wrong = right[:at] + junk + right[at + len(junk) :]
    find_flaw(toc, part, wrong[: len(part)])
    assert find_flaw(toc, part, bytes(len(part)))
    assert find_flaw(toc, part, wrong[: data.draw(st.integers(0, len(part) - 1))])


@layers
def test_bytes_of_another_piece_are_a_flaw(layer, toc):
    layout = toc.layout()
    part, other = layout.range_of(0), layout.range_of(1)
    data = (bytes_of(layer, other) * 5)[: len(part)]
    assert str(find_flaw(toc, part, data)).startswith("member at ")


def test_a_wrong_length_is_named():
    layer, toc = LAYERS[0]
    part = toc.layout().range_of(0)
    flaw = find_flaw(toc, part, bytes_of(layer, part) + b"x")
    assert flaw == f"{len(part) + 1} bytes instead of {len(part)}"


@layers
def test_a_tail_with_another_toc_is_a_flaw(layer, toc):
    part = ByteRange(toc.toc_offset, toc.size)
    assert find_flaw(toc, part, bytes_of(layer, part)) is None
    assert "neither" in str(find_flaw(toc, part, bytes(len(part))))
    digest = Digest.of(b"another")
    for other in (
        replace(toc, digest=digest),
        replace(toc, compression=next(c for c in Compression if c is not toc.compression)),
    ):
        assert "does not match" in str(find_flaw(other, part, bytes_of(layer, part)))


@layers
def test_a_part_that_cuts_a_member_cannot_be_asked_about(layer, toc):
    border = toc.layout().range_of(1).start
    first = toc.members[0].range.start
    for start, stop in [
        (0, border - 1), (1, border), (border, border + 1), (0, first),
        (border, toc.size - 1), (toc.toc_offset - 1, toc.size), (toc.toc_offset, toc.size - 1),
        (toc.toc_offset + 1, toc.size), (0, toc.size + 1),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="whole pieces"):
            find_flaw(toc, ByteRange(start, stop), layer.blob[start:stop])


@pytest.mark.parametrize("compression", Compression)
def test_a_layer_without_file_data_is_one_piece_proven_by_its_toc(compression):
    tail_only = build_layer([], compression=compression)
    document = b'{"version":1,"entries":[{"name":"d","type":"dir"}]}'
    toc = parse_toc(document, compression=compression, size=len(tail_only.blob), toc_offset=100)
    assert toc.layout().count == 1
    whole = ByteRange(0, toc.size)
    assert find_flaw(toc, whole, tail_only.blob)
    with pytest.raises(ValueError, match="whole pieces"):
        find_flaw(toc, ByteRange(0, 100), bytes(100))


def hand_made(
    parts: list[bytes],
    chunks: list[tuple[int, int, Digest]],
    compression: Compression = Compression.GZIP,
) -> tuple[Toc, ByteRange, bytes]:
    """A TOC with one member that is made of *parts*, and its bytes."""
    data = b"".join(parts)
    entries = [
        {"type": "reg", "size": size, "offset": 1, "innerOffset": inner, "chunkDigest": str(digest)}
        for inner, size, digest in chunks
    ]
    document = json.dumps({"entries": entries}).encode()
    size = 1 + len(data) + 1
    toc = parse_toc(document, compression=compression, size=size, toc_offset=size - 1)
    return toc, ByteRange(0, size - 1), b"?" + data


def packed(compression: Compression, data: bytes) -> bytes:
    if compression is Compression.GZIP:
        return gzip.compress(data)
    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize("compression", Compression)
def test_chunks_may_cross_from_one_stream_into_the_next(compression):
    plain = noise[:3000]
    toc, part, data = hand_made(
        [packed(compression, plain[:1000]), packed(compression, plain[1000:])],
        [(10, 2000, Digest.of(plain[10:2010])), (2500, 500, Digest.of(plain[2500:]))],
        compression,
    )
    assert find_flaw(toc, part, data) is None


@pytest.mark.parametrize("compression", Compression)
def test_members_that_the_toc_does_not_list_are_not_looked_at(compression):
    plain = b"payload"
    for rest in (packed(compression, b"headers"), b"junk"):
        toc, part, data = hand_made(
            [packed(compression, plain + bytes(505)), rest], [(0, 7, Digest.of(plain))], compression
        )
        assert find_flaw(toc, part, data) is None


@pytest.mark.parametrize("compression", Compression)
def test_a_member_that_inflates_to_too_little_is_a_flaw(compression):
    toc, part, data = hand_made(
        [packed(compression, b"short")], [(0, 6, Digest.of(b"short!"))], compression
    )
    assert find_flaw(toc, part, data) == "member at 1: the data ends early"


@pytest.mark.parametrize("compression", Compression)
def test_the_stream_of_the_last_chunk_must_end_well(compression):
    frame = packed(compression, noise[:5000])
    toc, part, data = hand_made([frame], [(0, 100, Digest.of(noise[:100]))], compression)
    assert find_flaw(toc, part, data) is None
    toc, part, data = hand_made([frame[:-1]], [(0, 100, Digest.of(noise[:100]))], compression)
    assert "cut off" in str(find_flaw(toc, part, data))


def test_what_follows_the_last_chunk_is_bounded():
    # RFC 8878, 3.1.1: a window of 128 KiB, and blocks that repeat one byte as often.
    block = (131_072 << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    bomb = b"\x28\xb5\x2f\xfd\x00\x38" + block * 2100 + b"\x01\0\0"
    toc, part, data = hand_made([bomb], [(0, 7, Digest.of(bytes(7)))], Compression.ZSTD)
    assert len(bomb) < 10_000
    assert "too large" in str(find_flaw(toc, part, data))


def test_a_chunk_larger_than_a_block_is_hashed_in_parts():
    plain = noise * 25
    digest = Digest("sha256", hashlib.sha256(plain).hexdigest())
    toc, part, data = hand_made([gzip.compress(plain, 1)], [(0, len(plain), digest)])
    assert find_flaw(toc, part, data) is None
