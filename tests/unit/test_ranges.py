"""Range headers, against a slow model made of sets of byte numbers."""

from email import message_from_bytes

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from p2pcache.core.errors import BadRange, FormatError, RangeNotSatisfiable
from p2pcache.core.model import MAX_BLOB_SIZE
from p2pcache.core.ranges import (
    MAX_RANGES,
    ByteRange,
    RequestedRanges,
    multipart_heads,
    parse_content_range,
    parse_range,
)

SIZES = st.integers(0, 40)
SPECS = st.one_of(
    st.tuples(st.integers(0, 50), st.integers(0, 50) | st.none()),
    st.tuples(st.none(), st.integers(0, 50)),
)


@st.composite
def byte_ranges(draw, limit=1 << 40):
    start = draw(st.integers(0, limit - 1))
    return ByteRange(start, draw(st.integers(start + 1, limit)))


def members(part):
    return set(range(part.start, part.stop))


# ByteRange.


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (5, 5), (6, 5), (-1, 3)])
def test_a_range_is_never_empty_nor_negative(start, stop):
    with pytest.raises(ValueError, match="not a byte range"):
        ByteRange(start, stop)


@given(byte_ranges(30), byte_ranges(30))
def test_overlap_is_what_both_have(one, other):
    both = one.overlap(other)
    assert (members(both) if both else set()) == members(one) & members(other)
    assert len(one) == len(members(one))


@given(byte_ranges(1 << 36), st.integers(0, 1 << 36))
def test_a_printed_range_is_read_back(part, more):
    size = min(part.stop + more, MAX_BLOB_SIZE)
    assert parse_range(part.header, size) == RequestedRanges((part,), open_ended=False)
    assert parse_content_range(part.content_range(size)) == (part, size)


# The Range header.


def spelled(spec):
    first, last = spec
    return f"{'' if first is None else first}-{'' if last is None else last}"


def modelled(specs, size):
    """The bytes of each part, as RFC 9110 words it; or the error."""
    found = []
    for first, last in specs:
        if first is None:
            wanted = set(range(size)[-last:]) if last else set()
        elif last is not None and last < first:
            return BadRange
        else:
            wanted = {i for i in range(size) if i >= first and (last is None or i <= last)}
        if wanted:
            found.append(wanted)
    return found or RangeNotSatisfiable


@given(st.lists(SPECS, min_size=1, max_size=6), SIZES)
@example([(0, None)], 0)
@example([(None, 0)], 10)
@example([(None, 50)], 10)
@example([(10, None), (0, 0)], 10)
@example([(3, 2)], 10)
def test_parts_are_what_the_rfc_says(specs, size):
    header = "bytes=" + ",".join(map(spelled, specs))
    expected = modelled(specs, size)
    if isinstance(expected, list):
        found = parse_range(header, size)
        assert found is not None
        assert [members(part) for part in found.parts] == expected
    else:
        with pytest.raises(expected):
            parse_range(header, size)


@given(st.text(max_size=30) | st.from_regex(r"\Abytes=[-0-9, ]{0,30}\Z"), SIZES)
def test_any_header_gives_ranges_within_the_blob_or_our_error(header, size):
    try:
        found = parse_range(header, size)
    except (BadRange, RangeNotSatisfiable):
        return
    assert found is None or all(0 <= p.start < p.stop <= size for p in found.parts)


@pytest.mark.parametrize(
    ("header", "open_ended"),
    [
        ("bytes=3-", True),
        ("bytes=0-", True),
        ("bytes=3-9", False),
        ("bytes=-4", False),
        ("bytes=3-,5-", False),
    ],
)
def test_only_a_lone_range_without_a_last_byte_is_open_ended(header, open_ended):
    found = parse_range(header, 10)
    assert found is not None
    assert found.open_ended is open_ended


def test_parts_keep_the_order_of_the_header_and_may_overlap():
    found = parse_range("bytes=5-7, 0-1 ,\t6-100, -1,,", 10)
    assert found is not None
    assert found.parts == (ByteRange(5, 8), ByteRange(0, 2), ByteRange(6, 10), ByteRange(9, 10))


def test_the_unit_is_read_in_any_case_and_another_one_means_the_whole_blob():
    assert parse_range("Bytes=0-1", 10) == parse_range("bytes=0-1", 10)
    for header in ("items=0-1", "", "0-1", "none", "kilobytes=0-1"):
        assert parse_range(header, 10) is None


@pytest.mark.parametrize(
    "header",
    [
        "bytes",
        "bytes=",
        "bytes= , ,",
        "bytes=-",
        "bytes=a-b",
        "bytes=5-2",
        "bytes=99-2",
        "bytes=--1",
        "bytes=1--1",
        "bytes=1-2-3",
        "bytes=+1-2",
        "bytes=0x1-2",
        "bytes=1.0-2",
        "bytes=1 - 2",
        "bytes=0-1;2-3",
        "bytes=((((0-1))))",
        "bytes=0-1=2-3",
        "bytes=bytes=0-1",
        "bytes=٣-٤",  # digits, but not those of the RFC
        "bytes=²-³",
        "bytes=1-\udcff",
        "bytes=0-1\n2-3",
        "bytes=0-1,junk",
        "bytes=" + "9" * 20 + "-",
    ],
)
def test_a_malformed_header_is_refused(header):
    with pytest.raises(BadRange):
        parse_range(header, 10)


