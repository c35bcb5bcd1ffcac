"""Work that outlives those who wait for it: a task group that ends with its block, and futures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any


def loop_time() -> float:
    """Return the running loop's clock, in monotonic seconds: the one that its timers follow."""
    return asyncio.get_running_loop().time()


def shared_future() -> asyncio.Future[Any]:
    """Return a future for any number of waiters, none included.

    asyncio complains about an exception that nobody looked at; here all waiters may have left.
    """
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.add_done_callback(_look_at)
    return future


def _look_at(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


class _BlockLeft(Exception):
    pass


@asynccontextmanager
async def cancelled_at_exit() -> AsyncIterator[asyncio.TaskGroup]:
    """Yield a task group whose tasks are cancelled, and awaited, when the block is left.

    An exception of the block passes as it is; one of a task ends the block, as in any task group.
    """
    failure: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            try:
                yield tasks
            except BaseException as error:
                failure = error
            raise _BlockLeft
    except* _BlockLeft:
        pass
    if failure is not None:
        raise failure
