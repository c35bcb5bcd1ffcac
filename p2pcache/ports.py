"""The seams between the mirror and the world, as protocols.

The mirror is written against these; `p2pcache.app` hands the real things in, tests hand in others.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from p2pcache.core.claims import Cut
from p2pcache.core.errors import SourceError
from p2pcache.core.layout import Layout, PieceMask, PieceState
from p2pcache.core.model import (
    BlobFacts,
    Descriptor,
    Digest,
    Manifest,
    Reference,
    Repository,
    Tag,
    TagFact,
)
from p2pcache.core.pacing import Priority
from p2pcache.core.ranges import ByteRange
from p2pcache.core.wire import Holding, TagNews


class StoredBlob(Protocol):
    """The pieces of one blob on disk."""

    digest: Digest
    layout: Layout
    toc_digest: Digest | None

    @property
    def is_whole(self) -> bool:
        """Its own digest matched: every byte is proven, bit for bit."""

    @property
    def is_complete(self) -> bool:
        """Every piece is on disk, proven or not."""

    @property
    def held(self) -> PieceMask:
        """The proven pieces: all of them if whole."""

    def pieces_in(self, *states: PieceState) -> PieceMask:
        """The pieces in any of *states*."""

    def state_of(self, piece: int) -> PieceState:
        """The state of one piece."""

    def hash_of(self, piece: int) -> int:
        """The stored 64-bit hash of a present piece."""

    def reading(self) -> AbstractContextManager[object]:
        """While open, the blob is not evicted."""

    def read_held_now(self, start: int, stop: int) -> bytes | None:
        """Return held bytes without waiting, or None if that takes a disk or a check."""

    def file_held_now(self, start: int, stop: int) -> int | None:
        """Return the descriptor of held bytes that can be sent without waiting, or None.

        It is good until the caller next waits.
        """

    async def read(self, part: ByteRange, *, staged: bool = False) -> bytes:
        """Return bytes whose pieces are present, checked against their hashes.

        Staged pieces only if *staged*. Raises `StoreCorrupt` after dropping a rotten piece,
        `StoreError` if a piece is not there.
        """

    async def write(self, piece: int, data: bytes, state: PieceState) -> None:
        """Store a piece; it survives a crash once this returns. Raises `StoreFull`."""

    async def hash_ahead(self) -> None:
        """Do some of the work of `confirm_whole` while pieces are still coming."""

    async def confirm_whole(self) -> bool:
        """Check the digest of a blob whose pieces are all present, and mark it whole if right."""

    async def drop(self, pieces: Iterable[int]) -> None:
        """Forget *pieces*. Absent ones are no error."""


class BlobStore(Protocol):
    """Blobs on disk, found by digest."""

    def find(self, digest: Digest) -> StoredBlob | None:
        """Return what is stored of a blob."""

    async def create(
        self, digest: Digest, layout: Layout, *, toc_digest: Digest | None = None
    ) -> StoredBlob:
        """Return the blob, made if needed; one with another layout is replaced.

        Raises `StoreFull`.
        """

    async def forget(self, digest: Digest) -> None:
        """Drop all of a blob. An absent one is no error."""


class Memory(Protocol):
    """What manifests and tags said, kept over restarts."""

    async def manifest(self, digest: Digest) -> Manifest | None:
        """Return a manifest's bytes."""

    async def put_manifest(self, manifest: Manifest) -> None:
        """Keep a manifest whose bytes matched its digest. A full disk is not an error."""

    def tag(self, repository: Repository, tag: Tag) -> TagFact | None:
        """Return where the tag was last seen to point."""

    async def put_tag(self, repository: Repository, tag: Tag, fact: TagFact) -> None:
        """Keep where the tag points now."""

    def facts(self, digest: Digest) -> BlobFacts | None:
        """Return what manifests said of a blob."""

    async def put_facts(
        self, repository: Repository, descriptor: Descriptor, toc_digest: Digest | None
    ) -> None:
        """Add what a manifest in *repository* says of a blob."""


class Forwarded(Protocol):
    """An answer of the upstream that is passed on."""

    @property
    def status(self) -> int:
        """The HTTP status."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers worth passing on."""

    @property
    def body(self) -> bytes:
        """The whole body."""


