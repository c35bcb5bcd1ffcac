"""The parts of the upstream client that decide without I/O."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from p2pcache.core.errors import ConfigError, SourceRefused
from p2pcache.core.model import Digest, Repository
from p2pcache.upstream.backoff import FAILURES_TO_CLOSE, Gate
from p2pcache.upstream.bounded import BoundedMap
from p2pcache.upstream.endpoint import Endpoint, UpstreamConfig, check_endpoints
from p2pcache.upstream.redirects import RedirectMemory, resolve_target

SAFE = Endpoint.of("r.example", None)
PLAIN = Endpoint.of("r.example", "http://r.example:5000")


# Where registries are.


def test_a_registry_is_at_its_own_host_by_https():
    assert str(SAFE.url("a/b/manifests/v1")) == "https://r.example/v2/a/b/manifests/v1"
    assert str(Endpoint.of("r:5000", None).base) == "https://r:5000"
    assert Endpoint.of("docker.io", None).base.host == "registry-1.docker.io"
    assert not SAFE.is_plain


def test_a_registry_may_be_below_a_path():
    endpoint = Endpoint.of("r.example", "https://proxy.example/api/docker/")
    assert str(endpoint.url("a/tags/list")) == "https://proxy.example/api/docker/v2/a/tags/list"


@pytest.mark.parametrize(
    "url",
    ["ftp://r", "r.example", "https://", "https://user:pass@r", "https://r?x=y", "https://r:99999"],
)
def test_what_is_no_place_for_a_registry_is_refused(url):
    with pytest.raises(ConfigError) as caught:
        Endpoint.of("r.example", url)
    assert "pass" not in str(caught.value)


def test_every_wrong_endpoint_is_reported():
    with pytest.raises(ConfigError) as caught:
        check_endpoints(UpstreamConfig(endpoints={"a": "ftp://a", "b": "https://b", "c": "c"}))
    assert len(caught.value.problems) == 2


def test_only_the_same_scheme_host_and_port_is_the_registrys_own():
    assert SAFE.owns(URL("https://r.example:443/elsewhere?x"))
    for other in ("http://r.example/", "https://r.example:444/", "https://s.example/"):
        assert not SAFE.owns(URL(other))


# Redirects.


def test_a_signature_is_kept_as_it_is_spelled():
    location = "https://s.example/a%2Fb/c?sig=x%2By%3D%3D&p=%7E~+&q=a%20b"
    assert str(resolve_target(SAFE, SAFE.base, location)) == location


def test_a_relative_redirect_stays_on_the_host():
    target = resolve_target(SAFE, SAFE.url("a/blobs/x"), "/other/place?sig=a%2Bb#part")
    assert str(target) == "https://r.example/other/place?sig=a%2Bb"


@pytest.mark.parametrize(
    "location",
    [
        None,
        "",
        "http://s.example/",
        "ftp://s.example/",
        "file:///etc/passwd",
        "https://s.example:99999/",
        "https://user:pass@s.example/",
        "https://user@s.example/",
        "https://[::1",
        "javascript:alert(1)",
    ],
)
def test_a_redirect_to_a_bad_place_is_refused(location):
    with pytest.raises(SourceRefused):
        resolve_target(SAFE, SAFE.base, location)


def test_plain_http_may_lead_to_plain_http():
    assert resolve_target(PLAIN, PLAIN.base, "http://s.example/x").scheme == "http"


@given(st.text(max_size=40))
def test_any_location_is_followed_or_refused(location):
    try:
        target = resolve_target(SAFE, SAFE.base, location)
    except SourceRefused:
        return
    assert target.scheme == "https"
    assert target.host


def test_an_address_is_remembered_until_it_lapses():
    memory, repository, digest = RedirectMemory(), Repository("r", "a"), Digest.of(b"")
    memory.put(repository, digest, URL("https://s/1"), until=10.0)
    assert memory.find(repository, digest, 9.9) == URL("https://s/1")
    assert memory.find(repository, digest, 10.0) is None
    memory.forget(repository, digest, URL("https://s/0"))
    assert memory.find(repository, digest, 0.0) is not None
    memory.forget(repository, digest, URL("https://s/1"))
    assert memory.find(repository, digest, 0.0) is None
    memory.forget(repository, digest, URL("https://s/1"))


# When not to ask.


def test_a_gate_closes_after_failures_in_a_row():
    gate = Gate()
    for _ in range(FAILURES_TO_CLOSE - 1):
        assert not gate.failed(0.0)
        assert gate.enter(0.0) == 0.0
    gate.succeeded()
    for _ in range(FAILURES_TO_CLOSE - 1):
        assert not gate.failed(0.0)
    assert gate.failed(0.0)
    assert 0.0 < gate.enter(0.0) <= 1.0


def test_one_request_at_a_time_tries_a_failing_host():
    gate = Gate()
    for _ in range(FAILURES_TO_CLOSE):
        gate.failed(0.0)
    assert gate.enter(2.0) == 0.0
    assert gate.enter(2.0) > 0.0
    assert not gate.failed(2.1)
    assert gate.enter(2.2) > 0.0
    gate.succeeded()
    assert gate.enter(2.2) == 0.0


def test_the_rests_grow_up_to_a_bound():
    gate, now = Gate(), 0.0
    for _ in range(2000):
        gate.failed(now)
        wait = gate.enter(now)
        assert wait <= 30.0
        now += wait
    assert wait >= 15.0


def test_a_wait_that_was_asked_for_outlasts_success():
    gate = Gate()
    gate.quiet(0.0, 60.0)
    gate.quiet(0.0, 5.0)
    gate.succeeded()
    assert gate.enter(59.0) == 1.0
    assert gate.enter(60.0) == 0.0


# A mapping with a bound.


@given(
    st.lists(st.tuples(st.sampled_from(["get", "put", "drop", "make"]), st.integers(0, 5))),
    st.integers(1, 4),
)
def test_the_entries_used_last_are_kept(steps, limit):
    bounded: BoundedMap[int, int] = BoundedMap(limit)
    model: list[tuple[int, int]] = []
    for number, (step, key) in enumerate(steps, 1):
        known = dict(model)
        if step == "put":
            bounded.put(key, number)
            kept = number
        elif step == "make":
            kept = bounded.get_or_make(key, partial(int, number))
            assert kept == known.get(key, number)
        elif step == "get":
            assert bounded.get(key) == known.get(key)
            kept = known.get(key, 0)
        else:
            bounded.drop(key)
            kept = 0
        model = [pair for pair in model if pair[0] != key] + ([(key, kept)] if kept else [])
        model = model[-limit:]
        assert len(bounded) == len(model)
