"""Upstreams that fail, images that are made to harm, disks that are full, clients that leave."""

import asyncio
import contextlib
import json
import logging
import resource
import socket
from dataclasses import replace

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pcache.core.errors import ConfigError
from p2pcache.core.model import Digest
from p2pcache.core.ranges import ByteRange
from p2pcache.core.wire import decode_holding
from tests.fakes import (
    Answer,
    Chunked,
    Endless,
    FakeRegistry,
    FlipBit,
    Header,
    Hold,
    IgnoreRange,
    Narrow,
    Reset,
    Short,
    Stall,
    Together,
)
from tests.fakes_peer import FakePeer
from tests.integration.nodes import (
    MIB,
    NAME,
    RunningNode,
    add_lazy_image,
    document_of,
    gzip_bomb,
    layout_of,
    lazy_layer,
    noise,
    poisoned,
    running,
    with_toc,
)

LAYER = lazy_layer()
LAYOUT = layout_of(LAYER)
PLAIN = noise(3 * MIB + 17)

# What an upstream may do to an answer and a client must not notice.
PASSING = {
    "another range": Header("Content-Range", "bytes 5-6/7"),
    "another size": Header("Content-Range", f"bytes 0-{len(PLAIN) - 1}/{len(PLAIN) + 1}"),
    "no Content-Range": Header("Content-Range", None),
    "a backward range": Header("Content-Range", "bytes 9-1/420000"),
    "less than asked": Narrow(1000),
    "the whole blob": IgnoreRange(),
    "the whole blob, of no told length": IgnoreRange(chunked=True),
    "a body that ends early": Short(after=40_000),
    "no answer": Short(after=-1),
    "a reset": Reset(after=40_000),
    "a reset at once": Reset(after=-1),
    "silence": Stall(after=40_000),
    "silence at once": Stall(after=-1),
    "more than asked": Chunked(extra=b"more"),
    "no end": Endless(),
    "503": Answer(503),
    "429": Answer(429, {"Retry-After": "0"}),
    "500 in HTML": Answer(500, {"Content-Type": "text/html"}, b"<html>" * 1000),
    "compressed": Header("Content-Encoding", "gzip"),
}


@pytest.fixture
async def registry():
    async with FakeRegistry() as registry:
        yield registry


async def holding(node: RunningNode, digest: Digest):
    """What a node tells its peers that it holds; None if nothing."""
    url = f"{node.peer_url}/p2p/v1/blobs/{digest}/holding"
    async with node.session.get(url) as response:
        return decode_holding(await response.read()) if response.status == 200 else None


def errors(caplog) -> list[str]:
    return [f"{r.name} {r.message}" for r in caplog.records if r.levelno >= logging.ERROR]


# The upstream.


@pytest.mark.parametrize("wanted", [None, "bytes=1000-", "bytes=1000-2500000"])
@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
async def test_a_plain_blob_is_right_whatever_one_answer_of_the_upstream_is(
    tmp_path, registry, fault, wanted, caplog
):
    digest = registry.add_blob(NAME, PLAIN)
    registry.inject(fault, method="GET", path="*/blobs/*")
    async with running(tmp_path / "node", registry) as node:
        body = await node.read(digest, wanted)
        stop = 2_500_001 if wanted and wanted.endswith("0") else len(PLAIN)
        assert body == PLAIN[1000 if wanted else 0 : stop]
        assert await node.read(digest) == PLAIN
    assert errors(caplog) == []


@pytest.mark.parametrize(
    "fault", [*PASSING.values(), FlipBit(at=20_000)], ids=[*PASSING, "a flipped bit"]
)
async def test_a_lazy_layer_is_right_whatever_one_answer_of_the_upstream_is(
    tmp_path, registry, fault, caplog
):
    image = add_lazy_image(registry, LAYER)
    async with running(tmp_path / "node", registry) as node:
        await node.pull_manifest(image)
        await node.read(LAYER.digest, "bytes=0-1")
        registry.inject(fault, method="GET", path="*/blobs/*")
        assert await node.read(LAYER.digest, "bytes=1000-399999") == LAYER.blob[1000:400_000]
        assert await node.read(LAYER.digest) == LAYER.blob
        assert node.count("layout_fallbacks") == 0
    assert errors(caplog) == []


