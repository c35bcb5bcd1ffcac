"""A blob that is being read: what is known of it, and what of it is on its way."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Final

from p2pcache.core.claims import Cut, cut_name
from p2pcache.core.errors import IntegrityError
from p2pcache.core.layout import Layout, LayoutKind, PieceMask, PieceState
from p2pcache.core.model import Digest, Repository
from p2pcache.core.toc import Toc
from p2pcache.ports import Offer, Peer, StoredBlob

UNPROVEN_BY_PEER: Final = (PieceState.STAGED_PEER, PieceState.HELD_PEER)
BY_UPSTREAM: Final = (PieceState.STAGED_UPSTREAM, PieceState.HELD_UPSTREAM)


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


@dataclass(eq=False)
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
    sourced: dict[int, int] = field(default_factory=dict)
    """The pieces that some source has been asked for, and how many sources."""
    contributors: dict[int, Peer] = field(default_factory=dict)
    """Who delivered the pieces that are not proven bit for bit."""
    upstream_flaws: dict[int, bytes] = field(default_factory=dict)
    """The sha256 of pieces in which the upstream's own bytes did not match the TOC."""
    assembly: asyncio.Future[None] | None = None
    """Set while somebody gathers the whole blob to check its digest."""
    readers: int = 0
    rotten: int = 0
    """How many of its stored pieces turned out rotten while it was open."""

    @cached_property
    def cut(self) -> Cut:
        """What other nodes must agree on to mean the same pieces."""
        kind = self.layout.kind
        name = cut_name(kind, self.toc_digest)
        return Cut(self.digest, name, self.layout.count, passes_on=kind is LayoutKind.TOC)

    @property
    def is_whole(self) -> bool:
        """Its own digest matched."""
        return self.stored is not None and self.stored.is_whole

    @property
    def given(self) -> PieceMask:
        """The pieces that peers may have."""
        return PieceMask(self.layout.count) if self.stored is None else given_pieces(self.stored)

    @property
    def fetching(self) -> PieceMask:
        """The pieces that are on their way from a source, or from there to the disk."""
        landing = [p for p, future in self.inflight.items() if future.done()]
        return PieceMask.of(self.layout.count, [*self.sourced, *landing])

    def state_of(self, piece: int) -> PieceState:
        """What is on disk of *piece*."""
        return PieceState.ABSENT if self.stored is None else self.stored.state_of(piece)


def given_pieces(stored: StoredBlob) -> PieceMask:
    """Return the pieces that peers may have: what is proven, and what this node read itself.

    Of a fixed layout nothing is proven before all is, and so nobody could say who spoiled a whole
    whose parts had been passed on from peer to peer. Each part comes from the node that read it
    from the upstream.
    """
    if stored.layout.kind is LayoutKind.TOC or stored.is_whole:
        return stored.held
    return stored.pieces_in(*BY_UPSTREAM)


def cut_of(stored: StoredBlob) -> Cut:
    """Return what other nodes must agree on to mean the same pieces."""
    kind = stored.layout.kind
    name = cut_name(kind, stored.toc_digest)
    return Cut(stored.digest, name, stored.layout.count, passes_on=kind is LayoutKind.TOC)


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
