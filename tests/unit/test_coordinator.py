"""The rules of a coordinator, one by one."""

import pytest

from p2pcache.core.bounds import (
    FETCHING_S,
    HOLDING_S,
    LEASE_S,
    MAX_LEASE_AGE_S,
    MIN_LEASE_AGE_S,
    RENEW_S,
    RETRY_S,
)
from p2pcache.core.claims import REGION_PIECES, Claim, Grant, RegionKey
from p2pcache.core.coordinator import Coordinator
from p2pcache.core.model import Digest
from p2pcache.core.region import MAX_MEMBERS, MAX_SOURCES
from tests.unit.test_coordinator_machine import Cluster, check_books

KEY = RegionKey(Digest.of(b"layer"), "fixed", 0)
OTHER = RegionKey(Digest.of(b"layer"), "fixed", 1)
FULL = (1 << REGION_PIECES) - 1


class Told:
    """A coordinator, and short ways to tell it something."""

    def __init__(self, **limits):
        self.coordinator = Coordinator(**limits)
        self.now = 100.0

    def says(self, sender, key=KEY, **facts):
        grant = self.coordinator.answer(sender, Claim(key, **facts), self.now)
        check_books(self.coordinator)
        return grant

    def wants(self, sender, wanted, limit=REGION_PIECES, key=KEY, **facts):
        return self.says(sender, key, wanted=wanted, lease_limit=limit, **facts)

    def keeps_reading(self, sender, fetching, seconds):
        """It renews its lease in time, for so long."""
        end = self.now + seconds
        while self.now + RENEW_S < end:
            self.now += RENEW_S
            self.says(sender, fetching=fetching)
        self.now = end


def named(grant):
    return [source.address for source in grant.sources]


@pytest.fixture
def told():
    return Told()


# --- leases -----------------------------------------------------------------------------------


def test_the_first_who_asks_gets_the_lease(told):
    assert told.wants("a", 0b1011) == Grant(leased=0b1011)
    assert told.coordinator.granted == 3
    assert told.coordinator.live_leases(told.now) == 3


def test_no_more_is_leased_than_it_would_read_lowest_first(told):
    grant = told.wants("a", 0b110110, limit=2)
    assert grant.leased == 0b000110
    assert grant.retry_s == RETRY_S


def test_nobody_else_gets_the_lease(told):
    told.wants("a", 0b1)
    grant = told.wants("b", 0b1, passes_on=False)
    assert grant.leased == 0
    assert named(grant) == ["a"]


def test_what_is_left_over_is_leased_to_the_next(told):
    told.wants("a", 0b11, limit=1)
    grant = told.wants("b", 0b11, limit=1)
    assert grant.leased == 0b10
    assert [(s.address, s.mask, s.held) for s in grant.sources] == [("a", 0b01, 0)]
    assert grant.retry_s == 0


def test_a_lost_answer_is_given_again(told):
    told.wants("a", 0b11)
    assert told.wants("a", 0b11).leased == 0b11
    assert told.coordinator.granted == 2


def test_a_lease_asked_for_again_is_not_renewed_for_ever(told):
    told.wants("a", 0b1)
    for _ in range(int(MAX_LEASE_AGE_S) + 1):
        told.now += 1.0
        told.wants("a", 0b1)
    assert told.coordinator.lapsed == 1


def test_who_would_not_read_it_any_more_loses_it(told):
    told.wants("a", 0b1)
    assert told.wants("a", 0b1, limit=0) == Grant(retry_s=RETRY_S)
    assert told.wants("b", 0b1).leased == 0b1


def test_a_lease_that_is_not_mentioned_is_given_back(told):
    told.wants("a", 0b11)
    told.says("a", fetching=0b01)
    grant = told.wants("b", 0b11)
    assert grant.leased == 0b10
    assert named(grant) == ["a"]


def test_who_is_silent_loses_the_lease(told):
    told.wants("a", 0b1)
    told.now += LEASE_S
    assert told.wants("b", 0b1).leased == 0b1
    assert told.coordinator.lapsed == 1


def test_who_keeps_reading_keeps_the_lease(told):
    told.wants("a", 0b1)
    told.keeps_reading("a", 0b1, MIN_LEASE_AGE_S + 1)
    assert named(told.wants("b", 0b1)) == ["a"]


def test_no_lease_gets_older_than_the_longest(told):
    told.wants("a", 0b1)
    told.keeps_reading("a", 0b1, MAX_LEASE_AGE_S)
    assert told.wants("b", 0b1).leased == 0b1
    # It is still reading, but is not taken for the one who leads, nor a source for the next.
    told.says("a", fetching=0b1)
    assert named(told.wants("c", 0b1))[0] == "b"


