"""Looking for pieces: claims, failing over, zones, and what is announced."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcache.core.bounds import (
    ANNOUNCE_S,
    CLAIM_S,
    COORDINATORS,
    HOLDING_S,
    LEASE_S,
    REANNOUNCE_S,
    RENEW_S,
)
from p2pcache.core.claims import REGION_PIECES, Cut
from p2pcache.core.errors import IntegrityError, SourceLacksBlob
from p2pcache.core.layout import PieceMask
from p2pcache.core.model import Digest, Manifest, Repository, Tag
from p2pcache.core.wire import TagNews
from p2pcache.ports import Located
from tests.fakes_cluster import TRIP_S, Cluster, FakeNode, a_cut, cluster
from tests.virtual_time import in_virtual_time

CUT = a_cut()
LONG = a_cut("a long one", 4 * REGION_PIECES)


@pytest.fixture(autouse=True)
def no_bug_was_caught(caplog):
    yield
    assert [record.message for record in caplog.records if record.exc_info] == []


def addresses(located: Located) -> list[str]:
    return [lead.peer.address for lead in located.leads]  # type: ignore[attr-defined] # a FakeContact


async def together(*questions: Awaitable[Located]) -> list[Located]:
    async def ask(question: Awaitable[Located]) -> Located:
        return await question

    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(ask(question)) for question in questions]
    return [task.result() for task in asked]


def now() -> float:
    return asyncio.get_running_loop().time()


async def news_have_gone_out() -> None:
    await asyncio.sleep(2 * ANNOUNCE_S)


def asker(nodes: Cluster, number: int = 0) -> FakeNode:
    """A node that coordinates nothing of CUT."""
    return nodes.others(*nodes.coordinators(CUT))[number]


# Claims.


@in_virtual_time
async def test_alone_the_upstream_is_free_without_a_message():
    async with cluster(1) as nodes:
        located = await nodes[0].locate(CUT, [3, 4])
        assert list(located.upstream) == [3, 4]
        assert nodes[0].knowledge.regions == 0


@in_virtual_time
async def test_the_first_gets_a_lease_and_the_next_is_sent_to_it():
    async with cluster(5) as nodes:
        first, second = asker(nodes, 0), asker(nodes, 1)
        assert list((await first.locate(CUT, [1, 2])).upstream) == [1, 2]
        located = await second.locate(CUT, [1, 2, 3])
        assert list(located.upstream) == [3]
        (lead,) = located.leads
        assert lead.peer is second.contact(first)
        assert list(lead.pieces) == [1, 2]
        assert not lead.holds_all


@in_virtual_time
async def test_one_claim_for_each_region_and_one_message_for_each_coordinator():
    async with cluster(2) as nodes:
        await nodes[0].locate(LONG, range(LONG.count), limit=LONG.count)
        away = [i for i in range(4) if nodes.coordinators(LONG, i)[0] is nodes[1]]
        (message,) = nodes.messages
        assert [claim.key.index for claim in message.claims] == away


@in_virtual_time
async def test_a_burst_of_searches_costs_few_messages():
    async with cluster(5) as nodes:
        node = asker(nodes)
        found = await together(*(node.locate(CUT, [piece], limit=1) for piece in range(40)))
        assert [list(located.upstream) for located in found] == [[piece] for piece in range(40)]
        (message,) = nodes.messages
        (claim,) = message.claims
        assert claim.wanted == (1 << 40) - 1


@in_virtual_time
async def test_what_comes_while_a_message_is_under_way_goes_with_the_next():
    async with cluster(5) as nodes:
        node = asker(nodes)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(node.locate(CUT, [0]))
            await asyncio.sleep(TRIP_S / 2)
            for piece in range(1, 20):
                tasks.create_task(node.locate(CUT, [piece]))
        first, second = nodes.messages
        assert [claim.wanted for claim in first.claims] == [1]
        # What was granted meanwhile is not given up by what is said next.
        assert [claim.wanted for claim in second.claims] == [(1 << 20) - 2]
        assert [claim.fetching for claim in second.claims] == [1]
        assert nodes.coordinators(CUT)[0].knowledge.live_leases(now()) == 20


@in_virtual_time
async def test_a_node_asks_itself_without_a_message():
    async with cluster(5) as nodes:
        coordinator = nodes.coordinators(CUT)[0]
        assert list((await coordinator.locate(CUT, [7])).upstream) == [7]
        assert nodes.messages == []


@in_virtual_time
async def test_leases_stay_within_the_limit_over_all_regions():
    async with cluster(6) as nodes:
        located = await nodes[0].locate(LONG, range(LONG.count), limit=70)
        assert len(located.upstream) == 70
        assert located.retry_s > 0


@in_virtual_time
async def test_leases_that_one_region_does_not_need_go_to_another():
    async with cluster(6) as nodes:
        nodes[0].announce(LONG, held=range(REGION_PIECES))
        await news_have_gone_out()
        located = await nodes[1].locate(LONG, range(2 * REGION_PIECES), limit=REGION_PIECES)
        assert list(located.upstream) == list(range(REGION_PIECES, 2 * REGION_PIECES))


# Coordinators that do not answer.


@in_virtual_time
async def test_a_silent_coordinator_costs_its_patience_once():
    async with cluster(8) as nodes:
        node = asker(nodes)
        first, second, _ = nodes.coordinators(CUT)
        first.is_silent = True
        start = now()
        assert list((await node.locate(CUT, [1])).upstream) == [1]
        assert now() - start < CLAIM_S + 10 * TRIP_S
        (message,) = second.messages
        assert message.rank == 1
        start = now()
        await node.locate(CUT, [2])
        assert now() - start < 10 * TRIP_S


@in_virtual_time
async def test_what_waited_for_a_silent_coordinator_waits_no_second_time():
    async with cluster(8) as nodes:
        node = asker(nodes)
        nodes.coordinators(CUT)[0].is_silent = True

        async def later() -> Located:
            await asyncio.sleep(CLAIM_S / 2)
            return await node.locate(CUT, [2])

        start = now()
        found = await together(node.locate(CUT, [1]), later())
        assert [list(located.upstream) for located in found] == [[1], [2]]
        assert now() - start < CLAIM_S + 20 * TRIP_S


@in_virtual_time
@pytest.mark.parametrize("trouble", ["is_down", "is_silent", "is_old"])
async def test_without_any_coordinator_the_upstream_is_free(trouble):
    async with cluster(8) as nodes:
        node = asker(nodes)
        for coordinator in nodes.coordinators(CUT):
            setattr(coordinator, trouble, True)
        start = now()
        located = await node.locate(CUT, [1, 2, 3], limit=2)
        # No more than with leave: a coordinator may be there again in a moment.
        assert list(located.upstream) == [1, 2]
        assert now() - start <= COORDINATORS * CLAIM_S + 0.01
        assert node.metrics.unleased_pieces._value.get() == 2


@in_virtual_time
async def test_a_coordinator_that_is_back_is_asked_again():
    async with cluster(8) as nodes:
        node, coordinator = asker(nodes), nodes.coordinators(CUT)[0]
        coordinator.is_down = True
        await node.locate(CUT, [1])
        coordinator.is_down = False
        await asyncio.sleep(1.0)
        coordinator.messages.clear()
        await node.locate(CUT, [2])
        assert [message.rank for message in coordinator.messages] == [0]


@in_virtual_time
async def test_one_that_lied_still_coordinates():
    async with cluster(8) as nodes:
        node, coordinator = asker(nodes), nodes.coordinators(CUT)[0]
        node.locator.note(node.contact(coordinator), IntegrityError("it", "other bytes"))
        await node.locate(CUT, [1])
        assert len(coordinator.messages) == 1


# Sources.


@in_virtual_time
async def test_whom_we_shun_is_not_used_and_the_coordinator_is_told():
    async with cluster(8) as nodes:
        liar, node, honest = asker(nodes, 0), asker(nodes, 1), asker(nodes, 2)
        liar.announce(CUT, held=[1])
        await news_have_gone_out()
        node.locator.note(node.contact(liar), IntegrityError("it", "other bytes"))
        located = await node.locate(CUT, [1])
        assert list(located.upstream) == [1]
        assert liar.address not in addresses(located)
        node.announce(CUT, held=[1])
        await news_have_gone_out()
        assert node.address in addresses(await honest.locate(CUT, [1]))


@in_virtual_time
async def test_a_source_that_we_do_not_know_is_passed_over_at_once():
    async with cluster(8) as nodes:
        stranger, node = asker(nodes, 0), asker(nodes, 1)
        stranger.announce(CUT, held=[1])
        await news_have_gone_out()
        known = [member for member in nodes if member is not stranger]
        node.directory.show(Cluster.agree(nodes, known))
        start = now()
        located = await node.locate(CUT, [1])
        assert list(located.upstream) == [1]
        assert now() - start < 0.1


@in_virtual_time
async def test_this_node_is_no_source_for_itself():
    async with cluster(8) as nodes:
        node = asker(nodes)
        node.announce(CUT, held=[1])
        await news_have_gone_out()
        assert list((await node.locate(CUT, [1])).upstream) == [1]  # it was evicted


@in_virtual_time
async def test_known_holders_need_no_claim():
    async with cluster(8) as nodes:
        holders, node = [asker(nodes, 0), asker(nodes, 1)], asker(nodes, 2)
        for holder in holders:
            holder.announce(CUT, held=range(CUT.count))
        await news_have_gone_out()
        assert (await node.locate(CUT, [1])).leads
        nodes.forget_messages()
        located = await node.locate(CUT, [2, 3])
        assert located.leads
        assert all(lead.holds_all and list(lead.pieces) == [2, 3] for lead in located.leads)
        assert nodes.messages == []
        # One that lacked a piece is not believed in the others either.
        for lead in located.leads:
            node.locator.note(lead.peer, SourceLacksBlob("it", "404"))
        await node.locate(CUT, [4])
        assert len(nodes.messages) == 1


@in_virtual_time
async def test_known_holders_are_forgotten_soon():
    async with cluster(8) as nodes:
        holder, node = asker(nodes, 0), asker(nodes, 1)
        holder.announce(CUT, held=range(CUT.count))
        await news_have_gone_out()
        await node.locate(CUT, [1])
        await asyncio.sleep(11)
        nodes.forget_messages()
        await node.locate(CUT, [2])
        assert len(nodes.messages) == 1


@in_virtual_time
async def test_members_that_disagree_still_find_each_other_at_a_shared_coordinator():
    async with cluster(8) as nodes:
        first, second, _ = nodes.coordinators(CUT)
        node, other = asker(nodes, 0), asker(nodes, 1)
        # It does not know the first coordinator, the other one does: two leases, both at work.
        known = [member for member in nodes if member is not first]
        node.directory.show(Cluster.agree(nodes, known))
        nodes.agree(nodes.others(node))
        assert list((await node.locate(CUT, [1])).upstream) == [1]
        assert second.messages
        assert list((await other.locate(CUT, [1])).upstream) == [1]


# Announcements.


@in_virtual_time
async def test_what_is_announced_is_found():
    async with cluster(8) as nodes:
        holder, node = asker(nodes, 0), asker(nodes, 1)
        holder.announce(CUT, held=[1, 2])
        await news_have_gone_out()
        located = await node.locate(CUT, [2])
        assert addresses(located) == [holder.address]
        assert located.leads[0].holds_all


@in_virtual_time
async def test_news_are_collected_and_told_once():
    async with cluster(8) as nodes:
        node = asker(nodes)
        for count in range(1, 20):
            node.announce(CUT, held=range(count))
        await news_have_gone_out()
        node.announce(CUT, held=range(19))
        await asyncio.sleep(10)
        (message,) = nodes.messages
        assert [claim.held for claim in message.claims] == [(1 << 19) - 1]


@in_virtual_time
async def test_pieces_that_arrive_are_news_only_with_the_last_or_after_a_while():
    async with cluster(8) as nodes:
        node = asker(nodes)
        await node.locate(CUT, range(40))
        nodes.forget_messages()
        for count in range(40):
            node.announce(CUT, held=range(count), fetching=range(count, 40))
            await asyncio.sleep(0.05)
        node.announce(CUT, held=range(40))
        await news_have_gone_out()
        assert len(nodes.messages) <= 2 / RENEW_S + 2
        assert nodes.messages[-1].claims[0].held == (1 << 40) - 1
        assert nodes.coordinators(CUT)[0].knowledge.live_leases(now()) == 0


@in_virtual_time
async def test_one_who_reads_from_a_peer_has_no_lease_to_renew():
    async with cluster(8) as nodes:
        node, other = asker(nodes, 0), asker(nodes, 1)
        await node.locate(CUT, [1])
        await other.locate(CUT, [1])
        nodes.forget_messages()
        for _ in range(20):
            node.announce(CUT, fetching=[1])
            other.announce(CUT, fetching=[1])
            await asyncio.sleep(RENEW_S / 2)
        senders = Counter(message.sender for message in nodes.messages)
        assert senders[node.address] > 2 * senders[other.address] > 0
        # It is still one to whom others are sent.
        found = [await asker(nodes, number).locate(CUT, [1]) for number in (2, 3, 4)]
        assert other.address in {address for located in found for address in addresses(located)}


@in_virtual_time
async def test_a_lease_lasts_while_bytes_flow_and_ends_when_it_is_given_up():
    async with cluster(8) as nodes:
        node, other = asker(nodes, 0), asker(nodes, 1)
        await node.locate(CUT, [1])
        for _ in range(20):
            node.announce(CUT, fetching=[1])
            await asyncio.sleep(RENEW_S / 2)
        assert not (await other.locate(CUT, [1])).upstream
        node.announce(CUT)
        await news_have_gone_out()
        located = await other.locate(CUT, [1], failed={node: [1]})
        assert list(located.upstream) == [1]


@in_virtual_time
async def test_a_lease_of_one_who_says_nothing_lapses():
    async with cluster(8) as nodes:
        await asker(nodes, 0).locate(CUT, [1])
        await asyncio.sleep(LEASE_S + 0.1)
        assert nodes.coordinators(CUT)[0].knowledge.live_leases(now()) == 0


@in_virtual_time
async def test_what_is_held_is_told_again_before_it_is_forgotten():
    async with cluster(8) as nodes:
        node = asker(nodes)
        node.announce(CUT, held=[1])
        await news_have_gone_out()
        for _ in range(4):
            nodes.forget_messages()
            await asyncio.sleep(REANNOUNCE_S + 3)
            assert 1 <= len(nodes.messages) <= 2
        await asyncio.sleep(HOLDING_S)
        assert addresses(await asker(nodes, 1).locate(CUT, [1])) == [node.address]


@in_virtual_time
async def test_a_coordinator_that_has_forgotten_is_told_again():
    async with cluster(4) as nodes:
        node = nodes.others(nodes.coordinators(CUT)[0])[0]
        coordinator = nodes.coordinators(CUT)[0]
        node.announce(CUT, held=[1, 2, 3])
        await news_have_gone_out()
        coordinator.restart()
        other = next(
            cut
            for cut in (a_cut(f"another {i}") for i in range(100))
            if nodes.coordinators(cut)[0] is coordinator
        )
        await node.locate(other, [1])
        await asyncio.sleep(1)
        last = nodes.others(node, coordinator)[0]
        assert addresses(await last.locate(CUT, [1])) == [node.address]


@in_virtual_time
async def test_one_that_forgets_with_every_answer_is_not_told_for_ever():
    async with cluster(4) as nodes:
        coordinator = nodes.coordinators(CUT)[0]
        node = nodes.others(coordinator)[0]
        node.announce(CUT, held=[1])
        await news_have_gone_out()
        nodes.forget_messages()

        async def forget() -> None:
            for _ in range(1000):
                coordinator.restart()
                await asyncio.sleep(0.01)

        node.announce(CUT, held=[1, 2])
        await forget()
        assert len(nodes.messages) <= 10


@in_virtual_time
async def test_a_new_coordinator_is_told_what_its_forerunner_knew():
    async with cluster(4) as nodes:
        holder = nodes.others(*nodes.coordinators(CUT))[0]
        holder.announce(CUT, held=[5])
        await news_have_gone_out()
        number = 0
        while nodes.coordinators(CUT)[0].messages:
            number += 1
            nodes.join(f"10.0.1.{number}:29901")
            nodes.agree()
        newcomer = nodes.coordinators(CUT)[0]
        await asyncio.sleep(2)
        assert newcomer.messages
        last = nodes.others(newcomer, holder)[0]
        newcomer.coordination._started_at = -1e9  # it does not ask around: it was told
        assert addresses(await last.locate(CUT, [5])) == [holder.address]


@in_virtual_time
async def test_news_that_went_to_a_stand_in_reach_the_coordinator_later():
    async with cluster(8) as nodes:
        node, coordinator = asker(nodes), nodes.coordinators(CUT)[0]
        coordinator.is_down = True
        node.announce(CUT, held=[1])
        await news_have_gone_out()
        coordinator.is_down = False
        coordinator.messages.clear()
        await asyncio.sleep(10)
        assert coordinator.messages
        assert addresses(await asker(nodes, 1).locate(CUT, [1])) == [node.address]


@in_virtual_time
async def test_all_that_a_store_holds_is_announced_at_a_pace():
    async with cluster(4) as nodes:
        node = nodes[0]
        cuts = [a_cut(f"blob {i}") for i in range(3000)]
        await node.locator.announce_all((cut, PieceMask.full(cut.count)) for cut in cuts)
        await asyncio.sleep(10)
        assert sum(n.knowledge.regions for n in nodes) == 3000
        assert max(len(message.claims) for message in nodes.messages) <= 1024


@in_virtual_time
async def test_the_memory_of_announcements_is_bounded():
    async with cluster(2) as nodes:
        node = nodes[0]
        announcer = node.locator._announcer
        for i in range(70):
            cut = a_cut(f"large {i}", 1 << 16)
            node.announce(cut, held=[0, cut.count - 1])
            if i % 10 == 0:
                await news_have_gone_out()
        await news_have_gone_out()
        assert announcer._weight <= 65_536
        assert len(announcer._told) == 2 * len(announcer._known)
        assert not announcer._due


# Everything at once.


class Chaos:
    """Accidents, drawn by hypothesis, while all nodes look for pieces."""

    def __init__(self, nodes: Cluster, draw: random.Random) -> None:
        self.nodes = nodes
        self.draw = draw
        self.held: dict[str, set[int]] = {node.address: set() for node in nodes}
        self.longest_s = 0.0

    async def read(self, node: FakeNode, cut: Cut) -> None:
        """Look for pieces until this node has them all, as the mirror would."""
        held = self.held[node.address]
        for _ in range(200):
            wanted = sorted(set(range(cut.count)) - held)[:20]
            if not wanted:
                return
            start = now()
            located = await node.locate(cut, wanted, held=held, limit=8)
            self.longest_s = max(self.longest_s, now() - start)
            node.announce(cut, held, fetching=wanted)
            await asyncio.sleep(self.draw.uniform(0.0, 0.2))
            held |= set(located.upstream)
            for lead in located.leads:
                held |= set(lead.pieces) & self.held[lead.peer.address]  # type: ignore[attr-defined] # a FakeContact
            node.announce(cut, held)
            await asyncio.sleep(located.retry_s)
        raise AssertionError("it never got them all")

    async def go_wrong(self) -> None:
        while True:
            await asyncio.sleep(self.draw.uniform(0.0, 0.5))
            node = self.draw.choice(list(self.nodes))
            match self.draw.randrange(5):
                case 0:
                    node.is_down = not node.is_down
                case 1:
                    node.is_silent = not node.is_silent
                case 2:
                    node.restart()
                case 3:
                    some = [n for n in self.nodes if n is node or self.draw.random() < 0.8]
                    node.directory.show(Cluster.agree(self.nodes, some))
                case 4:
                    node.trip_s = self.draw.choice((TRIP_S, 0.1, 0.5))


@settings(max_examples=15)
@given(seed=st.integers(0, 1 << 32), zones=st.sampled_from(("", "ab")))
def test_whatever_goes_wrong_everyone_gets_everything_and_no_search_takes_long(seed, zones):
    @in_virtual_time
    async def run() -> None:
        async with cluster(9, zones=zones or ("",)) as nodes:
            chaos = Chaos(nodes, random.Random(seed))
            async with asyncio.TaskGroup() as tasks:
                trouble = tasks.create_task(chaos.go_wrong())
                async with asyncio.TaskGroup() as readers:
                    for node in nodes:
                        readers.create_task(chaos.read(node, a_cut(count=150)))
                trouble.cancel()
            # Claims for the zone, a second time for useless sources, and both for the cluster;
            # each may wait for a message that is under way, and then for all its coordinators.
            assert chaos.longest_s <= 4 * (COORDINATORS + 1) * CLAIM_S

    run()


# Zones.


@in_virtual_time
async def test_one_node_of_a_zone_fetches_from_beyond_it():
    async with cluster(12, zones="abc") as nodes:
        in_a, in_b = [n for n in nodes if n.zone == "a"], [n for n in nodes if n.zone == "b"]
        assert list((await in_a[0].locate(CUT, [1])).upstream) == [1]
        # Its own zone goes to it, and asks nobody else.
        located = await in_a[1].locate(CUT, [1])
        assert (addresses(located), list(located.upstream)) == ([in_a[0].address], [])
        # The first of the next zone goes to it too, as the others of that zone go to that one.
        located = await in_b[0].locate(CUT, [1])
        assert (addresses(located), list(located.upstream)) == ([in_a[0].address], [])
        located = await in_b[1].locate(CUT, [1])
        assert (addresses(located), list(located.upstream)) == ([in_b[0].address], [])


@in_virtual_time
async def test_what_crossed_a_border_is_announced_on_both_sides():
    async with cluster(12, zones="abc") as nodes:
        in_a = [node for node in nodes if node.zone == "a"]
        await in_a[0].locate(CUT, [1])
        in_a[0].announce(CUT, held=[1])
        await news_have_gone_out()
        scopes = {c.key.scope for m in nodes.messages for c in m.claims if c.held}
        for zone in ("", "a"):  # it needs no message to tell itself
            assert zone in scopes or nodes.coordinators(CUT, zone=zone)[0] is in_a[0]
        in_c = next(node for node in nodes if node.zone == "c")
        located = await in_c.locate(CUT, [1])
        assert (addresses(located), located.leads[0].holds_all) == ([in_a[0].address], True)


@in_virtual_time
async def test_zones_that_become_known_later_are_told_what_was_announced_before():
    async with cluster(8) as nodes:
        nodes[0].announce(CUT, held=[1])
        await news_have_gone_out()
        for number, node in enumerate(nodes):
            node.zone = node.directory.own_zone = "ab"[number % 2]
        nodes.agree()
        await asyncio.sleep(3)
        assert nodes.coordinators(CUT, zone="a")[0].knowledge.regions
        located = await nodes[2].locate(CUT, [1])
        assert (addresses(located), list(located.upstream)) == ([nodes[0].address], [])


@in_virtual_time
async def test_a_zone_without_coordinators_asks_the_cluster():
    async with cluster(12, zones="abc") as nodes:
        in_a, in_b = [n for n in nodes if n.zone == "a"], [n for n in nodes if n.zone == "b"]
        await in_b[0].locate(CUT, [1])
        zone = nodes.coordinators(CUT, zone="a")
        node = next(n for n in in_a if n not in zone)
        for coordinator in zone:
            coordinator.is_down = True
        await node.locate(CUT, [2])  # it finds out
        assert addresses(await node.locate(CUT, [1])) == [in_b[0].address]


# Asking around.


@in_virtual_time
async def test_who_holds_a_blob_is_found_by_asking():
    async with cluster(5) as nodes:
        nodes[3].hold(CUT, [1])
        nodes[4].is_silent = True
        (offer,) = await nodes[0].locator.find(CUT.digest, None)
        assert offer.peer is nodes[0].contact(nodes[3])
        await nodes[0].locator.find(CUT.digest, PieceMask.of(CUT.count, [1]))
        assert nodes[3].questions[CUT.digest] == 1  # enough is known


@in_virtual_time
async def test_no_question_goes_to_more_than_some():
    async with cluster(200, zones="ab") as nodes:
        await nodes[0].locator.find(CUT.digest, None)
        asked = [node for node in nodes if node.questions[CUT.digest]]
        assert len(asked) == 64
        assert {node.zone for node in asked} == {"a"}
        await asyncio.sleep(1)
        await nodes[0].locator.find(CUT.digest, None)
        assert {node.questions[CUT.digest] for node in asked} == {2}


@in_virtual_time
async def test_manifests_and_tags_are_asked_for():
    async with cluster(5) as nodes:
        data = b"{}"
        manifest = Manifest(Digest.of(data), "", data)
        nodes[2].manifests[manifest.digest] = manifest
        nodes[1].is_silent = True
        start = now()
        assert await nodes[0].locator.manifest(manifest.digest) == manifest
        assert now() - start < 0.1
        assert await nodes[0].locator.manifest(CUT.digest) is None
        old, young = (TagNews(manifest.digest, "", 2, age_s) for age_s in (9.0, 1.0))
        nodes[2].tag, nodes[3].tag = old, young
        repository, tag = Repository.parse("registry.test", "team/app"), Tag.parse("latest")
        assert await nodes[0].locator.tag(repository, tag) == young


@in_virtual_time
async def test_an_answer_of_our_own_is_no_offer():
    async with cluster(2) as nodes:
        nodes[1].hold(CUT, [1])
        nodes[0].locator._asking._own_id = nodes[1].address  # known by two addresses
        assert not await nodes[0].locator.find(CUT.digest, None)


# What is gone, and what goes wrong.


@in_virtual_time
async def test_what_is_gone_is_no_longer_told_to_anybody_soon():
    async with cluster(5) as nodes:
        holder, seeker = asker(nodes, 0), asker(nodes, 1)
        holder.announce(CUT, [0, 1, 2])
        await news_have_gone_out()
        assert addresses(await seeker.locate(CUT, [0])) == [holder.address]
        holder.locator.announce_rest(CUT, PieceMask.of(CUT.count, [2]))
        await news_have_gone_out()
        late = nodes.others(*nodes.coordinators(CUT))[-1]
        assert list((await nodes.coordinators(CUT)[0].locate(CUT, [1])).upstream) == [1]
        assert late is seeker or addresses(await late.locate(CUT, [2])) == [holder.address]


@in_virtual_time
async def test_what_is_fetched_stays_so_when_something_else_is_gone():
    async with cluster(5) as nodes:
        holder, seeker = asker(nodes, 0), asker(nodes, 1)
        holder.announce(CUT, [0, 1], [7])
        await news_have_gone_out()
        holder.locator.announce_rest(CUT, PieceMask(CUT.count))
        await news_have_gone_out()
        assert addresses(await seeker.locate(CUT, [7])) == [holder.address]


@in_virtual_time
async def test_what_nobody_was_told_of_needs_no_telling_when_it_is_gone():
    async with cluster(5) as nodes:
        asker(nodes).locator.announce_rest(CUT, PieceMask(CUT.count))
        await news_have_gone_out()
        assert nodes.messages == []


@in_virtual_time
async def test_a_bug_in_a_round_of_announcements_is_logged_and_the_next_round_comes(
    monkeypatch, caplog
):
    async with cluster(5) as nodes:
        holder, seeker = asker(nodes, 0), asker(nodes, 1)
        announcer = holder.locator._announcer
        tell, bugs = announcer._tell, [LookupError("a bug")]

        def broken_once(now, send):
            if bugs:
                raise bugs.pop()
            tell(now, send)

        monkeypatch.setattr(announcer, "_tell", broken_once)
        holder.announce(CUT, [0])
        await asyncio.sleep(2.0)
        assert addresses(await seeker.locate(CUT, [0])) == [holder.address]
    assert [record.message for record in caplog.records if record.exc_info] == ["announcing.broken"]
    caplog.clear()
