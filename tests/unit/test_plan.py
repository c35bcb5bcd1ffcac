"""Runs, against what they promise: all wanted pieces, once, from those who hold them."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from p2pcache.core.layout import Layout, LayoutKind, PieceMask
from p2pcache.core.plan import Run, assign

TEN = Layout(LayoutKind.TOC, 100, range(0, 100, 10))


@st.composite
def cases(draw):
    starts = sorted(draw(st.sets(st.integers(1, 199), max_size=25)) | {0})
    layout = Layout(LayoutKind.TOC, draw(st.integers(starts[-1] + 1, 220)), starts)
    some = st.sets(st.integers(0, layout.count - 1))
    masks = draw(st.lists(some | st.just(set(range(layout.count))), max_size=4))
    holders = [(f"p{i}", PieceMask.of(layout.count, mask)) for i, mask in enumerate(masks)]
    return sorted(draw(some)), layout, holders, draw(st.integers(1, 250))


def peers_of(piece, holders):
    return tuple(name for name, held in holders if piece in held)


@given(cases())
def test_every_wanted_piece_is_in_one_run_in_order(case):
    wanted, layout, holders, max_bytes = case
    runs = assign(wanted, layout, holders, max_bytes=max_bytes)
    assert [piece for run in runs for piece in run.pieces] == wanted
    assert all(len(run.pieces) > 0 for run in runs)


@given(cases())
def test_a_run_names_exactly_the_peers_that_hold_each_of_its_pieces(case):
    wanted, layout, holders, max_bytes = case
    for run in assign(wanted, layout, holders, max_bytes=max_bytes):
        assert {peers_of(piece, holders) for piece in run.pieces} == {run.peers}


@given(cases())
def test_a_run_is_within_the_limit_unless_it_is_one_piece(case):
    wanted, layout, holders, max_bytes = case
    for run in assign(wanted, layout, holders, max_bytes=max_bytes):
        assert len(run.pieces) == 1 or len(layout.span(run.pieces)) <= max_bytes


@given(cases())
def test_neighbouring_runs_could_not_have_been_one(case):
    wanted, layout, holders, max_bytes = case
    for a, b in pairwise(assign(wanted, layout, holders, max_bytes=max_bytes)):
        more = range(a.pieces.start, b.pieces.start + 1)
        assert (
            a.pieces.stop != b.pieces.start
            or a.peers != b.peers
            or len(layout.span(more)) > max_bytes
        )


def test_nothing_wanted_is_no_run():
    assert assign([], TEN, [("p", PieceMask.full(10))]) == []


def test_without_holders_all_is_left_to_the_upstream():
    assert assign(range(10), TEN, []) == [Run(range(10), ())]


def test_peers_stay_in_the_order_given_best_first():
    holders = [("b", PieceMask.full(10)), ("a", PieceMask.of(10, range(5)))]
    assert assign(range(10), TEN, holders) == [
        Run(range(5), ("b", "a")),
        Run(range(5, 10), ("b",)),
    ]


def test_a_long_read_is_cut_so_that_several_sources_share_it():
    layout = Layout.fixed(20 << 20)
    runs: list[Run[str]] = assign(range(20), layout, [])
    assert [run.pieces for run in runs] == [range(8), range(8, 16), range(16, 20)]


def test_a_piece_larger_than_the_limit_is_a_run_of_its_own():
    layout = Layout(LayoutKind.TOC, 100, [0, 1, 90])
    runs: list[Run[str]] = assign(range(3), layout, [], max_bytes=20)
    assert [run.pieces for run in runs] == [range(1), range(1, 2), range(2, 3)]
