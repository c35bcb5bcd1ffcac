"""The bodies that peers send each other: whatever comes in, a checked value or our error."""

import math
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcache.core.errors import FormatError
from p2pcache.core.layout import LayoutKind, PieceMask
from p2pcache.core.model import MAX_BLOB_SIZE, Digest
from p2pcache.core.wire import (
    Hello,
    Holding,
    NodeState,
    TagNews,
    decode_hello,
    decode_holding,
    decode_tag,
    encode_hello,
    encode_holding,
    encode_tag,
)

A = Digest.of(b"a")
WHOLE = Holding("n", 10, LayoutKind.FIXED, None, PieceMask.full(3), is_whole=True)


@st.composite
def holdings(draw):
    count = draw(st.integers(0, 70))
    size = draw(st.integers(count, MAX_BLOB_SIZE)) if count else 0
    whole = draw(st.booleans())
    mask = PieceMask(count, draw(st.integers(0, (1 << count) - 1)))
    return Holding(
        draw(st.text(max_size=8)),
        size,
        draw(st.sampled_from(LayoutKind)),
        draw(st.none() | st.integers(0, size - 1)) if size else None,
        PieceMask.full(count) if whole else mask,
        whole,
        draw(st.none() | st.just(A)),
    )


TAGS = st.builds(
    TagNews,
    st.binary(max_size=3).map(Digest.of),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60),
    st.integers(0, MAX_BLOB_SIZE),
    st.floats(0, 1e12),
)


@given(holdings())
def test_a_sent_holding_is_read_back(holding):
    assert decode_holding(encode_holding(holding)) == holding


@given(TAGS)
def test_a_sent_tag_is_read_back(news):
    assert decode_tag(encode_tag(news)) == news


NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30)
ADDRESSES = st.just("") | st.builds("{}:{}".format, st.ip_addresses(v=4), st.integers(0, 65535))
HELLOS = st.builds(
    Hello, st.text(min_size=1, max_size=30), NAMES, ADDRESSES, st.sampled_from(NodeState), NAMES
)


@given(HELLOS)
def test_a_sent_hello_is_read_back(hello):
    assert decode_hello(encode_hello(hello)) == hello


def hello(**changes):
    fields = {"node": "n", "zone": "z", "address": "a:1", "state": "active", "protocol": "v1"}
    return msgspec.msgpack.encode(list((fields | changes).values()))


@pytest.mark.parametrize(
    "changes",
    [
        {"node": ""},
        {"node": "n" * 256},
        {"node": None},
        {"zone": "z" * 256},
        {"zone": "a zone"},
        {"zone": "z\n"},
        {"zone": "zön"},
        {"address": "a:1\r\nb"},
        {"address": "a" * 256},
        {"state": "gone"},
        {"state": ""},
        {"protocol": "v\x00"},
        {"protocol": 1},
    ],
)
def test_an_impossible_hello_is_refused(changes):
    assert decode_hello(hello())
    with pytest.raises(FormatError):
        decode_hello(hello(**changes))


def test_a_whole_blob_takes_no_mask():
    full = PieceMask.full(100_000)
    partial = Holding("n", 1 << 37, LayoutKind.FIXED, None, full, is_whole=False)
    whole = Holding("n", 1 << 37, LayoutKind.FIXED, None, full, is_whole=True)
    assert len(encode_holding(partial)) > 12_500
    assert len(encode_holding(whole)) < 40
    assert decode_holding(encode_holding(whole)).held.is_full


def wire(**changes):
    fields = {
        "node": "n",
        "size": 100,
        "kind": "toc",
        "toc_offset": 90,
        "count": 9,
        "mask": b"\xff\x01",
        "whole": False,
    } | changes
    return msgspec.msgpack.encode(list(fields.values()))


