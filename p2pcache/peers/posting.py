"""Claims on their way to coordinators: few messages, and the next coordinator if one is silent.

Hides batching and failing over. The rules: at most one message to a member is under way, and what
comes meanwhile goes with the next one, so that a burst costs few requests; a message has one claim
for a region, written when it is sent, so that no claim contradicts the answer to an earlier one; a
claim is answered or given up within the patience for all its coordinators; a member that was silent
is not waited for again for a growing moment.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from p2pcache.core.bounds import ALIVE_CLAIM_S, ALIVE_S, CLAIM_S
from p2pcache.core.claims import (
    MAX_CLAIMS,
    REGION_PIECES,
    Claim,
    Claims,
    Grant,
    Grants,
    RegionKey,
)
from p2pcache.core.errors import SourceError, SourceLacksBlob, SourceUnavailable
from p2pcache.metrics import Metrics
from p2pcache.peers.directory import Contact, Directory
from p2pcache.tasks import shared_future

logger = logging.getLogger(__name__)

# Regions that wait for one member's answer to an earlier message.
_MAX_WAITING: Final = 4 * MAX_CLAIMS
# When no coordinator can be reached, one of them is tried nevertheless so long after a failure.
_PROBE_S: Final = 0.5
# Of each kind: as many as a claim may carry.
_MAX_COMPLAINTS: Final = 64

Complaints = Sequence[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Question:
    """What someone wants of a region. One that wants nothing is there to be told our news."""

    wanted: int = 0
    lease_limit: int = 0
    failed: Complaints = ()
    stalled: Complaints = ()
    answer: asyncio.Future[Grant | None] = field(default_factory=shared_future)
    """Covers what others want of the region too; None if no coordinator could be reached."""


@dataclass(frozen=True, slots=True)
class State:
    """What this node has to say of a region now."""

    held: int
    fetching: int
    passes_on: bool


class Book(Protocol):
    """Knows what there is to say of each region, and is told what was said."""

    def state(self, key: RegionKey) -> State:
        """Return what there is to say."""

    def answered(
        self, address: str, rank: int, claim: Claim, grant: Grant, incarnation: str
    ) -> None:
        """*address* answered, before which *rank* coordinators could not be reached."""


@dataclass(slots=True)
class _Letter:
    key: RegionKey
    coordinators: Sequence[str]
    questions: list[Question]
    rank: int = 0

    @property
    def is_awaited(self) -> bool:
        """Someone still waits for the answer."""
        return not all(question.answer.done() for question in self.questions)

    def settle(self, grant: Grant | None) -> None:
        for question in self.questions:
            if not question.answer.done():
                question.answer.set_result(grant)

    def claim(self, book: Book) -> Claim:
        wanted = limit = 0
        failed: dict[str, int] = {}
        stalled: dict[str, int] = {}
        for question in self.questions:
            if question.answer.done():
                continue
            wanted |= question.wanted
            limit += question.lease_limit
            for all_of_them, own in ((failed, question.failed), (stalled, question.stalled)):
                for address, mask in own:
                    all_of_them[address] = all_of_them.get(address, 0) | mask
        state = book.state(self.key)
        return Claim(
            self.key,
            held=state.held,
            fetching=state.fetching,
            wanted=wanted,
            lease_limit=min(limit, REGION_PIECES),
            passes_on=state.passes_on,
            failed=tuple(failed.items())[:_MAX_COMPLAINTS],
            stalled=tuple(stalled.items())[:_MAX_COMPLAINTS],
        )


@dataclass(slots=True)
class _Box:
    """What waits for one member."""

    letters: dict[RegionKey, _Letter] = field(default_factory=dict)

    def put(self, letter: _Letter) -> None:
        waiting = self.letters.setdefault(letter.key, letter)
        if waiting is not letter:
            waiting.questions += letter.questions
            waiting.rank = max(waiting.rank, letter.rank)

    def take(self) -> list[_Letter]:
        """Take the next message: letters of one rank, whose senders still wait."""
        for key in [key for key, letter in self.letters.items() if not letter.is_awaited]:
            del self.letters[key]
        rank = next((letter.rank for letter in self.letters.values()), 0)
        taken = [letter for letter in self.letters.values() if letter.rank == rank][:MAX_CLAIMS]
        for letter in taken:
            del self.letters[letter.key]
        return taken


class Posting:
    """Sends claims. Its tasks live in *tasks*; *handle* is this node's own coordinator."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        directory: Directory,
        handle: Callable[[Claims], Awaitable[Grants]],
        metrics: Metrics,
        book: Book,
    ) -> None:
        self._tasks = tasks
        self._directory = directory
        self._handle = handle
        self._metrics = metrics
        self._book = book
        self._boxes: dict[str, _Box] = {}
        self._probe_at = 0.0

    def send(self, key: RegionKey, question: Question) -> asyncio.Future[Grant | None]:
        """Send a claim; return where its answer will be.

        A sender who cancels that may leave the claim unsent.
        """
        members = self._directory.placement.coordinators(key)
        self._forward(_Letter(key, [member.address for member in members], [question]))
        return question.answer

    def _forward(self, letter: _Letter) -> None:
        """Put it into the box of the first of its coordinators, from its rank on, to be asked."""
        while letter.rank < len(letter.coordinators):
            address = letter.coordinators[letter.rank]
            box = self._boxes.get(address)
            if self._is_reachable(address) and (box is None or len(box.letters) < _MAX_WAITING):
                self._put(address, letter)
                return
            letter.rank += 1
        if not self._probe(letter):
            letter.settle(None)

    def _put(self, address: str, letter: _Letter) -> None:
        box = self._boxes.get(address)
        if box is None:
            box = self._boxes[address] = _Box()
            self._tasks.create_task(self._deliver(address, box))
        box.put(letter)

    def _probe(self, letter: _Letter) -> bool:
        """Put it to the first coordinator after all, now and then; say whether that is done.

        If all of them have failed, it may be this node that was cut off, and is not any more.
        """
        first = next(iter(letter.coordinators), "")
        if asyncio.get_running_loop().time() < self._probe_at or first in self._boxes:
            return False
        if self._directory.peer(first) is None:
            return False
        letter.rank = 0
        self._put(first, letter)
        return True

    def _is_reachable(self, address: str) -> bool:
        if address == self._directory.own_address:
            return True
        peer = self._directory.peer(address)
        if peer is None:
            return False
        # One that only lied may still coordinate: if it were passed over here but by nobody else,
        # two coordinators would grant the same leases.
        has_failed = peer.record.failures > 0
        return not has_failed or peer.record.is_usable(asyncio.get_running_loop().time())

    async def _deliver(self, address: str, box: _Box) -> None:
        """Send all that is in the box, and what is put there meanwhile."""
        letters: list[_Letter] = []
        try:
            while letters := box.take():
                claims = [letter.claim(self._book) for letter in letters]
                grants = await self._exchange(address, claims, letters[0].rank)
                if grants is None:
                    break
                for letter, claim, grant in zip(letters, claims, grants.grants, strict=True):
                    self._book.answered(address, letter.rank, claim, grant, grants.incarnation)
                    letter.settle(grant)
        except Exception:  # a bug ends here, logged: the claims go to the next coordinator
            logger.exception("claims.broken", extra={"peer": address})
        except asyncio.CancelledError:
            for letter in (*letters, *box.letters.values()):
                letter.settle(None)
            raise
        finally:
            del self._boxes[address]
        for letter in (*letters, *box.letters.values()):
            if letter.is_awaited:
                letter.rank += 1
                self._forward(letter)

    async def _exchange(self, address: str, claims: list[Claim], rank: int) -> Grants | None:
        """Send one message; None if it is not answered."""
        own = self._directory.own_address
        message = Claims(own, claims, rank)
        if address == own:
            return await self._handle(message)
        peer = self._directory.peer(address)
        if peer is None:
            return None
        try:
            grants = await _ask(peer, message)
        except SourceError as error:
            self._metrics.claim_failures.inc()
            if isinstance(error, SourceLacksBlob):  # of a blob that would be no failure
                error = SourceUnavailable(peer.name, "does not coordinate")
            self._directory.note(peer, error)
            self._probe_at = asyncio.get_running_loop().time() + _PROBE_S
            return None
        if peer.record.failures:
            self._forgive()
        peer.record.failures = 0
        peer.record.answered_at = asyncio.get_running_loop().time()
        return grants

    def _forgive(self) -> None:
        """One that had failed answers. If most had failed, it was likely this node's own line.

        Else this node would tell coordinators of members that are well that they failed.
        """
        members = self._directory.placement.members
        peers = [self._directory.peer(member.address) for member in members]
        records = [peer.record for peer in peers if peer is not None]
        failing = [record for record in records if record.failures]
        if 2 * len(failing) >= len(records):
            for record in failing:
                record.failures = 0
                if not record.blames:
                    record.shunned_until = 0.0


async def _ask(peer: Contact, message: Claims) -> Grants:
    is_alive = asyncio.get_running_loop().time() < peer.record.answered_at + ALIVE_S
    grants = await peer.claim(message, ALIVE_CLAIM_S if is_alive else CLAIM_S)
    asked, answered = len(message.claims), len(grants.grants)
    if asked != answered:
        raise SourceUnavailable(peer.name, f"answered {answered} of {asked} claims")
    return grants
