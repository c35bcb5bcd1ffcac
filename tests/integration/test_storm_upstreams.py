"""An upstream that refuses for a time, and many readers, while all nodes start one image."""

import asyncio

import aiohttp
import pytest

from tests.fakes import Answer
from tests.integration.storms import AGAIN_WHEN_SLOW, Refused, Storm, storm

pytestmark = [pytest.mark.timeout(120), AGAIN_WHEN_SLOW]

REFUSES_S = 3.0
REFUSALS = {
    "429, wait a second": Answer(429, {"Retry-After": "1"}),
    "503": Answer(503),
}


def refuse(s: Storm, answer: Answer, path: str) -> None:
    """From now on, and for a time, every request is refused."""
    s.registry.inject(answer, path=path, times=None)
    asyncio.get_running_loop().call_later(REFUSES_S, s.registry.heal)


@pytest.mark.parametrize("answer", REFUSALS.values(), ids=REFUSALS)
async def test_the_upstream_refuses_in_the_middle(tmp_path, answer):
    async with storm(tmp_path, 4) as s:
        async with s.starts():
            await s.until(s.has_sent(0.4))
            refuse(s, answer, "*/blobs/*")
        s.check()
        assert s.refusals == s.cuts == 0


async def test_the_upstream_refuses_at_the_start(tmp_path):
    """A client that is told so tries the whole start again, as a kubelet does."""
    async with storm(tmp_path, 4) as s:
        refuse(s, Answer(503, {"Retry-After": "1"}), "*")

        async def insist(number: int) -> None:
            async with asyncio.timeout(60):
                while True:
                    try:
                        await s.start(number)
                    except* (Refused, aiohttp.ClientError):
                        await asyncio.sleep(0.5)
                    else:
                        return

        async with asyncio.TaskGroup() as tasks:
            for number in range(4):
                tasks.create_task(insist(number))
        s.check()


async def test_two_hundred_readers_on_one_node(tmp_path):
    async with storm(tmp_path, 4) as s:
        async with s.starts(), asyncio.TaskGroup() as readers:
            await s.nodes[0].pull_manifest(s.manifest)
            for seed in range(200):
                layer = (s.lazy, s.plain)[seed % 2]
                if seed % 20 < 2:
                    readers.create_task(s.pull(s.nodes[0], layer))
                else:
                    readers.create_task(s.read_some(s.nodes[0], layer, seed, reads=10))
        s.check(max_ratio=1.1)
        assert s.refusals == s.cuts == 0