def test_a_mask_has_one_bit_for_each_piece():
    held = decode_holding(wire(mask=b"\x05\x01")).held
    assert list(held) == [0, 2, 8]
    assert held.count == 9


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": b"\xff"},
        {"mask": b"\xff\x01\x00"},
        {"mask": b"\xff\x02"},
        {"mask": b"\xff\xff"},
        {"mask": None},
        {"mask": "xx"},
        {"count": -1},
        {"count": 0, "mask": b""},
        {"count": 101, "mask": b"\0" * 13},
        {"count": 9.5},
        {"count": 1 << 63},
        {"size": 0},
        {"size": -1},
        {"size": 8},
        {"size": MAX_BLOB_SIZE + 1},
        {"size": (1 << 64) - 1},
        {"size": None},
        {"size": MAX_BLOB_SIZE, "count": (MAX_BLOB_SIZE >> 16) + 1, "whole": True},
        {"kind": "other"},
        {"kind": 1},
        {"toc_offset": -1},
        {"toc_offset": 100},
        {"toc_offset": 1.5},
        {"whole": 1},
        {"whole": None},
        {"node": b"n"},
        {"node": None},
    ],
)
def test_a_holding_that_contradicts_itself_is_refused(changes):
    with pytest.raises(FormatError):
        decode_holding(wire(**changes))


def test_an_empty_blob_has_no_pieces():
    assert decode_holding(wire(size=0, count=0, mask=b"", toc_offset=None)).held.count == 0
    with pytest.raises(FormatError):
        decode_holding(wire(size=0, count=1, mask=b"\0", toc_offset=None))


def tag(digest=str(A), media_type="a/b", size=1, age_s=0.5):
    return msgspec.msgpack.encode([digest, media_type, size, age_s])


@pytest.mark.parametrize(
    "body",
    [
        tag(digest="sha256:abc"),
        tag(digest=""),
        tag(digest=None),
        tag(size=-1),
        tag(size=MAX_BLOB_SIZE + 1),
        tag(age_s=-0.1),
        tag(age_s=math.nan),
        tag(age_s=math.inf),
        tag(age_s="1"),
        tag(media_type="a/b\r\nSet-Cookie: x"),
        tag(media_type="a/b\x00"),
        tag(media_type="ä/b"),
        tag(media_type="a/" + "b" * 600),
    ],
)
def test_impossible_news_of_a_tag_is_refused(body):
    with pytest.raises(FormatError):
        decode_tag(body)


def test_what_a_later_version_adds_at_the_end_is_passed_over():
    assert decode_holding(msgspec.msgpack.encode([*msgspec.msgpack.decode(wire()), "", "new"]))
    assert decode_tag(msgspec.msgpack.encode([*msgspec.msgpack.decode(tag()), "new"]))
    assert decode_hello(msgspec.msgpack.encode([*msgspec.msgpack.decode(hello()), "new"]))


BODIES = [
    b"",
    b"\xc1",
    b"\xc0",
    b"\x97",
    b"\x97\xa1\xff",
    b"\xdd\xff\xff\xff\xff",  # says that 4 Gi elements follow
    b"\xdb\xff\xff\xff\xff",  # says that 4 GiB of text follow
    b"\x91" * 100_000,
    encode_holding(WHOLE) + b"\0",
    encode_holding(WHOLE)[:-1],
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:20]))
def test_broken_bodies_are_refused(body):
    for decode in (decode_holding, decode_tag, decode_hello):
        with pytest.raises(FormatError):
            decode(body)


@given(
    st.one_of(
        st.binary(max_size=40),
        st.lists(
            st.none()
            | st.booleans()
            | st.integers(-(1 << 63), (1 << 64) - 1)
            | st.floats()
            | st.binary(max_size=4)
            | st.text(max_size=4)
            | st.sampled_from(["toc", "fixed", "active", str(A)]),
            min_size=4,
            max_size=8,
        ).map(msgspec.msgpack.encode),
    )
)
def test_any_body_gives_a_possible_value_or_our_error(body):
    with suppress(FormatError):
        holding = decode_holding(body)
        assert len(holding.held) <= holding.held.count <= min(1 << 24, holding.size)
    with suppress(FormatError):
        assert 0 <= decode_tag(body).age_s < math.inf
    with suppress(FormatError):
        said = decode_hello(body)
        assert max(map(len, (said.node, said.zone, said.address, said.protocol))) <= 255


def test_a_deeply_nested_body_is_refused():
    nested = b"\x98" + encode_holding(WHOLE)[1:] + b"\x91" * 100_000
    with pytest.raises(FormatError):
        decode_holding(nested)
