"""What lazy snapshotters and containerd need of a mirror, rule by rule, spoken byte by byte.

The rules are those that stargz-snapshotter 0.12 to 0.18, SOCI, nydus, overlaybd, podman and
containerd were seen to depend on. A real process, a registry in the test.
"""

import asyncio
import contextlib
import random
import socket
import struct
import time
from dataclasses import dataclass

import pytest

from p2pcache.core.estargz_writer import TOC_DIGEST_ANNOTATION, Entry, build_layer
from p2pcache.core.model import Digest
from tests.e2e.node_process import (
    NodeProcess,
    Ports,
    Reply,
    Wire,
    ask,
    node_process,
    start_node,
    until,
)
from tests.fakes import Answer, FakeRegistry, FlipBit, Hold, Reset, Short

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

REGISTRY = "registry.test"
NAME = "team/app"
MIB = 1 << 20

NOISE = random.Random(4).randbytes(12 * MIB)
PLAIN = NOISE[: 9 * MIB + 17]
LAYER = build_layer([Entry(f"f{i}", NOISE[i * 70_000 : (i + 1) * 70_000]) for i in range(30)])
LAZY = LAYER.blob


@dataclass
class Stage:
    registry: FakeRegistry
    node: NodeProcess
    plain: Digest

    @property
    def port(self) -> int:
        return self.node.ports.mirror

    def path(self, digest: Digest) -> str:
        return f"/v2/{NAME}/blobs/{digest}"

    async def containerd(self, digest: Digest, *headers: str, method: str = "GET") -> Reply:
        line = f"{method} {self.path(digest)}?ns={REGISTRY} HTTP/1.1"
        return await ask(self.port, line, "User-Agent: containerd/2.1.9", *headers)

    async def stargz_012(self, digest: Digest, *headers: str, method: str = "GET") -> Reply:
        """No ns, no headers to configure: the listener says which registry is meant."""
        line = f"{method} {self.path(digest)} HTTP/1.1"
        return await ask(self.node.ports.mirror_for, line, "Accept-Encoding: identity", *headers)

    async def stargz_018(self, digest: Digest, *headers: str, method: str = "GET") -> Reply:
        """No ns, but a header that the operator configures."""
        line = f"{method} {self.path(digest)} HTTP/1.1"
        return await ask(self.port, line, f"OCI-Namespace: {REGISTRY}", *headers)

    async def by_digest(self, digest: Digest, *headers: str, method: str = "GET") -> Reply:
        """Says nothing about the registry at all: manifests seen before have to tell."""
        return await ask(self.port, f"{method} {self.path(digest)} HTTP/1.1", *headers)

    @property
    def clients(self):
        return (self.containerd, self.stargz_012, self.stargz_018, self.by_digest)


@pytest.fixture
async def stage(tmp_path):
    async with FakeRegistry(storage=True) as registry:
        plain = registry.add_blob(NAME, PLAIN)
        note = {TOC_DIGEST_ANNOTATION: str(LAYER.toc_digest)}
        registry.add_image(NAME, "latest", [LAZY, PLAIN], [note, {}])
        async with node_process(tmp_path / "node", REGISTRY, registry.url) as node:
            line = f"GET /v2/{NAME}/manifests/latest?ns={REGISTRY} HTTP/1.1"
            assert (await ask(node.ports.mirror, line)).status == 200
            yield Stage(registry, node, plain)


BLOBS = pytest.mark.parametrize("data", [PLAIN, LAZY], ids=["plain", "lazy"])


@BLOBS
async def test_m01_probe_honours_range(stage, data):
    for client in stage.clients:
        got = await client(Digest.of(data), "Range: bytes=0-1")
        assert (got.status, got.body) == (206, data[:2])
        assert got.headers["content-length"] == "2"


@BLOBS
async def test_m02_head_tells_the_exact_length(stage, data):
    for _ in range(2):
        for client in stage.clients:
            got = await client(Digest.of(data), method="HEAD")
            assert (got.status, got.headers["content-length"]) == (200, str(len(data)))
        await stage.containerd(Digest.of(data))


@BLOBS
async def test_m03_content_range_has_a_numeric_total(stage, data):
    for client in stage.clients:
        got = await client(Digest.of(data), "Range: bytes=50000-99999")
        assert got.headers["content-range"] == f"bytes 50000-99999/{len(data)}"


