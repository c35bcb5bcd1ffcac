"""What a node says to the coordinator of a region, and what the coordinator answers.

A claim tells all that a node has to say of one region: which pieces it would give to others, which
are on their way to it, and which it wants. Nothing in it depends on earlier claims, so that claims
may be repeated, lost, or sent to another coordinator. A claim that wants nothing is an
announcement. On the wire both are MessagePack; decoding bounds what a hostile node can make of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from p2pcache.core.address import is_address
from p2pcache.core.errors import BadDigest, FormatError
from p2pcache.core.layout import FIXED_PIECE_SIZE, LayoutKind, PieceMask
from p2pcache.core.model import Digest
from p2pcache.core.toc import MIN_GROUP_SIZE

REGION_PIECES: Final = 64
"""The unit of coordination: so many consecutive pieces, one bit each."""
_ALL: Final = (1 << REGION_PIECES) - 1

MAX_CLAIMS: Final = 1024
"""In one message."""
_MAX_NAME: Final = 255
# A blob has at most 2 ** 20 pieces.
_MAX_INDEX: Final = 1 << 14
_MAX_SOURCES: Final = 64

MANIFEST_CUT: Final = "manifest"
_TAIL: Final = "tail "


def cut_name(kind: LayoutKind, toc_digest: Digest | None) -> str:
    """Name the way in which a layout cuts a blob: equal names mean equal pieces."""
    if kind is LayoutKind.FIXED:
        return f"fixed {FIXED_PIECE_SIZE}"
    return f"toc {MIN_GROUP_SIZE} {toc_digest}"


def tail_name(toc_digest: Digest | None) -> str:
    """Name the cut of a table of contents."""
    return f"{_TAIL}{toc_digest}"


def is_tail(name: str) -> bool:
    """Say whether a cut is that of a table of contents."""
    return name.startswith(_TAIL)


@dataclass(frozen=True, slots=True)
class Cut:
    """A blob, cut in one way: what nodes must agree on before "piece 7" means the same to them."""

    digest: Digest
    name: str
    """How it is cut: nodes that cut otherwise, another version of the program too, differ here."""
    count: int
    """How many pieces there are."""
    passes_on: bool
    """A piece from a peer is proven on arrival, so that it may be given to the next peer."""

    @classmethod
    def of_manifest(cls, digest: Digest) -> Cut:
        """A manifest: one piece."""
        return cls(digest, MANIFEST_CUT, 1, passes_on=True)

    @classmethod
    def of_tail(cls, digest: Digest, toc_digest: Digest) -> Cut:
        """The table of contents of a blob whose other pieces are not known yet: one piece."""
        return cls(digest, tail_name(toc_digest), 1, passes_on=True)

    def regions(self, pieces: PieceMask) -> list[int]:
        """The regions in which there are some of *pieces*, in order."""
        return [i for i in range(-(-self.count // REGION_PIECES)) if region_mask(pieces, i)]


def region_mask(pieces: PieceMask, index: int) -> int:
    """The bits of *pieces* in region *index*."""
    return (pieces.bits >> (index * REGION_PIECES)) & _ALL


def region_pieces(count: int, index: int, mask: int) -> PieceMask:
    """The inverse of `region_mask`, for a blob of *count* pieces; bits past its end are dropped."""
    return PieceMask(count, (mask << (index * REGION_PIECES)) & ((1 << count) - 1))


@dataclass(frozen=True, slots=True, order=True)
class RegionKey:
    """A region of a cut, and who is coordinated: all nodes, or those of one zone."""

    digest: Digest
    cut: str
    index: int
    scope: str = ""
    """A zone's name, or "" for the whole cluster."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a node says of a region. All masks have one bit per piece of the region."""

    key: RegionKey
    held: int = 0
    """It has them and gives them to whoever asks."""
    fetching: int = 0
    """They are on their way to it, from a source that it was given."""
    wanted: int = 0
    """It lacks them and asks for sources now."""
    lease_limit: int = 0
    """It would read at most so many of them from the upstream now."""
    passes_on: bool = True
    """What it gets from peers it gives to others at once; else only what it read itself."""
    failed: tuple[tuple[str, int], ...] = ()
    """Members that could not be reached, or did not deliver these pieces."""
    stalled: tuple[tuple[str, int], ...] = ()
    """Members from which nothing comes just now, though they have not failed."""


@dataclass(frozen=True, slots=True)
class Source:
    """A member to ask, as its address, for the pieces in *mask*."""

    address: str
    mask: int
    """The wanted pieces that it should be asked for."""
    held: int
    """Everything that it is known to hold of the region."""


@dataclass(frozen=True, slots=True)
class Grant:
    """The answer to a claim. A wanted piece that is in neither has no source yet: ask again."""

    leased: int = 0
    """To be read from the upstream by the claimant, and by nobody else meanwhile."""
    sources: tuple[Source, ...] = ()
    """Best first. Where masks overlap, the earlier source comes first and the later is a spare."""
    retry_s: float = 0.0
    """When to ask again for pieces that have no source yet."""


