"""Whole nodes in the test's own process, and the layers that the fault tests serve through them."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import random
import tarfile
import time
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from p2pcache.app import Node, open_node
from p2pcache.config import Address, Config
from p2pcache.core.estargz import TOC_NAME, unpack_toc
from p2pcache.core.estargz_writer import (
    TOC_DIGEST_ANNOTATION,
    BuiltLayer,
    Entry,
    EntryType,
    build_layer,
)
from p2pcache.core.layout import Layout
from p2pcache.core.model import Digest
from p2pcache.core.toc import FOOTER_PROBE_SIZE, find_footer, open_tail
from p2pcache.upstream.endpoint import Patience
from tests.fakes import FakeRegistry

REGISTRY: Final = "registry.test"
NAME: Final = "team/app"
MIB: Final = 1 << 20

# As patient as a node in the field, in what matters here, but in tenths of its seconds.
HASTY: Final = Patience(
    connect_s=2.0, headers_s=0.5, progress_s=0.5, total_s=5.0, pause_s=0.02, retry_after_s=0.1
)


@dataclass(frozen=True, slots=True)
class Got:
    """An answer, read to its end."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


class RunningNode:
    """A node, and a client of its mirror."""

    def __init__(self, node: Node, session: aiohttp.ClientSession) -> None:
        self.node = node
        self.session = session
        self.mirror_url = f"http://127.0.0.1:{node.clients[0].port}"
        self.peer_url = f"http://127.0.0.1:{node.peers.port}"

    def url(self, path: str) -> str:
        """The address of a path below the repository, as containerd spells it."""
        return f"{self.mirror_url}/v2/{NAME}/{path}?ns={REGISTRY}"

    async def get(self, path: str, **headers: str) -> Got:
        """Read an answer to its end. A body that is cut raises `aiohttp.ClientError`."""
        async with self.session.get(self.url(path), headers=headers) as response:
            return Got(response.status, response.headers.copy(), await response.read())

    async def read(self, digest: Digest, wanted: str | None = None) -> bytes:
        """Read a blob, or the range *wanted* of it, which must succeed."""
        got = await self.get(f"blobs/{digest}", **({"Range": wanted} if wanted else {}))
        assert got.status == (206 if wanted else 200), got.body[:300]
        return got.body

    async def pull_manifest(self, digest: Digest) -> None:
        """Have the node read a manifest, and learn from it."""
        got = await self.get(f"manifests/{digest}")
        assert got.status == 200, got.body[:300]

    def count(self, name: str, **labels: str) -> int:
        """The value of a counter, without its prefix and suffix."""
        page = self.node.metrics.render().decode()
        return int(
            sum(
                sample.value
                for family in text_string_to_metric_families(page)
                for sample in family.samples
                if sample.name in (f"p2pcache_{name}_total", f"p2pcache_{name}")
                and labels.items() <= sample.labels.items()
            )
        )


