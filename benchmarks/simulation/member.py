"""One simulated node as others see it: it answers claims, gives pieces, and may die.

Hides how bytes move. The rules: a member gives what it holds at once and what is on its way to it
as it comes; what arrives is proven before it is held; from a dead member nothing comes, and who
asks it learns that by a reset or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NoReturn, Protocol

from benchmarks.simulation.clock import VirtualLoop
from benchmarks.simulation.image import Part
from benchmarks.simulation.network import (
    CLAIM_S,
    MESSAGE_S,
    PROOF_S,
    UPSTREAM_LATENCY_S,
    Latency,
    Queue,
)
from p2pcache.core.bounds import HOLD_S
from p2pcache.core.claims import Claims, Grants
from p2pcache.core.errors import SourceError, SourceLacksBlob, SourceUnavailable
from p2pcache.core.layout import LayoutKind, PieceMask
from p2pcache.core.model import Digest
from p2pcache.core.wire import Holding

CONNECT_S: Final = 1.0
NO_PROGRESS_S: Final = 3.0
QUESTION_S: Final = 0.4
"""After which a peer's client takes a silent one for dead: when connecting, when
reading, and when asking what it holds."""
WINDOW_S: Final = 0.1
"""Messages are counted in windows of this length."""


class Coordinates(Protocol):
    """What coordinates: the real thing."""

    async def handle(self, message: Claims) -> Grants:
        """Return the grants for *message*, soon."""


@dataclass(slots=True)
class PartState:
    """What a member has of one part. Masks are plain integers over the whole part."""

    part: Part
    held: int = 0
    coming: int = 0
    proving: int = 0
    hops: dict[int, int] = field(default_factory=dict)
    """How often each held piece was passed on since the upstream sent it: there it is 1."""
    waiting: dict[int, list[Reading]] = field(default_factory=dict)


@dataclass(slots=True)
class Traffic:
    """What a member did, for the report."""

    peer_bytes: int = 0
    upstream_bytes: int = 0
    wasted_bytes: int = 0
    """It had these already when they came."""
    messages: dict[int, int] = field(default_factory=dict)
    """By number of the window."""
    claims: int = 0
    wanting: int = 0
    """Claims in which something was wanted."""


@dataclass(slots=True, eq=False)
class Reading:
    """One request for pieces, from the asking side. *source* is None for the upstream."""

    reader: Member
    source: Member | None
    part: Part
    left: int
    """Pieces that have not come."""
    on_end: Callable[[Reading, SourceError | None], None]
    on_piece: Callable[[Reading], None]
    progress_at: float
    is_silent: bool = True
    is_over: bool = False

    def end(self, error: SourceError | None = None) -> None:
        """All has come, or *error*."""
        if not self.is_over:
            self.close()
            self.on_end(self, error)

    def close(self) -> None:
        """Take nothing more from it."""
        self.is_over = True
        if self.source:
            self.source.serving.pop(self, None)


class Registry:
    """The upstream: one link for all."""

    def __init__(self, loop: VirtualLoop, mbit: float) -> None:
        self._loop = loop
        self._line = Queue(mbit * 1e6 / 8)
        self.bytes = 0

    def serve(self, reading: Reading) -> None:
        """Answer a request that has just been made."""
        self._loop.at(self._loop.now + UPSTREAM_LATENCY_S, self._send, reading)

    def _send(self, reading: Reading) -> None:
        for piece in pieces_of(reading.left):
            self._send_piece(reading, piece)

    def _send_piece(self, reading: Reading, piece: int) -> None:
        if reading.reader.is_dead or reading.is_over:
            return
        size = reading.part.sizes[piece]
        sent_at = self._line.take(self._loop.now, size)
        self.bytes += size
        self._loop.at(sent_at, reading.reader.receive, reading, piece, 1, 0.0)


class Member:
    """A node's server side, and what it holds."""

    def __init__(
        self,
        loop: VirtualLoop,
        latency: Latency,
        address: str,
        zone: str,
        parts: Sequence[Part],
        link_mbit: float,
    ) -> None:
        self.address = address
        self.zone = zone
        self.parts = [PartState(part) for part in parts]
        self.traffic = Traffic()
        self.coordination: Coordinates | None = None
        self.serving: dict[Reading, None] = {}
        self.is_dead = False
        self.resets = False
        self._loop = loop
        self._latency = latency
        rate = link_mbit * 1e6 / 8
        self._up, self._down = Queue(rate), Queue(rate)
        self._processor, self._proofs = Queue(), Queue()

    def latency_to(self, other: Member) -> float:
        """Return how long one message takes."""
        return self._latency.between(self.zone, other.zone)

    def die(self, *, resets: bool) -> None:
        """Answer nothing from now on. With *resets* its kernel still refuses connections."""
        self.is_dead = True
        self.resets = resets
        for reading in list(self.serving):
            self._fail_as_dead(reading, NO_PROGRESS_S)

    def _fail_as_dead(self, reading: Reading, noticed_after_s: float) -> None:
        reason = "reset" if self.resets else "silent"
        error = SourceUnavailable(self.address, reason)
        after = self.latency_to(reading.reader) if self.resets else noticed_after_s
        self._loop.at(self._loop.now + after, reading.end, error)

    # Questions.

    async def claim(self, sender: Member, message: Claims, timeout_s: float) -> Grants:
        """Carry *message* from *sender* here and the answer back. Raises `SourceUnavailable`."""
        deadline = self._loop.now + timeout_s
        await self._come_in(sender, MESSAGE_S + CLAIM_S * len(message.claims), deadline)
        self.traffic.claims += len(message.claims)
        self.traffic.wanting += sum(claim.wanted != 0 for claim in message.claims)
        assert self.coordination is not None
        grants = await self.coordination.handle(message)
        await self._go_back(sender, deadline)
        return grants

    async def holding(self, sender: Member, digest: Digest) -> Holding | None:
        """Say to *sender* what is held here of a layer. Raises `SourceUnavailable`."""
        deadline = self._loop.now + QUESTION_S
        await self._come_in(sender, MESSAGE_S, deadline)
        found = None
        for state in self.parts:
            part = state.part
            if part.cut.digest == digest and part.toc_digest and state.held:
                held, size = PieceMask(part.cut.count, state.held), sum(part.sizes)
                found = Holding(
                    self.address, size, LayoutKind.TOC, None, held, False, part.toc_digest
                )
        await self._go_back(sender, deadline)
        return found

    async def _come_in(self, sender: Member, work_s: float, deadline: float) -> None:
        """Return when a question that has just been sent is being answered."""
        arrives_at = self._loop.now + self.latency_to(sender)
        if not self.is_dead:
            window = int(arrives_at / WINDOW_S)
            messages = self.traffic.messages
            messages[window] = messages.get(window, 0) + 1
            arrives_at = self._processor.take(arrives_at, work_s)
        await self._loop.until(arrives_at)
        if self.is_dead:
            await self._fall_silent(sender, deadline)

    async def _go_back(self, sender: Member, deadline: float) -> None:
        if self.is_dead:
            await self._fall_silent(sender, deadline)
        await self._loop.until(min(deadline, self._loop.now + self.latency_to(sender)))
        if self._loop.now >= deadline:
            raise SourceUnavailable(self.address, "no answer in time")

    async def _fall_silent(self, sender: Member, deadline: float) -> NoReturn:
        """Let *sender* notice that nobody answers."""
        noticed_at = self._loop.now + self.latency_to(sender) if self.resets else deadline
        await self._loop.until(noticed_at)
        raise SourceUnavailable(self.address, "connection refused" if self.resets else "no answer")

    # Giving pieces.

    def serve(self, reading: Reading) -> None:
        """Answer a request that has just been sent."""
        arrives_at = self._loop.now + self.latency_to(reading.reader)
        if not self.is_dead:
            self.serving[reading] = None
            runs = (reading.left & ~(reading.left << 1)).bit_count()  # a request for each
            arrives_at = self._processor.take(arrives_at, runs * MESSAGE_S)
        self._loop.at(arrives_at, self._give, reading)

    def _give(self, reading: Reading) -> None:
        state = self.parts[reading.part.index]
        if self.is_dead:
            self._fail_as_dead(reading, CONNECT_S)
        if self.is_dead or reading.is_over:
            return
        if reading.left & ~(state.held | state.coming):
            lacking = SourceLacksBlob(self.address, "lacks a piece")
            self._loop.at(self._loop.now + self.latency_to(reading.reader), reading.end, lacking)
            return
        for piece in pieces_of(reading.left):
            if state.held >> piece & 1:
                self._send(reading, piece)
            else:
                state.waiting.setdefault(piece, []).append(reading)
        if reading.left & ~state.held:
            self._loop.at(self._loop.now + HOLD_S, self._give_up, reading)

    def _give_up(self, reading: Reading) -> None:
        if not self.is_dead:
            reading.end(SourceLacksBlob(self.address, "still lacks a piece"))

    def _send(self, reading: Reading, piece: int) -> None:
        if reading.is_over or reading.reader.is_dead or not reading.left >> piece & 1:
            return
        size = reading.part.sizes[piece]
        sent_at = self._up.take(self._loop.now, size)
        latency = self.latency_to(reading.reader)
        first_byte_at = sent_at - size / self._up.rate + latency
        hops = self.parts[reading.part.index].hops[piece] + 1
        self._loop.at(first_byte_at, reading.reader.receive, reading, piece, hops, sent_at)

    # Getting pieces.

    def receive(self, reading: Reading, piece: int, hops: int, sent_at: float) -> None:
        """The first byte of *piece* is here, the last was sent at *sent_at*."""
        if self.is_dead or (reading.source and reading.source.is_dead and sent_at > self._loop.now):
            return
        size = reading.part.sizes[piece]
        arrives_at = self._down.take(self._loop.now, size)
        self._loop.at(arrives_at, self._take, reading, piece, hops)

    def _take(self, reading: Reading, piece: int, hops: int) -> None:
        if self.is_dead:
            return
        state = self.parts[reading.part.index]
        size = reading.part.sizes[piece]
        if reading.source:
            self.traffic.peer_bytes += size
        else:
            self.traffic.upstream_bytes += size
        if (state.held | state.proving) >> piece & 1:
            self.traffic.wasted_bytes += size
            return
        state.proving |= 1 << piece
        reading.progress_at = self._loop.now
        reading.on_piece(reading)
        proven_at = self._proofs.take(self._loop.now, PROOF_S)
        self._loop.at(proven_at, self._hold, reading, piece, hops)

    def _hold(self, reading: Reading, piece: int, hops: int) -> None:
        if self.is_dead:
            return
        state = self.parts[reading.part.index]
        bit = 1 << piece
        state.held |= bit
        state.coming &= ~bit
        state.proving &= ~bit
        state.hops[piece] = hops
        for waiting in state.waiting.pop(piece, ()):
            self._send(waiting, piece)
        reading.left &= ~bit
        reading.progress_at = self._loop.now
        if reading.left:
            reading.on_piece(reading)
        else:
            reading.end()


def pieces_of(mask: int) -> list[int]:
    """The pieces in *mask*, in order."""
    pieces = []
    while mask:
        low = mask & -mask
        pieces.append(low.bit_length() - 1)
        mask ^= low
    return pieces
