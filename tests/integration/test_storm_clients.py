"""What clients do, and limits, while all nodes start one image; and layers that lie about in parts.

containerd's early closes, its resumes and its parallel fetch, upload and upstream limits.
"""

import asyncio

import pytest

from tests.integration.nodes import MIB, RunningNode
from tests.integration.storm_lines import REGISTRY_LINE
from tests.integration.storms import AGAIN_WHEN_SLOW, Layer, Storm, storm

pytestmark = [pytest.mark.timeout(120), AGAIN_WHEN_SLOW]

CHUNK = 3 * MIB // 2


async def read_open_ended(node: RunningNode, layer: Layer, start: int, size: int) -> None:
    """Ask for all from *start* on, as containerd does, and close after *size* bytes."""
    size = min(size, len(layer.data) - start)
    url = node.url(f"blobs/{layer.digest}")
    async with node.session.get(url, headers={"Range": f"bytes={start}-"}) as response:
        assert response.status == 206
        assert await response.content.readexactly(size) == layer.data[start : start + size]
        response.close()


async def test_parallel_fetches_with_early_closes_on_all_nodes(tmp_path):
    async with storm(tmp_path, 4) as s:

        async def fetch(node: RunningNode) -> None:
            await node.pull_manifest(s.manifest)
            starts = iter(range(0, len(s.plain.data), CHUNK))

            async def work() -> None:
                for start in starts:
                    await read_open_ended(node, s.plain, start, CHUNK)

            async with asyncio.TaskGroup() as workers:
                for _ in range(3):
                    workers.create_task(work())

        async with asyncio.TaskGroup() as fetches:
            for node in s.nodes:
                fetches.create_task(fetch(node))
        assert s.sent_of(s.plain) < 1.1 * len(s.plain.data)


async def test_clients_that_are_cut_go_on_where_they_were(tmp_path):
    async with storm(tmp_path, 4) as s:

        async def pull(number: int) -> None:
            node, at = s.nodes[number], 0
            await node.pull_manifest(s.manifest)
            while at < len(s.plain.data):
                size = 700_001 + 300_007 * number
                await read_open_ended(node, s.plain, at, size)
                at += size

        async with asyncio.TaskGroup() as pulls:
            for number in range(4):
                pulls.create_task(pull(number))
        assert s.sent_of(s.plain) < 1.1 * len(s.plain.data)


@pytest.mark.parametrize("kind", ["lazy", "plain"])
async def test_a_layer_is_put_together_from_parts_with_the_registry_down(tmp_path, kind):
    async with storm(tmp_path, 4, bytes_per_s=100e6) as s:
        layer: Layer = getattr(s, kind)
        starts = [*layer.layout.starts, len(layer.data)]
        bounds = [starts[len(starts) * third // 3] for third in range(3)] + [len(layer.data)]
        for number in range(4):
            await s.nodes[number].pull_manifest(s.manifest)
        for number in range(3):
            await s.read(s.nodes[number], layer, bounds[number], bounds[number + 1])
        for number in range(4):
            s.net.line(number, REGISTRY_LINE).kill()
        before = s.sent_of(layer)
        async with asyncio.TaskGroup() as pulls:
            for node in s.nodes:
                pulls.create_task(_have_all(s, node, layer))
        assert s.sent_of(layer) == before
        assert before < 1.05 * len(layer.data)
        assert sum(s.count("peer_blames")) == 0


async def _have_all(s: Storm, node: RunningNode, layer: Layer) -> None:
    if layer.toc_digest is None:
        await s.pull(node, layer)
    else:
        await s.run_lazily(node, layer)


@pytest.mark.parametrize("limits", [{"max_uploads": 1}, {"upload_limit": 2_000_000}], ids=str)
async def test_over_its_limits_a_node_sends_askers_elsewhere(tmp_path, limits):
    async with storm(
        tmp_path, 5, lazy_bytes=MIB, plain_bytes=3 * MIB, settings=lambda number: limits
    ) as s:
        async with s.starts():
            pass
        s.check(max_ratio=1.2)
        # A limit on bytes makes askers wait first.
        assert sum(s.count("peer_busy_requests")) > 0 or "upload_limit" in limits
        assert s.refusals == s.cuts == 0


async def test_a_limit_of_its_own_makes_no_node_read_without_a_lease(tmp_path):
    limits = {"upstream_limit": 1_500_000}
    async with storm(tmp_path, 5, bytes_per_s=100e6, settings=lambda number: limits) as s:
        async with s.starts():
            pass
        s.check(max_ratio=1.05)
        assert sum(s.count("unleased_pieces")) == 0
        assert s.refusals == s.cuts == 0