@BLOBS
async def test_m04_a_partial_answer_has_a_content_type(stage, data):
    for client in stage.clients:
        got = await client(Digest.of(data), "Range: bytes=0-1")
        assert got.headers["content-type"] == "application/octet-stream"


@BLOBS
async def test_m05_exactly_the_bytes_asked_for(stage, data):
    size = len(data)
    chunks = [(n, min(n + 50_000, size)) for n in range(0, size, 350_000)]
    for start, stop in [*chunks, (49_999, 50_001), (1, size - 1), (size - 1, size), (0, size)]:
        got = await stage.stargz_018(Digest.of(data), f"Range: bytes={start}-{stop - 1}")
        assert (got.status, got.body) == (206, data[start:stop])
        assert got.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"


def parts_of(got: Reply) -> list[tuple[str, bytes]]:
    kind, _, boundary = got.headers["content-type"].partition("; boundary=")
    assert (got.status, kind) == (206, "multipart/byteranges")
    before, *parts, end = (b"\r\n" + got.body).split(b"\r\n--" + boundary.strip('"').encode())
    assert (before, end) == (b"", b"--\r\n")
    found = []
    for part in parts:
        head, _, body = part.partition(b"\r\n\r\n")
        lines = dict(line.split(": ") for line in head.decode().strip().split("\r\n"))
        assert lines["Content-Type"] == "application/octet-stream"
        found.append((lines["Content-Range"], body))
    return found


MULTI = [(0, 99_999), (150_000, 299_999), (350_000, 499_999), (100_000, 149_999), (5, 6), (5, 6)]
MULTI_HEADER = "Range: bytes=" + ",".join(f"{a}-{b}" for a, b in MULTI)


@BLOBS
async def test_m06_one_part_for_each_range_in_order(stage, data):
    for client in stage.clients:
        got = await client(Digest.of(data), MULTI_HEADER)
        assert parts_of(got) == [
            (f"bytes {a}-{b}/{len(data)}", data[a : b + 1]) for a, b in MULTI
        ]  # podman counts the parts


@BLOBS
async def test_m07_several_ranges_never_go_upstream_as_one_request(stage, data):
    await stage.stargz_012(Digest.of(data), MULTI_HEADER)
    asked = stage.registry.requests("*/blobs/*") + stage.registry.storage.log
    assert [access.range for access in asked if access.method == "GET"]
    assert not [access.range for access in asked if "," in (access.range or "")]


@BLOBS
async def test_m08_no_redirects(stage, data):
    # The registry behind redirects every blob to its storage.
    for headers in ([], ["Range: bytes=0-1"], ["Range: bytes=5-"]):
        got = await stage.containerd(Digest.of(data), *headers)
        assert got.status == (206 if headers else 200)
        assert "location" not in got.headers
    assert stage.registry.storage.log


async def test_m09_what_cannot_be_served_to_its_end_is_a_404_at_once(stage):
    nobody = Digest.of(b"nobody has this")
    for client in stage.clients:
        for headers in (["Range: bytes=0-1"], []):
            assert (await client(nobody, *headers)).status == 404
        assert (await client(nobody, method="HEAD")).status == 404


