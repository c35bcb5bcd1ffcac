"""A coordinator that may have missed something asks around before it grants leases."""

import asyncio

import pytest

from p2pcache.core.bounds import ASK_AROUND_S, CLAIM_S, SETTLE_S
from p2pcache.core.claims import Claim, Claims, Cut, RegionKey
from p2pcache.core.coordinator import Coordinator
from p2pcache.core.layout import LayoutKind, PieceMask
from p2pcache.core.model import Digest
from p2pcache.core.wire import Holding
from p2pcache.peers.coordination import Knowledge
from p2pcache.peers.directory import Directory
from p2pcache.peers.locator import Locator
from p2pcache.peers.members import Members
from p2pcache.ports import Neighbours
from tests.fakes_cluster import Cluster, FakeNode, a_cut, cluster
from tests.virtual_time import in_virtual_time

CUT = a_cut()
LONG = a_cut("a long one", 256)


def the_real_ones_fit(
    members: Members, coordinator: Coordinator, locator: Locator
) -> tuple[Directory, Knowledge, Neighbours]:
    """Checked by mypy: what the tests replace is what the program uses."""
    return members, coordinator, locator


def some_nodes(nodes: Cluster) -> tuple[FakeNode, FakeNode, FakeNode]:
    """The coordinator of CUT, and two that coordinate nothing of it."""
    coordinators = nodes.coordinators(CUT)
    one, other, *_ = nodes.others(*coordinators)
    return coordinators[0], one, other


def now() -> float:
    return asyncio.get_running_loop().time()


@in_virtual_time
async def test_after_a_restart_what_others_hold_is_found():
    async with cluster(8) as nodes:
        coordinator, holder, node = some_nodes(nodes)
        holder.hold(CUT, [1, 2])
        coordinator.restart()
        located = await node.locate(CUT, [1, 3])
        (lead,) = located.leads
        assert lead.peer is node.contact(holder)
        assert list(lead.pieces) == [1]
        assert list(located.upstream) == [3]


@in_virtual_time
async def test_the_first_news_after_a_restart_are_not_taken_for_all():
    async with cluster(8) as nodes:
        coordinator, holder, node = some_nodes(nodes)
        holder.hold(CUT, [1])
        coordinator.restart()
        node.announce(CUT, held=[2])
        await asyncio.sleep(1)
        assert not coordinator.knowledge.is_cold(RegionKey(CUT.digest, CUT.name, 0))
        assert not (await node.locate(CUT, [1], held=[2])).upstream


@in_virtual_time
async def test_a_settled_coordinator_asks_nobody():
    async with cluster(8) as nodes:
        _, holder, node = some_nodes(nodes)
        holder.hold(CUT, [1])
        assert list((await node.locate(CUT, [1])).upstream) == [1]
        assert not any(member.questions for member in nodes)


@in_virtual_time
async def test_a_stand_in_asks_around_though_it_has_settled():
    async with cluster(8) as nodes:
        coordinator, holder, node = some_nodes(nodes)
        holder.hold(CUT, [1])
        coordinator.is_down = True
        assert not (await node.locate(CUT, [1])).upstream


@in_virtual_time
async def test_after_a_change_of_the_members_cold_regions_are_asked_for():
    async with cluster(8) as nodes:
        _, holder, node = some_nodes(nodes)
        holder.hold(CUT, [1])
        nodes.agree()
        assert not (await node.locate(CUT, [1])).upstream
        await asyncio.sleep(SETTLE_S)
        later = a_cut("later")
        holder.hold(later, [1])
        assert (await node.locate(later, [1])).upstream


@in_virtual_time
async def test_one_question_however_many_wait_for_it():
    async with cluster(8) as nodes:
        for node in nodes:
            node.restart()
        async with asyncio.TaskGroup() as tasks:
            for node in nodes:
                tasks.create_task(node.locate(LONG, range(256)))
                tasks.create_task(node.locate(LONG, [3, 200]))
        coordinators = {nodes.coordinators(LONG, index)[0] for index in range(4)}
        for node in nodes:
            assert node.questions[LONG.digest] <= len(coordinators)


@in_virtual_time
async def test_members_that_do_not_answer_cost_a_bounded_wait_once():
    async with cluster(8) as nodes:
        coordinator, holder, node = some_nodes(nodes)
        holder.hold(CUT, [1])
        mute = nodes.others(coordinator, holder, node)[0]
        mute.is_silent = True
        coordinator.restart()
        start = now()
        located = await node.locate(CUT, [1])
        assert ASK_AROUND_S <= now() - start < CLAIM_S
        assert not located.upstream
        asked = mute.asked
        other = next(
            cut
            for cut in (a_cut(f"another {i}") for i in range(1000))
            if nodes.coordinators(cut)[0] is coordinator
        )
        start = now()
        await node.locate(other, [1])
        assert now() - start < 0.1
        assert mute.asked == asked


