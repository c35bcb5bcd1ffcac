"""The limit on what is read from registries: that it holds, who goes first, whom it hurts."""

import asyncio
import time
from contextlib import aclosing, asynccontextmanager, contextmanager

import pytest

from p2pcache.core.errors import SourceBusy
from p2pcache.core.pacing import Priority
from p2pcache.core.ranges import ByteRange
from p2pcache.pacing import Pacer
from p2pcache.upstream.client import Upstream
from p2pcache.upstream.endpoint import Patience, UpstreamConfig
from p2pcache.upstream.intake import Intake
from p2pcache.upstream.transport import Deadline
from tests.fakes import OCI_MANIFEST, FakeRegistry, Hold, IgnoreRange, Short, Stall
from tests.timers import HeldTimer

RATE, BURST = 4_000_000, 400_000
DATA = bytes(range(250)) * 16_000
SIZE = len(DATA)
PATIENCE = Patience(pause_s=0.001)


@pytest.fixture
async def registry():
    async with FakeRegistry() as registry:
        yield registry


@pytest.fixture
def blob(registry):
    return registry.add_blob("team/app", DATA)


@asynccontextmanager
async def reading_from(registry, pacer, patience=PATIENCE, **options):
    config = UpstreamConfig(
        endpoints={registry.address: registry.url}, patience=patience, **options
    )
    async with Upstream(config, pacer=pacer) as upstream:
        yield upstream


async def read(upstream, registry, blob, start=0, stop=SIZE, size=SIZE, **options):
    part = ByteRange(start, stop)
    repository = registry.repository("team/app")
    async with aclosing(upstream.read(repository, blob, part, size, **options)) as blocks:
        return b"".join([block async for block in blocks])


async def drained(timer, **options):
    """A pacer that has nothing to give until the timer goes on."""
    pacer = Pacer(RATE, burst=BURST, timer=timer, **options)
    await pacer.admit(BURST)
    return pacer


async def wait_for(pacer, waiting):
    async with asyncio.timeout(5):
        while pacer.waiting != waiting:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0)


# It holds. The pacer's clock goes on only while somebody waits for it.


async def test_reading_takes_the_time_that_the_limit_demands(registry, blob):
    timer = HeldTimer(flowing=True)
    async with reading_from(registry, Pacer(RATE, burst=BURST, timer=timer)) as upstream:
        assert await read(upstream, registry, blob) == DATA
    assert timer.now == pytest.approx((SIZE - BURST) / RATE)