async def test_m10_no_status_line_before_the_first_bytes_and_no_short_body_after_it(stage):
    go_on = asyncio.Event()
    stage.registry.storage.inject(Hold(go_on), method="GET")
    async with Wire.to(stage.port) as wire:
        wire.send(f"GET {stage.path(stage.plain)}?ns={REGISTRY} HTTP/1.1")
        await stage.registry.storage.arrived(1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await wire.reader.readexactly(1)
        # From here on the source breaks off, twice: the body goes on where it was.
        stage.registry.storage.inject(Reset(2 * MIB), method="GET")
        stage.registry.storage.inject(Short(3 * MIB), method="GET")
        go_on.set()
        got = await wire.reply()
        assert (got.status, got.body == PLAIN) == (200, True)


async def test_m11_a_wrong_byte_of_a_lazy_layer_is_never_served(stage):
    digest = Digest.of(LAZY)
    await stage.stargz_012(digest, "Range: bytes=0-1")
    stage.registry.storage.inject(FlipBit(at=30_000), method="GET")
    got = await stage.stargz_012(digest, "Range: bytes=300000-899999")
    assert got.body == LAZY[300_000:900_000]


async def test_m12_headers_within_three_seconds_and_a_large_body_within_thirty(stage):
    began = time.monotonic()
    async with Wire.to(stage.port) as wire:
        wire.send(f"GET {stage.path(stage.plain)}?ns={REGISTRY} HTTP/1.1", "Range: bytes=0-9437183")
        head = await wire.head()
        assert head.status == 206
        assert time.monotonic() - began < 3.0
        await wire.reader.readexactly(int(head.headers["content-length"]))
        assert time.monotonic() - began < 30.0


async def test_m13_not_having_it_is_said_at_once(stage):
    nobody = Digest.of(b"nobody has this")
    for line in (
        f"GET /v2/{NAME}/blobs/{nobody} HTTP/1.1",
        f"GET /v2/{NAME}/blobs/{nobody}?ns={REGISTRY} HTTP/1.1",
        f"HEAD /v2/{NAME}/manifests/v9?ns={REGISTRY} HTTP/1.1",
    ):
        began = time.monotonic()
        assert (await ask(stage.port, line)).status == 404
        assert time.monotonic() - began < 0.25
    stage.registry.inject(Reset(-1), times=None)
    began = time.monotonic()
    assert (await stage.containerd(nobody, "Range: bytes=0-1")).status == 503
    assert time.monotonic() - began < 3.0


async def test_m14_a_restart_is_not_noticed(stage, tmp_path):
    digest, errors, reads, stop = Digest.of(LAZY), [], [0], asyncio.Event()
    await stage.containerd(digest)

    async def read_all_the_time(seed: int) -> None:
        """As Go's client: a kept connection that ended before any answer is opened anew."""
        pick = random.Random(seed)
        while not stop.is_set():
            async with Wire.to(stage.port) as wire:
                is_fresh = True
                while not stop.is_set():
                    start = pick.randrange(len(LAZY) - 50_000)
                    line = f"GET {stage.path(digest)}?ns={REGISTRY} HTTP/1.1"
                    try:
                        got = await wire.ask(line, f"Range: bytes={start}-{start + 49_999}")
                    except (asyncio.IncompleteReadError, ConnectionError) as error:
                        partial = getattr(error, "partial", b"")
                        if is_fresh or partial:
                            errors.append(repr(error)[:200])
                        break
                    if (got.status, got.body) != (206, LAZY[start : start + 50_000]):
                        errors.append(f"{got.status} {len(got.body)}")
                    is_fresh = False
                    reads[0] += 1

    async with asyncio.TaskGroup() as readers:
        for seed in range(4):
            readers.create_task(read_all_the_time(seed))
        second = await start_node(tmp_path / "node", REGISTRY, stage.registry.url, stage.node.ports)
        try:
            # Both answer on the status port: the new one is up once its own log says so.
            await until(lambda: stage.node.log.read_text().count('"node.ready"') == 2)
            assert await stage.node.stop() == 0
            before = reads[0]
            await until(lambda: reads[0] >= before + 200)
            stage.registry.inject(Reset(-1), times=None)
            assert (await stage.containerd(digest)).body == LAZY
        finally:
            stop.set()
            await second.kill()
    assert errors == []
    assert second.errors() == []


async def test_m15_after_a_reboot_what_is_held_is_served_without_any_upstream(tmp_path):
    ports, digest = Ports.free(), Digest.of(LAZY)
    async with FakeRegistry() as registry:
        note = {TOC_DIGEST_ANNOTATION: str(LAYER.toc_digest)}
        registry.add_image(NAME, "latest", [LAZY], [note])
        upstream = registry.url
        async with node_process(tmp_path / "node", REGISTRY, upstream, ports=ports) as node:
            manifest = f"/v2/{NAME}/manifests/latest?ns={REGISTRY} HTTP/1.1"
            first = await ask(ports.mirror, f"GET {manifest}")
            blob = f"/v2/{NAME}/blobs/{digest} HTTP/1.1"
            assert (await ask(ports.mirror_for, f"GET {blob}", "Range: bytes=0-")).body == LAZY
            assert await node.stop() == 0
    async with node_process(tmp_path / "node", REGISTRY, upstream, ports=ports) as node:
        began = time.monotonic()
        got = await ask(ports.mirror_for, f"GET {blob}", "Range: bytes=0-1")
        assert (got.status, got.body) == (206, LAZY[:2])
        assert (await ask(ports.mirror_for, f"HEAD {blob}")).status == 200
        got = await ask(ports.mirror_for, f"GET {blob}", "Range: bytes=100000-199999")
        assert got.body == LAZY[100_000:200_000]
        assert time.monotonic() - began < 1.0
        assert (await ask(ports.mirror, f"GET {manifest}")).body == first.body


async def test_m16_a_length_on_every_reply_connections_kept_no_encoding(stage):
    accept = "Accept-Encoding: zstd;q=1.0, gzip;q=0.8, deflate;q=0.5"
    lazy, nobody = Digest.of(LAZY), Digest.of(b"nobody has this")
    ns = f"?ns={REGISTRY} HTTP/1.1"
    async with Wire.to(stage.port) as wire:
        for line, *headers in [
            ("GET /v2/ HTTP/1.1",),
            (f"GET /v2/{NAME}/manifests/latest{ns}",),
            (f"HEAD /v2/{NAME}/manifests/latest{ns}",),
            (f"GET /v2/{NAME}/manifests/nothing{ns}",),
            (f"GET /v2/{NAME}/tags/list{ns}",),
            (f"GET /v2/{NAME}/referrers/{lazy}{ns}",),
            (f"HEAD {stage.path(lazy)}{ns}",),
            (f"GET {stage.path(lazy)}{ns}", "Range: bytes=0-1"),
            (f"GET {stage.path(lazy)}{ns}", MULTI_HEADER),
            (f"GET {stage.path(lazy)}{ns}",),
            (f"GET {stage.path(stage.plain)}{ns}", "Range: bytes=5-"),
            (f"GET {stage.path(lazy)}{ns}", "Range: bytes=999999999-"),
            (f"GET {stage.path(lazy)}{ns}", "Range: bytes=nonsense"),
            (f"GET {stage.path(nobody)}{ns}",),
            (f"GET /v2/{NAME}/blobs/sha256:short{ns}",),
            ("GET /elsewhere HTTP/1.1",),
            (f"PUT /v2/{NAME}/manifests/latest{ns}", "Content-Length: 0"),
        ]:
            got = await wire.ask(line, accept, *headers)  # raises if no length is told
            assert "content-encoding" not in got.headers, line
            assert "transfer-encoding" not in got.headers, line
            assert got.headers.get("connection", "keep-alive") == "keep-alive", line


@BLOBS
async def test_m17_ends_of_ranges(stage, data):
    size, digest = len(data), Digest.of(data)
    for header, start, stop in [
        (f"bytes=0-{size + 5}", 0, size),
        (f"bytes={size - 3}-{10**18}", size - 3, size),
        ("bytes=100-", 100, size),
        ("bytes=-100", size - 100, size),
        (f"bytes=-{size + 100}", 0, size),
    ]:
        got = await stage.containerd(digest, f"Range: {header}")
        assert (got.status, got.body == data[start:stop]) == (206, True), header
        assert got.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
    for header in (f"bytes={size}-", f"bytes={size}-{size}", f"bytes={10**18}-", "bytes=-0"):
        got = await stage.containerd(digest, f"Range: {header}")
        assert (got.status, got.headers["content-range"]) == (416, f"bytes */{size}"), header


@BLOBS
async def test_m18_any_single_range_and_clients_that_leave_after_the_headers(stage, data):
    digest, size, pick = Digest.of(data), len(data), random.Random(18)
    for length in (1, 2, 4095, 65_537, 1_000_003, 8_000_000):
        start = pick.randrange(max(1, size - length))
        stop = min(size, start + length)
        got = await stage.by_digest(digest, f"Range: bytes={start}-{stop - 1}")
        assert (got.status, got.body == data[start:stop]) == (206, True)
    for reset in (False, True):
        async with Wire.to(stage.port) as wire:
            wire.send(f"GET {stage.path(digest)} HTTP/1.1")
            assert (await wire.head()).status == 200
            if reset:
                raw: socket.socket = wire.writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                wire.writer.transport.abort()
    assert (await stage.containerd(digest)).body == data
    assert stage.node.errors() == []


async def test_writes_are_refused(stage):
    for method in ("PUT", "POST", "PATCH", "DELETE"):
        line = f"{method} /v2/{NAME}/blobs/uploads/?ns={REGISTRY} HTTP/1.1"
        got = await ask(stage.port, line, "Content-Length: 0")
        assert (got.status, got.headers["allow"]) == (405, "GET, HEAD")


async def test_a_registry_that_answers_429_is_not_passed_on_as_429(stage):
    # containerd would ask the same host six times without a pause.
    stage.registry.inject(Answer(429), times=None)
    stage.registry.storage.inject(Answer(429), times=None)
    with contextlib.suppress(TimeoutError):
        assert (await stage.containerd(Digest.of(b"nobody has this"))).status in (404, 503)