async def test_a_wrong_bit_of_the_upstream_is_never_told_to_peers_and_read_again(
    tmp_path, registry
):
    # Nothing proves a plain blob before its end; then everything does.
    digest = registry.add_blob(NAME, PLAIN)
    registry.inject(FlipBit(at=1_500_000), path="*/blobs/*", method="GET")
    async with running(tmp_path / "node", registry) as node:
        assert await node.read(digest) != PLAIN
        assert await holding(node, digest) is None
        for _ in range(50):  # the check of the whole ends some moment after the last byte
            with contextlib.suppress(aiohttp.ClientError):  # a body that is cut
                got = await node.get(f"blobs/{digest}")
                if got.body == PLAIN:
                    break
        assert await node.read(digest) == PLAIN
        async with asyncio.timeout(10):
            while (held := await holding(node, digest)) is None:
                pass
        assert held.is_whole


async def test_an_upstream_that_is_gone_is_a_quick_error(tmp_path, registry):
    digest = registry.add_blob(NAME, PLAIN)
    registry.inject(Reset(-1), times=None)
    async with running(tmp_path / "node", registry) as node:
        got = await node.get(f"blobs/{digest}", Range="bytes=0-1")
        assert got.status == 503
        assert json.loads(got.body)["errors"][0]["code"] == "BLOB_UNKNOWN"


async def test_what_the_upstream_lacks_is_a_404(tmp_path, registry, caplog):
    async with running(tmp_path / "node", registry) as node:
        digest = Digest.of(b"nobody has this")
        assert (await node.get(f"blobs/{digest}")).status == 404
        assert (await node.get(f"manifests/{digest}")).status == 404
        assert (await node.get("manifests/v9")).status == 404
    assert errors(caplog) == []


# Manifests and tags.


async def test_a_manifest_that_does_not_match_its_digest_is_not_served(tmp_path, registry):
    image = add_lazy_image(registry, LAYER)
    registry.inject(FlipBit(at=5), path="*/manifests/*", times=None)
    async with running(tmp_path / "node", registry) as node:
        assert (await node.get(f"manifests/{image}")).status == 503
        registry.heal()
        got = await node.get(f"manifests/{image}")
        assert Digest.of(got.body) == image


async def test_a_tag_that_was_seen_answers_while_the_upstream_fails(tmp_path, registry, caplog):
    image = add_lazy_image(registry, LAYER)
    async with running(tmp_path / "node", registry) as node:
        first = await node.get("manifests/latest")
        assert (first.status, first.headers["Docker-Content-Digest"]) == (200, str(image))
        registry.inject(Answer(503), times=None)
        again = await node.get("manifests/latest")
        assert (again.status, again.body) == (200, first.body)
        assert node.count("stale_tags", memory="own") == 1
        assert "tag.stale" in caplog.messages


async def test_a_tag_is_remembered_over_a_restart(tmp_path, registry):
    image = add_lazy_image(registry, LAYER)
    async with running(tmp_path / "node", registry) as node:
        await node.get("manifests/latest")
    registry.inject(Reset(-1), times=None)
    async with running(tmp_path / "node", registry) as node:
        got = await node.get("manifests/latest")
        assert (got.status, got.headers["Docker-Content-Digest"]) == (200, str(image))


async def test_a_tag_that_was_seen_too_long_ago_is_an_error(tmp_path, registry):
    add_lazy_image(registry, LAYER)
    async with running(tmp_path / "node", registry, tag_max_age_s=0.0) as node:
        assert (await node.get("manifests/latest")).status == 200
        registry.inject(Answer(503), times=None)
        assert (await node.get("manifests/latest")).status == 503


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_an_upstream_that_denies_a_tag_is_believed(tmp_path, registry, status):
    add_lazy_image(registry, LAYER)
    async with running(tmp_path / "node", registry) as node:
        assert (await node.get("manifests/latest")).status == 200
        registry.inject(Answer(status), path="*/manifests/*", times=None)
        assert (await node.get("manifests/latest")).status == 404


# Tables of contents that are made to harm.


