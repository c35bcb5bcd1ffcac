"""An event loop whose clock jumps: what takes a minute in the cluster takes no time here.

Hides how asyncio is made to run on a simulated clock. The rules: when nothing is ready the clock
moves to the next timer, so that a run is a function of its seed alone; and a loop in which
nothing can ever happen again is an error, not a hang.
"""

from __future__ import annotations

import asyncio
import heapq
import selectors
from collections import deque
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any, Final, TypeVar

_T = TypeVar("_T")
_FOR_EVER: Final = float("inf")


class _Jump(selectors.SelectSelector):
    """Where a real loop waits for sockets and the clock, this one moves the clock."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Run the events that are due next; never wait."""
        self.loop.jump(_FOR_EVER if timeout is None else max(0.0, timeout))
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop on a simulated clock, with a second, cheaper kind of timer: `at`."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds since the run began."""
        self._events: list[tuple[float, int, Callable[..., object], tuple[object, ...]]] = []
        self._numbers = count()
        selector = _Jump()
        selector.loop = self
        super().__init__(selector)
        # The callbacks that run next: asyncio's own name for them, since its first version.
        self._ready: deque[object]

    def time(self) -> float:
        """Return the simulated time."""
        return self.now

    def at(self, when: float, callback: Callable[..., object], *args: object) -> None:
        """Call *callback* at *when*. Cannot be undone: callbacks look whether they still matter.

        They set futures and call `at`, but set no timers of asyncio's: the loop would look at
        those too late. asyncio's timers compare handles in Python, which is most of the cost of
        a large run.
        """
        heapq.heappush(self._events, (when, next(self._numbers), callback, args))

    async def until(self, when: float) -> None:
        """Return at *when*."""
        if when > self.now:
            waiter = self.create_future()
            self.at(when, _wake, waiter)
            await waiter

    def jump(self, at_most: float) -> None:
        """Run the events of the next *at_most* seconds, until one makes something ready."""
        events = self._events
        limit = self.now + at_most
        while events and events[0][0] <= limit and not self._ready:
            when, _, callback, args = heapq.heappop(events)
            self.now = max(self.now, when)
            callback(*args)
        if self._ready:
            return
        if limit == _FOR_EVER:
            raise RuntimeError(f"nothing will ever happen again, {self.now:.3f} s into the run")
        self.now = limit


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def virtual_loop() -> VirtualLoop:
    """Return the running loop, which must be a virtual one."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """Run *main* from time 0 on a loop of its own."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
