"""What is remembered of a peer: lies weigh more than failures, and both fade."""

from hypothesis import given
from hypothesis import strategies as st

from p2pcache.core.peers import MAX_HEDGE_S, MIN_HEDGE_S, PeerRecord

LATENCIES = st.floats(0, 1e4)


def shunned_for(record, now=0.0):
    return record.shunned_until - now


def test_a_new_peer_may_be_asked():
    record = PeerRecord()
    assert record.is_usable(0.0)
    assert MIN_HEDGE_S <= record.hedge_after_s <= MAX_HEDGE_S


def test_each_lie_doubles_the_time_up_to_a_day():
    record = PeerRecord()
    times = []
    for i in range(40):
        now = i * 1e6
        record.note_lie("wrong bytes", now)
        times.append(shunned_for(record, now))
    assert times[:4] == [60.0, 120.0, 240.0, 480.0]
    assert times == sorted(times)
    assert set(times[12:]) == {24 * 3600.0}
    assert record.blames == 40


def test_failures_pause_it_for_moments_only():
    record = PeerRecord()
    times = []
    for i in range(40):
        now = i * 1e6
        record.note_failure("refused", now)
        times.append(shunned_for(record, now))
    assert times[:4] == [0.5, 1.0, 2.0, 4.0]
    assert set(times[6:]) == {30.0}
    assert record.failures == 40


def test_a_delivery_forgives_failures_but_no_lie():
    record = PeerRecord()
    for _ in range(5):
        record.note_failure("stalled", 0.0)
    record.note_lie("wrong bytes", 0.0)
    record.note_delivery(0.1)
    assert record.failures == 0
    assert record.blames == 1
    record.note_failure("stalled", 1e6)
    assert shunned_for(record, 1e6) == 0.5
    record.note_lie("wrong bytes", 2e6)
    assert shunned_for(record, 2e6) == 120.0


def test_a_failure_does_not_shorten_the_time_for_a_lie():
    record = PeerRecord()
    record.note_lie("wrong bytes", 0.0)
    record.note_failure("refused", 1.0)
    assert shunned_for(record) == 60.0
    assert record.reason == "wrong bytes"
    assert not record.is_usable(59.9)
    assert record.is_usable(60.0)


def test_the_later_end_and_its_reason_count():
    record = PeerRecord()
    record.note_failure("refused", 0.0)
    record.note_lie("wrong bytes", 0.1)
    assert record.reason == "wrong bytes"
    assert shunned_for(record, 0.1) == 60.0


EVENTS = st.lists(
    st.tuples(st.sampled_from(["lie", "failure", "delivery"]), st.floats(0, 100)), max_size=30
)


@given(EVENTS)
def test_time_alone_makes_any_peer_usable_again_within_a_day(events):
    record, now = PeerRecord(), 0.0
    for kind, passed in events:
        now += passed
        before = record.shunned_until
        if kind == "lie":
            record.note_lie("x", now)
            assert not record.is_usable(now + 59)
        elif kind == "failure":
            record.note_failure("x", now)
            assert not record.is_usable(now)
        else:
            record.note_delivery(passed)
        assert record.shunned_until >= before
    assert record.is_usable(now + 24 * 3600.0)


@given(st.lists(LATENCIES, max_size=30))
def test_the_hedge_stays_within_its_bounds(latencies):
    record = PeerRecord()
    for latency_s in latencies:
        record.note_delivery(latency_s)
        assert MIN_HEDGE_S <= record.hedge_after_s <= MAX_HEDGE_S


def test_the_hedge_follows_what_was_seen():
    fast, steady, jumpy = PeerRecord(), PeerRecord(), PeerRecord()
    for i in range(100):
        fast.note_delivery(0.001)
        steady.note_delivery(0.2)
        jumpy.note_delivery(0.1 if i % 2 else 0.3)
    assert fast.hedge_after_s == MIN_HEDGE_S
    assert 0.2 <= steady.hedge_after_s < 0.21
    assert jumpy.hedge_after_s > 0.5
    assert abs(steady.latency_s - 0.2) < 0.001