def hostile_layers():
    """Layers whose manifest vouches for a table of contents that is of no use."""
    honest = document_of(LAYER)
    entries = honest["entries"]
    files = [i for i, entry in enumerate(entries) if entry.get("chunkDigest")]

    def changed(i, **changes):
        document = {**honest, "entries": [*entries]}
        document["entries"][files[i]] = {**entries[files[i]], **changes}
        return with_toc(LAYER, json.dumps(document).encode())

    first, third = entries[files[1]]["offset"], entries[files[3]]["offset"]
    yield "not JSON", with_toc(LAYER, b"\x00\xff not JSON")
    yield "deeply nested", with_toc(LAYER, b'{"entries":' + b"[" * 500_000)
    yield (
        "deeply nested xattrs",
        with_toc(
            LAYER, b'{"entries":[{"xattrs":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}]}"
        ),
    )
    yield "many entries", with_toc(LAYER, b'{"entries":[' + b"{}," * 1_100_000 + b"{}]}")
    yield "overlapping chunks", changed(3, offset=first, innerOffset=5)
    yield "a member past the end", changed(3, offset=1 << 40)
    yield "a member in the tail", changed(3, offset=LAYOUT.size - 10)
    yield "a negative offset", changed(3, offset=-5)
    yield "a huge number", changed(3, offset=10**400)
    yield "a huge chunk", changed(3, size=1 << 50, chunkSize=1 << 50)
    yield "no digest", changed(3, chunkDigest="", digest="")
    yield "another digest", changed(3, chunkDigest="md5:" + "0" * 32)
    yield "digests that nothing matches", changed(3, chunkDigest=str(Digest.of(b"other")))
    yield "offsets within a member", changed(3, offset=third + 7)
    bomb = gzip_bomb(2 << 30)
    yield "a bomb", with_toc(LAYER, b"", bomb)
    cut = bomb[: len(bomb) // 2]
    yield "a cut bomb", with_toc(LAYER, b"", cut)
    yield "no gzip", with_toc(LAYER, b"", noise(1000))
    yield "nothing", with_toc(LAYER, b"", b"")
    # The TOC is sound, but not the one that the manifest names.
    yield "another TOC", replace(LAYER, toc_digest=Digest.of(b"another"))


async def test_accidents_in_different_pieces_do_not_cost_a_layer_its_table_of_contents(
    tmp_path, registry
):
    image = add_lazy_image(registry, LAYER)
    async with running(tmp_path / "node", registry) as node:
        await node.pull_manifest(image)
        await node.read(LAYER.digest, "bytes=0-1")
        for wanted, start in (("bytes=100000-100999", 100_000), ("bytes=300000-300999", 300_000)):
            registry.inject(FlipBit(at=5000), method="GET", path="*/blobs/*")
            expected = LAYER.blob[start : start + 1000]
            assert await node.read(LAYER.digest, wanted) == expected
        assert node.count("source_failures", source="upstream", reason="IntegrityError") == 2
        assert node.count("layout_fallbacks") == 0


HOSTILE = dict(hostile_layers())


@pytest.mark.parametrize("layer", HOSTILE.values(), ids=HOSTILE)
async def test_a_layer_with_a_hostile_table_of_contents_is_served_without_it(
    tmp_path, registry, layer, caplog
):
    image = add_lazy_image(registry, layer)
    async with running(tmp_path / "node", registry) as node:
        await node.pull_manifest(image)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wanted = [
            "bytes=0-1",
            "bytes=50000-149999",
            "bytes=200000-419999",
            "bytes=0-9,300000-300009",
        ]
        for text in wanted[:3]:
            first, last = map(int, text.removeprefix("bytes=").split("-"))
            assert await node.read(layer.digest, text) == layer.blob[first : last + 1]
        assert (await node.get(f"blobs/{layer.digest}", Range=wanted[3])).status == 206
        assert await node.read(layer.digest) == layer.blob
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 128 << 10  # KiB
        assert node.count("layout_fallbacks") == 1
        held = await holding(node, layer.digest)
        assert held is None or held.kind.value == "fixed"
    assert errors(caplog) == []


async def test_a_table_of_contents_out_of_order_does_no_harm(tmp_path, registry):
    document = document_of(LAYER)
    document["entries"].reverse()
    layer = with_toc(LAYER, json.dumps(document).encode())
    image = add_lazy_image(registry, layer)
    async with running(tmp_path / "node", registry) as node:
        await node.pull_manifest(image)
        assert await node.read(layer.digest, "bytes=0-399999") == layer.blob[:400_000]
        assert await node.read(layer.digest) == layer.blob


async def test_a_layer_that_lost_its_table_is_read_from_the_upstream_by_the_next_node_too(
    tmp_path, registry
):
    layer = HOSTILE["digests that nothing matches"]
    image = add_lazy_image(registry, layer)
    async with running(tmp_path / "a", registry) as first:
        await first.pull_manifest(image)
        assert await first.read(layer.digest) == layer.blob
        async with running(tmp_path / "b", registry, peers=[first.peer_url]) as second:
            await second.pull_manifest(image)
            assert await second.read(layer.digest, "bytes=0-399999") == layer.blob[:400_000]
            assert await second.read(layer.digest) == layer.blob


# Range headers.


MALFORMED = [
    "bytes=", "bytes=-", "bytes=a-b", "bytes=5-4", "bytes=--5", "bytes=1-2-3", "bytes=0x1-2",
    "bytes=1 -2", "bytes=+1-2", "bytes=1-2;3-4", "bytes", "bytes=,", "bytes=,,,,", "bytes=٣-٤",
    "bytes=" + "9" * 30 + "-", "bytes=0-" + "9" * 30, "bytes=1-2,zz",
    "bytes=" + ",".join(["0-0"] * 257), "bytes=" + "," * 4000, "bytes=0-0" + " " * 4000,
]  # fmt: skip


@pytest.mark.parametrize("header", MALFORMED)
async def test_a_malformed_range_is_refused_or_ignored_and_harms_nobody(
    tmp_path, registry, header, caplog
):
    digest = registry.add_blob(NAME, PLAIN)
    async with running(tmp_path / "node", registry) as node:
        answer = await raw_get(node, digest, header.encode())
        assert answer[0] in (200, 206, 400, 416), answer[1][:200]
        if answer[0] == 200:
            assert answer[1] == PLAIN
        if answer[0] in (400, 416):
            assert json.loads(answer[1])["errors"]
        assert await node.read(digest, "bytes=5-9") == PLAIN[5:10]
    assert errors(caplog) == []


@pytest.mark.parametrize("length", [8_000, 15_900, 16_500, 40_000, 1_000_000])
async def test_a_header_of_any_length_gets_an_answer(tmp_path, registry, length, caplog):
    digest = registry.add_blob(NAME, PLAIN)
    async with running(tmp_path / "node", registry) as node:
        status, _ = await raw_get(node, digest, b"bytes=0-0," + b" " * length + b"5-5")
        assert status in (206, 400)
        assert await node.read(digest, "bytes=5-9") == PLAIN[5:10]
    assert errors(caplog) == []


@pytest.mark.parametrize(
    ("header", "parts"),
    [
        ("bytes=0-0", [(0, 1)]),
        ("bytes=-1", [(len(PLAIN) - 1, len(PLAIN))]),
        ("bytes=0-999999999999", [(0, len(PLAIN))]),
        ("bytes=5-5,0-0,5-5", [(5, 6), (0, 1), (5, 6)]),
        (f"bytes={len(PLAIN)}-,7-8", [(7, 9)]),
        ("bytes=0-1048577, 1048570-2097159 ,-1", None),
    ],
)
async def test_ranges_are_answered_in_order_and_not_merged(tmp_path, registry, header, parts):
    digest = registry.add_blob(NAME, PLAIN)
    parts = parts or [(0, 1_048_578), (1_048_570, 2_097_160), (len(PLAIN) - 1, len(PLAIN))]
    async with running(tmp_path / "node", registry) as node:
        got = await node.get(f"blobs/{digest}", Range=header)
        assert got.status == 206
        assert int(got.headers["Content-Length"]) == len(got.body)
        if len(parts) == 1:
            start, stop = parts[0]
            assert got.body == PLAIN[start:stop]
            assert got.headers["Content-Range"] == ByteRange(start, stop).content_range(len(PLAIN))
        else:
            assert split_multipart(got) == [(r, PLAIN[r[0] : r[1]]) for r in parts]


async def test_256_ranges_are_answered(tmp_path, registry):
    image = add_lazy_image(registry, LAYER)
    parts = [(i * 1600, i * 1600 + 100) for i in range(256)]
    header = "bytes=" + ",".join(f"{start}-{stop - 1}" for start, stop in parts)
    async with running(tmp_path / "node", registry) as node:
        await node.pull_manifest(image)
        got = await node.get(f"blobs/{LAYER.digest}", Range=header)
        assert split_multipart(got) == [(r, LAYER.blob[r[0] : r[1]]) for r in parts]
        for access in registry.requests("*/blobs/*"):
            assert "," not in (access.range or "")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(header=st.text(st.characters(min_codepoint=9, max_codepoint=255), max_size=60))
async def test_any_range_header_gets_an_answer_that_can_be_read(live_node, header):
    node, digest = live_node
    text = b"bytes=" + header.encode("latin-1").replace(b"\r", b"").replace(b"\n", b"")
    status, body = await raw_get(node, digest, text.replace(b"\x00", b""))
    assert status in (200, 206, 400, 416)
    assert body


@pytest.fixture
async def live_node(tmp_path, registry):
    digest = registry.add_blob(NAME, PLAIN[:50_000])
    async with running(tmp_path / "node", registry) as node:
        yield node, digest


async def raw_get(node: RunningNode, digest: Digest, wanted: bytes) -> tuple[int, bytes]:
    """Send a Range header as it is, which no HTTP library would; return status and body."""
    target = node.url(f"blobs/{digest}").removeprefix(node.mirror_url).encode()
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", node.node.clients[0].port)
        try:
            writer.write(
                b"GET " + target + b" HTTP/1.1\r\nHost: mirror\r\nRange: " + wanted + b"\r\n\r\n"
            )
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1])
                for line in head.lower().split(b"\r\n")
                if line.startswith(b"content-length:")
            )
            return int(head.split()[1]), await reader.readexactly(length)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


