"""What coordination needs of the list of members, as protocols.

Hides where the list comes from and how members are reached, so that the same coordination runs
over HTTP and over a simulated network. The rule: an address names a member, and each node reckons
with the list that it has now, knowing that others may have another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nsmallest
from typing import Final, Protocol

from xxhash import xxh64_intdigest

from p2pcache.core.claims import Claims, Grants, RegionKey
from p2pcache.core.errors import SourceError
from p2pcache.core.model import Digest, Repository, Tag
from p2pcache.core.peers import PeerRecord
from p2pcache.core.wire import Holding, TagNews
from p2pcache.ports import Peer

MAX_ASKED: Final = 64
"""No question goes to more peers than so many, however large the cluster is."""


class Member(Protocol):
    """One node in the list."""

    @property
    def address(self) -> str:
        """Where peers reach it."""

    @property
    def zone(self) -> str:
        """Where it stands; "" if nobody said."""


class Placement(Protocol):
    """A list of members, and what it makes of them: a value that never changes."""

    @property
    def members(self) -> Sequence[Member]:
        """All of them, this node too."""

    def scopes(self, address: str, zone: str) -> tuple[str, ...]:
        """Return where the member at *address*, in *zone*, claims: first the smallest scope, at
        last "", the whole cluster."""

    def within(self, scope: str) -> Sequence[Member]:
        """Return the members of a scope."""

    def coordinators(self, key: RegionKey) -> Sequence[Member]:
        """Who coordinates a region: the first, and who stands in for it, in order."""


class Contact(Peer, Protocol):
    """A member, as it is reached."""

    record: PeerRecord

    @property
    def address(self) -> str:
        """Its address in the list of members."""

    @property
    def reading(self) -> int:
        """How many reads from it are under way."""

    async def claim(self, message: Claims, timeout_s: float) -> Grants:
        """Have it answer *message* as a coordinator. Raises `SourceError`."""

    async def holding(self, digest: Digest) -> Holding | None:
        """Ask what it holds of a blob; None if nothing. Raises `SourceError`."""

    async def tag(self, repository: Repository, tag: Tag) -> TagNews | None:
        """Ask what it remembers of a tag; None if nothing. Raises `SourceError`."""


class Directory(Protocol):
    """The list of members as it is now."""

    @property
    def own_address(self) -> str:
        """Where peers reach this node."""

    @property
    def own_zone(self) -> str:
        """Where this node stands; "" if nobody said."""

    @property
    def placement(self) -> Placement:
        """The members now: another object whenever they change."""

    @property
    def changed_at(self) -> float:
        """When they last changed, by the event loop's clock."""

    def peer(self, address: str) -> Contact | None:
        """Return the member with *address*; None if there is none, or it is this node."""

    def usable(self) -> Sequence[Contact]:
        """The members that may be asked, this node not among them."""

    def note(self, peer: Peer, outcome: float | SourceError) -> None:
        """Remember a delivery, by its latency in seconds, or a failure."""


def has_others(directory: Directory) -> bool:
    """Say whether there is any member beside this node."""
    members = directory.placement.members
    return len(members) > 1 or any(m.address != directory.own_address for m in members)


def own_scopes(directory: Directory) -> tuple[str, ...]:
    """Return the scopes in which this node claims, the smallest first; the last one is ""."""
    return directory.placement.scopes(directory.own_address, directory.own_zone)


def some_peers(directory: Directory, question: str, *, scope: str = "") -> list[Contact]:
    """Return whom to ask *question*: few enough, of this node's zone first, or of *scope* alone.

    Where there are too many the choice is random, but the same each time: what one of them has
    said need not be asked again.
    """
    peers = directory.usable()
    if len(peers) <= MAX_ASKED and not scope:
        return list(peers)
    zones = {member.address: member.zone for member in directory.placement.within(scope)}
    peers = [peer for peer in peers if peer.address in zones]
    salt = f"{directory.own_address} {question} "

    def rank(peer: Contact) -> tuple[bool, int]:
        is_far = zones.get(peer.address) != directory.own_zone
        return is_far, xxh64_intdigest((salt + peer.address).encode())

    return nsmallest(MAX_ASKED, peers, key=rank)
