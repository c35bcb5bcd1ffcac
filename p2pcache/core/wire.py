"""What peers tell each other: the small bodies of the peer API, as MessagePack.

Decoding bounds what a hostile peer can make of them: sizes are limited by the reader, types by
the structs, and every number is checked against the others before it becomes a value.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

import msgspec

from p2pcache.core.address import is_address
from p2pcache.core.errors import BadDigest, FormatError
from p2pcache.core.layout import LayoutKind, PieceMask
from p2pcache.core.model import MAX_BLOB_SIZE, Digest

PROTOCOL: Final = "v1"
MEDIA_TYPE: Final = "application/vnd.msgpack"

# As many as a table of contents may have chunks, and more than a blob can have fixed pieces.
_MAX_PIECES: Final = 1 << 20
# RFC 6838, section 4.2: type and subtype have at most 127 characters each; the rest is parameters.
_MEDIA_TYPE = re.compile(r"[ -~]{0,512}")
# What is logged, compared and sent on: printable, without blanks.
_NAME = re.compile(r"[!-~]{0,255}")
_MAX_NODE: Final = 255


@dataclass(frozen=True, slots=True)
class Holding:
    """What a node holds of one blob, proven. A claim, until its bytes have been proven here."""

    node: str
    """The id of the node that says so: by it a node recognises itself in a list of peers."""
    size: int
    kind: LayoutKind
    toc_offset: int | None
    """Where the last piece of a toc layout starts: a hint that saves reading the footer."""
    held: PieceMask
    is_whole: bool
    toc_digest: Digest | None = None
    """The table of contents that cut it and proved its pieces; None if the node does not say."""


@dataclass(frozen=True, slots=True)
class TagNews:
    """Where a node last saw a tag point, and how many seconds ago."""

    digest: Digest
    media_type: str
    size: int
    age_s: float


class NodeState(Enum):
    """Whether a node is there to stay."""

    ACTIVE = "active"
    LEAVING = "leaving"
    """It finishes what it has begun and takes no new work."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who a node is."""

    node: str
    """Its id: another one after each start. By it a node recognises itself in a list of peers."""
    zone: str
    """Where it runs, "" if it does not say."""
    address: str
    """HOST:PORT at which others reach it, "" if it does not know."""
    state: NodeState = NodeState.ACTIVE
    protocol: str = PROTOCOL
    """The newest version of the peer API that it speaks."""


class _WireHolding(msgspec.Struct, array_like=True):
    node: str
    size: int
    kind: str
    toc_offset: int | None
    count: int
    mask: bytes
    whole: bool
    toc_digest: str = ""


class _WireTag(msgspec.Struct, array_like=True):
    digest: str
    media_type: str
    size: int
    age_s: float


class _WireHello(msgspec.Struct, array_like=True):
    node: str
    zone: str
    address: str
    state: str
    protocol: str


_HOLDING: Final = msgspec.msgpack.Decoder(_WireHolding)
_TAG: Final = msgspec.msgpack.Decoder(_WireTag)
_HELLO: Final = msgspec.msgpack.Decoder(_WireHello)


def encode_holding(holding: Holding) -> bytes:
    """Return the body that says *holding*."""
    mask = b"" if holding.is_whole else holding.held.to_bytes()
    return msgspec.msgpack.encode(
        _WireHolding(
            holding.node,
            holding.size,
            holding.kind.value,
            holding.toc_offset,
            holding.held.count,
            mask,
            holding.is_whole,
            str(holding.toc_digest or ""),
        )
    )


def decode_holding(body: bytes) -> Holding:
    """The inverse of `encode_holding`. Raises `FormatError`."""
    try:
        wire = _HOLDING.decode(body)
        kind = LayoutKind(wire.kind)
        fewest = 1 if wire.size else 0
        if wire.size > MAX_BLOB_SIZE or not fewest <= wire.count <= min(_MAX_PIECES, wire.size):
            raise ValueError(f"{wire.count} pieces of {wire.size} bytes")
        if wire.toc_offset is not None and not 0 <= wire.toc_offset < wire.size:
            raise ValueError(f"TOC at {wire.toc_offset} of {wire.size} bytes")
        held = (
            PieceMask.full(wire.count)
            if wire.whole
            else PieceMask.from_bytes(wire.count, wire.mask)
        )
        toc_digest = Digest.parse(wire.toc_digest) if wire.toc_digest else None
    except (msgspec.MsgspecError, ValueError, RecursionError, BadDigest) as error:
        raise FormatError(f"not a holding: {error}") from error
    return Holding(wire.node, wire.size, kind, wire.toc_offset, held, wire.whole, toc_digest)


def encode_tag(news: TagNews) -> bytes:
    """Return the body that says *news*."""
    return msgspec.msgpack.encode(
        _WireTag(str(news.digest), news.media_type, news.size, news.age_s)
    )


def decode_tag(body: bytes) -> TagNews:
    """The inverse of `encode_tag`. Raises `FormatError`."""
    try:
        wire = _TAG.decode(body)
        if not 0 <= wire.size <= MAX_BLOB_SIZE or not 0 <= wire.age_s < math.inf:
            raise ValueError("no such size or age")
        # It becomes a header's value.
        if not _MEDIA_TYPE.fullmatch(wire.media_type):
            raise ValueError("not a media type")
        return TagNews(Digest.parse(wire.digest), wire.media_type, wire.size, wire.age_s)
    except (msgspec.MsgspecError, ValueError, RecursionError, BadDigest) as error:
        raise FormatError(f"not a tag's news: {error}") from error


def encode_hello(hello: Hello) -> bytes:
    """Return the body that says *hello*."""
    return msgspec.msgpack.encode(
        _WireHello(hello.node, hello.zone, hello.address, hello.state.value, hello.protocol)
    )


def decode_hello(body: bytes) -> Hello:
    """The inverse of `encode_hello`. Raises `FormatError`."""
    try:
        wire = _HELLO.decode(body)
        if not 0 < len(wire.node) <= _MAX_NODE:
            raise ValueError("no such node id")
        for name in (wire.zone, wire.address, wire.protocol):
            if not _NAME.fullmatch(name):
                raise ValueError("not a name")
        if wire.address and not is_address(wire.address):
            raise ValueError("not an address")
        state = NodeState(wire.state)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"not a hello: {error}") from error
    return Hello(wire.node, wire.zone, wire.address, state, wire.protocol)