def split_multipart(got):
    """The parts of a ``multipart/byteranges`` answer, each with its range."""
    kind, _, boundary = got.headers["Content-Type"].partition("; boundary=")
    assert kind == "multipart/byteranges"
    before, *parts, end = (b"\r\n" + got.body).split(b"\r\n--" + boundary.encode())
    assert (before, end) == (b"", b"--\r\n")
    found = []
    for part in parts:
        head, _, data = part.partition(b"\r\n\r\n")
        assert b"Content-Type: application/octet-stream" in head
        span = head.partition(b"Content-Range: bytes ")[2].partition(b"/")[0].split(b"-")
        found.append(((int(span[0]), int(span[1]) + 1), data))
    return found


# A disk without room.


@pytest.mark.parametrize("budget", [1, 70_000, MIB + 5])
async def test_without_room_blobs_are_served_and_not_stored(tmp_path, registry, budget, caplog):
    image = add_lazy_image(registry, LAYER)
    digest = registry.add_blob(NAME, PLAIN)
    async with running(tmp_path / "node", registry, store_size=budget) as node:
        await node.pull_manifest(image)
        for _ in range(2):
            assert await node.read(LAYER.digest, "bytes=0-399999") == LAYER.blob[:400_000]
            assert await node.read(LAYER.digest) == LAYER.blob
            assert await node.read(digest) == PLAIN
            assert await node.read(digest, "bytes=70000-1999999") == PLAIN[70_000:2_000_000]
        assert node.count("unstored_pieces") > 0
        assert node.node.store.used <= budget
    assert errors(caplog) == []


