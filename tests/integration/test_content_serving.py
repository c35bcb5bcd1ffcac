"""Whole nodes that are told of a content store: they give what it has, as long as it has it.

The registry counts: what it is not asked for came from the content store.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from p2pcache.core.model import Digest
from tests.fakes import FakeRegistry
from tests.integration.nodes import (
    MIB,
    NAME,
    RunningNode,
    add_lazy_image,
    lazy_layer,
    noise,
    running,
)
from tests.integration.test_content import arrive, file_of, spoil

SIZE = 9 * MIB + 7


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "content"
    (root / "blobs/sha256").mkdir(parents=True)
    (root / "ingest").mkdir()
    return root


async def until_proven(node: RunningNode, count: int) -> None:
    """Wait until so many blobs in the content store are proven."""
    await until_says(node, f"p2pcache_content_blobs {float(count)}")


async def until_says(node: RunningNode, line: str) -> None:
    """Wait until the status page says so."""
    url = f"http://127.0.0.1:{node.node.status.port}/metrics"
    async with asyncio.timeout(20):
        while True:
            async with node.session.get(url) as response:
                if f"\n{line}\n" in await response.text():
                    return


def blob_reads(registry: FakeRegistry, digest: Digest) -> int:
    return len(registry.requests(f"*/blobs/{digest}", "GET"))


async def test_clients_and_peers_read_from_the_content_store(tmp_path, root):
    data = noise(SIZE)
    digest = Digest.of(data)
    async with FakeRegistry() as registry:
        registry.add_image(NAME, "latest", [data])
        async with running(tmp_path / "a", registry, containerd_content=root) as first:
            arrive(root, data)
            await until_proven(first, 1)
            assert await first.read(digest) == data
            assert await first.read(digest, "bytes=1048570-1148569") == data[1048570:1148570]
            async with first.session.head(first.url(f"blobs/{digest}")) as response:
                assert response.headers["Content-Length"] == str(SIZE)
            assert first.node.store.used == 0
            await until_says(first, "p2pcache_coordinated_regions 1.0")  # it has told itself
            async with running(tmp_path / "b", registry, peers=[first.peer_url]) as second:
                assert await second.read(digest) == data
            assert blob_reads(registry, digest) == 0
            assert first.count("peer_served_bytes") == SIZE
            assert first.node.store.used == 0


async def test_a_lazy_layer_is_read_from_the_content_store_in_ranges(tmp_path, root):
    layer = lazy_layer(40 * 70_000)
    async with FakeRegistry() as registry:
        manifest = add_lazy_image(registry, layer)
        async with running(tmp_path / "a", registry, containerd_content=root) as node:
            arrive(root, layer.blob)
            await until_proven(node, 1)
            await node.pull_manifest(manifest)
            for start in range(0, len(layer.blob) - 50_000, 50_000):
                wanted = f"bytes={start}-{start + 49_999}"
                assert await node.read(layer.digest, wanted) == layer.blob[start : start + 50_000]
            assert blob_reads(registry, layer.digest) == 0


async def test_a_lazy_layer_begun_from_elsewhere_goes_on_from_the_content_store(tmp_path, root):
    layer = lazy_layer(40 * 70_000)
    async with FakeRegistry() as registry:
        manifest = add_lazy_image(registry, layer)
        async with running(tmp_path / "a", registry, containerd_content=root) as node:
            await node.pull_manifest(manifest)
            assert await node.read(layer.digest, "bytes=0-99") == layer.blob[:100]
            arrive(root, layer.blob)
            await until_proven(node, 1)
            before = blob_reads(registry, layer.digest)
            assert await node.read(layer.digest) == layer.blob
            assert blob_reads(registry, layer.digest) == before
            file_of(root, layer.blob).unlink()
            await until_proven(node, 0)
            assert await node.read(layer.digest) == layer.blob
            assert await node.read(layer.digest, "bytes=5-1000") == layer.blob[5:1001]


@pytest.mark.parametrize("accident", ["removed", "spoilt"])
@pytest.mark.parametrize("is_read", [False, True])
async def test_a_client_gets_the_right_bytes_whatever_becomes_of_the_file(
    tmp_path, root, accident, is_read
):
    data = noise(SIZE)
    digest = Digest.of(data)
    async with FakeRegistry() as registry:
        registry.add_image(NAME, "latest", [data])
        async with running(tmp_path / "a", registry, containerd_content=root) as node:
            path = arrive(root, data)
            await until_proven(node, 1)
            if is_read:
                assert await node.read(digest) == data
            harm(path, accident)
            assert await node.read(digest) == data
            assert await node.read(digest, f"bytes={8 * MIB}-") == data[8 * MIB :]
            await until_proven(node, 0)
            assert await node.read(digest) == data
            assert blob_reads(registry, digest) > 0


@pytest.mark.parametrize("accident", ["removed", "spoilt"])
async def test_an_answer_that_has_begun_is_finished_right(tmp_path, root, accident):
    data = noise(64 * MIB + 1)
    digest = Digest.of(data)
    async with FakeRegistry() as registry:
        registry.add_image(NAME, "latest", [data])
        async with running(tmp_path / "a", registry, containerd_content=root) as node:
            path = arrive(root, data)
            await until_proven(node, 1)
            # A client that takes little at a time: most of it is not sent yet when it happens.
            async with (
                aiohttp.ClientSession(read_bufsize=1 << 16) as slow,
                slow.get(node.url(f"blobs/{digest}")) as response,
            ):
                got = await response.content.readexactly(2 * MIB)
                harm(path, accident, at=len(data) - 5)
                got += await response.read()
            assert got == data


def harm(path: Path, accident: str, *, at: int = 5) -> None:
    if accident == "removed":
        path.unlink()
    else:
        spoil(path, at)
