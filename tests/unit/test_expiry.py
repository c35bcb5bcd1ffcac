from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcache.core.expiry import (
    DEFAULT_REDIRECT_S,
    MAX_REDIRECT_S,
    MAX_RETRY_AFTER_S,
    MAX_TOKEN_S,
    parse_http_date,
    parse_retry_after,
    redirect_lifetime_s,
    token_lifetime_s,
)

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC).timestamp()
TIMES = st.integers(0, 4_000_000_000)
NAMES = st.sampled_from(
    ["X-Amz-Date", "X-Amz-Expires", "X-Goog-Date", "X-Goog-Expires", "se", "Expires", "other"]
)
FIELDS = st.sampled_from(["Cache-Control", "Expires", "Age", "Date"])
TEXTS = (
    st.text(max_size=20)
    | st.sampled_from(
        ["20260304T050607Z", "99999999T999999Z", "2026-03-04T05:16:07Z", "2026-02-30"]
    )
    | st.sampled_from(["600", "9" * 19, "-1", "\u0663" * 4])
    | st.sampled_from(["max-age=60", "no-store", "max-age=9999999999"])
    | st.sampled_from(["Wed, 31 Feb 2026 05:06:07 GMT", "Wed, 04 Mar 2026 05:06:60 GMT"])
)


def stamp(seconds, form):
    return datetime.fromtimestamp(NOW + seconds, UTC).strftime(form)


def http_date(seconds):
    return format_datetime(datetime.fromtimestamp(NOW + seconds, UTC), usegmt=True)


@pytest.mark.parametrize(
    "query",
    [
        {"X-Amz-Date": stamp(-300, "%Y%m%dT%H%M%SZ"), "X-Amz-Expires": "900"},
        {"x-amz-date": stamp(0, "%Y%m%dT%H%M%SZ"), "x-amz-expires": "600"},
        {"X-Goog-Date": stamp(0, "%Y%m%dT%H%M%SZ"), "X-Goog-Expires": "600"},
        {"se": stamp(600, "%Y-%m-%dT%H:%M:%SZ"), "sig": "x"},
        {"se": stamp(600, "%Y-%m-%dT%H:%M:%S.0000000Z")},
        {"Expires": str(int(NOW) + 600), "Signature": "x", "Key-Pair-Id": "y"},
        {"Expires": str(int(NOW) + 600), "se": stamp(9000, "%Y-%m-%dT%H:%M:%SZ")},
    ],
)
def test_every_clouds_signed_address_tells_its_end(query):
    assert redirect_lifetime_s(query, {}, NOW) == 570


def test_minutes_and_days_are_enough_for_azure():
    assert redirect_lifetime_s({"se": "2026-03-04T05:16Z"}, {}, NOW) == 593 - 30
    assert redirect_lifetime_s({"se": "2026-03-05"}, {}, NOW) == MAX_REDIRECT_S - 30


def test_an_address_that_says_nothing_is_kept_for_a_minute():
    assert redirect_lifetime_s({}, {}, NOW) == DEFAULT_REDIRECT_S * 0.8
    assert redirect_lifetime_s({"X-Amz-Expires": "600"}, {}, NOW) == DEFAULT_REDIRECT_S * 0.8


def test_an_address_that_has_lapsed_is_not_kept():
    assert redirect_lifetime_s({"Expires": str(int(NOW) - 1)}, {}, NOW) == 0


def test_cache_headers_count_where_the_address_says_nothing():
    assert redirect_lifetime_s({}, {"Cache-Control": "private, max-age=600"}, NOW) == 570
    aged = {"Cache-Control": "max-age=1000", "Age": "400"}
    assert redirect_lifetime_s({}, aged, NOW) == 570
    assert redirect_lifetime_s({}, {"Cache-Control": "max-age=10", "Age": "400"}, NOW) == 0
    assert redirect_lifetime_s({}, {"Expires": http_date(600)}, NOW) == 570
    assert redirect_lifetime_s({}, {"Expires": "0"}, NOW) == 0
    for forbidden in ("no-store", "No-Cache, max-age=60", "max-age=60,no-store"):
        assert redirect_lifetime_s({}, {"Cache-Control": forbidden}, NOW) == 0
    signed = {"Expires": str(int(NOW) + 600)}
    assert redirect_lifetime_s(signed, {"Cache-Control": "no-store"}, NOW) == 570


def test_a_wrong_local_clock_does_no_harm():
    query = {"X-Amz-Date": stamp(0, "%Y%m%dT%H%M%SZ"), "X-Amz-Expires": "600"}
    for skew in (-86_400, 86_400):
        assert redirect_lifetime_s(query, {"Date": http_date(0)}, NOW + skew) == 570


@given(st.dictionaries(NAMES, TEXTS), st.dictionaries(FIELDS, TEXTS), TIMES)
def test_a_lifetime_is_never_negative_nor_long(query, headers, now):
    assert 0 <= redirect_lifetime_s(query, headers, now) <= MAX_REDIRECT_S


@given(TIMES)
def test_a_printed_date_is_read_back(seconds):
    text = format_datetime(datetime.fromtimestamp(seconds, UTC), usegmt=True)
    assert parse_http_date(text) == seconds


@given(TEXTS, TIMES)
def test_any_text_is_a_wait_or_nothing(text, now):
    wait = parse_retry_after(text, now)
    assert wait is None or 0 <= wait <= MAX_RETRY_AFTER_S


def test_the_wait_is_in_seconds_or_until_a_date():
    assert parse_retry_after(" 17 ", NOW) == 17
    assert parse_retry_after(http_date(90), NOW) == 90
    assert parse_retry_after(http_date(-90), NOW) == 0
    assert parse_retry_after("99999999", NOW) == MAX_RETRY_AFTER_S
    assert parse_retry_after("", NOW) is None
    assert parse_retry_after("Wed, 04 Mat 2026 05:06:07 GMT", NOW) is None
    assert parse_retry_after("Wed, 31 Dec 1969 05:06:07 GMT", NOW) is None


def test_a_token_is_given_up_before_it_lapses():
    assert token_lifetime_s(300) == 270
    assert token_lifetime_s(None) == token_lifetime_s(60) == 48
    assert token_lifetime_s(0) == token_lifetime_s(-5) == token_lifetime_s(float("nan")) == 48
    assert token_lifetime_s(float("inf")) == MAX_TOKEN_S - 30
