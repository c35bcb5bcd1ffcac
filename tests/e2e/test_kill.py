"""``kill -9`` at any instant: no wrong byte afterwards, and nothing lost that was held."""

import asyncio
import logging
import random
import time
from dataclasses import dataclass

import pytest

from p2pcache.config import process_environment
from p2pcache.core.estargz_writer import TOC_DIGEST_ANNOTATION, Entry, build_layer
from p2pcache.core.layout import PieceMask
from p2pcache.core.model import Digest
from p2pcache.core.wire import decode_holding
from tests.e2e.node_process import NodeProcess, Ports, Wire, ask, start_node
from tests.fakes import FakeRegistry

logger = logging.getLogger(__name__)

ROUNDS = int(process_environment().get("P2PCACHE_KILL_ROUNDS", "20"))

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(60 + 10 * ROUNDS)]

REGISTRY = "registry.test"
NAME = "team/app"
READERS = 4


@dataclass
class Blob:
    data: bytes
    digest: Digest
    held: PieceMask | None = None
    """What the node said that it held, before it was killed."""


@dataclass
class Tally:
    rounds: int = 0
    bytes_compared: int = 0
    wrong: int = 0
    lost_pieces: int = 0
    pieces_held: int = 0
    broken_reads: int = 0


def new_image(registry: FakeRegistry, seed: int) -> list[Blob]:
    """An image of a lazily pullable layer and a plain one, different each time."""
    pick = random.Random(seed)
    layer = build_layer([Entry(f"f{i}", pick.randbytes(100_000)) for i in range(25)])
    plain = pick.randbytes(4 << 20)
    note = {TOC_DIGEST_ANNOTATION: str(layer.toc_digest)}
    registry.add_image(NAME, f"v{seed}", [layer.blob, plain], [note, {}])
    return [Blob(layer.blob, layer.digest), Blob(plain, Digest.of(plain))]


async def note_held(node: NodeProcess, blobs: list[Blob], tally: Tally) -> None:
    """Remember what the node tells its peers; what it held before must be part of it."""
    for blob in blobs:
        got = await ask(node.ports.peers, f"GET /p2p/v1/blobs/{blob.digest}/holding HTTP/1.1")
        held = decode_holding(got.body).held if got.status == 200 else None
        if blob.held is not None:
            if held is not None and held.count != blob.held.count:
                held = PieceMask.full(blob.held.count) if held.is_full else None
            lost = blob.held if held is None else blob.held - held
            tally.lost_pieces += len(lost)
        blob.held = held


async def read_until_cut(node: NodeProcess, blobs: list[Blob], seed: int, tally: Tally) -> None:
    """Read at random, comparing every byte that comes, until the connection breaks."""
    pick = random.Random(seed)
    try:
        async with Wire.to(node.ports.mirror) as wire:
            while True:
                blob = pick.choice(blobs)
                start = pick.randrange(len(blob.data))
                length = pick.choice((1, 50_000, 1_000_000, len(blob.data)))
                wanted = f"Range: bytes={start}-{start + length - 1}"
                if pick.random() < 0.1:
                    start, length, wanted = 0, len(blob.data), "X-Whole: yes"
                path = f"/v2/{NAME}/blobs/{blob.digest}?ns={REGISTRY}"
                wire.send(f"GET {path} HTTP/1.1", wanted)
                head = await wire.head()
                assert head.status in (200, 206)
                left = int(head.headers["content-length"])
                assert left == min(length, len(blob.data) - start)
                while left:
                    block = await wire.reader.read(min(left, 1 << 20))
                    if not block:
                        raise ConnectionResetError
                    tally.bytes_compared += len(block)
                    tally.wrong += block != blob.data[start : start + len(block)]
                    start += len(block)
                    left -= len(block)
    except (ConnectionError, asyncio.IncompleteReadError):
        tally.broken_reads += 1


async def test_a_node_that_is_killed_again_and_again_serves_no_wrong_byte_and_loses_no_piece(
    tmp_path,
):
    tally, pick, ports = Tally(), random.Random(9), Ports.free()
    began = time.monotonic()
    async with FakeRegistry(bytes_per_s=60e6) as registry:
        blobs: list[Blob] = []
        node = await start_node(tmp_path / "node", REGISTRY, registry.url, ports)
        try:
            for number in range(ROUNDS):
                await node.until_ready()
                if number % 5 == 0:
                    blobs = new_image(registry, number)
                    line = f"GET /v2/{NAME}/manifests/v{number}?ns={REGISTRY} HTTP/1.1"
                    assert (await ask(ports.mirror, line)).status == 200
                await note_held(node, blobs, tally)
                async with asyncio.TaskGroup() as readers:
                    for i in range(READERS):
                        seed = number * READERS + i
                        readers.create_task(read_until_cut(node, blobs, seed, tally))
                    await asyncio.sleep(pick.uniform(0.0, 0.15))
                    await note_held(node, blobs, tally)
                    await asyncio.sleep(pick.uniform(0.0, 0.02))
                    await node.kill()
                tally.pieces_held += sum(len(blob.held) for blob in blobs if blob.held)
                tally.rounds += 1
                node = await start_node(tmp_path / "node", REGISTRY, registry.url, ports)
            await node.until_ready()
            await note_held(node, blobs, tally)
            for blob in blobs:
                line = f"GET /v2/{NAME}/blobs/{blob.digest}?ns={REGISTRY} HTTP/1.1"
                assert (await ask(ports.mirror, line)).body == blob.data
        finally:
            if node.process.returncode is None:
                await node.kill()
    logger.info("%s, %.1f s", tally, time.monotonic() - began)
    assert tally.rounds == ROUNDS
    assert tally.wrong == 0
    assert tally.lost_pieces == 0
    assert tally.bytes_compared > 0
    assert node.errors() == []
