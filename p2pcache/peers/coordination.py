"""This node as a coordinator: answers claims, and asks around for what it may have missed.

Hides recovery. The rules: what is known of a region is never read before a wait and used after it,
so that a piece is not leased twice; a node that has just started, stands in for another one, or
has new neighbours, asks the members once what they hold before it sends anyone to the upstream;
asking takes `ASK_AROUND_S` at most, however many claims wait for it and whoever does not answer.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Protocol

from p2pcache.core.bounds import ASK_AROUND_S, RETRY_S, SETTLE_S
from p2pcache.core.claims import (
    REGION_PIECES,
    Claim,
    Claims,
    Grant,
    Grants,
    RegionKey,
    cut_name,
    is_tail,
    region_mask,
    tail_name,
)
from p2pcache.core.errors import SourceError, SourceUnavailable
from p2pcache.core.layout import LayoutKind
from p2pcache.core.model import Digest
from p2pcache.core.wire import Holding
from p2pcache.metrics import Metrics
from p2pcache.peers.directory import MAX_ASKED, Contact, Directory, some_peers
from p2pcache.peers.forwarding import Forwarding
from p2pcache.tasks import shared_future

logger = logging.getLogger(__name__)

# If few answered it is asked anew much sooner.
_POOR_S: Final = 0.5
# How often a look is taken at whom this node can reach.
_LOOK_S: Final = 0.1
# What was heard is used for the other regions of the blob for so long; then it is asked anew.
_FRESH_S: Final = 10.0
_MAX_HEARD: Final = 64
# Blobs that are asked for at once; a claim for one more is answered from what is known.
_MAX_ASKING: Final = 32
# The masks of all that was heard, together; those of one blob of a terabyte are 128 KiB a member.
_MAX_HEARD_BYTES: Final = 16 << 20
# Whoever is at work in a region notices within so long that its coordinator is gone, and turns to
# the next one: it renews its leases or asks for more, and gives up waiting after `CLAIM_S`.
TAKE_OVER_S: Final = 2 * RETRY_S
_MAX_TAKEN_OVER: Final = 4096
_FULL: Final = (1 << REGION_PIECES) - 1


class Knowledge(Protocol):
    """What a coordinator knows, and how it decides: `p2pcache.core.coordinator`."""

    @property
    def regions(self) -> int:
        """Regions of which anything is known."""

    def answer(self, sender: str, claim: Claim, now: float) -> Grant:
        """Take note of what *sender* says, and say what it is to do."""

    def is_cold(self, key: RegionKey) -> bool:
        """Say whether nothing is known of the region."""

    def learn(self, key: RegionKey, address: str, held: int, now: float) -> None:
        """Take note of what *address* was heard to hold."""

    def forget_member(self, address: str) -> None:
        """*address* is no member any more."""


@dataclass(frozen=True, slots=True)
class _Heard:
    """What members said that they hold of a blob."""

    holdings: dict[str, Holding]
    at: float
    is_poor: bool
    """Half of the members, or more, did not answer: perhaps it was this node that was cut off."""

    def is_fresh(self, now: float) -> bool:
        """Say whether it need not be asked again."""
        return now < self.at + (_POOR_S if self.is_poor else _FRESH_S)

    def is_outdated(self, now: float, cut_off_at: float) -> bool:
        """Say whether others may have gone on without this node since."""
        return now >= self.at + _POOR_S and (self.is_poor or self.at <= cut_off_at)

    @property
    def size(self) -> int:
        return sum(holding.held.count // 8 for holding in self.holdings.values())


class Coordination:
    """Answers the claims of all members, this node too. Its tasks live in *tasks*."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        directory: Directory,
        knowledge: Knowledge,
        metrics: Metrics,
        rng: random.Random,
    ) -> None:
        self._tasks = tasks
        self._directory = directory
        self._knowledge = knowledge
        self._metrics = metrics
        self._rng = rng
        self._forwarding = Forwarding(directory, self._renew_incarnation)
        self._renew_incarnation()
        self._started_at = asyncio.get_running_loop().time()
        self._placement = directory.placement
        self._asking: dict[tuple[Digest, str], asyncio.Future[None]] = {}
        self._heard: OrderedDict[tuple[Digest, str], _Heard] = OrderedDict()
        self._cut_off_at = float("-inf")
        """When a third of the others was last out of reach: they did without this node then."""
        self._look_at = 0.0
        self._taken_over: OrderedDict[RegionKey, float] = OrderedDict()

    async def handle(self, message: Claims) -> Grants:
        """Answer a message: at once, or after asking around."""
        self._note_members()
        others = await self._forwarding.grants(message)
        own = [claim for number, claim in enumerate(message.claims) if number not in others]
        unknown = [claim.key for claim in own if self._is_unknown(claim, message.rank)]
        self._take_over(own, message.rank)
        if unknown:
            await self._learn(unknown, message)
        now = asyncio.get_running_loop().time()
        grants = [
            self._knowledge.answer(message.sender, self._hold_back(claim, now), now)
            for claim in own
        ]
        self._metrics.answered_claims.inc(len(grants))
        self._metrics.leased_pieces.inc(sum(grant.leased.bit_count() for grant in grants))
        self._metrics.coordinated_regions.set(self._knowledge.regions)
        if others:
            answered = iter(grants)
            grants = [
                others[number] if number in others else next(answered)
                for number in range(len(message.claims))
            ]
        return Grants(self.incarnation, grants)

    def _renew_incarnation(self) -> None:
        self.incarnation = f"{self._rng.getrandbits(64):016x}"
        """Tells those who announce to this node that it has forgotten what they said before."""

    def _note_members(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._look_at:
            self._look_at = now + _LOOK_S
            others = len(self._directory.placement.members) - 1
            # Only those that it had to do with are known to be out of reach.
            if others > 0 and 3 * len(self._directory.usable()) <= 2 * others:
                self._cut_off_at = now
        if self._placement is self._directory.placement:
            return
        earlier, self._placement = self._placement, self._directory.placement
        left = {member.address for member in earlier.members}
        left -= {member.address for member in self._placement.members}
        for address in left:
            self._knowledge.forget_member(address)

    def _is_unknown(self, claim: Claim, rank: int) -> bool:
        """Say whether others may hold what is wanted, without this node having been told."""
        if not claim.wanted:
            return False
        now = asyncio.get_running_loop().time()
        is_young = now < self._started_at + SETTLE_S
        changed_at = max(self._directory.changed_at, self._cut_off_at)
        if not is_young and rank == 0 and now >= changed_at + SETTLE_S:
            return False
        if self._knowledge.is_cold(claim.key):
            return True
        heard = self._heard.get((claim.key.digest, claim.key.scope))
        if heard is None:
            # After a start the first news of a region may be of one member out of many.
            return is_young or now < self._cut_off_at + SETTLE_S
        return heard.is_outdated(now, self._cut_off_at)

    def _take_over(self, claims: list[Claim], rank: int) -> None:
        """Note which regions are in full swing, and were coordinated elsewhere until now."""
        now = asyncio.get_running_loop().time()
        until = now + TAKE_OVER_S
        if rank == 0 and now >= max(self._started_at, self._directory.changed_at) + SETTLE_S:
            return
        for claim in claims:
            key = claim.key
            # What may be passed on is told to who asks around.
            is_begun = bool(claim.fetching or (claim.held and not claim.passes_on))
            if is_begun and self._knowledge.is_cold(key):
                self._taken_over.setdefault(key, until)
        while len(self._taken_over) > _MAX_TAKEN_OVER:
            self._taken_over.popitem(last=False)

    def _hold_back(self, claim: Claim, now: float) -> Claim:
        """Grant no leases of a region before those who have some of it can have said so.

        What they are reading now, or have read and cannot prove yet, nobody tells who is asked.
        """
        until = self._taken_over.get(claim.key)
        if until is None:
            return claim
        if now >= until:
            del self._taken_over[claim.key]
            return claim
        return replace(claim, lease_limit=0)

    async def _learn(self, keys: list[RegionKey], message: Claims) -> None:
        """Find out who holds something of the regions.

        Not from the sender, who says so himself, nor from those whom he could not reach: likely
        nobody can, and waiting for them would double what they have cost already.
        """
        left_out = {message.sender}
        for key in keys if message.rank else ():
            before = self._directory.placement.coordinators(key)[: message.rank]
            left_out.update(member.address for member in before)
        questions = {(key.digest, key.scope) for key in keys}
        waits = {answer for q in questions if (answer := self._ask(*q, left_out)) is not None}
        if waits:
            await asyncio.wait(waits)  # which ends with the questions' own patience
        now = asyncio.get_running_loop().time()
        for key in keys:
            heard = self._heard.get((key.digest, key.scope))
            for address, held in _holders(heard, key):
                self._knowledge.learn(key, address, held, now)

    def _ask(self, digest: Digest, scope: str, left_out: set[str]) -> asyncio.Future[None] | None:
        """See to it that the members are asked; return what to wait for, if anything."""
        question = digest, scope
        heard = self._heard.get(question)
        now = asyncio.get_running_loop().time()
        if heard and heard.is_fresh(now) and not heard.is_outdated(now, self._cut_off_at):
            return None
        asking = self._asking.get(question)
        if asking is None:
            if len(self._asking) >= _MAX_ASKING:
                return None
            peers = some_peers(self._directory, str(digest), scope=scope)
            peers = [peer for peer in peers if peer.address not in left_out]
            asking = self._asking[question] = shared_future()
            self._tasks.create_task(self._ask_around(question, peers, asking))
        return asking

    async def _ask_around(
        self, question: tuple[Digest, str], peers: list[Contact], done: asyncio.Future[None]
    ) -> None:
        now = asyncio.get_running_loop().time()
        holdings: dict[str, Holding] = {}
        answered: list[Contact] = []
        members = self._directory.placement.members
        scope = question[1]
        others = sum(not scope or member.zone == scope for member in members) - 1
        try:
            async with asyncio.TaskGroup() as questions:
                for peer in peers:
                    questions.create_task(
                        self._ask_one(peer, question[0], holdings, answered, now + ASK_AROUND_S)
                    )
        finally:
            is_poor = 2 * len(answered) <= min(others, MAX_ASKED)
            self._heard[question] = _Heard(holdings, now, is_poor and others > 0)
            self._heard.move_to_end(question)
            while len(self._heard) > 1 and self._is_too_much():
                self._heard.popitem(last=False)
            del self._asking[question]
            if not done.done():
                done.set_result(None)

    def _is_too_much(self) -> bool:
        return (
            len(self._heard) > _MAX_HEARD
            or sum(heard.size for heard in self._heard.values()) > _MAX_HEARD_BYTES
        )

    async def _ask_one(
        self,
        peer: Contact,
        digest: Digest,
        holdings: dict[str, Holding],
        answered: list[Contact],
        deadline: float,
    ) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                holding = await peer.holding(digest)
        except TimeoutError:
            late = SourceUnavailable(peer.name, f"no answer within {ASK_AROUND_S} s")
            self._directory.note(peer, late)
        except SourceError as error:
            self._directory.note(peer, error)
        except Exception:  # a bug ends here, logged: the others' answers are used without this one
            logger.exception("coordination.question.broken", extra={"peer": peer.name})
        else:
            answered.append(peer)
            if holding is not None:
                holdings[peer.address] = holding


def _holders(heard: _Heard | None, key: RegionKey) -> Iterator[tuple[str, int]]:
    """Yield who said that it holds something of the region, and what."""
    for address, holding in heard.holdings.items() if heard else ():
        if is_tail(key.cut):
            held = int(tail_name(holding.toc_digest) == key.cut and _has_last(holding))
        elif holding.is_whole:
            held = _FULL  # it can give any piece, however the blob is cut
        elif cut_name(holding.kind, holding.toc_digest) == key.cut:
            held = region_mask(holding.held, key.index)
        else:
            continue
        if held:
            yield address, held


def _has_last(holding: Holding) -> bool:
    return holding.kind is LayoutKind.TOC and holding.held.count - 1 in holding.held