@in_virtual_time
async def test_whole_holders_count_however_they_cut_the_blob():
    async with cluster(8) as nodes:
        cut = Cut(CUT.digest, f"toc 16384 {Digest.of(b'toc')}", 500, passes_on=True)
        coordinator = nodes.coordinators(cut, 7)[0]
        holder, node, *_ = nodes.others(coordinator)
        holder.hold(CUT, [], whole=True)
        coordinator.restart()
        located = await node.locate(cut, [450, 499])
        assert [list(lead.pieces) for lead in located.leads] == [[450, 499]]
        assert located.leads[0].peer is node.contact(holder)


@in_virtual_time
async def test_pieces_of_another_cut_do_not_count():
    async with cluster(8) as nodes:
        coordinator, holder, node = some_nodes(nodes)
        toc = Digest.of(b"a table of contents")
        holder.holdings[CUT.digest] = Holding(
            "it", 64 << 20, LayoutKind.TOC, None, PieceMask.full(64), False, toc
        )
        coordinator.restart()
        assert list((await node.locate(CUT, [1])).upstream) == [1]


TOC = Digest.of(b"toc")


@pytest.mark.parametrize(
    ("cut", "holding"),
    [
        (
            Cut.of_manifest(CUT.digest),
            Holding("it", 700, LayoutKind.FIXED, None, PieceMask.full(1), is_whole=True),
        ),
        (
            Cut.of_tail(CUT.digest, TOC),
            Holding("it", 700, LayoutKind.TOC, 600, PieceMask.of(64, [3, 63]), False, TOC),
        ),
    ],
)
@in_virtual_time
async def test_who_has_a_small_thing_is_found_by_asking_around(cut, holding):
    async with cluster(8) as nodes:
        for node in nodes:
            node.restart()
        asker, holder, *_ = [n for n in nodes if n is not nodes.coordinators(cut)[0]]
        holder.holdings[cut.digest] = holding
        located = await asker.locate(cut, [0])
        assert not located.upstream
        assert [lead.peer.name for lead in located.leads] == [f"peer {holder.address}"]


@pytest.mark.parametrize(
    "holding",
    [
        Holding("it", 700, LayoutKind.TOC, 600, PieceMask.of(64, [3, 62]), False, TOC),
        Holding("it", 700, LayoutKind.TOC, 600, PieceMask.full(64), False, Digest.of(b"other")),
        Holding("it", 700, LayoutKind.FIXED, None, PieceMask.full(1), is_whole=True),
    ],
    ids=["without it", "of another table", "never cut so"],
)
@in_virtual_time
async def test_who_cannot_give_a_table_of_contents_is_not_asked_for_it(holding):
    async with cluster(8) as nodes:
        for node in nodes:
            node.restart()
        nodes[3].holdings[CUT.digest] = holding
        assert (await nodes[0].locate(Cut.of_tail(CUT.digest, TOC), [0])).upstream


@in_virtual_time
async def test_in_a_zone_only_its_members_are_asked():
    async with cluster(12, zones="ab") as nodes:
        for node in nodes:
            node.restart()
        in_a = [node for node in nodes if node.zone == "a"]
        coordinator = nodes.coordinators(CUT, zone="a")[0]
        sender = next(node for node in in_a if node is not coordinator)
        key = RegionKey(CUT.digest, CUT.name, 0, "a")
        message = Claims(sender.address, [Claim(key, wanted=1, lease_limit=1)])
        await coordinator.coordination.handle(message)
        asked = {node.address for node in nodes if node.questions}
        assert asked == {node.address for node in in_a if node not in (coordinator, sender)}


@in_virtual_time
async def test_nobody_is_sent_to_a_member_that_has_left():
    async with cluster(8) as nodes:
        _, holder, node = some_nodes(nodes)
        holder.announce(CUT, held=[1])
        await asyncio.sleep(1)
        assert (await node.locate(CUT, [1])).leads
        del nodes.by_address[holder.address]
        nodes.agree()
        if nodes.coordinators(CUT)[0].knowledge.regions:
            await asyncio.sleep(11)
            assert list((await node.locate(CUT, [1])).upstream) == [1]


@in_virtual_time
async def test_a_piece_has_one_lease_though_many_wait_for_one_question():
    async with cluster(8) as nodes:
        coordinator, *_ = some_nodes(nodes)
        mute = nodes.others(*nodes.coordinators(CUT))[-1]
        mute.is_silent = True
        coordinator.restart()
        askers = nodes.others(*nodes.coordinators(CUT), mute)
        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(node.locate(CUT, range(64))) for node in askers]
        leased = [task.result().upstream for task in asked]
        assert sum(map(len, leased)) == 64
        assert coordinator.metrics.leased_pieces._value.get() == 64
        assert coordinator.metrics.coordinated_regions._value.get() == 1


@in_virtual_time
async def test_another_start_is_another_incarnation():
    async with cluster(2) as nodes:
        incarnations = set()
        for _ in range(10):
            nodes[0].restart()
            incarnations.add(nodes[0].coordination.incarnation)
        assert len(incarnations) == 10
