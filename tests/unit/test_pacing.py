"""The limit of bytes per second: who goes when, and that it holds."""

import asyncio
from collections import deque
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcache.core.pacing import SHARE, Priority, Saturated, Ticket, TokenBucket
from p2pcache.pacing import Pacer
from tests.timers import HeldTimer

DEMAND, AHEAD, BACKGROUND = Priority
RATE, BURST = 1000.0, 100

# Mostly busy: on average far more is asked for than the rate lets through.
REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(Priority),
        st.integers(0, BURST),
        st.floats(0, 0.05) | st.just(0.0),
        st.sampled_from(["keep"] * 6 + ["withdraw", "give back"]),
    ),
    max_size=80,
)


class Run:
    """A bucket with a clock that always goes on to what happens next, and all that happened."""

    def __init__(self, rate=RATE, burst=BURST):
        self.bucket = TokenBucket(rate, burst)
        self.now = 0.0
        self.through = []  # (when, ticket)
        self.given_back = []  # (when, bytes)
        self.asked_at = {}
        self.waiting: dict[Priority, deque[Ticket]] = {priority: deque() for priority in Priority}

    def ask(self, count, priority):
        ticket = self.bucket.request(count, priority)
        self.asked_at[ticket] = self.now
        self.waiting[priority].append(ticket)
        self.advance(self.now)
        return ticket

    def withdraw(self, ticket):
        if ticket.is_through:
            self.given_back.append((self.now, ticket.count))
        else:
            self.waiting[ticket.priority].remove(ticket)
        self.bucket.withdraw(ticket)
        self.advance(self.now)

    def advance(self, until):
        while (at := self.bucket.next_at) is not None and at <= until:
            self.now = max(self.now, at)
            before = len(self.through)
            for ticket in self.bucket.advance(self.now):
                self.through.append((self.now, ticket))
                # First come, first served within a class.
                assert self.waiting[ticket.priority].popleft() is ticket
                assert ticket.is_through
            assert len(self.through) > before, "the alarm rang for nothing"
        self.now = max(self.now, until)
        assert self.bucket.waiting == sum(map(len, self.waiting.values()))

    def finish(self):
        while (at := self.bucket.next_at) is not None:
            self.advance(max(self.now, at))


def play(requests):
    run = Run()
    for priority, count, pause, fate in requests:
        run.advance(run.now + pause)
        ticket = run.ask(count, priority)
        if fate == "withdraw":
            run.withdraw(ticket)
        elif fate == "give back" and run.through:
            _, done = run.through[-1]
            run.withdraw(done)
    run.finish()
    return run


@given(REQUESTS)
def test_in_any_time_no_more_than_rate_and_burst_is_let_through(requests):
    run = play(requests)
    for i, (start, _) in enumerate(run.through):
        total = 0
        for stop, ticket in run.through[i:]:
            total += ticket.count
            unused = sum(n for at, n in run.given_back if start <= at <= stop)
            assert total - unused <= RATE * (stop - start) + BURST + 1e-6


@given(REQUESTS)
def test_everything_asked_for_is_let_through_once_or_was_withdrawn(requests):
    run = play([(*request[:3], "keep") for request in requests])
    assert run.bucket.waiting == 0
    tickets = [ticket for _, ticket in run.through]
    assert len(tickets) == len(set(map(id, tickets))) == len(requests)
    assert sum(ticket.count for ticket in tickets) == sum(count for _, count, *_ in requests)


@given(REQUESTS)
def test_while_something_waits_the_limit_is_used_up(requests):
    run = play([(*request[:3], "keep") for request in requests])
    for _, ticket in run.through:
        since = run.asked_at[ticket]
        at = next(at for at, other in run.through if other is ticket)
        meanwhile = sum(t.count for when, t in run.through if since <= when <= at)
        # Waiting while the bucket fills up and nobody may go would show as missing bytes.
        assert meanwhile >= RATE * (at - since) - 1e-6


