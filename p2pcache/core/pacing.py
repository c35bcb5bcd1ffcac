"""Who may send or read how many bytes now, under a limit of bytes per second: a token bucket.

Pure: time is an argument, in monotonic seconds. Hides the order in which those who wait go on. The
rules: over any time T at most rate * T + burst bytes are let through; the most urgent class goes
first, first come, first served within a class; and a class that waits still gets a twentieth of
all bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from p2pcache.core.errors import P2PCacheError

SHARE: Final = 0.05
"""What a less urgent class gets of all bytes while more urgent ones wait as well."""
MAX_WAITING: Final = 4096
"""Requests of one class that may wait."""
BURST_S: Final = 0.1
MIN_BURST: Final = 256 << 10


class Priority(IntEnum):
    """What bytes are wanted for: the smaller, the more urgent."""

    DEMAND = 0
    """A client waits for them."""
    AHEAD = 1
    """A client is expected to ask for them soon."""
    BACKGROUND = 2
    """To have the whole blob, some time."""


class Saturated(P2PCacheError):
    """So many wait already that one more would only wait in vain."""

    def __init__(self, priority: Priority, waiting: int) -> None:
        super().__init__(f"{waiting} requests of class {priority.name} wait for the limit")
        self.priority = priority
        self.waiting = waiting


@dataclass(slots=True, eq=False)
class Ticket:
    """A request for *count* bytes and its place in the queue."""

    count: int
    priority: Priority
    is_through: bool = False
    """It was let through."""


class TokenBucket:
    """Lets requests through at *rate* bytes/s; up to *burst* bytes at once after a quiet time.

    The state is one point in time, at which the bucket would be full again (GCRA, ITU-T I.371):
    each byte let through moves it on by 1 / rate, and it is never more than burst / rate ahead of
    the clock. From that follows the bound: within T it can move by no more than T + burst / rate.

    The rule against starvation: of every byte let through, a class that waits is owed `SHARE`;
    what it gets is taken off. Once it is owed as much as its first request, that goes next. So
    while it waits it has got `SHARE` of all bytes but for little more than one request; and an
    urgent request is held up by two requests of others, and their share of what goes before it.
    """

    def __init__(
        self, rate: float, burst: int | None = None, *, max_waiting: int = MAX_WAITING
    ) -> None:
        if not rate > 0 or (burst is not None and burst < 1):
            raise ValueError(f"not a limit: {rate} bytes/s, {burst} at once")
        self.rate = rate
        self.burst = max(MIN_BURST, int(rate * BURST_S)) if burst is None else burst
        self._max_waiting = max_waiting
        self._full_at = float("-inf")
        # By class, the most urgent first.
        self._queues: list[OrderedDict[Ticket, None]] = [OrderedDict() for _ in Priority]
        self._queued = [0 for _ in Priority]
        self._owed = [0.0 for _ in Priority]

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return sum(map(len, self._queues))

    def request(self, count: int, priority: Priority) -> Ticket:
        """Queue a request, of at most `burst` bytes; `advance` lets it through.

        Raises `Saturated`.
        """
        if not 0 <= count <= self.burst:
            raise ValueError(f"{count} bytes at once, of at most {self.burst}")
        queue = self._queues[priority]
        if len(queue) >= self._max_waiting:
            raise Saturated(priority, len(queue))
        ticket = Ticket(count, priority)
        queue[ticket] = None
        self._queued[priority] += count
        return ticket

    def withdraw(self, ticket: Ticket) -> None:
        """Give a place in the queue back, or the bytes if it was let through and has no use."""
        if ticket.is_through:
            self.give_back(ticket.count)
        elif ticket in self._queues[ticket.priority]:
            self._leave(ticket)

    def give_back(self, count: int) -> None:
        """Take it that *count* of the bytes let through will never be used."""
        self._full_at -= count / self.rate

    def advance(self, now: float) -> list[Ticket]:
        """Let through what may go at *now*; return it in order."""
        through: list[Ticket] = []
        while (ticket := self._next()) is not None and now >= self._may_go_at(ticket.count):
            self._full_at = max(self._full_at, now) + ticket.count / self.rate
            ticket.is_through = True
            self._share_out(ticket)
            self._leave(ticket)
            through.append(ticket)
        return through

    @property
    def next_at(self) -> float | None:
        """When `advance` has something to let through; None while nothing waits."""
        ticket = self._next()
        return None if ticket is None else self._may_go_at(ticket.count)

    def wait_s(self, count: int, priority: Priority, now: float) -> float:
        """For how long a new request would wait, if nothing more urgent came after it.

        The shares of less urgent classes come on top.
        """
        ahead = sum(self._queued[: priority + 1])
        return max(0.0, self._may_go_at(ahead + count) - now)

    def _may_go_at(self, count: int) -> float:
        return self._full_at + (count - self.burst) / self.rate

    def _next(self) -> Ticket | None:
        first = None
        for priority, queue in enumerate(self._queues):
            if queue:
                ticket = next(iter(queue))
                if first is None:
                    first = ticket
                elif ticket.count <= self._owed[priority]:
                    return ticket
        return first

    def _share_out(self, ticket: Ticket) -> None:
        for priority, queue in enumerate(self._queues):
            if queue:
                self._owed[priority] += SHARE * ticket.count
        # Never below nothing: what a class got while nobody else wanted it is not held against it.
        self._owed[ticket.priority] = max(0.0, self._owed[ticket.priority] - ticket.count)

    def _leave(self, ticket: Ticket) -> None:
        queue = self._queues[ticket.priority]
        del queue[ticket]
        self._queued[ticket.priority] -= ticket.count
        if not queue:
            self._owed[ticket.priority] = 0.0
