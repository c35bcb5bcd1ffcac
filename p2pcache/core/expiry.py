"""For how long an answer may be used again: signed URLs, cache headers, tokens, Retry-After.

Hides the clouds' ways of writing a date into a URL. The rule it keeps: what cannot be read is as
good as absent, and the shortest of several promises counts. Times are seconds since the epoch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

# A redirect that says nothing: every signed URL in use lives longer, and a wrong guess costs one
# refused request.
DEFAULT_REDIRECT_S: Final = 60.0
# Access that was taken back is noticed within this time, however long a URL is signed for.
MAX_REDIRECT_S: Final = 3600.0
# Token spec, "Token Response Fields": the lifetime if expires_in is missing.
DEFAULT_TOKEN_S: Final = 60.0
MAX_TOKEN_S: Final = 24 * 3600.0
# What a registry may demand; more is a mistake, or would shut it out for good.
MAX_RETRY_AFTER_S: Final = 3600.0

_MARGIN_S: Final = 30.0
_MARGIN_SHARE: Final = 0.2

_MONTHS: Final = "JanFebMarAprMayJunJulAugSepOctNovDec"
# RFC 9110, section 5.6.7, IMF-fixdate. The two obsolete forms are not read.
_HTTP_DATE = re.compile(
    r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), (\d\d) ([A-Z][a-z]{2}) (\d{4}) (\d\d):(\d\d):(\d\d) GMT",
    re.ASCII,
)
# AWS signature version 4, and Google's V4: 20260102T030405Z.
_BASIC_DATE = re.compile(r"(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z", re.ASCII)
# Azure's shared access signatures: a date, with or without minutes, seconds and fractions.
_AZURE_DATE = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:T(\d\d):(\d\d)(?::(\d\d)(?:\.\d{1,9})?)?Z)?", re.ASCII
)
_SECONDS = re.compile(r"\d{1,10}", re.ASCII)
_MAX_AGE = re.compile(r"(?:^|[\s,])max-age=\"?(\d{1,10})", re.ASCII | re.IGNORECASE)
_NOT_KEPT = re.compile(r"(?:^|[\s,])(?:no-store|no-cache)(?:[\s,=]|$)", re.ASCII | re.IGNORECASE)


def redirect_lifetime_s(query: Mapping[str, str], headers: Mapping[str, str], now: float) -> float:
    """Return for how many seconds a redirect's target may be asked again, without its author.

    *query* is that of the target, decoded; *headers* are the redirect's, names in any case if the
    mapping does not care. A date in the URL outranks the headers: it is what the storage enforces,
    and the URL goes nowhere but back to the storage. The server's Date stands in for *now*, so a
    wrong local clock does no harm. A margin is taken off. 0 means: ask each time.
    """
    now = parse_http_date(headers.get("Date", "")) or now
    ends = list(_signed_ends({name.lower(): text for name, text in query.items()}))
    left = min(ends) - now if ends else _fresh_for(headers, now)
    left = min(left, MAX_REDIRECT_S)
    return max(0.0, left - min(_MARGIN_S, left * _MARGIN_SHARE))


def token_lifetime_s(expires_in: float | None) -> float:
    """Return for how long a token is used that was said to last *expires_in* seconds.

    A margin is taken off, since the token must outlive the request that carries it.
    """
    if expires_in is None or not expires_in > 0:
        expires_in = DEFAULT_TOKEN_S
    expires_in = min(expires_in, MAX_TOKEN_S)
    return expires_in - min(_MARGIN_S, expires_in * _MARGIN_SHARE)


def parse_retry_after(text: str, now: float) -> float | None:
    """Return the seconds that a Retry-After header asks to wait (RFC 9110, section 10.2.3).

    None if it is absent or unreadable; at most `MAX_RETRY_AFTER_S`.
    """
    text = text.strip()
    if _SECONDS.fullmatch(text):
        return min(float(text), MAX_RETRY_AFTER_S)
    date = parse_http_date(text)
    return None if date is None else min(max(0.0, date - now), MAX_RETRY_AFTER_S)


def parse_http_date(text: str) -> float | None:
    """Return the time that an HTTP date names, or None."""
    match = _HTTP_DATE.fullmatch(text.strip())
    if match is None or _MONTHS.find(match[2]) % 3:  # -1, if absent, is 2 modulo 3
        return None
    month = _MONTHS.index(match[2]) // 3 + 1
    return _time(match[3], str(month), match[1], *match.groups()[3:])


def _signed_ends(query: Mapping[str, str]) -> Iterator[float]:
    """Yield every end of validity that a URL states."""
    for maker in ("amz", "goog"):
        start = _parse(_BASIC_DATE, query.get(f"x-{maker}-date", ""))
        length = query.get(f"x-{maker}-expires", "")
        if start is not None and _SECONDS.fullmatch(length):
            yield start + int(length)
    end = _parse(_AZURE_DATE, query.get("se", ""))
    if end is not None:
        yield end
    # CloudFront, and the older signatures of Amazon and Google: seconds since the epoch.
    if _SECONDS.fullmatch(query.get("expires", "")):
        yield float(query["expires"])


def _fresh_for(headers: Mapping[str, str], now: float) -> float:
    """Return the freshness that cache headers give (RFC 9111, sections 4.2.1 and 5.2)."""
    control = headers.get("Cache-Control", "")
    if _NOT_KEPT.search(control):
        return 0.0
    if match := _MAX_AGE.search(control):
        age = headers.get("Age", "").strip()
        return max(0.0, int(match[1]) - (int(age) if _SECONDS.fullmatch(age) else 0))
    if "Expires" in headers:
        # Section 5.3: what is not a date, "0" above all, is in the past.
        end = parse_http_date(headers["Expires"])
        return 0.0 if end is None else max(0.0, end - now)
    return DEFAULT_REDIRECT_S


def _parse(form: re.Pattern[str], text: str) -> float | None:
    match = form.fullmatch(text)
    return None if match is None else _time(*match.groups())


def _time(*parts: str | None) -> float | None:
    """Return the time of year, month, day, hour, minute, second; None if there is no such time."""
    year, month, day, hour, minute, second = (int(part or 0) for part in parts)
    # A leap second is the first of the next minute; datetime knows none.
    if second > 60 or year < 1970:
        return None
    try:
        whole = datetime(year, month, day, hour, minute, tzinfo=UTC)
        return (whole + timedelta(seconds=second)).timestamp()
    except (ValueError, OverflowError):
        return None
