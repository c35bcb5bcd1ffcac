"""Claims and grants on the wire: what is said is heard, and nothing else is believed."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcache.core.claims import (
    MAX_CLAIMS,
    REGION_PIECES,
    Claim,
    Claims,
    Cut,
    Grant,
    Grants,
    RegionKey,
    Source,
    decode_claims,
    decode_grants,
    encode_claims,
    encode_grants,
    region_mask,
    region_pieces,
)
from p2pcache.core.errors import FormatError
from p2pcache.core.layout import PieceMask
from p2pcache.core.model import Digest

DIGEST = Digest.of(b"a blob")
MASKS = st.integers(0, (1 << REGION_PIECES) - 1)
NAMES = st.text(st.characters(codec="utf-8"), max_size=255)
HOSTS = st.from_regex(r"([a-z0-9_-]{1,63}\.){0,2}[a-z0-9]{1,63}\.?", fullmatch=True)
IPS = st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map("[{}]".format)
ADDRESSES = st.just("") | st.builds("{}:{}".format, HOSTS | IPS, st.integers(0, 65535))
COMPLAINTS = st.lists(st.tuples(ADDRESSES, MASKS), max_size=64).map(tuple)
KEYS = st.builds(RegionKey, st.just(DIGEST), NAMES, st.integers(0, (1 << 14) - 1), NAMES)
CLAIM = st.builds(
    Claim,
    KEYS,
    MASKS,
    MASKS,
    MASKS,
    st.integers(0, REGION_PIECES),
    st.booleans(),
    COMPLAINTS,
    COMPLAINTS,
)
CLAIMS = st.builds(
    Claims, ADDRESSES, st.lists(CLAIM, max_size=4).map(tuple), st.integers(0, (1 << 63) - 1)
)
SOURCES = st.lists(st.builds(Source, ADDRESSES, MASKS, MASKS), max_size=64).map(tuple)
GRANT = st.builds(Grant, MASKS, SOURCES, st.floats(0, 3599))
GRANTS = st.builds(Grants, NAMES, st.lists(GRANT, max_size=4).map(tuple))

GOOD_CLAIM = [str(DIGEST), "fixed", 0, "", 0, 0, 1, 8, True, [], []]


def claims_body(*claims, sender="a:1", rank=0):
    return msgspec.msgpack.encode([sender, rank, list(claims)])


def grants_body(*grants, incarnation="1"):
    return msgspec.msgpack.encode([incarnation, list(grants)])


def changed(position, value):
    return [*GOOD_CLAIM[:position], value, *GOOD_CLAIM[position + 1 :]]


@given(CLAIMS)
def test_claims_are_decoded_as_they_were_encoded(message):
    assert decode_claims(encode_claims(message)) == message


@given(GRANTS)
def test_grants_are_decoded_as_they_were_encoded(message):
    assert decode_grants(encode_grants(message)) == message


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | NAMES,
    lambda children: st.lists(children) | st.dictionaries(NAMES, children),
    max_leaves=30,
)
BODIES = st.binary() | ANYTHING.map(msgspec.msgpack.encode)


@given(BODIES, st.sampled_from([decode_claims, decode_grants]))
def test_any_body_is_a_value_or_a_format_error(body, decode):
    with contextlib.suppress(FormatError):
        decode(body)


@given(CLAIMS, st.data())
def test_a_damaged_body_is_a_value_or_a_format_error(message, data):
    body = bytearray(encode_claims(message))
    position = data.draw(st.integers(0, len(body) - 1))
    body[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError):
        decode_claims(bytes(body))


def test_a_deeply_nested_body_is_refused():
    with pytest.raises(FormatError):
        decode_claims(b"\x91" * 100_000)


def test_the_good_claim_is_good():
    assert decode_claims(claims_body(GOOD_CLAIM)).claims[0].wanted == 1


@pytest.mark.parametrize(
    "claim",
    [
        changed(0, "sha256:00"),
        changed(0, "nonsense"),
        changed(1, "x" * 256),
        changed(2, -1),
        changed(2, 1 << 14),
        changed(3, "x" * 256),
        changed(4, -1),
        changed(5, -1),
        changed(6, 1.5),
        changed(7, -1),
        changed(7, REGION_PIECES + 1),
        changed(8, 1),
        changed(9, [["a:1", 0]] * 65),
        changed(9, [["x" * 256, 0]]),
        changed(10, [["a:1", -1]]),
        changed(10, [["a:1", 0]] * 65),
        GOOD_CLAIM[:-1],
    ],
)
def test_a_bad_claim_is_refused(claim):
    with pytest.raises(FormatError):
        decode_claims(claims_body(claim))


@pytest.mark.parametrize(
    "body",
    [
        claims_body(sender="x" * 256),
        claims_body(rank=-1),
        claims_body(*[GOOD_CLAIM] * (MAX_CLAIMS + 1)),
        claims_body()[:-1],
        claims_body() + b"\0",
    ],
)
def test_a_bad_message_of_claims_is_refused(body):
    with pytest.raises(FormatError):
        decode_claims(body)


@pytest.mark.parametrize(
    "body",
    [
        grants_body(incarnation="x" * 256),
        grants_body(*[[0, [], 0.0]] * (MAX_CLAIMS + 1)),
        grants_body([-1, [], 0.0]),
        grants_body([0, [["a:1", 0, 0]] * 65, 0.0]),
        grants_body([0, [["x" * 256, 0, 0]], 0.0]),
        grants_body([0, [["a:1", -1, 0]], 0.0]),
        grants_body([0, [["a:1", 0, -1]], 0.0]),
        grants_body([0, [], -0.1]),
        grants_body([0, [], 3600.0]),
        grants_body([0, [], float("nan")]),
        grants_body([0, []]),
    ],
)
def test_a_bad_message_of_grants_is_refused(body):
    with pytest.raises(FormatError):
        decode_grants(body)


@pytest.mark.parametrize(
    "address",
    [
        "x" * 64 + ":1",
        "a." + "x" * 64 + ".b:1",
        "bücher.test:29901",
        "a..b:1",
        ".a:1",
        "a b:1",
        "a\r\nb:1",
        "a/b:1",
        "a?b:1",
        "u@a:1",
        "a:65536",
        "a:\u0661",
        "a:",
        "a",
        "a:1\n",
        "[::g]:1",
        "::1:1",
        "[fe80::1%ü]:1",
        ".".join(["x" * 60] * 5) + ":1",
    ],
)
def test_an_address_that_nobody_can_ask_is_refused_wherever_it_stands(address):
    for body in (
        claims_body(sender=address),
        claims_body(changed(9, [[address, 1]])),
        claims_body(changed(10, [[address, 1]])),
    ):
        with pytest.raises(FormatError, match="no such address"):
            decode_claims(body)
    with pytest.raises(FormatError, match="no such address"):
        decode_grants(grants_body([0, [[address, 1, 1]], 0.0]))


@given(st.integers(1, 300), st.data())
def test_a_mask_is_the_sum_of_its_regions(count, data):
    pieces = PieceMask(count, data.draw(st.integers(0, (1 << count) - 1)))
    cut = Cut(DIGEST, "fixed", count, passes_on=False)
    regions = cut.regions(pieces)
    whole = PieceMask(count)
    for index in regions:
        mask = region_mask(pieces, index)
        assert 0 < mask < 1 << REGION_PIECES
        whole |= region_pieces(count, index, mask)
    assert whole == pieces
    assert regions == sorted({piece // REGION_PIECES for piece in pieces})


def test_bits_past_the_end_of_the_blob_are_dropped():
    assert region_pieces(70, 1, (1 << REGION_PIECES) - 1) == PieceMask(70, 0b111111 << 64)
    assert region_pieces(70, 5, 1) == PieceMask(70)


def test_manifests_and_tails_are_one_piece_that_is_proven_on_arrival():
    toc_digest = Digest.of(b"a table of contents")
    manifest, tail = Cut.of_manifest(DIGEST), Cut.of_tail(DIGEST, toc_digest)
    assert (manifest.count, tail.count) == (1, 1)
    assert manifest.passes_on
    assert tail.passes_on
    assert manifest.name != tail.name != Cut.of_tail(DIGEST, DIGEST).name
    assert manifest.regions(PieceMask.full(1)) == [0]