def test_a_last_byte_far_past_the_end_is_clamped():
    found = parse_range("bytes=4-9999999999999999999", 10)
    assert found is not None
    assert found.parts == (ByteRange(4, 10),)


def test_a_range_past_the_end_reports_the_size():
    with pytest.raises(RangeNotSatisfiable) as caught:
        parse_range("bytes=10-,20-30,-0", 10)
    assert caught.value.size == 10


def test_as_many_ranges_as_allowed_are_answered_and_one_more_is_refused():
    header = "bytes=" + ",".join(f"{i}-{i}" for i in range(MAX_RANGES))
    found = parse_range(header, 1000)
    assert found is not None
    assert len(found.parts) == MAX_RANGES
    assert parse_range(header + ",", 1000) == found
    with pytest.raises(BadRange, match="1 to 256"):
        parse_range(header + ",999-", 1000)


class CountingText(str):
    """A header that counts its parts, and the characters that they are made of."""

    made = 0
    owner: "CountingText"

    def __new__(cls, text, owner=None):
        made = super().__new__(cls, text)
        made.owner = owner or made
        return made

    def partition(self, sep):
        head, found, tail = super().partition(sep)
        self.made += len(self)
        return head, found, CountingText(tail, self)

    def split(self, sep=None, maxsplit=-1):
        parts = super().split(sep, maxsplit)
        self.owner.made += sum(map(len, parts)) + len(parts) * 100
        return parts


@pytest.mark.parametrize(
    "junk",
    [
        ",",
        "0-0,",
        "-,",
        "((",
        " \t",
        "9",
        "0-",
        "1-2-",
        "bytes=",
        "٣",
        ", ",
    ],
)
def test_a_hostile_header_costs_no_more_than_its_length(junk):
    costs = []
    for length in (16 << 10, 32 << 10):
        header = CountingText("bytes=" + junk * (length // len(junk)))
        with pytest.raises(BadRange) as caught:
            parse_range(header, 1 << 30)
        assert len(str(caught.value)) < 400
        costs.append(header.made)
    # The number of parts is capped: twice the length is at most twice the cost.
    assert costs[1] <= 2 * costs[0] + 100
    assert costs[0] <= 2 * (16 << 10) + 100 * (MAX_RANGES + 1)


# Content-Range.


@pytest.mark.parametrize(
    "header",
    [
        "",
        "bytes */10",
        "bytes 0-4/*",
        "bytes 5-4/10",
        "bytes 0-10/10",
        "bytes 0-0/0",
        "bytes=0-4/10",
        "bytes 0-4",
        "bytes -4/10",
        "bytes ٣-٤/10",
        "bytes 0-4/10 0-4/10",
        "items 0-4/10",
        "bytes 0-" + "9" * 18 + "/1" + "0" * 18,
        "bytes 0-0/" + "9" * 100_000,
    ],
)
def test_a_content_range_that_says_no_range_of_a_possible_blob_is_refused(header):
    with pytest.raises(FormatError) as caught:
        parse_content_range(header)
    assert len(str(caught.value)) < 400


@given(st.text(max_size=40) | st.from_regex(r"\Abytes [-0-9/*]{0,60}\Z"))
def test_any_content_range_gives_a_range_of_a_countable_blob_or_our_error(header):
    try:
        part, size = parse_content_range(header)
    except FormatError:
        return
    assert 0 < len(part) <= size <= MAX_BLOB_SIZE
    assert part.stop <= size


# multipart/byteranges.

BODY = bytes(range(32, 127)) * 3


@given(st.lists(byte_ranges(len(BODY)), min_size=1, max_size=8))
def test_a_multipart_answer_is_read_by_the_standard_library(parts):
    heads, end = multipart_heads(parts, len(BODY), "b0und", "application/x-test")
    body = b"".join(
        head + BODY[part.start : part.stop] for head, part in zip(heads, parts, strict=True)
    )
    message = message_from_bytes(
        b"Content-Type: multipart/byteranges; boundary=b0und\r\n\r\n" + body + end
    )
    assert not message.defects
    assert [
        (item["Content-Type"], item["Content-Range"], item.get_payload(decode=True))
        for item in message.walk()
        if not item.is_multipart()
    ] == [
        ("application/x-test", part.content_range(len(BODY)), BODY[part.start : part.stop])
        for part in parts
    ]


@given(st.lists(byte_ranges(), min_size=1, max_size=MAX_RANGES))
def test_the_heads_are_as_long_as_the_number_of_parts_allows(parts):
    heads, end = multipart_heads(parts, 1 << 40, "b" * 32, "application/octet-stream")
    assert len(heads) == len(parts)
    assert heads[0].startswith(b"--")
    assert all(head.startswith(b"\r\n--") for head in heads[1:])
    assert all(head.endswith(b"\r\n\r\n") and len(head) < 200 for head in heads)
    assert end == b"\r\n--" + b"b" * 32 + b"--\r\n"