@dataclass(frozen=True, slots=True)
class Claims:
    """One message to a coordinator. *sender* is the address at which peers reach the claimant."""

    sender: str
    claims: Sequence[Claim]
    rank: int = 0
    """How many coordinators that stand before the addressee could not be reached."""


@dataclass(frozen=True, slots=True)
class Grants:
    """The answer: one grant for each claim, in order."""

    incarnation: str
    """Changes when the coordinator has forgotten what it knew."""
    grants: Sequence[Grant] = field(default_factory=tuple)


class _WireClaim(msgspec.Struct, array_like=True):
    digest: str
    cut: str
    index: int
    scope: str
    held: int
    fetching: int
    wanted: int
    lease_limit: int
    passes_on: bool
    failed: list[tuple[str, int]]
    stalled: list[tuple[str, int]]


class _WireClaims(msgspec.Struct, array_like=True):
    sender: str
    rank: int
    claims: list[_WireClaim]


class _WireGrant(msgspec.Struct, array_like=True):
    leased: int
    sources: list[tuple[str, int, int]]
    retry_s: float


class _WireGrants(msgspec.Struct, array_like=True):
    incarnation: str
    grants: list[_WireGrant]


_CLAIMS: Final = msgspec.msgpack.Decoder(_WireClaims)
_GRANTS: Final = msgspec.msgpack.Decoder(_WireGrants)


def encode_claims(message: Claims) -> bytes:
    """Return the body that says *message*."""
    claims = [
        _WireClaim(
            str(claim.key.digest),
            claim.key.cut,
            claim.key.index,
            claim.key.scope,
            claim.held,
            claim.fetching,
            claim.wanted,
            claim.lease_limit,
            claim.passes_on,
            list(claim.failed),
            list(claim.stalled),
        )
        for claim in message.claims
    ]
    return msgspec.msgpack.encode(_WireClaims(message.sender, message.rank, claims))


def decode_claims(body: bytes) -> Claims:
    """The inverse of `encode_claims`. Raises `FormatError`."""
    try:
        wire = _CLAIMS.decode(body)
        _check(len(wire.claims) <= MAX_CLAIMS, "too many claims")
        _check_address(wire.sender)
        _check(wire.rank >= 0, "no such rank")
        return Claims(wire.sender, tuple(map(_claim, wire.claims)), wire.rank)
    except (msgspec.MsgspecError, ValueError, RecursionError, BadDigest) as error:
        raise FormatError(f"not claims: {error}") from error


def _claim(wire: _WireClaim) -> Claim:
    _check(len(wire.cut) <= _MAX_NAME and len(wire.scope) <= _MAX_NAME, "a name is too long")
    _check(0 <= wire.index < _MAX_INDEX, "no such region")
    _check(0 <= wire.lease_limit <= REGION_PIECES, "no such limit")
    _check(max(len(wire.failed), len(wire.stalled)) <= _MAX_SOURCES, "too many complaints")
    _check_masks(wire.held, wire.fetching, wire.wanted)
    for address, mask in (*wire.failed, *wire.stalled):
        _check_address(address)
        _check_masks(mask)
    return Claim(
        RegionKey(Digest.parse(wire.digest), wire.cut, wire.index, wire.scope),
        wire.held,
        wire.fetching,
        wire.wanted,
        wire.lease_limit,
        wire.passes_on,
        tuple(wire.failed),
        tuple(wire.stalled),
    )


def encode_grants(message: Grants) -> bytes:
    """Return the body that says *message*."""
    grants = [
        _WireGrant(
            grant.leased, [(s.address, s.mask, s.held) for s in grant.sources], grant.retry_s
        )
        for grant in message.grants
    ]
    return msgspec.msgpack.encode(_WireGrants(message.incarnation, grants))


def decode_grants(body: bytes) -> Grants:
    """The inverse of `encode_grants`. Raises `FormatError`."""
    try:
        wire = _GRANTS.decode(body)
        _check(len(wire.grants) <= MAX_CLAIMS, "too many grants")
        _check(len(wire.incarnation) <= _MAX_NAME, "a name is too long")
        return Grants(wire.incarnation, tuple(map(_grant, wire.grants)))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"not grants: {error}") from error


def _grant(wire: _WireGrant) -> Grant:
    _check_masks(wire.leased)
    _check(len(wire.sources) <= _MAX_SOURCES, "too many sources")
    _check(0 <= wire.retry_s < 3600, "no such wait")
    for address, mask, held in wire.sources:
        _check_address(address)
        _check_masks(mask, held)
    return Grant(wire.leased, tuple(Source(*item) for item in wire.sources), wire.retry_s)


def _check_masks(*masks: int) -> None:
    _check(all(0 <= mask <= _ALL for mask in masks), "not a mask of a region")


def _check_address(address: str) -> None:
    # What one member says here, all who claim the region are told to connect to.
    _check(not address or is_address(address), "no such address")


def _check(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)