@given(REQUESTS)
def test_demand_waits_for_its_own_class_and_little_else(requests):
    run = play([(*request[:3], "keep") for request in requests])
    through_at = {ticket: at for at, ticket in run.through}
    for ticket, since in run.asked_at.items():
        if ticket.priority is not DEMAND:
            continue
        own = ticket.count + sum(
            other.count
            for other, asked in run.asked_at.items()
            if other.priority is DEMAND and asked <= since and through_at[other] >= since
            if other is not ticket
        )
        # Two classes, each owed at most a little more than one request, and their shares.
        bound = (own + 2 * 1.2 * BURST) / (1 - 2 * SHARE)
        assert through_at[ticket] - since <= bound / RATE + 1e-9


@given(REQUESTS)
def test_who_waits_gets_its_share_whatever_else_is_asked_for(requests):
    run = play([(*request[:3], "keep") for request in requests])
    through_at = {ticket: at for at, ticket in run.through}
    for priority in (AHEAD, BACKGROUND):
        for since, until in busy_times(run, priority, through_at):
            got = everything = 0
            for at, ticket in run.through:
                if since < at < until:
                    everything += ticket.count
                    got += ticket.count * (ticket.priority is priority)
                    assert got >= SHARE * everything - 1.2 * BURST


def busy_times(run, priority, through_at):
    """The times in which some request of the class waited, without a pause."""
    waits = sorted(
        (asked, through_at[ticket])
        for ticket, asked in run.asked_at.items()
        if ticket.priority is priority
    )
    merged: list[list[float]] = []
    for asked, through in waits:
        if merged and asked <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], through)
        else:
            merged.append([asked, through])
    return merged


@given(st.lists(st.tuples(st.sampled_from(Priority), st.integers(1, BURST)), max_size=30))
def test_the_wait_foretold_is_exact_if_nothing_else_waits(asked):
    run = Run()
    for priority, count in asked:
        same = [p for p, queue in run.waiting.items() if queue and p != priority]
        foretold = run.bucket.wait_s(count, priority, run.now)
        since = run.now
        ticket = run.ask(count, priority)
        if not same:
            assert run.bucket.next_at is not None or foretold == 0.0
            run.finish()
            (at,) = (at for at, other in run.through if other is ticket)
            assert at - since == pytest.approx(foretold)


def test_the_more_urgent_overtake_and_the_less_urgent_get_a_twentieth():
    run = Run()
    run.ask(BURST, DEMAND)
    for _ in range(200):
        for priority in (BACKGROUND, AHEAD, DEMAND):
            run.ask(10, priority)
    run.finish()
    order = [ticket.priority for _, ticket in run.through][1:]
    first = order[: order.index(DEMAND) + 180]
    assert first[:19] == [DEMAND] * 19
    # A request of either class for every twenty: 180 of demand stand beside nine and nine.
    assert 8 <= first.count(AHEAD) <= 10
    assert 8 <= first.count(BACKGROUND) <= 10
    assert order[-150:].count(BACKGROUND) == 150


def test_what_a_class_got_in_quiet_times_is_not_held_against_it():
    run = Run()
    for _ in range(50):
        run.ask(BURST, BACKGROUND)
    run.advance(4.05)
    assert len(run.waiting[BACKGROUND]) == 9
    for _ in range(100):
        run.ask(BURST, DEMAND)
    run.finish()
    order = [ticket.priority for _, ticket in run.through]
    assert 19 <= order.index(BACKGROUND, order.index(DEMAND)) - order.index(DEMAND) <= 21


def test_a_queue_is_bounded_and_does_not_take_the_room_of_others():
    bucket = TokenBucket(RATE, BURST, max_waiting=2)
    for _ in range(2):
        bucket.request(1, BACKGROUND)
    with pytest.raises(Saturated) as caught:
        bucket.request(1, BACKGROUND)
    assert (caught.value.priority, caught.value.waiting) == (BACKGROUND, 2)
    assert bucket.request(1, DEMAND)