async def test_all_readers_share_one_limit(registry, blob):
    timer = HeldTimer(flowing=True)
    async with (
        reading_from(registry, Pacer(RATE, burst=BURST, timer=timer)) as upstream,
        asyncio.TaskGroup() as tasks,
    ):
        for start in range(0, SIZE, SIZE // 8):
            tasks.create_task(read(upstream, registry, blob, start, start + SIZE // 8))
    assert timer.now == pytest.approx((SIZE - BURST) / RATE)


async def test_manifests_count(registry):
    timer = HeldTimer(flowing=True)
    body = b'{"layers": []}'.ljust(3_000_000)
    digest = registry.add_manifest("team/app", OCI_MANIFEST, body)
    async with reading_from(registry, Pacer(RATE, burst=BURST, timer=timer)) as upstream:
        found = await upstream.manifest(registry.repository("team/app"), digest, [OCI_MANIFEST])
    assert found.data == body
    assert timer.now == pytest.approx((len(body) - BURST) / RATE)


async def test_bytes_are_paid_for_once_though_the_connection_breaks(registry, blob):
    registry.inject(Short(after=1_500_000))
    timer = HeldTimer(flowing=True)
    async with reading_from(registry, Pacer(RATE, burst=BURST, timer=timer)) as upstream:
        assert await read(upstream, registry, blob) == DATA
    assert len(registry.log) == 2
    assert timer.now == pytest.approx((SIZE - BURST) / RATE)


async def test_bytes_read_in_vain_count(registry, blob):
    registry.inject(IgnoreRange())
    timer = HeldTimer(flowing=True)
    async with reading_from(registry, Pacer(RATE, burst=BURST, timer=timer)) as upstream:
        got = await read(upstream, registry, blob, SIZE - 10, SIZE)
    assert got == DATA[-10:]
    assert timer.now == pytest.approx((SIZE - BURST) / RATE)


async def test_on_a_real_clock_the_registry_is_held_back(registry):
    # Not a matter of speed: slower machines only make it easier.
    size, rate, burst = 48 << 20, 8_000_000, 256 << 10
    blob = registry.add_blob("team/app", bytes(size))
    began = time.monotonic()
    got = 0
    async with reading_from(registry, Pacer(rate, burst=burst)) as upstream:
        part, repository = ByteRange(0, size), registry.repository("team/app")
        async with aclosing(upstream.read(repository, blob, part, size)) as blocks:
            async for block in blocks:
                got += len(block)
                # What the kernel's buffers of both ends hold, and the reader's.
                assert registry.bytes_sent <= got + (16 << 20)
                if got > 3_000_000:
                    break
    assert time.monotonic() - began >= (3_000_000 - burst) / rate


# Who goes first.


async def test_small_reads_wait_before_they_ask_and_the_urgent_ask_first(registry, blob):
    timer = HeldTimer()
    pacer = await drained(timer)
    async with reading_from(registry, pacer) as upstream, asyncio.TaskGroup() as tasks:
        for start, priority in ((0, Priority.BACKGROUND), (1, Priority.AHEAD), (2, None)):
            options = {} if priority is None else {"priority": priority}
            tasks.create_task(read(upstream, registry, blob, start, start + 50_000, **options))
            await wait_for(pacer, start + 1)
        assert registry.log == []
        for count in (1, 2, 3):
            timer.ring()
            await registry.arrived(count)
    assert [access.range[:7] for access in registry.log] == ["bytes=2", "bytes=1", "bytes=0"]


async def test_the_background_never_holds_all_connections(registry, blob):
    done = asyncio.Event()
    registry.inject(Hold(done), times=3)
    async with (
        reading_from(registry, None, connections_per_registry=4) as upstream,
        asyncio.TaskGroup() as tasks,
    ):
        for _ in range(8):
            tasks.create_task(read(upstream, registry, blob, 0, 10, priority=Priority.BACKGROUND))
        await registry.arrived(3)
        assert await read(upstream, registry, blob, 5, 10) == DATA[5:10]
        assert len(registry.log) == 4
        done.set()
    assert len(registry.log) == 9


# Whom it hurts.


async def test_waiting_for_the_limit_is_no_stall_and_takes_no_time_from_the_read(registry, blob):
    timer = HeldTimer()
    pacer = Pacer(RATE, burst=BURST, timer=timer)
    patience = Patience(progress_s=0.4, total_s=0.4, slowest_bytes_per_s=1 << 40, attempts=1)
    async with reading_from(registry, pacer, patience) as upstream, asyncio.TaskGroup() as tasks:
        reader = tasks.create_task(read(upstream, registry, blob))
        await wait_for(pacer, 1)
        asyncio.get_running_loop().call_later(0.5, timer.flow)
        assert await reader == DATA
    assert len(registry.log) == 1


async def test_a_reader_learns_when_it_waits_for_the_limit(registry, blob):
    timer = HeldTimer()
    pacer = await drained(timer)
    depth, entered = 0, 0

    @contextmanager
    def pausing():
        nonlocal depth, entered
        depth, entered = depth + 1, entered + 1
        yield
        depth -= 1

    async with reading_from(registry, pacer) as upstream, asyncio.TaskGroup() as tasks:
        tasks.create_task(read(upstream, registry, blob, 0, 100, pausing=pausing))
        await wait_for(pacer, 1)
        assert depth == 1
        timer.flow()
    assert (depth, entered) == (0, 1)
    async with reading_from(registry, None) as upstream:
        await read(upstream, registry, blob, pausing=pausing)
    assert entered == 1


async def test_a_deadline_moves_on_by_the_wait_unless_the_caller_set_it():
    timer = HeldTimer()
    pacer = await drained(timer)
    before = Deadline.after(0.0)
    intake = Intake(pacer, "upstream r", before, firm=False)
    began = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(intake.room(10))
        await wait_for(pacer, 1)
        waiting_since = time.monotonic()
        timer.ring()
        waited_at_least = time.monotonic() - waiting_since
        assert await asking == 10
    moved = intake.deadline.at - before.at
    assert waited_at_least <= moved <= time.monotonic() - began


async def test_who_set_a_deadline_is_told_that_this_node_is_busy(registry, blob):
    pacer = await drained(HeldTimer())
    digest = registry.add_manifest("team/app", OCI_MANIFEST, b"{}")
    async with reading_from(registry, pacer) as upstream:
        with pytest.raises(SourceBusy, match="waiting for the limit"):
            await read(upstream, registry, blob, deadline_s=0.05)
        with pytest.raises(SourceBusy, match="waiting for the limit"):
            await upstream.manifest(
                registry.repository("team/app"), digest, [OCI_MANIFEST], deadline_s=0.5
            )
    assert pacer.waiting == 0
    assert len(registry.requests("*/blobs/*")) == 0
    assert len(registry.requests("*/manifests/*")) == 1


async def test_where_too_many_wait_another_is_told_so_at_once(registry, blob):
    timer = HeldTimer()
    pacer = await drained(timer, max_waiting=1)
    async with reading_from(registry, pacer) as upstream, asyncio.TaskGroup() as tasks:
        tasks.create_task(read(upstream, registry, blob, 0, 10))
        await wait_for(pacer, 1)
        with pytest.raises(SourceBusy, match="1 requests of class DEMAND"):
            await read(upstream, registry, blob, 0, 10)
        assert registry.log == []
        timer.flow()


async def test_a_reader_that_is_cancelled_gives_its_place_back(registry, blob):
    timer = HeldTimer()
    pacer = await drained(timer)
    async with reading_from(registry, pacer) as upstream, asyncio.TaskGroup() as tasks:
        reader = tasks.create_task(read(upstream, registry, blob))
        await wait_for(pacer, 1)
        reader.cancel()
    assert pacer.waiting == 0
    assert not timer.is_set


async def test_what_was_paid_for_and_never_came_is_given_back(registry, blob):
    registry.inject(Stall(after=1000))
    pacer = Pacer(RATE, burst=BURST, timer=HeldTimer())
    async with reading_from(registry, pacer) as upstream:
        part, repository = ByteRange(0, SIZE), registry.repository("team/app")
        async with aclosing(upstream.read(repository, blob, part, SIZE)) as blocks:
            got = len(await anext(blocks))
            assert not pacer.admit_now(BURST - got)
        assert pacer.admit_now(BURST - got - 1)
        assert not pacer.admit_now(2)
