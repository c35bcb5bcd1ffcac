"""What one simulated node knows of the others: its member list, and a record of each.

Stands in for the list that membership makes and for the HTTP client of each peer; what coordinates
is handed this list. The rule: knowledge is one node's own; only the placement is shared, because
it is a function of the list of members, which is the same for all here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from benchmarks.simulation.clock import VirtualLoop
from benchmarks.simulation.member import Member
from p2pcache.core.claims import Claims, Cut, Grants
from p2pcache.core.errors import IntegrityError, SourceBusy, SourceError, SourceLacksBlob
from p2pcache.core.model import Digest, Manifest, Repository, Tag
from p2pcache.core.peers import PeerRecord
from p2pcache.core.placement import Placement
from p2pcache.core.ranges import ByteRange
from p2pcache.core.wire import Holding, TagNews
from p2pcache.ports import Peer


class Contact:
    """One other node, as this one sees it."""

    def __init__(self, owner: Member, member: Member) -> None:
        self.member = member
        self.name = self.address = member.address
        self.zone = member.zone
        self.record = PeerRecord()
        self.reading = 0
        self._owner = owner

    @property
    def hedge_after_s(self) -> float:
        """Without progress for so long, another source should be asked as well."""
        return self.record.hedge_after_s

    async def claim(self, message: Claims, timeout_s: float) -> Grants:
        """Ask it as a coordinator. Raises `SourceError`."""
        return await self.member.claim(self._owner, message, timeout_s)

    async def holding(self, digest: Digest) -> Holding | None:
        """Ask what it holds of a blob; None if nothing. Raises `SourceError`."""
        return await self.member.holding(self._owner, digest)

    def read(
        self, digest: Digest, part: ByteRange, *, cut: Cut | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Not simulated: pieces have no bytes here."""
        raise NotImplementedError

    async def tag(self, repository: Repository, tag: Tag) -> TagNews | None:
        """Not simulated."""
        raise NotImplementedError

    async def tail(self, digest: Digest, toc_digest: Digest) -> bytes | None:
        """Not simulated: a tail is a piece of its own cut."""
        raise NotImplementedError

    async def manifest(self, digest: Digest) -> Manifest | None:
        """Not simulated: a manifest is a piece of its own cut."""
        raise NotImplementedError


@dataclass(slots=True)
class Cluster:
    """All members, and what is a function of their list."""

    members: Mapping[str, Member]
    placement: Placement
    loop: VirtualLoop


class Contacts:
    """The member list of one node."""

    changed_at = -1e6
    """Long before the storm."""

    def __init__(self, owner: Member, cluster: Cluster) -> None:
        self.own_address = owner.address
        self.own_zone = owner.zone
        self.placement = cluster.placement
        self._owner = owner
        self._cluster = cluster
        self._contacts: dict[str, Contact] = {}

    def peer(self, address: str) -> Contact | None:
        """Return the peer at *address*; None if no member, or this node itself, is there."""
        contact = self._contacts.get(address)
        if contact is None:
            member = self._cluster.members.get(address)
            if member is None or member is self._owner:
                return None
            contact = self._contacts[address] = Contact(self._owner, member)
        return contact

    def usable(self) -> list[Contact]:
        """Return the peers that have not failed of late, those never asked included."""
        now = self._cluster.loop.now
        contacts = map(self.peer, self._cluster.members)
        return [c for c in contacts if c is not None and c.record.is_usable(now)]

    def note(self, peer: Peer, outcome: float | SourceError) -> None:
        """Remember a delivery, by its latency in seconds, or a failure."""
        assert isinstance(peer, Contact)
        now = self._cluster.loop.now
        if isinstance(outcome, float):
            peer.record.note_delivery(outcome)
        elif isinstance(outcome, IntegrityError):
            peer.record.note_lie(outcome.reason, now)
        elif not isinstance(outcome, SourceLacksBlob | SourceBusy):
            peer.record.note_failure(outcome.reason, now)