def test_the_age_limit_follows_how_long_leases_take(told):
    for piece in range(8):
        told.wants("a", 1 << piece, held=(1 << piece) - 1)
        told.now += 0.5
        told.says("a", held=(2 << piece) - 1)
    told.wants("slow", 1 << 20)
    told.keeps_reading("slow", 1 << 20, MIN_LEASE_AGE_S)
    assert told.wants("b", 1 << 20).leased == 1 << 20


def test_the_age_limit_grows_while_leases_outlast_it(told):
    told.wants("a", 0b1)
    told.now += 0.1
    told.says("a", held=0b1)
    told.wants("slow", 0b10)
    told.keeps_reading("slow", 0b10, MIN_LEASE_AGE_S)
    assert told.wants("b", 0b10).leased
    told.keeps_reading("b", 0b10, MIN_LEASE_AGE_S)
    assert named(told.wants("c", 0b10))[0] == "b"


def test_a_holder_relieves_who_asks_again_of_its_lease(told):
    told.wants("a", 0b1)
    told.says("b", held=0b1)
    grant = told.wants("a", 0b1)
    assert (grant.leased, named(grant)) == (0, ["b"])
    assert told.coordinator.live_leases(told.now) == 0


def test_leases_of_the_unreachable_are_not_kept(told):
    assert told.wants("", 0b1).leased == 0b1
    assert told.coordinator.is_cold(KEY)
    assert told.wants("a", 0b1).leased == 0b1
    assert named(told.wants("", 0b1)) == ["a"]
    assert told.wants("", 0b10).leased == 0b10
    assert named(told.wants("b", 0b1)) == ["a"]


def test_a_lease_of_another_time_is_believed(told):
    told.says("a", held=0b10)
    told.says("a", fetching=0b1)
    assert told.coordinator.live_leases(told.now) == 1
    assert named(told.wants("b", 0b1)) == ["a"]
    told.now += LEASE_S
    assert told.wants("b", 0b1).leased == 0b1


def test_what_is_not_passed_on_is_not_taken_for_a_lease(told):
    told.says("a", fetching=0b1, passes_on=False)
    assert told.wants("b", 0b1).leased == 0b1


def test_who_fetches_what_others_have_is_not_taken_for_a_reader(told):
    told.says("h", held=0b1)
    told.says("a", fetching=0b1)
    assert told.coordinator.live_leases(told.now) == 0


# --- sources ----------------------------------------------------------------------------------


def test_holders_take_turns(told):
    for address in "abc":
        told.says(address, held=0b1)
    found = [named(told.wants(f"x{i}", 0b1, passes_on=False))[0] for i in range(6)]
    assert sorted(found) == sorted("aabbcc")


def test_who_is_busy_with_other_regions_comes_later(told):
    for key in (KEY, OTHER):
        for address in "ab":
            told.says(address, key, held=0b1)
    first = named(told.wants("x", 0b1, key=KEY))[0]
    assert named(told.wants("y", 0b1, key=OTHER))[0] != first


def test_a_spare_is_named_after_the_source(told):
    told.says("a", held=0b11)
    told.says("b", held=0b11)
    grant = told.wants("x", 0b11)
    assert sorted(named(grant)) == ["a", "b"]
    assert [s.mask for s in grant.sources] == [0b11, 0b11]
    assert [s.held for s in grant.sources] == [0b11, 0b11]
    # The spare is not counted: it is the next one's source.
    assert named(told.wants("y", 0b11))[0] == named(grant)[1]


def test_one_source_for_everything_is_better_than_two(told):
    told.says("a", held=0b0011)
    told.says("b", held=0b1100)
    told.says("c", held=0b1111)
    assert told.wants("x", 0b1111).sources[0].address == "c"


def test_pieces_are_put_together_from_several(told):
    told.says("a", held=0b0011)
    told.says("b", held=0b0110)
    grant = told.wants("x", 0b1111)
    assert grant.leased == 0b1000
    assert {s.address for s in grant.sources} == {"a", "b"}
    assert grant.sources[0].mask | grant.sources[1].mask == 0b0111
    assert not grant.sources[0].mask & grant.sources[1].mask


def test_askers_become_sources(told):
    told.wants("a", 0b1)
    told.wants("b", 0b1)
    found = {named(told.wants(f"x{i}", 0b1))[0] for i in range(6)}
    assert {"a", "b"} < found


def test_askers_that_may_not_pass_it_on_do_not(told):
    told.wants("a", 0b1, passes_on=False)
    found = {a for i in range(6) for a in named(told.wants(f"x{i}", 0b1, passes_on=False))}
    assert found == {"a"}


def test_nobody_is_sent_to_itself(told):
    told.says("a", held=0b1)
    assert told.wants("a", 0b1).leased == 0b1


