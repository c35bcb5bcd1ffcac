"""Who waits for a whole layer gets a few bytes now and then, so that it goes on waiting."""

from __future__ import annotations

import pytest

from p2pcache.core.layout import Layout
from p2pcache.mirror import reading
from tests.fakes import Answer, FakeRegistry
from tests.fakes_peer import FakePeer
from tests.integration.nodes import MIB, NAME, noise, running

PLAIN = noise(6 * MIB, seed=4)


@pytest.fixture
async def registry():
    async with FakeRegistry() as registry:
        yield registry


async def slow_peer(peer: FakePeer, registry: FakeRegistry):
    digest = registry.add_blob(NAME, PLAIN)
    peer.hold(digest, PLAIN, Layout.fixed(len(PLAIN)), whole=True)
    peer.bytes_per_s = 6.0 * MIB
    return digest


async def test_who_waits_for_the_whole_gets_some_bytes_meanwhile(tmp_path, registry, monkeypatch):
    monkeypatch.setattr(reading, "SIGN_EVERY_S", 0.1)
    async with FakePeer() as peer:
        digest = await slow_peer(peer, registry)
        async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
            assert await node.read(digest) == PLAIN
            signs = registry.requests("*/blobs/*", "GET")
            assert len(signs) >= 2
            assert sum(sign.bytes_sent for sign in signs) == len(signs) * reading.SIGN_BYTES
            assert node.count("served_bytes", source="upstream") == len(signs) * reading.SIGN_BYTES
            stored = node.node.store.find(digest)
            assert stored is not None
            assert stored.is_whole


async def test_a_registry_that_fails_gives_no_sign_and_spoils_nothing(
    tmp_path, registry, monkeypatch
):
    monkeypatch.setattr(reading, "SIGN_EVERY_S", 0.1)
    async with FakePeer() as peer:
        digest = await slow_peer(peer, registry)
        registry.inject(Answer(503), path="*/blobs/*", method="GET", times=None)
        async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
            assert await node.read(digest) == PLAIN
            assert node.count("served_bytes", source="upstream") == 0
