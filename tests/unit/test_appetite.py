"""How much is leased at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcache.core.layout import Layout
from p2pcache.mirror.appetite import FIRST_BYTES, MAX_BYTES, MIN_BYTES, Appetite

PIECE = 1 << 20
LAYOUT = Layout.fixed(64 * PIECE)


def read(appetite: Appetite, size: int, bytes_per_s: float, now: float) -> float:
    """Read *size* bytes in blocks; return the time at the end."""
    appetite.take(size)
    appetite.begin(now)
    for _ in range(16):
        now += size / 16 / bytes_per_s
        appetite.note(size // 16, now)
    appetite.end(now)
    appetite.give_back(size)
    return now


def limit(appetite: Appetite, *, idle: bool) -> int:
    with appetite.asking(LAYOUT, range(64), idle=idle) as count:
        return count


def test_before_anything_is_known_it_leases_enough_to_measure_by():
    assert Appetite().horizon == FIRST_BYTES
    assert limit(Appetite(), idle=True) == FIRST_BYTES // PIECE


@pytest.mark.parametrize(
    ("bytes_per_s", "horizon"),
    [(1e9, MAX_BYTES), (4e6, 4_000_000), (1e4, MIN_BYTES)],
)
def test_it_leases_what_it_reads_in_a_second(bytes_per_s: float, horizon: int):
    appetite = Appetite()
    now = 0.0
    for _ in range(20):
        now = read(appetite, FIRST_BYTES, bytes_per_s, now)
    assert appetite.horizon == pytest.approx(horizon, rel=0.1)


def test_a_pause_between_reads_is_not_slowness():
    appetite = Appetite()
    now = read(appetite, 4 << 20, 8e6, 0.0)
    read(appetite, 4 << 20, 8e6, now + 100.0)
    assert appetite.horizon == pytest.approx(8e6, rel=0.2)


def test_a_line_that_slows_down_is_noticed():
    appetite = Appetite()
    now = 0.0
    for _ in range(5):
        now = read(appetite, 8 << 20, 16e6, now)
    for _ in range(8):
        now = read(appetite, 8 << 20, 1e6, now)
    assert appetite.horizon == pytest.approx(1e6, rel=0.2)


def test_what_is_under_way_leaves_no_room():
    appetite = Appetite()
    appetite.take(FIRST_BYTES)
    assert appetite.room == 0
    assert limit(appetite, idle=False) == 0
    assert limit(appetite, idle=True) == 1
    appetite.give_back(FIRST_BYTES)
    assert appetite.room == FIRST_BYTES


def test_those_who_ask_at_once_share():
    appetite = Appetite()
    with (
        appetite.asking(LAYOUT, range(64), idle=False) as first,
        appetite.asking(LAYOUT, range(64), idle=False) as second,
    ):
        assert (first, second) == (FIRST_BYTES // PIECE, 0)
    assert appetite.room == FIRST_BYTES


def test_asking_for_nothing():
    with Appetite().asking(LAYOUT, (), idle=True) as count:
        assert count == 0


@given(
    st.lists(st.tuples(st.integers(1, 64), st.booleans()), max_size=20),
    st.floats(1e3, 1e10),
)
def test_never_much_more_than_the_horizon(asks: list[tuple[int, bool]], bytes_per_s: float):
    appetite = Appetite()
    read(appetite, FIRST_BYTES, bytes_per_s, 0.0)
    taken = 0
    for count, idle in asks:
        with appetite.asking(LAYOUT, range(count), idle=idle) as allowed:
            assert 0 <= allowed <= count
            assert allowed >= idle
        size = allowed * PIECE
        if not idle:
            assert size <= max(0, appetite.horizon - taken)
        appetite.take(size)
        taken += size
    appetite.give_back(taken)
    assert appetite.room == appetite.horizon
