"""Layouts and piece masks against slow models made of sets."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcache.core.layout import FIXED_PIECE_SIZE, Layout, LayoutKind, PieceMask
from p2pcache.core.ranges import ByteRange

fast = settings(max_examples=60, deadline=None)


@st.composite
def layouts(draw):
    starts = sorted(draw(st.sets(st.integers(1, 199), max_size=20)) | {0})
    return Layout(LayoutKind.TOC, draw(st.integers(starts[-1] + 1, 220)), starts)


@st.composite
def masks(draw, count=None):
    n = draw(st.integers(0, 40)) if count is None else count
    return PieceMask.of(n, draw(st.sets(st.integers(0, n - 1)) if n else st.just(set())))


@fast
@given(layouts())
def test_pieces_cover_the_blob_in_order_without_gaps(layout):
    ranges = [layout.range_of(i) for i in range(layout.count)]
    assert ranges[0].start == 0
    assert ranges[-1].stop == layout.size
    assert all(a.stop == b.start for a, b in pairwise(ranges))
    assert layout.span(range(layout.count)) == ByteRange(0, layout.size)


@fast
@given(layouts(), st.data())
def test_covering_names_exactly_the_pieces_that_share_a_byte(layout, data):
    start = data.draw(st.integers(0, layout.size - 1))
    wanted = ByteRange(start, data.draw(st.integers(start + 1, layout.size)))
    touched = [
        i
        for i in range(layout.count)
        if set(range(*_ends(layout.range_of(i)))) & set(range(*_ends(wanted)))
    ]
    assert list(layout.covering(wanted)) == touched


def _ends(part: ByteRange) -> tuple[int, int]:
    return part.start, part.stop


def test_covering_refuses_bytes_past_the_end():
    with pytest.raises(ValueError, match="past 10 bytes"):
        Layout.fixed(10).covering(ByteRange(5, 11))


@pytest.mark.parametrize(
    ("size", "count"),
    [(0, 0), (1, 1), (FIXED_PIECE_SIZE, 1), (FIXED_PIECE_SIZE + 1, 2), (10 * FIXED_PIECE_SIZE, 10)],
)
def test_fixed_pieces_have_one_size_but_for_the_last(size, count):
    layout = Layout.fixed(size)
    assert layout.count == count
    assert sum(len(layout.range_of(i)) for i in range(count)) == size
    assert all(len(layout.range_of(i)) == FIXED_PIECE_SIZE for i in range(count - 1))


@pytest.mark.parametrize(
    ("size", "starts"), [(-1, []), (0, [0]), (5, []), (5, [1]), (5, [0, 5]), (5, [0, 9])]
)
def test_starts_that_do_not_cut_the_blob_are_refused(size, starts):
    with pytest.raises(ValueError, match="not a layout"):
        Layout(LayoutKind.TOC, size, starts)


@fast
@given(st.integers(0, 40), st.data())
def test_masks_behave_like_sets(count, data):
    a, b = data.draw(masks(count)), data.draw(masks(count))
    assert set(a | b) == set(a) | set(b)
    assert set(a & b) == set(a) & set(b)
    assert set(a - b) == set(a) - set(b)
    assert len(a) == len(set(a))
    assert list(a) == sorted(a)
    assert all((i in a) == (i in set(a)) for i in range(count))
    assert a.is_full == (set(a) == set(range(count)))
    start = data.draw(st.integers(0, count))
    wanted = range(start, data.draw(st.integers(start, count)))
    assert a.covers(wanted) == set(wanted).issubset(a)
    run = a.run_length(start)
    assert set(range(start, start + run)) <= set(a)
    assert start + run not in set(a)


@fast
@given(masks())
def test_masks_survive_the_wire(mask):
    assert PieceMask.from_bytes(mask.count, mask.to_bytes()) == mask


@fast
@given(st.integers(0, 40), st.binary(max_size=8))
def test_any_bytes_are_a_mask_or_a_value_error(count, data):
    try:
        mask = PieceMask.from_bytes(count, data)
    except ValueError:
        assert len(data) != (count + 7) // 8 or int.from_bytes(data, "little") >= 1 << count
    else:
        assert mask.to_bytes() == data


def test_a_full_mask_has_every_piece():
    assert list(PieceMask.full(5)) == [0, 1, 2, 3, 4]
    assert PieceMask.full(5).is_full
    assert PieceMask(0).is_full


@pytest.mark.parametrize("bits", [-1, 8])
def test_bits_past_the_count_are_refused(bits):
    with pytest.raises(ValueError, match="not a mask of 3 pieces"):
        PieceMask(3, bits)
