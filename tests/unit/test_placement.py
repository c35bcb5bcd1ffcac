"""Which members coordinate a region: fairly, alike everywhere, and with few moves."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcache.core.bounds import COORDINATORS
from p2pcache.core.claims import RegionKey
from p2pcache.core.model import Digest
from p2pcache.core.placement import MAX_GROUP, Member, Placement

BLOBS = [Digest.of(bytes([i])) for i in range(50)]
KEYS = [RegionKey(blob, "fixed", index) for blob in BLOBS for index in range(40)]


def members(count, **facts):
    return [Member(f"10.0.{i // 250}.{i % 250}:29901", **facts) for i in range(count)]


def firsts(placement, keys=KEYS):
    return {key: placement.coordinators(key)[0].address for key in keys}


def counts(placement, keys=KEYS):
    found = {member.address: 0 for member in placement.members}
    for address in firsts(placement, keys).values():
        found[address] += 1
    return found


MEMBERS = st.lists(
    st.builds(
        Member,
        st.integers(0, 30).map(str),
        st.sampled_from(["", "a", "b"]),
        st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    ),
    max_size=30,
)
ANY_KEY = st.sampled_from(KEYS)

PINNED = ["10.0.0.12:29901", "10.0.0.93:29901", "10.0.0.11:29901", "10.0.0.7:29901"]
"""Nodes of several versions run side by side during an upgrade: they must agree."""

PINNED_GROUPS = ["~10/32", "~27/32", "~17/32", "~1/32", "~19/32", "~26/32"]


@given(MEMBERS, ANY_KEY, st.randoms(use_true_random=False))
def test_only_the_set_of_members_matters(given_members, key, random):
    shuffled = [*given_members, *given_members[:3]]
    random.shuffle(shuffled)
    one, other = Placement(given_members), Placement(shuffled)
    assert one.members == other.members
    assert one.coordinators(key) == other.coordinators(key)


@given(MEMBERS, ANY_KEY, st.integers(1, 5))
def test_as_many_distinct_coordinators_as_there_are(given_members, key, count):
    placement = Placement(given_members)
    found = placement.coordinators(key, count)
    able = [member for member in placement.members if member.weight > 0]
    assert len(found) == len(set(found)) == min(count, len(able))
    assert set(found) <= set(able)
    assert placement.coordinators(key, 1) == found[:1]


@given(MEMBERS, ANY_KEY, st.data())
def test_without_a_member_the_others_keep_their_order(given_members, key, data):
    placement = Placement(given_members)
    ranking = placement.coordinators(key, 100)
    if ranking:
        gone = data.draw(st.sampled_from(ranking))
        rest = Placement(m for m in placement.members if m != gone)
        assert rest.coordinators(key, 100) == tuple(m for m in ranking if m != gone)


def test_the_regions_are_spread_evenly():
    found = counts(Placement(members(40)))
    expected = len(KEYS) / 40
    chi_square = sum((n - expected) ** 2 / expected for n in found.values())
    # 39 degrees of freedom: mean 39, deviation sqrt(78).
    assert chi_square < 39 + 4 * math.sqrt(78)


def test_addresses_and_regions_that_differ_little_are_spread_evenly_too():
    keys = [RegionKey(BLOBS[0], "fixed", index) for index in range(2000)]
    found = counts(Placement(Member(f"node-{i}") for i in range(20)), keys)
    chi_square = sum((n - 100) ** 2 / 100 for n in found.values())
    assert chi_square < 19 + 4 * math.sqrt(38)


def test_the_second_choice_is_spread_over_the_others():
    placement = Placement(members(11))
    address = placement.members[0].address
    seconds: dict[str, int] = {}
    for key in KEYS:
        first, second, _ = placement.coordinators(key)
        if first.address == address:
            seconds[second.address] = seconds.get(second.address, 0) + 1
    assert len(seconds) == 10
    assert max(seconds.values()) < 3 * sum(seconds.values()) / 10


def test_only_the_keys_of_a_member_that_leaves_move():
    everyone = members(30)
    before, after = firsts(Placement(everyone)), firsts(Placement(everyone[1:]))
    moved = {key for key in KEYS if before[key] != after[key]}
    assert moved == {key for key in KEYS if before[key] == everyone[0].address}


def test_a_member_that_joins_takes_its_share_and_no_more():
    everyone = members(30)
    before, after = firsts(Placement(everyone[1:])), firsts(Placement(everyone))
    moved = [key for key in KEYS if before[key] != after[key]]
    assert {after[key] for key in moved} == {everyone[0].address}
    assert len(moved) < 2 * len(KEYS) / 30


def test_nodes_whose_lists_differ_a_little_mostly_agree():
    everyone = members(200)
    one, other = firsts(Placement(everyone[4:])), firsts(Placement(everyone[:-4]))
    agreed = sum(one[key] == other[key] for key in KEYS) / len(KEYS)
    # They differ by 8 of 200: a key moves if its best member is one of them.
    assert agreed > 0.94


def test_a_placement_is_the_same_in_every_process_and_version():
    found = [firsts(Placement(members(100)), [key])[key] for key in KEYS[:4]]
    assert found == PINNED


def test_weights_are_shares():
    light, heavy = members(20), [Member(f"heavy-{i}", weight=3.0) for i in range(20)]
    found = counts(Placement([*light, *heavy]))
    share = sum(found[member.address] for member in heavy) / len(KEYS)
    assert 0.71 < share < 0.79


def test_a_change_of_a_weight_moves_keys_only_to_or_from_its_member():
    everyone = members(30)
    changed = Member(everyone[0].address, weight=2.5)
    before, after = firsts(Placement(everyone)), firsts(Placement([changed, *everyone[1:]]))
    moved = [key for key in KEYS if before[key] != after[key]]
    assert moved
    assert {after[key] for key in moved} == {changed.address}


def test_a_member_without_weight_gets_nothing():
    leaving = Member("leaving", weight=0)
    placement = Placement([leaving, *members(2)])
    assert leaving in placement.members
    assert all(leaving not in placement.coordinators(key) for key in KEYS)


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_a_weight_is_a_finite_share(weight):
    with pytest.raises(ValueError, match="weight"):
        Member("a:1", weight=weight)


def test_a_zone_has_coordinators_of_its_own():
    here = [Member(f"here-{i}", "here") for i in range(5)]
    there = [Member(f"there-{i}", "there") for i in range(5)]
    placement = Placement([*here, *there, Member("nowhere")])
    assert placement.zones == {"here", "there"}
    for blob in BLOBS:
        assert set(placement.coordinators(RegionKey(blob, "fixed", 0, "here"))) <= set(here)
        assert len(placement.coordinators(RegionKey(blob, "fixed", 0, "here"))) == COORDINATORS
        assert placement.coordinators(RegionKey(blob, "fixed", 0, "elsewhere")) == ()
    everywhere = {placement.coordinators(key)[0].zone for key in KEYS}
    assert everywhere == {"here", "there", ""}


def test_nobody_coordinates_where_nobody_is():
    assert Placement([]).coordinators(KEYS[0]) == ()


def test_a_remembered_answer_is_the_same():
    placement = Placement(members(50))
    assert firsts(placement) == firsts(placement)
    assert placement.coordinators(KEYS[0]) is placement.coordinators(KEYS[0])


# Scopes.


def scopes(placement):
    return {m.address: placement.scopes(m.address, m.zone) for m in placement.members}


def smallest(placement):
    return {address: chain[0] for address, chain in scopes(placement).items()}


def addresses(found):
    return {member.address for member in found}


ZONES = st.lists(st.sampled_from(["", "a", "b", "~0/2", "z" * 250]), min_size=1, max_size=4)


@given(st.integers(0, 600), ZONES, st.integers(0, 1000))
def test_every_member_is_within_its_scopes_and_in_no_others_of_their_kind(count, zones, salt):
    everyone = [Member(f"10.{salt}.{i}.1:29901", zones[i * i % len(zones)]) for i in range(count)]
    placement = Placement(everyone)
    found = scopes(placement)
    for scope in {scope for chain in found.values() for scope in chain}:
        within = addresses(placement.within(scope))
        assert within == {address for address, chain in found.items() if scope in chain}
        coordinators = placement.coordinators(RegionKey(BLOBS[0], "fixed", 1, scope))
        assert addresses(coordinators) <= within
        assert len(coordinators) == min(COORDINATORS, len(within))
    for chain in found.values():
        assert chain[-1] == ""
        assert len(set(chain)) == len(chain)
        assert all(len(scope) <= 255 for scope in chain)
        pools = [addresses(placement.within(scope)) for scope in chain]
        assert all(small <= large for small, large in pairwise(pools))


@pytest.mark.parametrize(
    ("count", "counts"),
    [
        (0, [1]),
        (1, [1]),
        (MAX_GROUP, [1]),
        (MAX_GROUP + 1, [2, 1]),
        (2 * MAX_GROUP, [2, 1]),
        (2 * MAX_GROUP + 1, [4, 1]),
        (32 * MAX_GROUP, [32, 1]),
        (5000, [256, 16, 1]),
    ],
)
def test_many_members_make_a_power_of_two_of_groups_about_as_large(count, counts):
    placement = Placement(members(count))
    found = list(scopes(placement).values()) or [("",)]
    assert {len(chain) for chain in found} == {len(counts)}
    for level, groups in enumerate(counts):
        names = {chain[level] for chain in found}
        assert names == ({f"~{i}/{groups}" for i in range(groups)} if groups > 1 else {""})
        sizes = [len(placement.within(name)) for name in names]
        assert sum(sizes) == count
        usual = count / groups
        assert all(abs(size - usual) <= 5 * math.sqrt(usual) for size in sizes)


def test_zones_are_split_each_for_itself():
    large = 2 * MAX_GROUP + 1
    placement = Placement([*members(large, zone="a"), Member("b:1", "b"), Member("nowhere:1")])
    found = scopes(placement)
    assert {chain for chain in found.values() if "a" in chain} == {
        (f"a~{i}/4", "a", "") for i in range(4)
    }
    assert (found["b:1"], found["nowhere:1"]) == (("b", ""), ("",))
    assert placement.scopes("new:1", "elsewhere") == ("",)


def test_one_zone_is_none():
    placement = Placement(members(20, zone="a"))
    assert set(scopes(placement).values()) == {("",)}


def test_a_member_that_joins_changes_no_group_but_its_own():
    everyone = members(2 * MAX_GROUP)
    before, after = smallest(Placement(everyone[1:])), smallest(Placement(everyone))
    assert after == before | {everyone[0].address: after[everyone[0].address]}
    keys = [RegionKey(blob, "fixed", 0, scope) for blob in BLOBS for scope in set(after.values())]
    one, other = firsts(Placement(everyone[1:]), keys), firsts(Placement(everyone), keys)
    assert {other[key] for key in keys if one[key] != other[key]} == {everyone[0].address}


def test_where_groups_double_each_is_cut_in_two():
    before = smallest(Placement(members(2 * MAX_GROUP)))
    after = smallest(Placement(members(2 * MAX_GROUP + 1)))
    for address, scope in before.items():
        number = int(scope.removeprefix("~").removesuffix("/2"))
        assert after[address] in (f"~{number}/4", f"~{number + 2}/4")


def test_nodes_that_differ_on_the_number_of_groups_agree_on_who_is_in_one():
    one, other = Placement(members(2 * MAX_GROUP)), Placement(members(2 * MAX_GROUP + 1))
    for scope in {*smallest(one).values(), *smallest(other).values()}:
        others = [member for member in other.within(scope) if member in one.members]
        assert list(one.within(scope)) == others
        keys = [RegionKey(blob, "fixed", 0, scope) for blob in BLOBS]
        found = [(one.coordinators(key)[0], other.coordinators(key)[0]) for key in keys]
        assert sum(a == b for a, b in found) >= 0.8 * len(keys)


@pytest.mark.parametrize("scope", ["~", "~1", "~1/", "~1/0", "~2/2", "~-1/2", "a~0/2", "~0/999999"])
def test_a_scope_that_is_none_has_nobody(scope):
    placement = Placement(members(200))
    assert placement.within(scope) == ()
    assert placement.coordinators(RegionKey(BLOBS[0], "fixed", 0, scope)) == ()


def test_who_is_in_which_group_is_the_same_in_every_process_and_version():
    found = smallest(Placement(members(1000)))
    assert [found[m.address] for m in members(6)] == PINNED_GROUPS
