from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcache.core.errors import FormatError
from p2pcache.core.partial import Delivery, read_delivery
from p2pcache.core.ranges import ByteRange

WANTED = ByteRange(10, 20)


def test_a_206_delivers_what_was_asked_for():
    assert read_delivery(206, "bytes 10-19/100", 10, WANTED, 100) == Delivery(0, WANTED, True)
    assert read_delivery(206, "bytes 10-19/100", None, WANTED, 100) == Delivery(0, WANTED, True)


def test_a_206_may_be_shorter():
    delivery = read_delivery(206, "bytes 10-12/100", 3, WANTED, 100)
    assert delivery == Delivery(0, ByteRange(10, 13), True)


def test_a_200_is_skipped_to_the_start():
    assert read_delivery(200, None, 100, WANTED, 100) == Delivery(10, WANTED, False)
    assert read_delivery(200, None, None, WANTED, 20) == Delivery(10, WANTED, True)


@pytest.mark.parametrize(
    ("status", "content_range", "content_length"),
    [
        (206, None, 10),
        (206, "bytes 10-19/*", 10),
        (206, "bytes 10-19/101", 10),
        (206, "bytes 0-9/100", 10),
        (206, "bytes 11-19/100", 9),
        (206, "bytes 10-20/100", 11),
        (206, "bytes 10-19/100", 11),
        (206, "bytes 10-19/100", 9),
        (200, None, 99),
        (204, None, 0),
        (416, "bytes */100", 0),
    ],
)
def test_a_contradiction_is_refused(status, content_range, content_length):
    with pytest.raises(FormatError):
        read_delivery(status, content_range, content_length, WANTED, 100)


@given(
    st.sampled_from([200, 206]),
    st.none() | st.from_regex(r"bytes \d\d?-\d\d?/\d\d?\d?", fullmatch=True) | st.text(max_size=30),
    st.none() | st.integers(0, 120),
    st.integers(0, 50),
    st.integers(1, 50),
    st.integers(0, 50),
)
def test_nothing_but_wanted_bytes_is_delivered(status, content_range, length, start, many, after):
    wanted = ByteRange(start, start + many)
    with suppress(FormatError):
        delivery = read_delivery(status, content_range, length, wanted, wanted.stop + after)
        assert delivery.part.start == wanted.start
        assert delivery.part.stop <= wanted.stop
        assert delivery.skip in (0, wanted.start)
        if length is not None:
            assert delivery.skip + len(delivery.part) <= length
