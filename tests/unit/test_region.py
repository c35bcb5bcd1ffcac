"""A region with many members: what it remembers, and the shape of the trees."""

import math

import pytest

from p2pcache.core.bounds import RENEW_S
from p2pcache.core.claims import REGION_PIECES, Claim, RegionKey
from p2pcache.core.coordinator import Coordinator
from p2pcache.core.model import Digest
from p2pcache.core.region import MAX_MEMBERS, MAX_SOURCES
from tests.unit.test_coordinator_machine import check_books

KEY = RegionKey(Digest.of(b"layer"), "fixed", 0)
FULL = (1 << REGION_PIECES) - 1


def test_in_a_full_region_fetchers_make_room_then_holders_but_never_readers():
    coordinator = Coordinator()
    coordinator.answer("reader", Claim(KEY, wanted=1, lease_limit=1), 0.0)
    for i in range(2 * MAX_MEMBERS):
        coordinator.answer(f"f{i}", Claim(KEY, wanted=1), 0.0)
    region = coordinator._regions[KEY]
    assert len(region.members) == MAX_MEMBERS
    check_books(coordinator)
    for i in range(2 * MAX_MEMBERS):
        coordinator.answer(f"h{i}", Claim(KEY, held=1), 0.1)
    assert len(region.members) == MAX_MEMBERS
    assert "reader" in region.members
    assert sum(member.held for member in region.members.values()) == MAX_MEMBERS - 1
    coordinator.answer("late", Claim(KEY, wanted=2, lease_limit=1), 0.2)
    assert {"reader", "late"} < set(region.members)
    assert len(region.members) == MAX_MEMBERS
    check_books(coordinator)


def test_work_is_bounded_when_everyone_has_a_little_of_everything():
    coordinator = Coordinator()
    for i in range(MAX_MEMBERS):
        coordinator.answer(f"h{i}", Claim(KEY, held=0b11 << i % 63), 0.0)
    grant = coordinator.answer("x", Claim(KEY, wanted=FULL), 0.0)
    named_pieces = 0
    for source in grant.sources:
        named_pieces |= source.mask
    assert grant.retry_s == 0 or named_pieces.bit_count() >= MAX_SOURCES
    assert len(grant.sources) <= MAX_SOURCES


def tree(count, *, limit, burst):
    """The depth of the tree of *count* askers, and the most that one was asked by."""
    coordinator = Coordinator()
    above: dict[tuple[str, int], str] = {}
    asked: dict[str, int] = {}
    upstream = 0
    wanted = {f"n{i}": FULL for i in range(count)}
    fetching = dict.fromkeys(wanted, 0)
    now = 0.0
    while wanted:
        for i, (address, pieces) in enumerate(list(wanted.items())):
            now += RENEW_S / count if i % burst == 0 else 0.0
            claim = Claim(KEY, 0, fetching[address], pieces, limit)
            grant = coordinator.answer(address, claim, now)
            upstream += grant.leased.bit_count()
            left = pieces & ~grant.leased
            for source in grant.sources:
                if source.mask & left:
                    asked[source.address] = asked.get(source.address, 0) + 1
                for piece in range(REGION_PIECES):
                    if source.mask & left & 1 << piece:
                        above[address, piece] = source.address
                left &= ~source.mask
            fetching[address] |= pieces & ~left
            wanted[address] = left
        wanted = {address: left for address, left in wanted.items() if left}
    check_books(coordinator)
    assert upstream == REGION_PIECES

    def depth(address, piece):
        steps = 0
        while (address, piece) in above:
            address, steps = above[address, piece], steps + 1
        return steps

    some = range(0, REGION_PIECES, 9)
    return max(depth(f"n{i}", p) for i in range(count) for p in some), max(asked.values())


@pytest.mark.parametrize("burst", [1, 50])
@pytest.mark.parametrize("limit", [REGION_PIECES, 4, 1])
@pytest.mark.parametrize("count", [100, 1000])
def test_the_tree_is_flat_and_no_member_is_asked_by_many(count, limit, burst):
    depth, most = tree(count, limit=limit, burst=burst)
    assert depth <= 2 * math.log2(count) + 2
    assert most <= 3 * math.log2(count)


def test_thousands_of_askers_share_the_members_that_are_known():
    depth, most = tree(5000, limit=8, burst=50)
    assert depth <= 2 * math.log2(5000) + 2
    assert most <= 3 * 5000 / MAX_MEMBERS