def test_nobody_is_sent_to_one_who_waits_for_him(told):
    told.wants("a", 0b1)
    told.wants("b", 0b1)
    for i in range(8):
        if named(told.wants(f"x{i}", 0b1))[0] != "b":
            told.says(f"x{i}")
    assert len(told.coordinator._regions[KEY].members) > 2
    assert named(told.wants("b", 0b1, stalled=(("a", 0b1),))) == ["a"]


def test_asking_again_releases_the_source(told):
    told.says("a", held=0b1)
    told.wants("x", 0b1)
    told.says("x", held=0b1)
    region = told.coordinator._regions[KEY]
    assert region.members["a"].load == 0


def test_no_more_sources_than_fit(told):
    for i in range(REGION_PIECES):
        told.says(f"h{i}", held=1 << i)
    grant = told.wants("x", FULL, limit=0)
    assert len(grant.sources) == MAX_SOURCES
    assert grant.retry_s == RETRY_S


def test_an_announcement_is_answered_with_nothing(told):
    assert told.says("a", held=0b1, fetching=0b10) == Grant()


# --- failures ---------------------------------------------------------------------------------


def test_who_failed_is_not_named_again(told):
    told.says("a", held=0b11)
    grant = told.wants("x", 0b11, failed=(("a", 0b01),))
    assert grant.leased == 0b01
    assert [(s.address, s.mask) for s in grant.sources] == [("a", 0b10)]


def test_who_failed_loses_the_lease_at_once(told):
    told.wants("a", 0b1)
    assert told.wants("x", 0b1, failed=(("a", 0b1),)).leased == 0b1


def test_who_failed_comes_back_with_its_own_claim(told):
    told.says("a", held=0b1)
    told.wants("x", 0b1, limit=0, failed=(("a", 0b1),))
    told.says("a", held=0b1)
    assert named(told.wants("y", 0b1)) == ["a"]


def test_what_failed_is_not_taken_for_a_lease_again(told):
    told.wants("a", 0b1)
    told.wants("x", 0b1, limit=0, failed=(("a", 0b1),))
    told.says("a", fetching=0b1)
    assert told.wants("y", 0b1).leased == 0b1


def test_complaints_about_strangers_and_oneself_change_nothing(told):
    told.says("a", held=0b1)
    told.wants("x", 0b10, failed=(("nobody", 0b1),))
    told.says("a", held=0b1, failed=(("a", 0b1),))
    assert named(told.wants("y", 0b1)) == ["a"]


def test_when_a_reader_fails_who_waits_for_it_is_no_source(told):
    told.wants("a", 0b1)
    for i in range(5):
        told.wants(f"x{i}", 0b1)
    assert told.wants("y", 0b1, failed=(("a", 0b1),)).leased == 0b1
    assert named(told.wants("z", 0b1))[0] == "y"


def test_when_a_lease_lapses_who_waits_for_it_is_no_source(told):
    told.wants("a", 0b1)
    told.now += LEASE_S / 2
    told.wants("x", 0b1)
    told.now += LEASE_S / 2
    assert told.wants("y", 0b1).leased == 0b1


def test_who_stalls_is_named_only_if_there_is_nobody_else(told):
    told.wants("a", 0b1)
    told.says("x", held=0b1)
    assert named(told.wants("y", 0b1, stalled=(("x", 0b1),)))[0] == "a"
    assert named(told.wants("y", 0b1, stalled=(("x", 0b1), ("a", 0b1))))[0] in ("a", "x")


def test_a_stalled_reader_with_a_live_lease_is_named_again(told):
    told.wants("a", 0b1)
    assert named(told.wants("x", 0b1, stalled=(("a", 0b1),))) == ["a"]


def test_the_lease_of_a_stalled_reader_passes_on_when_it_lapsed(told):
    told.wants("a", 0b1)
    told.now += LEASE_S
    assert told.wants("x", 0b1, stalled=(("a", 0b1),)).leased == 0b1


def test_who_waits_for_a_stalled_holder_reads_itself(told):
    told.says("a", held=0b1)
    assert told.wants("x", 0b1, stalled=(("a", 0b1),)).leased == 0b1


def test_a_stalled_reader_is_better_than_one_whose_lease_lapsed(told):
    told.wants("old", 0b1)
    told.now += LEASE_S
    told.wants("new", 0b1)
    assert named(told.wants("x", 0b1, stalled=(("new", 0b1),)))[0] == "new"


@pytest.mark.parametrize("wanted", [0b0, 0b1])
def test_who_waits_for_one_that_gave_up_is_no_source(told, wanted):
    told.wants("a", 0b1)
    told.wants("x", 0b1)
    told.wants("a", wanted, limit=0, held=0b10)
    assert told.wants("y", 0b1).leased == 0b1


