"""What a node loses from its store it no longer offers: the coordinators hear of it soon."""

import asyncio
import resource
import time

import pytest

from p2pcache.app import _raise_file_limit
from p2pcache.core.claims import Claim, Claims, Cut, Grant, RegionKey, cut_name
from p2pcache.core.layout import Layout, LayoutKind, PieceState
from p2pcache.core.model import Digest
from p2pcache.peers.client import PeerClient, address_of
from p2pcache.peers.connections import Connections
from p2pcache.store import Store
from tests.fakes import FakeRegistry
from tests.integration.nodes import noise, running

DATA = noise(3 << 20)
DIGEST = Digest.of(DATA)
LAYOUT = Layout.fixed(len(DATA))


@pytest.fixture
async def store(tmp_path):
    async with Store(tmp_path / "store", 64 << 20) as store:
        yield store


async def test_coordinators_hear_soon_that_a_blob_was_forgotten(tmp_path):
    cut = Cut(DIGEST, cut_name(LayoutKind.FIXED, None), LAYOUT.count, passes_on=False)
    claim = Claim(RegionKey(DIGEST, cut.name, 0), wanted=1)
    async with (
        FakeRegistry() as registry,
        running(tmp_path / "a", registry) as a,
        Connections() as connections,
    ):
        coordinator = PeerClient(a.peer_url, connections, None, time.time)  # noqa: TID251

        async def until(named: list[str]) -> None:
            async with asyncio.timeout(5.0):
                while [source.address for source in (await ask()).sources] != named:  # noqa: ASYNC110 - it is asked, and tells nobody
                    await asyncio.sleep(0.01)

        async def ask() -> Grant:
            grants = await coordinator.claim(Claims("127.0.0.1:9", [claim]), 1.0)
            return grants.grants[0]

        registry.add_blob("team/app", DATA)
        assert await a.read(DIGEST) == DATA
        await until([address_of(a.peer_url)])
        await a.node.store.forget(DIGEST)
        await until([])


async def test_the_store_tells_of_what_it_loses(store):
    lost = []
    store.on_change = lambda blob: lost.append((blob.digest, len(blob.held)))
    blob = await store.create(DIGEST, LAYOUT)
    for piece in range(LAYOUT.count):
        part = LAYOUT.range_of(piece)
        await blob.write(piece, DATA[part.start : part.stop], PieceState.HELD_UPSTREAM)
    assert lost == []
    await blob.drop([0])
    assert lost == [(DIGEST, LAYOUT.count - 1)]
    await blob.drop([0])
    assert len(lost) == 1
    await store.forget(DIGEST)
    assert lost[1:] == [(DIGEST, 0)]
    await store.forget(DIGEST)
    assert len(lost) == 2


async def test_the_store_tells_of_what_it_evicts(tmp_path):
    lost = []
    async with Store(tmp_path / "small", 64 << 20, max_blobs=1) as store:
        store.on_change = lambda blob: lost.append(blob.digest)
        await store.create(DIGEST, LAYOUT)
        await store.create(Digest.of(b"other"), Layout.fixed(5))
    assert lost == [DIGEST]


def test_a_node_may_open_as_many_files_as_the_machine_lets_it(caplog):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
    try:
        with caplog.at_level("INFO"):
            _raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert [record.message for record in caplog.records] == ["files.limit"]
