"""Groups and zones: who fetches from beyond them, who waits for whom, and who is told what."""

import asyncio
import random

import pytest

from p2pcache.core import placement
from p2pcache.core.bounds import ALIVE_CLAIM_S, ANNOUNCE_S, COORDINATORS, FETCHING_S, LEASE_S
from p2pcache.core.placement import MAX_GROUP
from p2pcache.ports import Located
from tests.fakes_cluster import TRIP_S, FakeNode, a_cut, cluster
from tests.integration.test_locator import Chaos
from tests.virtual_time import in_virtual_time

CUT = a_cut()


def addresses(located: Located) -> list[str]:
    return [lead.peer.address for lead in located.leads]  # type: ignore[attr-defined] # a FakeContact


async def news_have_gone_out() -> None:
    await asyncio.sleep(2 * ANNOUNCE_S)


@in_virtual_time
async def test_nobody_is_sent_beyond_a_zone_to_one_who_waits_within_it():
    async with cluster(12, zones="abc") as nodes:
        first, second = [n for n in nodes if n.zone == "a"][:2]
        other = next(n for n in nodes if n.zone == "b")
        await second.locate(CUT, [2])  # from now on it announces beyond its zone, too
        await first.locate(CUT, [1])
        assert addresses(await second.locate(CUT, [1], fetching=[2])) == [first.address]
        second.announce(CUT, fetching=[1, 2])
        await news_have_gone_out()
        located = await other.locate(CUT, [1, 2], failed={first: [1]})
        assert list(located.upstream) == [1]
        (lead,) = located.leads
        assert (lead.peer, list(lead.pieces)) == (other.contact(second), [2])


@in_virtual_time
async def test_one_that_turns_to_its_zone_is_no_source_beyond_it_any_more():
    async with cluster(12, zones="abc") as nodes:
        first, second = [n for n in nodes if n.zone == "a"][:2]
        one, other = [n for n in nodes if n.zone == "b"][:2]
        await one.locate(CUT, [1])
        assert addresses(await first.locate(CUT, [1])) == [one.address]
        await asyncio.sleep(LEASE_S + 0.1)  # silent for so long: the zone's lease is the next one's
        assert first.address not in addresses(await second.locate(CUT, [1]))
        nodes.forget_messages()
        assert addresses(await first.locate(CUT, [1])) == [second.address]
        first.announce(CUT, fetching=[1])
        await news_have_gone_out()
        said = [c for m in nodes.messages if m.sender == first.address for c in m.claims]
        assert [c.fetching for c in said if not c.key.scope] == [0]
        located = await other.locate(CUT, [1], failed={one: [1]})
        assert addresses(located) in ([], [second.address])


@in_virtual_time
async def test_one_node_of_a_group_and_one_of_a_zone_fetches_from_beyond_it():
    async with cluster(4 * MAX_GROUP, zones="ab") as nodes:
        groups: dict[str, list[FakeNode]] = {}
        for node in nodes:
            group, zone, everywhere = nodes.placement.scopes(node.address, node.zone)
            assert (zone, everywhere) == (node.zone, "")
            groups.setdefault(group, []).append(node)
        first, second = groups["a~0/2"][:2]
        other, far = groups["a~1/2"][0], groups["b~0/2"][0]
        assert list((await first.locate(CUT, [1])).upstream) == [1]
        assert addresses(await second.locate(CUT, [1])) == [first.address]
        assert addresses(await other.locate(CUT, [1])) == [first.address]
        assert addresses(await far.locate(CUT, [1])) == [first.address]
        assert addresses(await groups["a~1/2"][1].locate(CUT, [1])) == [other.address]
        assert addresses(await groups["b~0/2"][1].locate(CUT, [1])) == [far.address]
        assert addresses(await groups["b~1/2"][0].locate(CUT, [1])) == [far.address]
        # Who is told what is on its way: the second only its group, the other its zone as well.
        nodes.forget_messages()
        for node in (second, other, far):
            node.announce(CUT, fetching=[1], held=[2])
        await asyncio.sleep(FETCHING_S)
        told: dict[str, set[str]] = {}
        for message in nodes.messages:
            for claim in message.claims:
                told.setdefault(message.sender, set())
                if claim.fetching:
                    told[message.sender].add(claim.key.scope)
        assert told[second.address] <= {"a~0/2"}
        assert told[other.address] <= {"a~1/2", "a"}
        assert "" in told[far.address] or nodes.coordinators(CUT)[0] is far


@in_virtual_time
async def test_what_came_from_peers_is_told_when_there_is_time():
    async with cluster(300) as nodes:
        group = nodes.placement.scopes(nodes[0].address, "")[0]
        members = [nodes.by_address[member.address] for member in nodes.placement.within(group)]
        coordinators = nodes.coordinators(CUT, zone=group)
        first, *others = [node for node in members if node not in coordinators]
        await first.locate(CUT, [1])
        for node in others:
            await node.locate(CUT, [1])
        nodes.forget_messages()
        for node in (first, *others):
            node.announce(CUT, held=[1])
        await asyncio.sleep(1.1 * ANNOUNCE_S + TRIP_S)
        assert first.address in {message.sender for message in nodes.messages}
        assert len(coordinators[0].messages) < len(others) / 2
        await asyncio.sleep(1.0)
        assert len(coordinators[0].messages) == len(others) + 1


@pytest.mark.parametrize("seed", range(8))
def test_whatever_goes_wrong_in_small_groups_everyone_gets_everything(seed, monkeypatch):
    monkeypatch.setattr(placement, "MAX_GROUP", 2)

    @in_virtual_time
    async def run() -> None:
        async with cluster(16, zones="ab") as nodes:
            scopes = nodes.placement.scopes(nodes[0].address, "a")
            assert len(scopes) == 3
            chaos = Chaos(nodes, random.Random(seed))
            async with asyncio.TaskGroup() as tasks:
                trouble = tasks.create_task(chaos.go_wrong())
                async with asyncio.TaskGroup() as readers:
                    for node in nodes:
                        readers.create_task(chaos.read(node, a_cut(count=150)))
                trouble.cancel()
            assert chaos.longest_s <= 2 * len(scopes) * (COORDINATORS + 1) * ALIVE_CLAIM_S

    run()
