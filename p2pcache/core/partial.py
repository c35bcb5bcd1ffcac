"""What the answer to a range request really delivers (RFC 9110, section 15.3.7).

The rule it keeps: nothing is taken on trust that the answer's own headers contradict. An answer
with the wrong range or total is a lie, not a smaller success.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pcache.core.errors import FormatError
from p2pcache.core.ranges import ByteRange, parse_content_range


@dataclass(frozen=True, slots=True)
class Delivery:
    """How to read the body: drop *skip* bytes, then come the bytes of *part*.

    *ends* tells that the body must end there; otherwise the rest is of no interest.
    """

    skip: int
    part: ByteRange
    ends: bool


def read_delivery(
    status: int,
    content_range: str | None,
    content_length: int | None,
    wanted: ByteRange,
    size: int,
) -> Delivery:
    """Return what a 206, or a 200 that ignored the range, delivers of the *wanted* bytes.

    *size* is the known size of the blob. A 206 may be shorter than asked, as the RFC permits, if
    it starts at the right byte. Raises `FormatError`.
    """
    if status == 200:
        if content_length is not None and content_length != size:
            raise FormatError(f"whole blob of {content_length} bytes, expected {size}")
        return Delivery(wanted.start, wanted, ends=wanted.stop == size)
    if status != 206:
        raise FormatError(f"status {status} delivers no range")
    if content_range is None:
        raise FormatError("206 without a Content-Range")
    part, total = parse_content_range(content_range)
    if total != size:
        raise FormatError(f"range of a blob of {total} bytes, expected {size}")
    if part.start != wanted.start or part.stop > wanted.stop:
        raise FormatError(f"range {part.start}-{part.stop} for {wanted.start}-{wanted.stop}")
    if content_length is not None and content_length != len(part):
        raise FormatError(f"{content_length} bytes for a range of {len(part)}")
    return Delivery(0, part, ends=True)
