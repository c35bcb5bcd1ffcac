"""Who is in the cluster: learned from a list and from greetings, over real HTTP on loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from multidict import CIMultiDict

from p2pcache.core.claims import Claims, RegionKey
from p2pcache.core.errors import (
    IntegrityError,
    SourceBusy,
    SourceLacksBlob,
    SourceRefused,
    SourceUnavailable,
)
from p2pcache.core.model import Digest
from p2pcache.core.placement import Member
from p2pcache.core.wire import Hello, NodeState, encode_hello
from p2pcache.metrics import Metrics
from p2pcache.peers.client import NotCoordinating, PeerClient, address_of
from p2pcache.peers.connections import Connections
from p2pcache.peers.members import GREET_EVERY_S, MAX_STRANGERS, Members
from p2pcache.server.peer_api import PeerApi
from p2pcache.store import Store
from tests.fakes import Answer, FakeHost, Reply, Stall
from tests.fakes_peer import FakePeer

SECRET = b"correct horse battery staple"
NOW = 1.7e9
KEYS = [RegionKey(Digest.of(b"blob"), "fixed", index) for index in range(64)]


class Greeter(FakeHost):
    """A host that says *hello*."""

    def __init__(self, node: str, zone: str = "", address: str = "") -> None:
        super().__init__()
        self.hello = Hello(node, zone, address)

    async def reply(self, request: web.BaseRequest) -> Reply:
        if request.path != "/p2p/v1/hello":
            return Reply(404, CIMultiDict())
        return Reply(200, CIMultiDict(), encode_hello(self.hello))


@pytest.fixture
async def connections():
    async with Connections() as connections:
        yield connections


@pytest.fixture
async def a():
    async with Greeter("a/1", "east") as host:
        yield host


@pytest.fixture
async def b():
    async with Greeter("b/1", "west") as host:
        yield host


SEEN = "127.0.0.1:29901"
"""How this node is seen from the others here."""


def members_of(connections: Connections, *urls: str, **settings: Any) -> Members:
    options: dict[str, Any] = {
        "own_id": "me/1",
        "own_address": "",
        "own_zone": "",
        "connections": connections,
        "secret": None,
        "metrics": Metrics(),
        "now": lambda: NOW,
    } | settings
    options.setdefault("own_port", 29901)  # as in SEEN
    return Members(urls, **options)


@asynccontextmanager
async def greeting(members: Members) -> AsyncIterator[None]:
    """Run the members' greetings."""
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(members.run())
        try:
            yield
        finally:
            running.cancel()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what other tasks bring about. Gives up after five seconds."""
    async with asyncio.timeout(5.0):
        while not condition():  # noqa: ASYNC110 - nothing in the code under test waits for it
            await asyncio.sleep(0.01)


def zones(members: Members) -> dict[str, str]:
    """All members but this node, unless it was told its address or found it in the list."""
    placed = members.placement.members
    return {member.address: member.zone for member in placed if member.address != SEEN}


def coordinators(members: Members) -> list[Sequence[Member]]:
    return [members.placement.coordinators(key, 3) for key in KEYS]


def names(peers: Sequence[PeerClient]) -> set[str]:
    return {peer.address for peer in peers}


# Before any greeting.


async def test_the_list_is_the_truth_before_anyone_has_answered(connections):
    members = members_of(
        connections, "http://10.0.0.2:1", "http://10.0.0.3:1", own_address="10.0.0.1:1"
    )
    assert zones(members) == {"10.0.0.1:1": "", "10.0.0.2:1": "", "10.0.0.3:1": ""}
    assert names(members.usable()) == {"10.0.0.2:1", "10.0.0.3:1"}
    assert abs(members.changed_at - time.monotonic()) < 5.0
    assert all(len(found) == 3 for found in coordinators(members))


async def test_a_node_alone_is_a_cluster(connections):
    assert members_of(connections).placement.members == ()
    alone = members_of(connections, own_address="10.0.0.1:1", own_zone="z")
    assert alone.placement.members == (Member("10.0.0.1:1", "z"),)
    async with greeting(alone):
        await asyncio.sleep(0)


async def test_a_node_that_knows_its_address_does_not_ask_itself(connections, a):
    members = members_of(connections, a.url, own_address=a.address, own_zone="z")
    assert members.usable() == []
    assert members.peer(a.address) is None
    assert zones(members) == {a.address: "z"}
    async with greeting(members):
        await asyncio.sleep(0)
    assert a.log == []


async def test_all_nodes_compute_the_same_whichever_they_are(connections):
    addresses = [f"10.0.0.{i}:1" for i in range(9)]
    urls = [f"http://{address}" for address in addresses]
    views = [
        members_of(connections, *urls, own_address=addresses[0]),
        members_of(connections, *reversed(urls), own_address=addresses[5]),
        # Its list has the others only.
        members_of(connections, *urls[1:], own_address=addresses[0]),
        # It does not know yet which one it is.
        members_of(connections, *urls),
    ]
    assert all(coordinators(view) == coordinators(views[0]) for view in views)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://Node1:29901", "node1:29901"),
        ("http://node1", "node1:80"),
        ("https://node1", "node1:443"),
        ("http://[fd00::1]:7/prefix", "[fd00::1]:7"),
    ],
)
def test_a_member_is_called_by_host_and_port(url, address):
    assert address_of(url) == address


# Greetings.


async def test_zones_are_learned_and_the_placement_changes_once(connections, a, b):
    members = members_of(connections, a.url, b.url, own_address="10.0.0.1:1", own_zone="east")
    before, started = members.placement, members.changed_at
    async with greeting(members):
        await until(lambda: members.placement is not before)
    assert zones(members) == {a.address: "east", b.address: "west", "10.0.0.1:1": "east"}
    assert members.changed_at > started
    assert len(a.log) == len(b.log) == 1


async def test_what_changes_nothing_leaves_the_placement_alone(connections, b):
    async with Greeter("a/1") as a:
        members = members_of(connections, a.url)
        before, started = members.placement, members.changed_at
        async with greeting(members):
            await a.arrived(1)
            await until(lambda: a.log[0].finished)
        members._rebuild()
        assert (members.placement, members.changed_at) == (before, started)


async def test_a_member_that_does_not_answer_stays_one(connections, a, b, caplog):
    caplog.set_level("INFO")
    b.inject(Stall(-1))
    members = members_of(connections, a.url, b.url, "http://127.0.0.1:1")
    before = members.placement
    async with greeting(members):
        # It does not keep the others waiting.
        await until(lambda: members.placement is not before)
        assert zones(members) == {a.address: "east", b.address: "", "127.0.0.1:1": ""}
        await until(lambda: names(members.usable()) == {a.address})
    silent = members.peer("127.0.0.1:1")
    assert silent is not None
    assert silent.record.failures >= 1
    assert "peer.failed" in caplog.messages


async def test_a_member_that_fails_is_greeted_again_soon(connections, a):
    a.inject(Answer(500))
    members = members_of(connections, a.url)
    async with greeting(members):
        await until(lambda: zones(members) == {a.address: "east"})
    assert len(a.log) == 2


async def test_an_older_version_is_a_member_that_coordinates_nothing_until_it_is_updated(
    connections, a
):
    a.inject(Answer(404))
    members = members_of(connections, a.url, own_address="10.0.0.1:1")
    before = members.placement
    async with greeting(members):
        await until(lambda: members.placement is not before)
        assert all([m.address for m in each] == ["10.0.0.1:1"] for each in coordinators(members))
        assert names(members.usable()) == {a.address}
        members._listed[a.address].due = 0.0
    async with greeting(members):
        await until(lambda: zones(members)[a.address] == "east")
    found = {member.address for each in coordinators(members) for member in each}
    assert found == {a.address, "10.0.0.1:1"}


async def test_who_refuses_claims_for_its_age_is_still_asked_for_bytes(connections):
    async with FakePeer() as old:
        members = members_of(connections, old.url, own_address="10.0.0.1:1")
        before = members.placement
        (peer,) = members.usable()
        with pytest.raises(NotCoordinating) as caught:
            await peer.claim(Claims("10.0.0.1:1", ()), 5.0)
        members.note(peer, caught.value)
        assert members.usable() == [peer]
        await until(lambda: members.placement is not before)
        assert all([m.address for m in each] == ["10.0.0.1:1"] for each in coordinators(members))


async def test_a_member_that_leaves_coordinates_nothing(connections, a, b):
    a.hello = Hello("a/1", "", "", NodeState.LEAVING)
    members = members_of(connections, a.url, b.url)
    before = members.placement
    async with greeting(members):
        await until(lambda: members.placement is not before)
    found = {member.address for each in coordinators(members) for member in each}
    assert found == {b.address, SEEN}
    assert members.peer(a.address) is not None


async def test_a_node_that_leaves_says_so_and_coordinates_nothing(connections):
    members = members_of(connections, "http://10.0.0.2:1", own_address="10.0.0.1:1", own_zone="z")
    assert members.hello() == Hello("me/1", "z", "10.0.0.1:1", NodeState.ACTIVE)
    members.leave()
    assert members.hello() == Hello("me/1", "z", "10.0.0.1:1", NodeState.LEAVING)
    found = {member.address for each in coordinators(members) for member in each}
    assert found == {"10.0.0.2:1"}


async def test_a_member_that_proves_nothing_is_not_believed(connections, a):
    members = members_of(connections, a.url, secret=SECRET)
    async with greeting(members):
        await until(lambda: members.usable() == [])
    assert zones(members) == {a.address: ""}


# Oneself.


async def test_a_node_that_is_not_in_the_list_takes_the_address_that_the_others_see(connections, b):
    members = members_of(connections, b.url, own_zone="mine")
    async with greeting(members):
        await until(members.greeted.is_set)
    assert members.own_address == SEEN
    assert Member(SEEN, "mine") in members.placement.members


async def test_a_node_recognises_itself_in_the_list(connections, b):
    async with Greeter("me/1", "mine") as me:
        members = members_of(connections, me.url, b.url, own_zone="mine")
        async with greeting(members):
            await until(lambda: members.own_address != "")
            await until(lambda: zones(members) == {me.address: "mine", b.address: "west"})
        assert members.own_address == me.address
        assert names(members.usable()) == {b.address}
        assert members.peer(me.address) is None
        assert members.hello().address == me.address
        assert len(me.log) == 1


async def test_a_node_that_was_told_its_address_keeps_it_whatever_the_list_says(connections, b):
    async with Greeter("me/1", address="10.0.0.1:1") as me:
        members = members_of(connections, me.url, b.url, own_address="10.0.0.1:1")
        async with greeting(members):
            await until(lambda: zones(members) == {"10.0.0.1:1": "", b.address: "west"})
        assert members.own_address == "10.0.0.1:1"
        assert members.peer("10.0.0.1:1") is members.peer(me.address) is None


async def test_lists_that_spell_a_member_differently_come_to_agree(connections, b):
    async with Greeter("a/1", "east", address="10.0.0.7:1") as a:
        here = members_of(connections, a.url, b.url)
        there = members_of(connections, a.url.replace("127.0.0.1", "localhost"), b.url)
        assert zones(here) != zones(there)
        async with greeting(here), greeting(there):
            expected = {"10.0.0.7:1": "east", b.address: "west"}
            await until(lambda: zones(here) == zones(there) == expected)
        assert coordinators(here) == coordinators(there)


@asynccontextmanager
async def serving(store: Store, node: str, now: float, view: list[Members]) -> AsyncIterator[str]:
    """A real peer listener, which says hello as its *view* does; yield its URL."""
    api = PeerApi(
        node, store, store.memory, Metrics(), SECRET, now=lambda: now, hello=lambda: view[0].hello()
    )
    runner = web.ServerRunner(web.Server(api.handle, access_log=None), shutdown_timeout=0.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_two_real_nodes_greet_each_other_and_themselves_with_clocks_an_hour_apart(
    tmp_path, connections
):
    one: list[Members] = []
    two: list[Members] = []
    async with (
        Store(tmp_path / "store", 1 << 20) as store,
        serving(store, "one/1", NOW, one) as first,
        serving(store, "two/1", NOW + 3600, two) as second,
    ):
        settings: dict[str, Any] = {"secret": SECRET, "own_zone": "z"}
        one.append(members_of(connections, first, second, own_id="one/1", **settings))
        settings["now"] = lambda: NOW + 3600
        two.append(members_of(connections, first, second, own_id="two/1", **settings))
        expected = {address_of(first): "z", address_of(second): "z"}
        async with greeting(one[0]), greeting(two[0]):
            await until(lambda: zones(one[0]) == zones(two[0]) == expected)
        assert [one[0].own_address, two[0].own_address] == list(expected)
        assert coordinators(one[0]) == coordinators(two[0])


# Peers that a coordinator names.


async def test_a_listed_peer_is_found_under_its_address(connections, a):
    members = members_of(connections, a.url)
    assert members.peer(a.address) is members.usable()[0]


async def test_a_peer_is_found_under_the_address_that_it_gives_for_itself(connections):
    async with Greeter("a/1", address="127.0.0.9:7") as a:
        members = members_of(connections, a.url)
        stranger = members.peer("127.0.0.9:7")
        assert stranger is not members.peer(a.address)
        async with greeting(members):
            await until(lambda: members.peer("127.0.0.9:7") is members.peer(a.address))
            a.hello = Hello("a/1", "", "127.0.0.9:8")
            members._listed[a.address].due = 0.0
        async with greeting(members):
            await until(lambda: members.peer("127.0.0.9:8") is members.peer(a.address))
        assert members.peer("127.0.0.9:7") is not members.peer(a.address)


async def test_nobody_takes_the_address_of_another_member(connections, a):
    async with (
        Greeter("x/1", address=a.address) as thief,
        Greeter("y/1", address="10.0.0.1:1") as other,
    ):
        members = members_of(connections, a.url, thief.url, other.url, own_address="10.0.0.1:1")
        before = members.peer(a.address)
        async with greeting(members):
            for host in (a, thief, other):
                await host.arrived(1)
            await until(lambda: zones(members)[a.address] == "east")
        assert members.peer(a.address) is before
        assert members.peer("10.0.0.1:1") is None


async def test_a_peer_that_is_not_listed_is_asked_under_its_address(connections, a):
    members = members_of(connections)
    peer = members.peer(a.address)
    assert peer is not None
    assert await peer.hello() == a.hello
    assert members.peer(a.address) is peer
    assert members.usable() == []
    assert members.placement.members == ()


@pytest.mark.parametrize(
    ("address", "with_secret", "without"),
    [
        ("127.0.0.1:1", True, True),
        ("[::1]:1", True, True),
        ("localhost:1", True, True),
        ("10.0.0.1:1", True, False),
        ("node.example:1", True, False),
        ("0.0.0.0:1", False, False),
        ("[::]:1", False, False),
        ("127.0.0.1:0", False, False),
        ("127.0.0.1:01", False, False),
        (" 127.0.0.1:1", False, False),
        ("127.0.0.1", False, False),
        ("", False, False),
        ("user@127.0.0.1:1", False, False),
        ("127.0.0.1:1/path", False, False),
        ("127.0.0.1:1?query", False, False),
        ("http://127.0.0.1:1", False, False),
        ("127.0.0.1:99999", False, False),
        ("127.0.0.1:1\r\nHost: x", False, False),
    ],
)
async def test_only_what_is_an_address_and_can_prove_itself_is_asked(
    connections, address, with_secret, without
):
    assert (members_of(connections, secret=SECRET).peer(address) is not None) is with_secret
    assert (members_of(connections).peer(address) is not None) is without


async def test_peers_that_are_not_listed_are_forgotten_in_the_end(connections):
    members = members_of(connections, secret=SECRET)
    first, second = members.peer("10.0.0.1:1"), members.peer("10.0.0.1:2")
    for port in range(3, MAX_STRANGERS + 2):
        assert members.peer(f"10.0.0.1:{port}") is not None
        assert members.peer("10.0.0.1:1") is first
    assert members.peer("10.0.0.1:2") is not second
    assert len(members._strangers) == MAX_STRANGERS


# What is remembered of a peer.


async def test_a_liar_is_blamed_and_left_alone(connections, caplog):
    metrics = Metrics()
    members = members_of(connections, "http://10.0.0.2:1", metrics=metrics)
    (peer,) = members.usable()
    members.note(peer, IntegrityError(peer.name, "piece 3 is wrong"))
    assert members.usable() == []
    assert metrics.peer_blames._value.get() == 1
    (line,) = [record for record in caplog.records if record.message == "peer.blamed"]
    assert (line.levelname, line.peer, line.blames, line.shunned_s) == (
        "WARNING",
        "peer 10.0.0.2:1",
        1,
        60,
    )
    # A busy moment does not end that.
    members.note(peer, SourceBusy(peer.name, "is busy"))
    members.note(peer, 0.001)
    assert members.usable() == []


@pytest.mark.parametrize("failure", [SourceUnavailable, SourceRefused])
async def test_a_peer_that_fails_is_left_alone_for_moments(connections, caplog, failure):
    caplog.set_level("INFO")
    members = members_of(connections, "http://10.0.0.2:1")
    (peer,) = members.usable()
    members.note(peer, failure(peer.name, "reset"))
    assert members.usable() == []
    assert peer.record.is_usable(time.monotonic() + 1.0)
    assert "peer.failed" in caplog.messages


async def test_a_busy_peer_has_not_failed(connections):
    members = members_of(connections, "http://10.0.0.2:1")
    (peer,) = members.usable()
    members.note(peer, SourceBusy(peer.name, "is busy", retry_after_s=60.0))
    assert peer.record.failures == 0
    assert peer.record.is_usable(time.monotonic() + 0.06)


async def test_a_peer_that_lacks_something_has_not_failed(connections):
    members = members_of(connections, "http://10.0.0.2:1")
    (peer,) = members.usable()
    members.note(peer, SourceLacksBlob(peer.name, "does not hold it"))
    assert members.usable() == [peer]


async def test_a_delivery_teaches_how_long_to_wait(connections):
    members = members_of(connections, "http://10.0.0.2:1")
    (peer,) = members.usable()
    before = peer.hedge_after_s
    for _ in range(20):
        members.note(peer, 0.001)
    assert peer.hedge_after_s < before


async def test_only_peers_are_noted(connections):
    class Other:
        name = "somebody else"

    with pytest.raises(TypeError):
        members_of(connections).note(Other(), 0.1)  # type: ignore[arg-type]  # that is the point


def test_greetings_take_their_time():
    assert GREET_EVERY_S >= 10.0


async def test_a_bug_in_one_greeting_is_logged_and_the_others_go_on(
    connections, a, b, monkeypatch, caplog
):
    hello = PeerClient.hello

    async def broken_for_a(peer: PeerClient) -> Hello | None:
        if peer.url == a.url:
            raise LookupError("a bug")
        return await hello(peer)

    monkeypatch.setattr(PeerClient, "hello", broken_for_a)
    members = members_of(connections, a.url, b.url)
    async with greeting(members):
        await until(members.greeted.is_set)
        assert zones(members) == {address_of(a.url): "", address_of(b.url): "west"}
    assert [record.message for record in caplog.records if record.exc_info] == ["greeting.broken"]


async def test_a_bug_in_a_round_of_greetings_is_logged_and_the_next_round_comes(
    connections, a, monkeypatch, caplog
):
    members = members_of(connections, a.url)
    rebuild, bugs = members._rebuild, [LookupError("a bug")]

    def broken_once() -> None:
        if bugs:
            raise bugs.pop()
        rebuild()

    monkeypatch.setattr("p2pcache.peers.members._FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(members, "_rebuild", broken_once)
    async with greeting(members):
        await until(members.greeted.is_set)
    assert [record.message for record in caplog.records if record.exc_info] == ["members.broken"]


async def test_a_member_whose_name_cannot_be_looked_up_is_one_that_fails(connections, b):
    members = members_of(connections, "http://b\u00fccher.test:29901", b.url)
    async with greeting(members):
        await until(members.greeted.is_set)
        assert zones(members)[address_of(b.url)] == "west"
