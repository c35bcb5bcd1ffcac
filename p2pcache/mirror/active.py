"""A blob that is being read: what is known of it, and what of it is on its way."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum

from p2pcache.core.errors import IntegrityError
from p2pcache.core.layout import Layout, LayoutKind, PieceMask, PieceState
from p2pcache.core.model import Digest, Repository
from p2pcache.core.toc import Toc
from p2pcache.ports import Offer, Peer, StoredBlob


class Origin(Enum):
    """Where a piece came from. The value is the metrics label."""

    LOCAL = "local"
    PEER = "peer"
    UPSTREAM = "upstream"


class PieceData:
    """A fetched piece, in memory until the store has it."""

    __slots__ = ("data", "kept", "origin")

    def __init__(self, data: bytes, origin: Origin) -> None:
        self.data: bytes | None = data
        self.origin = origin
        self.kept: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        """Ends once the store has it, or with False if there is no room."""


class TocUnusable(IntegrityError):
    """The upstream's own bytes do not match the table of contents: read the blob without it."""


@dataclass(slots=True, eq=False)
class ActiveBlob:
    """A blob that is being read or served. *stored* is None if the store has no room for it."""

    digest: Digest
    layout: Layout
    repository: Repository | None
    """Where the upstream has it; None if only peers can be asked."""
    stored: StoredBlob | None
    toc_digest: Digest | None
    toc: Toc | None
    inflight: dict[int, asyncio.Future[PieceData]] = field(default_factory=dict)
    contributors: dict[int, Peer] = field(default_factory=dict)
    """Who delivered the pieces that are not proven bit for bit."""
    upstream_flaws: dict[int, bytes] = field(default_factory=dict)
    """The sha256 of pieces in which the upstream's own bytes did not match the TOC."""
    assembly: asyncio.Future[None] | None = None
    """Set while somebody gathers the whole blob to check its digest."""
    readers: int = 0
    rotten: int = 0
    """How many of its stored pieces turned out rotten while it was open."""

    @property
    def is_whole(self) -> bool:
        """Its own digest matched."""
        return self.stored is not None and self.stored.is_whole

    def state_of(self, piece: int) -> PieceState:
        """What is on disk of *piece*."""
        return PieceState.ABSENT if self.stored is None else self.stored.state_of(piece)


def usable_mask(offer: Offer, blob: ActiveBlob) -> PieceMask | None:
    """Return the pieces of *blob* that an offer is good for; None if there are none.

    A part of a blob is only of use where both sides cut it alike and each piece can be proven.
    """
    holding, count = offer.holding, blob.layout.count
    if holding.size != blob.layout.size:
        return None
    if holding.is_whole:
        return PieceMask.full(count)
    if holding.toc_digest not in (None, blob.toc_digest):
        return None
    alike = holding.kind is blob.layout.kind is LayoutKind.TOC and holding.held.count == count
    return holding.held if alike and holding.held else None
