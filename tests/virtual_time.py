"""An event loop whose clock jumps to the next timer: minutes of waiting take no time.

    @in_virtual_time
    async def test_something(): ...

Nothing but timers may be waited for: a loop with nothing to do fails instead of hanging.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from heapq import heappop
from typing import Any, ParamSpec

P = ParamSpec("P")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Never sleeps."""

    def __init__(self) -> None:
        self._now = 1000.0
        super().__init__()

    def time(self) -> float:
        """Seconds, as if this loop had waited for its timers."""
        return self._now

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled  # type: ignore[attr-defined] # CPython's
        while scheduled and scheduled[0].cancelled():
            heappop(scheduled)._scheduled = False
            self._timer_cancelled_count -= 1  # type: ignore[attr-defined] # CPython's
        if not ready and not self._stopping:  # type: ignore[attr-defined] # CPython's
            if not scheduled:
                raise RuntimeError("everyone waits for something that never comes")
            self._now = max(self._now, scheduled[0].when())
        super()._run_once()  # type: ignore[misc] # CPython's


def in_virtual_time(
    test: Callable[P, Coroutine[Any, Any, None]],
) -> Callable[P, None]:
    """Run an async test on a loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run