@asynccontextmanager
async def running(
    store: Path,
    registry: FakeRegistry,
    *,
    peers: Sequence[str] = (),
    patience: Patience = HASTY,
    wall_clock: Callable[[], float] = time.time,  # noqa: TID251 - as `open_node` has it
    **settings: Any,
) -> AsyncIterator[RunningNode]:
    """Run a node in front of *registry*, with its pieces in *store*."""
    anywhere = Address("127.0.0.1", 0)
    config = Config(
        **{
            "store": store,
            "store_size": 256 * MIB,
            "mirror_listen": anywhere,
            "peer_listen": anywhere,
            "status_listen": anywhere,
            "node_name": store.name,
            "upstream": {REGISTRY: registry.url},
            "peers": tuple(peers),
            **settings,
        }
    )
    async with (
        open_node(config, patience=patience, wall_clock=wall_clock) as node,
        # Each request on a connection of its own or not: many at once must not wait here.
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=30),
            auto_decompress=False,
        ) as session,
    ):
        async with asyncio.timeout(10):  # who coordinates is settled then
            await node.members.greeted.wait()
        yield RunningNode(node, session)


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes that do not compress, the same each time."""
    return random.Random(seed).randbytes(size)


def lazy_layer(size: int = 6 * 70_000, seed: int = 1) -> BuiltLayer:
    """An eStargz layer of files that do not compress: a piece per 70 000 bytes, and the tail."""
    files = range(size // 70_000)
    data = noise(70_000 * len(files), seed)
    return build_layer(
        [
            Entry("srv", type=EntryType.DIRECTORY, mode=0o755),
            *(Entry(f"srv/{i}", data[i * 70_000 : (i + 1) * 70_000]) for i in files),
        ]
    )


def layout_of(layer: BuiltLayer) -> Layout:
    """The layout that every node cuts *layer* by."""
    size = len(layer.blob)
    start = find_footer(layer.blob[-FOOTER_PROBE_SIZE:], size).tail.start
    return open_tail(layer.blob[start:], size=size, expected=layer.toc_digest).layout()


def document_of(layer: BuiltLayer) -> dict[str, Any]:
    """The table of contents of a gzip *layer*."""
    footer = find_footer(layer.blob[-FOOTER_PROBE_SIZE:], len(layer.blob))
    tail = memoryview(layer.blob)[footer.document.start : footer.document.stop]
    document: dict[str, Any] = json.loads(unpack_toc(tail, 64 * MIB))
    return document


def with_toc(layer: BuiltLayer, document: bytes, tail: bytes | None = None) -> BuiltLayer:
    """A layer like *layer* with another table of contents, or wholly another TOC member *tail*."""
    start = find_footer(layer.blob[-FOOTER_PROBE_SIZE:], len(layer.blob)).tail.start
    if tail is None:
        info = tarfile.TarInfo(TOC_NAME)
        info.size, info.mode = len(document), 0
        file = io.BytesIO(info.tobuf(tarfile.USTAR_FORMAT))
        file.seek(0, 2)
        file.write(document + bytes(-len(document) % 512 + 1024))
        tail = _member(file.getvalue())
    # The footer of eStargz: an empty member whose extra field says where the TOC starts.
    value = b"%016xSTARGZ" % start
    extra = b"SG" + len(value).to_bytes(2, "little") + value
    footer = b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff" + len(extra).to_bytes(2, "little") + extra
    blob = layer.blob[:start] + tail + footer + b"\x01\x00\x00\xff\xff" + bytes(8)
    return BuiltLayer(
        blob,
        Digest.of(blob),
        Digest.of(document),
        layer.diff_id,
        layer.uncompressed_size,
        layer.compression,
    )


def gzip_bomb(size: int) -> bytes:
    """A TOC member that inflates to *size* bytes of an honest header and then blanks."""
    info = tarfile.TarInfo(TOC_NAME)
    info.size, info.mode = size, 0
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    out = [compressor.compress(info.tobuf(tarfile.USTAR_FORMAT))]
    blank = b" " * MIB
    out += [compressor.compress(blank) for _ in range(size // MIB)]
    return b"".join([*out, compressor.flush()])


def poisoned(layer: BuiltLayer, piece: int) -> bytes:
    """The blob with one byte of *piece* changed that no chunk covers: a gzip header's time."""
    blob = bytearray(layer.blob)
    start = layout_of(layer).starts[piece]
    assert blob[start : start + 4] == b"\x1f\x8b\x08\x00"
    blob[start + 4] ^= 1
    return bytes(blob)


def add_lazy_image(registry: FakeRegistry, *layers: BuiltLayer) -> Digest:
    """Store an image of lazily pullable *layers* as ``latest``; return its manifest's digest."""
    notes = [{TOC_DIGEST_ANNOTATION: str(layer.toc_digest)} for layer in layers]
    return registry.add_image(NAME, "latest", [layer.blob for layer in layers], notes)


def _member(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)