async def test_without_room_what_peers_poisoned_is_still_not_served_to_the_end(tmp_path, registry):
    image = add_lazy_image(registry, LAYER)
    async with FakePeer() as peer:
        peer.hold(LAYER.digest, poisoned(LAYER, 2), LAYOUT)
        async with running(
            tmp_path / "node", registry, peers=[peer.url], store_size=100_000
        ) as node:
            await node.pull_manifest(image)
            assert await node.read(LAYER.digest) == LAYER.blob
            assert await node.read(LAYER.digest, "bytes=0-") == LAYER.blob


# Clients that come in crowds, and that leave.


async def test_twenty_readers_cost_the_upstream_one_blob(tmp_path, registry):
    digest = registry.add_blob(NAME, PLAIN)
    async with running(tmp_path / "node", registry) as node:
        async with asyncio.TaskGroup() as readers:
            reads = [readers.create_task(node.read(digest)) for _ in range(20)]
        assert all(read.result() == PLAIN for read in reads)
        assert sum(a.bytes_sent for a in registry.requests("*/blobs/*", "GET")) == len(PLAIN)


async def test_twenty_lazy_readers_cost_the_upstream_one_layer_and_a_look_at_its_end(
    tmp_path, registry
):
    image = add_lazy_image(registry, LAYER)
    async with running(tmp_path / "node", registry) as node:
        await node.pull_manifest(image)
        registry.clear_log()
        async with asyncio.TaskGroup() as readers:
            for i in range(20):
                text = f"bytes={i * 1000}-{LAYOUT.size - 1 - i}"
                readers.create_task(node.read(LAYER.digest, text))
        assert registry.bytes_sent <= LAYOUT.size + (64 << 10)
        assert await node.read(LAYER.digest) == LAYER.blob
        assert registry.bytes_sent <= LAYOUT.size + (64 << 10)


