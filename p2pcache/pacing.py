"""Limits of bytes per second, for what this node gives to peers and what it reads from registries.

Hides the alarm that wakes those who wait. The rules: without a limit nothing waits and nothing is
allocated; who is cancelled gives back the place or the bytes that it had; the queues are bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final, Protocol

from p2pcache.core.pacing import MAX_WAITING, Priority, Saturated, Ticket, TokenBucket

OVER_S: Final = 0.5
"""Who would have to wait for longer had better ask somebody else."""

# What is asked of the bucket at once. Small, since a request that is under way is not overtaken;
# not so small that a fast link is spent on asking.
_MIN_BLOCK: Final = 64 << 10
_MAX_BLOCK: Final = 256 << 10
_BLOCK_S: Final = 0.01
# uvloop counts milliseconds, and rounds. After an alarm that went off too early the next one leaves
# it time, or it would go off again and again until the time has come.
_EARLY_S: Final = 0.002


class Alarm(Protocol):
    """Something that was set to go off."""

    def cancel(self) -> None:
        """Have it not go off."""


class Timer(Protocol):
    """A clock with alarms: what an event loop offers."""

    def time(self) -> float:
        """Monotonic seconds."""

    def call_at(self, when: float, callback: Callable[[], Any], /) -> Alarm:
        """Have *callback* called at *when*."""


class Pacer:
    """Lets bytes through at no more than *rate* bytes/s; None is no limit.

    Belongs to the event loop that it is made in. *on_wait* is told of every wait that ended, in
    seconds; it must return at once.
    """

    def __init__(
        self,
        rate: float | None,
        *,
        burst: int | None = None,
        max_waiting: int = MAX_WAITING,
        on_wait: Callable[[float], None] | None = None,
        timer: Timer | None = None,
    ) -> None:
        self._bucket: TokenBucket | None = None
        self._on_wait = on_wait
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}
        self._alarm: Alarm | None = None
        self._alarm_at: float | None = None
        self.block = _MAX_BLOCK
        """Good sizes to ask for: more is let through in blocks of so many bytes."""
        if rate is not None:
            self._bucket = TokenBucket(rate, burst, max_waiting=max_waiting)
            block = min(_MAX_BLOCK, max(_MIN_BLOCK, int(rate * _BLOCK_S)))
            self.block = min(block, self._bucket.burst)
            self._timer: Timer = timer or asyncio.get_running_loop()

    @property
    def rate(self) -> float | None:
        """Bytes a second; None if there is no limit."""
        return None if self._bucket is None else self._bucket.rate

    @property
    def is_limited(self) -> bool:
        """There is a limit."""
        return self._bucket is not None

    @property
    def waiting(self) -> int:
        """How many wait now."""
        return len(self._waiting)

    @property
    def backlog_s(self) -> float:
        """For how long a block that a client waits for would wait, if it were asked for now."""
        if self._bucket is None:
            return 0.0
        return self._bucket.wait_s(self.block, Priority.DEMAND, self._timer.time())

    def is_over(self, limit_s: float = OVER_S) -> bool:
        """Say whether there is so much to do that others should be asked."""
        return self._bucket is not None and self.backlog_s > limit_s

    def admit_now(self, count: int, priority: Priority = Priority.DEMAND) -> bool:
        """Let *count* bytes through if that takes no waiting; say whether it did."""
        if self._bucket is None:
            return True
        if count > self._bucket.burst:
            return False
        try:
            ticket = self._bucket.request(count, priority)
        except Saturated:
            return False
        self._advance()
        if not ticket.is_through:
            self._bucket.withdraw(ticket)
            self._advance()
        return ticket.is_through

    async def admit(self, count: int, priority: Priority = Priority.DEMAND) -> None:
        """Return once *count* bytes may go.

        More than a block is let through block by block, in turns with others of its class; who is
        cancelled gives all of it back. Raises `Saturated` if too many wait.
        """
        if self._bucket is None:
            return
        paid = 0
        try:
            while paid < count:
                part = min(self.block, count - paid)
                await self._admit_block(self._bucket, part, priority)
                paid += part
        except BaseException:
            self.give_back(paid)
            raise

    def give_back(self, count: int) -> None:
        """Take it that *count* of the bytes let through will not be used after all."""
        if self._bucket is not None and count:
            self._bucket.give_back(count)
            self._advance()

    async def _admit_block(self, bucket: TokenBucket, count: int, priority: Priority) -> None:
        ticket = bucket.request(count, priority)
        self._advance()
        if ticket.is_through:
            return
        since = self._timer.time()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = future
        try:
            await future
        except BaseException:
            # Maybe after it was let through, in the moment before it could run on.
            self._waiting.pop(ticket, None)
            bucket.withdraw(ticket)
            self._advance()
            raise
        finally:
            if self._on_wait is not None:
                self._on_wait(self._timer.time() - since)

    def _advance(self, rung_for: float | None = None) -> None:
        """Wake who may go on, and set the alarm for who is next."""
        assert self._bucket is not None
        for ticket in self._bucket.advance(self._timer.time()):
            future = self._waiting.pop(ticket, None)
            if future is not None and not future.done():
                future.set_result(None)
        next_at = self._bucket.next_at
        if next_at == self._alarm_at:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = next_at
        self._alarm = None
        if next_at is not None:
            when = self._timer.time() + _EARLY_S if next_at == rung_for else next_at
            self._alarm = self._timer.call_at(when, self._wake)

    def _wake(self) -> None:
        rung_for, self._alarm, self._alarm_at = self._alarm_at, None, None
        self._advance(rung_for)
