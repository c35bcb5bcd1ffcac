"""Tasks that nobody waits for end with the block that owns them."""

import asyncio
import gc

import pytest

from p2pcache.tasks import cancelled_at_exit, shared_future


class Worker:
    """Waits for ever, and tells how it ended."""

    def __init__(self):
        self.started = asyncio.Event()
        self.ended = ""

    async def run(self):
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # cleaning up may take a while: it is waited for
            self.ended = "cancelled"
            raise


async def test_leaving_the_block_cancels_its_tasks_and_waits_for_them():
    worker = Worker()
    async with cancelled_at_exit() as tasks:
        tasks.create_task(worker.run())
        await worker.started.wait()
    assert worker.ended == "cancelled"


async def test_a_block_without_tasks_is_just_left():
    async with cancelled_at_exit():
        pass


async def test_finished_tasks_are_no_concern_of_the_exit():
    async with cancelled_at_exit() as tasks:
        done = tasks.create_task(asyncio.sleep(0, "done"))
        await done
    assert done.result() == "done"


async def test_an_error_of_the_block_passes_as_it_is():
    worker, error = Worker(), KeyError("of the block")

    async def own():
        async with cancelled_at_exit() as tasks:
            tasks.create_task(worker.run())
            await worker.started.wait()
            raise error

    with pytest.raises(KeyError) as caught:
        await own()
    assert caught.value is error
    assert worker.ended == "cancelled"


async def test_an_error_of_a_task_ends_the_block_and_the_other_tasks():
    worker = Worker()

    async def fail():
        await worker.started.wait()
        raise KeyError("of a task")

    async def own():
        async with cancelled_at_exit() as tasks:
            tasks.create_task(worker.run())
            tasks.create_task(fail())
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as caught:
        await own()
    assert caught.group_contains(KeyError, match="of a task", depth=1)
    assert len(caught.value.exceptions) == 1
    assert worker.ended == "cancelled"


async def test_an_error_while_cleaning_up_is_not_lost():
    started = asyncio.Event()

    async def clean_up_badly():
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise KeyError("while cleaning up")

    async def own():
        async with cancelled_at_exit() as tasks:
            tasks.create_task(clean_up_badly())
            await started.wait()

    with pytest.raises(ExceptionGroup) as caught:
        await own()
    assert caught.group_contains(KeyError, match="while cleaning up", depth=1)


async def test_cancelling_the_owner_cancels_its_tasks():
    worker = Worker()

    async def own():
        async with cancelled_at_exit() as tasks:
            tasks.create_task(worker.run())
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as group:
        owner = group.create_task(own())
        await worker.started.wait()
        owner.cancel()
    assert owner.cancelled()
    assert worker.ended == "cancelled"


async def test_nobody_has_to_look_at_a_shared_future():
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    failed, cancelled = shared_future(), shared_future()
    failed.set_exception(ValueError("unseen"))
    cancelled.cancel()
    await asyncio.sleep(0)
    del failed, cancelled
    gc.collect()
    assert complaints == []