def test_withdrawing_twice_is_no_error():
    bucket = TokenBucket(RATE, BURST)
    ticket = bucket.request(1, DEMAND)
    bucket.withdraw(ticket)
    bucket.withdraw(ticket)
    assert bucket.waiting == 0
    assert bucket.advance(0.0) == []


def test_what_is_given_back_never_adds_up_to_more_than_a_burst():
    run = Run()
    ticket = run.ask(BURST, DEMAND)
    run.advance(10.0)
    run.withdraw(ticket)
    assert run.ask(BURST, DEMAND).is_through
    assert not run.ask(1, DEMAND).is_through


@pytest.mark.parametrize(("rate", "burst"), [(0, None), (-1, None), (float("nan"), 1), (1, 0)])
def test_what_is_no_limit_is_refused(rate, burst):
    with pytest.raises(ValueError, match="not a limit"):
        TokenBucket(rate, burst)


@pytest.mark.parametrize("count", [-1, BURST + 1])
def test_a_request_that_could_never_go_is_refused(count):
    with pytest.raises(ValueError, match="at once"):
        TokenBucket(RATE, BURST).request(count, DEMAND)


def test_a_clock_that_stands_still_or_steps_back_lets_nothing_more_through():
    bucket = TokenBucket(RATE, BURST)
    bucket.request(BURST, DEMAND)
    bucket.request(1, DEMAND)
    assert len(bucket.advance(5.0)) == 1
    assert bucket.advance(5.0) == bucket.advance(4.0) == []
    assert len(bucket.advance(5.002)) == 1


def test_a_burst_is_a_tenth_of_a_second_but_not_too_small_for_a_block():
    assert TokenBucket(100e6).burst == 10_000_000
    assert TokenBucket(1.0).burst == 256 << 10


# The pacer.


async def test_without_a_limit_nobody_waits():
    pacer = Pacer(None)
    await pacer.admit(1 << 60, BACKGROUND)
    pacer.give_back(1 << 60)
    assert pacer.admit_now(1 << 60)
    assert not pacer.is_limited
    assert pacer.rate is None
    assert not pacer.is_over(0.0)
    assert (pacer.waiting, pacer.backlog_s) == (0, 0.0)


async def test_bytes_take_the_time_that_they_take():
    timer = HeldTimer(flowing=True)
    waits: list[float] = []
    pacer = Pacer(4e6, burst=400_000, timer=timer, on_wait=waits.append)
    for _ in range(16):
        await pacer.admit(250_000)
    assert timer.now == pytest.approx((16 * 250_000 - 400_000) / 4e6)
    assert sum(waits) == pytest.approx(timer.now)
    assert pacer.is_limited
    assert pacer.rate == 4e6


async def test_the_event_loop_is_clock_enough():
    pacer = Pacer(100e6, burst=1000)
    since = asyncio.get_running_loop().time()
    for _ in range(20):
        await pacer.admit(100_000)
    assert asyncio.get_running_loop().time() - since >= 0.0199


async def wait_for(pacer, waiting):
    async with asyncio.timeout(5):
        while pacer.waiting != waiting:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0)


async def full(timer, **options):
    pacer = Pacer(1e6, burst=100_000, timer=timer, **options)
    await pacer.admit(100_000)
    return pacer


async def test_the_urgent_overtake_those_who_came_before():
    timer = HeldTimer()
    pacer = await full(timer)
    order = []

    async def ask(name, count, priority):
        await pacer.admit(count, priority)
        order.append(name)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(ask("background", 300_000, BACKGROUND))
        tasks.create_task(ask("ahead", 50_000, AHEAD))
        tasks.create_task(ask("first", 50_000, DEMAND))
        tasks.create_task(ask("second", 50_000, DEMAND))
        await wait_for(pacer, 4)
        timer.flow()
    assert order == ["first", "second", "ahead", "background"]
    assert timer.now == pytest.approx(0.45)


