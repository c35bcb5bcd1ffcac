"""Claims that went astray: the claimant's list of members differs from this node's.

Who lacks a member in its list claims from the second best. If that one answered, two coordinators
would grant leases for one region, and the upstream be read twice. So it passes the claim on to the
member that stands, in its own list, where the claimant takes this node to stand. The rules: a claim
that was passed on says so by a higher rank, so that it is passed on to a few at most, and never in
circles; one that is silent costs no more than `FORWARD_S`, and is then stood in for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from p2pcache.core.bounds import CLAIM_S
from p2pcache.core.claims import Claims, Grant, RegionKey
from p2pcache.core.errors import SourceError
from p2pcache.peers.directory import Contact, Directory

FORWARD_S: Final = 0.8 * CLAIM_S
"""The claimant still waits then."""
# Most lists agree: so many other coordinators are remembered.
_MAX_OTHERS: Final = 1024


class Forwarding:
    """Finds who should answer, and asks. *forget* is called when the claimants of this node have
    to say all again, because somebody else answers them from now on."""

    def __init__(self, directory: Directory, forget: Callable[[], None]) -> None:
        self._directory = directory
        self._forget = forget
        self._answering: dict[str, str] = {}
        """By the other coordinator's address: its incarnation, or "" if this node stands in."""

    async def grants(self, message: Claims) -> dict[int, Grant]:
        """Return the grants of others, by their number in *message*: soon, perhaps none."""
        numbers: dict[str, list[int]] = {}
        for number, claim in enumerate(message.claims):
            meant = self._meant(claim.key, message.rank)
            if meant is not None:
                numbers.setdefault(meant, []).append(number)
        found: dict[int, Grant] = {}
        if numbers:
            async with asyncio.TaskGroup() as tasks:
                for address, theirs in numbers.items():
                    claims = [message.claims[number] for number in theirs]
                    passed = Claims(message.sender, claims, message.rank + 1)
                    tasks.create_task(self._pass_on(address, passed, theirs, found))
        return found

    def _meant(self, key: RegionKey, rank: int) -> str | None:
        """The one who stands before this node, and was not passed over by the claimant."""
        coordinators = self._directory.placement.coordinators(key)
        before = [member.address for member in coordinators[: rank + 1]]
        if len(before) <= rank or self._directory.own_address in before:
            return None
        return before[rank]

    async def _pass_on(
        self, address: str, message: Claims, numbers: list[int], found: dict[int, Grant]
    ) -> None:
        peer = self._directory.peer(address)
        # Its claimant does without it, too, if it is the sender: it is restarting, say.
        if peer is None or address == message.sender or not _is_usable(peer):
            self._note(address, "")
            return
        try:
            answer = await peer.claim(message, FORWARD_S)
        except SourceError as error:
            self._directory.note(peer, error)
            self._note(address, "")
            return
        if len(answer.grants) == len(numbers):
            found.update(zip(numbers, answer.grants, strict=True))
            self._note(address, answer.incarnation)

    def _note(self, address: str, incarnation: str) -> None:
        earlier = self._answering.pop(address, incarnation)
        self._answering[address] = incarnation
        if len(self._answering) > _MAX_OTHERS:
            del self._answering[next(iter(self._answering))]
        if earlier != incarnation:
            self._forget()


def _is_usable(peer: Contact) -> bool:
    return peer.record.failures == 0 or peer.record.is_usable(asyncio.get_running_loop().time())