async def test_a_client_that_leaves_stops_nobody_and_is_no_error(tmp_path, registry, caplog):
    data = noise(6 * MIB)
    digest = registry.add_blob(NAME, data)
    go_on = asyncio.Event()
    registry.inject(Hold(go_on, after=2 * MIB), method="GET", path="*/blobs/*")
    async with running(tmp_path / "node", registry) as node:
        leaving = await node.session.get(node.url(f"blobs/{digest}"))
        await leaving.content.readexactly(100_000)
        async with asyncio.TaskGroup() as others:
            staying = others.create_task(node.read(digest))
            await registry.arrived(1, "*/blobs/*", "GET")
            leaving.close()
            go_on.set()
        assert staying.result() == data
        assert sum(a.bytes_sent for a in registry.requests("*/blobs/*", "GET")) == len(data)
    assert errors(caplog) == []


async def test_what_a_client_left_behind_is_fetched_to_the_end(tmp_path, registry, caplog):
    digest = registry.add_blob(NAME, PLAIN)
    go_on = asyncio.Event()
    registry.inject(Hold(go_on, after=1000), method="GET", path="*/blobs/*")
    async with running(tmp_path / "node", registry) as node:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with asyncio.timeout(0.2):
                await node.read(digest)
        go_on.set()
        assert await node.read(digest) == PLAIN
        assert sum(a.bytes_sent for a in registry.requests("*/blobs/*", "GET")) == len(PLAIN)
    assert errors(caplog) == []


async def test_clients_that_leave_in_every_way_leave_no_trace(tmp_path, registry, caplog):
    digest = registry.add_blob(NAME, PLAIN)
    async with running(tmp_path / "node", registry) as node:
        target = node.url(f"blobs/{digest}").removeprefix(node.mirror_url)
        request = f"GET {target} HTTP/1.1\r\nHost: m\r\n\r\n".encode()
        for sent in (b"", request[:10], request[:-1], request, request * 3, request + b"GET /"):
            for reset in (False, True):
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", node.node.clients[0].port
                )
                writer.write(sent)
                if sent.endswith(b"\r\n\r\n"):
                    await reader.readexactly(100)
                if reset:
                    raw: socket.socket = writer.get_extra_info("socket")
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    writer.transport.abort()
                else:
                    writer.close()
        assert await node.read(digest) == PLAIN
    assert errors(caplog) == []


# Restarts.


async def test_a_restart_keeps_what_was_held(tmp_path, registry):
    image = add_lazy_image(registry, LAYER)
    digest = registry.add_blob(NAME, PLAIN)
    async with running(tmp_path / "node", registry) as node:
        await node.pull_manifest(image)
        await node.read(LAYER.digest, "bytes=100000-199999")
        await node.read(digest)
        await node.read(digest, "bytes=0-")
        before = await holding(node, LAYER.digest)
    registry.inject(Reset(-1), times=None)
    registry.clear_log()
    async with running(tmp_path / "node", registry) as node:
        after = await holding(node, LAYER.digest)
        assert before is not None
        assert after is not None
        assert after.held.bits & before.held.bits == before.held.bits
        assert await node.read(LAYER.digest, "bytes=100000-199999") == LAYER.blob[100_000:200_000]
        assert await node.read(digest) == PLAIN
        assert registry.log == []


async def test_faults_in_a_row_do_not_add_up(tmp_path, registry):
    digest = registry.add_blob(NAME, PLAIN)
    for fault in (Reset(500_000), Short(300_000), Together((Narrow(400_000),)), IgnoreRange()):
        registry.inject(fault, method="GET", path="*/blobs/*")
    async with running(tmp_path / "node", registry) as node:
        assert await node.read(digest) == PLAIN


async def test_strangers_are_not_asked_without_a_secret(tmp_path, registry):
    with pytest.raises(ConfigError, match="--cluster-secret-file"):
        async with running(tmp_path / "node", registry, peers=["http://192.0.2.1:29901"]):
            pass


async def test_a_reader_goes_on_when_its_blob_is_cut_anew_while_it_reads(tmp_path, registry):
    # Asked for by digest alone the layer is cut into fixed pieces; then a manifest tells of its
    # table of contents, and the store begins it anew under the reader's hands.
    layer = lazy_layer(420 * 70_000)
    image = add_lazy_image(registry, layer)
    async with running(tmp_path / "node", registry) as node, asyncio.timeout(60):
        url = node.url(f"blobs/{layer.digest}")
        async with node.session.get(url) as slow:
            first = await slow.content.readexactly(1000)
            await node.pull_manifest(image)
            assert await node.read(layer.digest, "bytes=5000-5999") == layer.blob[5000:6000]
            assert first + await slow.read() == layer.blob
