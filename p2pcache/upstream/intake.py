"""The bytes and the time that one read from a registry may take.

Hides this node's own limit from those who read. The rules: bytes are paid for before they are
read, the first of them before they are asked for, so that a connection on which nothing is read
fills up and TCP holds the registry back; and waiting for the limit is nobody's fault, so that it
counts neither as silence nor against the time that the registry has.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from p2pcache.core.errors import SourceBusy
from p2pcache.core.pacing import Priority, Saturated
from p2pcache.pacing import Pacer
from p2pcache.upstream.transport import Deadline


class Intake:
    """What one read may take. *pausing* is entered for each wait for the limit.

    A *firm* deadline holds whatever is waited for; another one moves on meanwhile.
    """

    def __init__(
        self,
        pacer: Pacer,
        source: str,
        deadline: Deadline,
        *,
        firm: bool,
        priority: Priority = Priority.DEMAND,
        pausing: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._pacer = pacer
        self._source = source
        self._firm = firm
        self._priority = priority
        self._pausing = pausing
        self._credit = 0
        self.deadline = deadline
        """When the read must be done, as it stands now."""

    async def room(self, wanted: int) -> int | None:
        """Return how many of *wanted* bytes may be read now; None without a limit.

        At least one: waits for it if need be. Raises `SourceBusy` if too many wait, or for longer
        than there is time.
        """
        if not self._pacer.is_limited:
            return None
        if not self._credit:
            block = min(wanted, self._pacer.block)
            await self.pay(block)
            self._credit = block
        return min(wanted, self._credit)

    def took(self, count: int) -> None:
        """So many bytes were read."""
        self._credit = max(0, self._credit - count)

    async def pay(self, count: int) -> None:
        """Wait until *count* bytes may be read, or have been. Raises as `room`."""
        if self._pacer.admit_now(count, self._priority):
            return
        began = time.monotonic()
        try:
            with self._pausing():
                async with asyncio.timeout(self.deadline.left() if self._firm else None):
                    await self._pacer.admit(count, self._priority)
        except TimeoutError:
            raise SourceBusy(self._source, "out of time, waiting for the limit") from None
        except Saturated as full:
            raise SourceBusy(self._source, str(full)) from full
        finally:
            if not self._firm:
                self.deadline = self.deadline.later(time.monotonic() - began)

    def close(self) -> None:
        """Be done: what was paid for and not read others may have."""
        credit, self._credit = self._credit, 0
        self._pacer.give_back(credit)