async def test_who_is_cancelled_gives_back_its_place():
    timer = HeldTimer()
    pacer = await full(timer)
    async with asyncio.TaskGroup() as tasks:
        large = tasks.create_task(pacer.admit(1_000_000))
        small = tasks.create_task(pacer.admit(10_000))
        await wait_for(pacer, 2)
        large.cancel()
        await wait_for(pacer, 1)
        timer.flow()
        await small
    assert timer.now == pytest.approx(0.01)
    assert pacer.waiting == 0
    assert not timer.is_set


async def test_who_is_cancelled_in_the_moment_it_is_let_through_gives_the_bytes_back():
    timer = HeldTimer()
    pacer = await full(timer)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(pacer.admit(60_000))
        await wait_for(pacer, 1)
        timer.ring()
        assert pacer.waiting == 0
        task.cancel()
    assert pacer.admit_now(60_000)
    assert not pacer.admit_now(1)


async def test_who_is_cancelled_gives_back_the_blocks_it_had_paid_for():
    timer = HeldTimer()
    pacer = Pacer(1e6, burst=200_000, timer=timer)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(pacer.admit(1_000_000))
        await wait_for(pacer, 1)
        timer.ring()
        await wait_for(pacer, 1)
        task.cancel()
    timer.now += 0.2 - timer.now % 0.2
    assert pacer.admit_now(200_000)


async def test_the_last_to_leave_takes_the_alarm_away():
    timer = HeldTimer()
    pacer = await full(timer)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(pacer.admit(10))
        await wait_for(pacer, 1)
        assert timer.is_set
        task.cancel()
    assert not timer.is_set


async def test_an_alarm_that_goes_off_too_early_is_not_set_for_the_same_moment_again():
    timer = HeldTimer()
    pacer = await full(timer)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(pacer.admit(10_000))
        await wait_for(pacer, 1)
        timer.ring(early_s=0.0004)
        assert timer.now == pytest.approx(0.0096)
        assert pacer.waiting == 1
        timer.ring()
        assert pacer.waiting == 0
    assert timer.now == pytest.approx(0.0116)


async def test_too_many_waiters_are_refused_at_once():
    timer = HeldTimer()
    pacer = await full(timer, max_waiting=1)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(pacer.admit(10))
        await wait_for(pacer, 1)
        with pytest.raises(Saturated):
            await pacer.admit(10)
        assert not pacer.admit_now(10)
        timer.flow()


async def test_what_would_wait_is_not_let_through_now_and_leaves_no_trace():
    timer = HeldTimer()
    pacer = await full(timer)
    assert not pacer.admit_now(10)
    assert not pacer.admit_now(200_000)
    assert pacer.waiting == 0
    assert not timer.is_set
    timer.now += 0.00002
    assert pacer.admit_now(10)


async def test_a_backlog_shows_before_one_asks():
    timer = HeldTimer()
    pacer = Pacer(1e6, burst=100_000, timer=timer)
    assert pacer.backlog_s == 0.0
    async with asyncio.TaskGroup() as tasks:
        readers = [tasks.create_task(pacer.admit(65_536)) for _ in range(10)]
        tasks.create_task(pacer.admit(1_000_000, BACKGROUND))  # does not hold up demand
        await wait_for(pacer, 10)
        expected = (11 * pacer.block - 100_000) / 1e6
        assert pacer.backlog_s == pytest.approx(expected)
        assert pacer.is_over()
        assert not pacer.is_over(expected + 0.01)
        for reader in readers:
            reader.cancel()
        await wait_for(pacer, 1)
        assert not pacer.is_over()
        timer.flow()


def test_blocks_are_small_enough_to_be_overtaken():
    sizes = [Pacer(rate, timer=HeldTimer()).block for rate in (1e5, 1e7, 2e7, 1e9)]
    assert sizes[0] == 64 << 10
    assert sizes[-1] == 256 << 10
    assert all(a <= b for a, b in pairwise(sizes))
    assert Pacer(1e9, burst=10, timer=HeldTimer()).block == 10