class Upstream(Protocol):
    """The registries that images come from."""

    async def manifest(
        self,
        repository: Repository,
        reference: Reference,
        accept: Sequence[str],
        *,
        deadline_s: float | None = None,
    ) -> Manifest:
        """Return a manifest whose bytes match the digest asked for. Raises `SourceError`."""

    async def resolve(
        self,
        repository: Repository,
        tag: Tag,
        accept: Sequence[str],
        *,
        deadline_s: float | None = None,
    ) -> Descriptor:
        """Return what a tag points at now. Raises `SourceError`."""

    async def blob_size(self, repository: Repository, digest: Digest) -> int:
        """Return a blob's size in bytes. Raises `SourceError`."""

    def read(
        self,
        repository: Repository,
        digest: Digest,
        part: ByteRange,
        size: int,
        *,
        priority: Priority = Priority.DEMAND,
        pausing: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> AsyncGenerator[bytes, None]:
        """Yield exactly the bytes of *part*, in blocks. Raises `SourceError`.

        Under a limit of this node the more urgent read goes first. *pausing* is entered for each
        wait for that limit: meanwhile no byte comes, and the registry is not to blame.
        """

    async def forward(
        self,
        repository: Repository,
        kind: str,
        query: Sequence[tuple[str, str]] = (),
        accept: Sequence[str] = (),
    ) -> Forwarded:
        """Return the answer to a question that only the upstream can answer, as it is.

        *kind* is ``tags/list`` or ``referrers/DIGEST``. Raises `SourceError`.
        """


class Peer(Protocol):
    """One other node, as a source of pieces."""

    @property
    def name(self) -> str:
        """Its address, for logs."""

    @property
    def hedge_after_s(self) -> float:
        """Without progress for so long, another source should be asked as well."""

    def read(
        self, digest: Digest, part: ByteRange, *, cut: Cut | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield exactly the bytes of *part*, unproven. Raises `SourceError`.

        With *cut*, a peer that is itself still fetching some of it sends on what it has and holds
        the rest of the answer until more is there, for a bounded time.
        """

    async def tail(self, digest: Digest, toc_digest: Digest) -> bytes | None:
        """Return the table of contents with what follows it, unproven; None if it has none.

        A peer that is itself still fetching it holds the answer for a bounded time. Raises
        `SourceError`.
        """

    async def manifest(self, digest: Digest) -> Manifest | None:
        """Return a manifest, its bytes matching *digest*; None if it has none. Waits as `tail`."""


@dataclass(frozen=True, slots=True)
class Search:
    """What a fetch tells of itself when it looks for sources. Masks cover the whole blob."""

    cut: Cut
    wanted: PieceMask
    held: PieceMask
    """What this node gives to others."""
    fetching: PieceMask
    """What is on its way to this node, from a source that it was given before."""
    lease_limit: int
    """At most so many pieces would it read from the upstream now."""
    failed: Mapping[Peer, PieceMask] = field(default_factory=dict)
    """Peers that did not deliver these pieces."""
    stalled: Mapping[Peer, PieceMask] = field(default_factory=dict)
    """Peers from which nothing comes just now."""


@dataclass(frozen=True, slots=True)
class Lead:
    """A peer to ask for *pieces*: it holds them, or is fetching them now."""

    peer: Peer
    pieces: PieceMask
    holds_all: bool
    """It has all of them: silence means trouble, not that it waits itself."""


@dataclass(frozen=True, slots=True)
class Located:
    """Where pieces are. What is in neither has no source yet: ask again after *retry_s*."""

    leads: Sequence[Lead]
    """Best first: where they overlap, the later one is a spare."""
    upstream: PieceMask
    """This node is to read them from the upstream."""
    retry_s: float


@dataclass(frozen=True, slots=True)
class Offer:
    """A peer, and what it says that it holds of a blob."""

    peer: Peer
    holding: Holding


class Neighbours(Protocol):
    """The other nodes: who holds what, who reads what from the upstream, how well each serves."""

    async def locate(self, search: Search) -> Located:
        """Ask the coordinators where the wanted pieces are. Never fails, and soon returns.

        If no coordinator can be reached, the upstream is free to all.
        """

    def announce(self, cut: Cut, held: PieceMask, fetching: PieceMask) -> None:
        """Tell the coordinators, soon, what this node has of a blob and what it is fetching.

        Also renews the leases of what is being fetched, and gives up those of what is not.
        """

    async def find(self, digest: Digest, wanted: PieceMask | None) -> Sequence[Offer]:
        """Return the peers with something of the blob, best first; soon, if need be too few.

        *wanted* are the pieces that matter now; None if the blob's pieces are not known yet.
        """

    async def manifest(self, digest: Digest) -> Manifest | None:
        """Return a manifest that some peer has, its bytes matching *digest*."""

    async def tag(self, repository: Repository, tag: Tag) -> TagNews | None:
        """Return the freshest memory that a peer has of a tag."""

    def note(self, peer: Peer, outcome: float | SourceError) -> None:
        """Remember a delivery, by its latency in seconds, or a failure.

        An `IntegrityError` is a lie: the peer is blamed and shunned.
        """


class Giver(Protocol):
    """What this node gives to peers beyond what lies held in its store."""

    async def piece(self, digest: Digest, cut: str, piece: int) -> bytes | None:
        """Return a piece that this node is fetching, or has read from the upstream itself.

        Waits for it, for a bounded time. None if it does not come, or may not be given on: what
        came from a peer and is not proven.
        """

    def will_give(self, digest: Digest, cut: str, pieces: range) -> bool:
        """Say whether it has or is fetching all of these consecutive pieces."""

    async def tail(self, digest: Digest, toc_digest: Digest) -> bytes | None:
        """Return the table of contents with what follows it, waiting for it if need be."""

    async def manifest(self, digest: Digest) -> Manifest | None:
        """Return a manifest, waiting for it if it is being fetched."""
