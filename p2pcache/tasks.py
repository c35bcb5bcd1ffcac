"""A task group for work that nobody waits for: leaving the block ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


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