def test_a_doubted_source_is_better_than_none(told):
    told.wants("a", 0b1)
    told.now += LEASE_S
    grant = told.wants("x", 0b1, limit=0)
    assert named(grant) == ["a"]
    # Who waits for a doubted one is doubted as well.
    assert told.wants("y", 0b1).leased == 0b1


# --- time and memory --------------------------------------------------------------------------


def test_a_fetcher_is_believed_for_a_short_time(told):
    told.wants("a", 0b1)
    told.now += FETCHING_S
    assert named(told.wants("x", 0b1, limit=0)) == []
    assert told.coordinator.is_cold(KEY)


def test_a_holder_is_believed_for_a_long_time(told):
    told.says("a", held=0b1, fetching=0b10)
    told.now += HOLDING_S - 1
    assert named(told.wants("x", 0b11, limit=0)) == ["a"]
    told.now += 1
    assert told.wants("y", 0b1).leased == 0b1


def test_waiters_that_fall_silent_are_not_counted(told):
    told.says("a", held=0b1)
    told.wants("x", 0b1, passes_on=False)
    told.wants("", 0b1)
    assert told.coordinator._regions[KEY].members["a"].load == 2
    told.now += FETCHING_S
    told.says("b", held=0b1)
    assert told.coordinator._regions[KEY].members["a"].load == 0


def test_hearsay_is_believed_until_the_member_speaks(told):
    assert told.coordinator.is_cold(KEY)
    told.coordinator.learn(KEY, "a", 0b11, told.now)
    assert not told.coordinator.is_cold(KEY)
    assert named(told.wants("x", 0b1, passes_on=False)) == ["a"]
    told.coordinator.learn(KEY, "a", 0b10, told.now)
    assert told.wants("y", 0b1).leased == 0b1
    told.says("a", held=0b100)
    told.coordinator.learn(KEY, "a", 0b11, told.now)
    assert named(told.wants("z", 0b10, limit=0)) == []


def test_hearsay_of_nothing_is_not_remembered(told):
    told.coordinator.learn(KEY, "a", 0, told.now)
    assert told.coordinator.is_cold(KEY)


def test_a_member_that_left_has_no_leases(told):
    told.wants("a", 0b1)
    told.wants("a", 0b1, key=OTHER)
    told.wants("b", 0b1)
    told.coordinator.forget_member("a")
    assert told.coordinator.live_leases(told.now) == 0
    assert told.wants("c", 0b1).leased == 0b1
    assert told.coordinator.is_cold(OTHER)


def test_live_leases_are_those_that_have_not_lapsed(told):
    told.wants("a", 0b11)
    assert told.coordinator.live_leases(told.now + LEASE_S) == 0
    assert told.coordinator.lapsed == 2


def test_the_regions_last_claimed_are_remembered():
    told = Told(max_regions=2)
    keys = [RegionKey(KEY.digest, "fixed", index) for index in range(3)]
    for key in (keys[0], keys[1], keys[0], keys[2]):
        told.says("a", key, held=0b1)
    assert [told.coordinator.is_cold(key) for key in keys] == [False, True, False]
    assert told.coordinator.regions == 2


def test_members_are_bounded_over_all_regions():
    coordinator = Coordinator(max_nodes=MAX_MEMBERS)
    for i in range(4 * MAX_MEMBERS):
        key = RegionKey(KEY.digest, "fixed", i // 100)
        coordinator.answer(f"n{i}", Claim(key, held=1), 0.0)
        assert coordinator.nodes <= MAX_MEMBERS
    check_books(coordinator)


@pytest.mark.parametrize("limits", [{"max_regions": 0}, {"max_nodes": MAX_MEMBERS - 1}])
def test_a_coordinator_has_room_for_one_region(limits):
    with pytest.raises(ValueError, match="room"):
        Coordinator(**limits)


# --- the loss of everything -------------------------------------------------------------------


@pytest.mark.parametrize("passes_on", [True, False])
def test_a_storm_reads_the_upstream_once(passes_on):
    cluster = Cluster(count=50, passes_on=passes_on)
    cluster.finish()
    assert cluster.reads == 5


@pytest.mark.parametrize("passes_on", [True, False])
def test_the_loss_of_everything_costs_only_extra_requests(passes_on):
    cluster = Cluster(count=50, passes_on=passes_on)
    for node in cluster.nodes.values():
        cluster.say(node, 1)
    for i in range(3):
        cluster.coordinator = Coordinator()
        cluster.leases.clear()
        for node in list(cluster.nodes.values())[i::7]:
            cluster.say(node, 1)
        cluster.now += 0.1
    cluster.finish()
    check_books(cluster.coordinator)
    # At worst what was on its way is read once more for each loss.
    assert cluster.reads <= 5 * 4
