"""Peers that lie, stall, break off or talk nonsense: no client ever notices."""

import logging
import time

import msgspec
import pytest

from p2pcache.core.layout import Layout
from p2pcache.core.model import Digest
from p2pcache.core.wire import TagNews
from p2pcache.peers.client import QUESTION_S
from tests.fakes import (
    OCI_MANIFEST,
    Answer,
    Chunked,
    Endless,
    FakeRegistry,
    Fault,
    FlipBit,
    Header,
    IgnoreRange,
    Narrow,
    Reset,
    Short,
    Stall,
    Together,
)
from tests.fakes_peer import BLOB_BYTES, HOLDING, MANIFEST, TAIL, Body, FakePeer, OtherBytes
from tests.integration.nodes import (
    MIB,
    NAME,
    add_lazy_image,
    layout_of,
    lazy_layer,
    noise,
    poisoned,
    running,
)

LIES = {
    "a flipped bit": FlipBit(at=35_000),
    "another blob's bytes": OtherBytes(),
    "more than asked": Chunked(extra=b"more"),
    "no end": Endless(),
    "another range": Header("Content-Range", "bytes 5-70004/420000"),
    "a backward range": Header("Content-Range", "bytes 9-1/420000"),
    "no Content-Range": Header("Content-Range", None),
    "an unknown size": Header("Content-Range", "bytes 0-69999/*"),
    "another blob's size": Header("Content-Range", "bytes 0-69999/70000"),
    "a part, rightly labelled": Narrow(1000),
}
FAILURES = {
    "the whole blob": IgnoreRange(),
    "not at all": Answer(404),
    "with 416": Answer(416),
    "with 500": Answer(500),
    "with 503": Answer(503, {"Retry-After": "60"}),
    "with a redirect": Answer(307, {"Location": "http://169.254.169.254/"}),
    "refusing us": Answer(401),
    "a short body": Short(after=35_000),
    "a regular end of a short body": Together((Body(b"short"), Header("Content-Length", None))),
    "a reset": Reset(after=35_000),
    "a reset at once": Reset(after=-1),
    "silence at once": Stall(after=-1),
    "silence": Stall(after=35_000),
    "as if compressed": Together((Header("Content-Encoding", "gzip"), Short(after=10))),
}


@pytest.fixture
async def registry():
    async with FakeRegistry() as registry:
        yield registry


@pytest.fixture
async def peer():
    async with FakePeer() as peer:
        yield peer


LAYER = lazy_layer()
LAYOUT = layout_of(LAYER)
# Some bytes of a piece that is large enough for every fault.
WITHIN = "bytes=200000-200099"


def blob_reads(peer: FakePeer) -> int:
    return len(peer.requests(BLOB_BYTES))


# Lazily pulled layers.


async def test_a_node_reads_from_a_peer_and_not_from_the_registry(tmp_path, registry, peer):
    peer.hold(LAYER.digest, LAYER.blob, LAYOUT)
    image = add_lazy_image(registry, LAYER)
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        await node.pull_manifest(image)
        assert await node.read(LAYER.digest, "bytes=100-299999") == LAYER.blob[100:300_000]
        assert registry.requests("*/blobs/*") == []
        assert node.count("peer_blames") == 0


@pytest.mark.parametrize("fault", LIES.values(), ids=LIES)
async def test_a_peer_that_lies_is_blamed_once_and_not_asked_again(
    tmp_path, registry, peer, caplog, fault: Fault
):
    peer.hold(LAYER.digest, LAYER.blob, LAYOUT)
    peer.inject(fault, path=BLOB_BYTES, times=None)
    image = add_lazy_image(registry, LAYER)
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        await node.pull_manifest(image)
        assert await node.read(LAYER.digest, WITHIN) == LAYER.blob[200_000:200_100]
        assert node.count("peer_blames") == 1
        assert "peer.blamed" in caplog.messages
        asked = blob_reads(peer)
        assert asked == 1
        assert await node.read(LAYER.digest, "bytes=0-419999") == LAYER.blob[:420_000]
        assert blob_reads(peer) == asked
        assert node.count("source_failures", source="peer", reason="IntegrityError") == 1


async def test_a_peer_that_drips_is_overtaken(tmp_path, registry, peer):
    peer.hold(LAYER.digest, LAYER.blob, LAYOUT)
    image = add_lazy_image(registry, LAYER)
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        await node.pull_manifest(image)
        await node.read(LAYER.digest, "bytes=0-1")
        peer.bytes_per_s = 2000.0
        began = time.monotonic()
        assert await node.read(LAYER.digest, WITHIN) == LAYER.blob[200_000:200_100]
        # At that rate the piece alone would take longer than a snapshotter waits.
        assert time.monotonic() - began < 10.0
        assert node.count("hedged_reads") >= 1
        assert node.count("peer_blames") == 0


@pytest.mark.parametrize("fault", FAILURES.values(), ids=FAILURES)
async def test_a_peer_that_fails_is_not_blamed_and_costs_little_time(
    tmp_path, registry, peer, fault: Fault
):
    peer.hold(LAYER.digest, LAYER.blob, LAYOUT)
    peer.inject(fault, path=BLOB_BYTES, times=None)
    image = add_lazy_image(registry, LAYER)
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        await node.pull_manifest(image)
        began = time.monotonic()
        assert await node.read(LAYER.digest, "bytes=0-299999") == LAYER.blob[:300_000]
        assert time.monotonic() - began < 3.0
        assert node.count("peer_blames") == 0


@pytest.mark.parametrize("fault", [*LIES.values(), *FAILURES.values()], ids=[*LIES, *FAILURES])
async def test_a_peer_whose_tail_is_wrong_does_not_keep_a_layer_from_opening(
    tmp_path, registry, peer, fault: Fault
):
    peer.hold(LAYER.digest, LAYER.blob, LAYOUT)
    size = len(LAYER.blob) - LAYOUT.starts[-1]
    if isinstance(fault, FlipBit):
        fault = FlipBit(at=size // 2)
    elif isinstance(fault, Short | Reset | Stall) and fault.after > 0:
        fault = type(fault)(size // 2)
    elif isinstance(fault, Narrow):
        fault = Narrow(size // 2)
    peer.inject(fault, path=TAIL, times=None)
    image = add_lazy_image(registry, LAYER)
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        await node.pull_manifest(image)
        began = time.monotonic()
        assert await node.read(LAYER.digest, "bytes=0-299999") == LAYER.blob[:300_000]
        assert time.monotonic() - began < 5.0
        assert node.count("layout_fallbacks") == 0


async def test_one_lying_peer_does_not_hide_an_honest_one(tmp_path, registry, peer):
    peer.hold(LAYER.digest, LAYER.blob, LAYOUT)
    peer.inject(FlipBit(at=1000), path=BLOB_BYTES, times=None)
    image = add_lazy_image(registry, LAYER)
    async with FakePeer("honest") as honest:
        honest.hold(LAYER.digest, LAYER.blob, LAYOUT)
        async with running(tmp_path / "node", registry, peers=[peer.url, honest.url]) as node:
            await node.pull_manifest(image)
            assert await node.read(LAYER.digest, "bytes=0-419999") == LAYER.blob[:420_000]
            assert registry.requests("*/blobs/*") == []
            assert node.count("peer_blames") <= 1


async def test_a_peer_that_claims_pieces_it_lacks_is_asked_no_more_than_it_takes_to_see(
    tmp_path, registry, peer
):
    peer.hold(LAYER.digest, LAYER.blob, LAYOUT)
    peer.inject(Answer(404), path=BLOB_BYTES, times=None)
    image = add_lazy_image(registry, LAYER)
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        await node.pull_manifest(image)
        assert await node.read(LAYER.digest, "bytes=0-419999") == LAYER.blob[:420_000]
        assert blob_reads(peer) <= 1 + LAYOUT.count
        assert node.count("peer_blames") == 0


async def test_a_peer_that_stalls_in_a_body_is_overtaken(tmp_path, registry, peer):
    peer.hold(LAYER.digest, LAYER.blob, LAYOUT)
    tail = f"bytes={LAYOUT.starts[-1]}-{LAYOUT.size - 1}"
    peer.inject(Stall(after=10), path=BLOB_BYTES, when=lambda a: a.range != tail)
    image = add_lazy_image(registry, LAYER)
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        await node.pull_manifest(image)
        began = time.monotonic()
        assert await node.read(LAYER.digest, "bytes=0-99") == LAYER.blob[:100]
        assert time.monotonic() - began < 1.5
        assert node.count("hedged_reads") == 1


# What peers say, rather than what they give.


NONSENSE = {
    "garbage": b"\xc1garbage",
    "nothing": b"",
    "another type": msgspec.msgpack.encode({"held": "all"}),
    "deep nesting": b"\x91" * 100_000,
    "a mask of another length": msgspec.msgpack.encode(["x", 420_000, "toc", 1, 5, b"", False]),
    "a negative size": msgspec.msgpack.encode(["x", -1, "toc", 1, 5, b"\x1f", False]),
    "too many pieces": msgspec.msgpack.encode(["x", 1 << 40, "fixed", None, 1 << 40, b"", True]),
    "an unknown layout": msgspec.msgpack.encode(["x", 420_000, "magic", 1, 5, b"\x1f", False]),
    "a long array": b"\xdd\xff\xff\xff\xff",
    "a long text": b"\x97\xdb\xff\xff\xff\xff",
}  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [*map(Body, NONSENSE.values()), Endless(), Stall(-1), Stall(3), Reset(-1), Short(3),
     Answer(200, {}, bytes(8 * MIB)), Answer(500), Answer(401)],
)  # fmt: skip
async def test_nonsense_about_what_is_held_is_ignored(tmp_path, registry, peer, fault):
    peer.hold(LAYER.digest, LAYER.blob, LAYOUT)
    peer.inject(fault, path=HOLDING, times=None)
    image = add_lazy_image(registry, LAYER)
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        await node.pull_manifest(image)
        began = time.monotonic()
        assert await node.read(LAYER.digest, "bytes=0-299999") == LAYER.blob[:300_000]
        assert time.monotonic() - began < QUESTION_S + 2.0
        assert blob_reads(peer) == 0


async def test_a_peer_with_another_secret_is_not_believed(tmp_path, registry):
    image = add_lazy_image(registry, LAYER)
    async with FakePeer(secret=b"another secret, long enough") as peer:
        peer.hold(LAYER.digest, LAYER.blob, LAYOUT)
        async with running(
            tmp_path / "node", registry, peers=[peer.url], cluster_secret=b"the cluster's secret"
        ) as node:
            await node.pull_manifest(image)
            assert await node.read(LAYER.digest, "bytes=0-299999") == LAYER.blob[:300_000]
            assert blob_reads(peer) == 0


async def test_a_node_gives_nothing_to_a_peer_without_the_secret(tmp_path, registry):
    image = add_lazy_image(registry, LAYER)
    async with running(tmp_path / "a", registry, cluster_secret=b"the cluster's secret") as holder:
        await holder.pull_manifest(image)
        await holder.read(LAYER.digest)
        for secret in (None, b"another secret, long enough"):
            async with running(
                tmp_path / f"b{secret is None}",
                registry,
                peers=[holder.peer_url],
                cluster_secret=secret,
            ) as node:
                await node.pull_manifest(image)
                assert await node.read(LAYER.digest, "bytes=0-99") == LAYER.blob[:100]
                assert node.count("fetched_bytes", source="peer") == 0


async def test_a_peer_that_says_another_size_is_of_no_use(tmp_path, registry, peer):
    other = lazy_layer(140_000, seed=2)
    peer.hold(LAYER.digest, other.blob, layout_of(other), whole=True)
    image = add_lazy_image(registry, LAYER)
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        await node.pull_manifest(image)
        assert await node.read(LAYER.digest, "bytes=0-299999") == LAYER.blob[:300_000]
        assert await node.read(LAYER.digest) == LAYER.blob


async def test_a_size_that_only_a_peer_knows_is_proven_with_the_whole(tmp_path, registry, peer):
    data = noise(3 * MIB)
    digest = Digest.of(data)
    peer.hold(digest, data[:MIB], Layout.fixed(MIB), whole=True)
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        got = await node.get(f"blobs/{digest}")
        assert got.status in (404, 503)
        assert node.count("peer_blames") == 1


@pytest.mark.parametrize(
    "fault",
    [Body(b"{}"), FlipBit(), Endless(), Stall(3), Reset(3), Short(3), Answer(200, {}, bytes(MIB)),
     Answer(302, {"Location": "/elsewhere"})],
)  # fmt: skip
async def test_a_peers_manifest_must_match_its_digest(tmp_path, registry, peer, fault):
    image = add_lazy_image(registry, LAYER)
    data = registry._manifests[NAME, image][1]
    peer.keep_manifest(image, OCI_MANIFEST, data)
    peer.inject(fault, path=MANIFEST, times=None)
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        got = await node.get(f"manifests/{image}")
        assert (got.status, got.body) == (200, data)
        assert got.headers["Content-Type"] == OCI_MANIFEST
        lied = isinstance(fault, Body | FlipBit) or fault == Answer(200, {}, bytes(MIB))
        assert node.count("peer_blames") == lied


async def test_a_manifest_comes_from_a_peer_when_the_registry_is_down(tmp_path, registry, peer):
    image = add_lazy_image(registry, LAYER)
    peer.keep_manifest(image, OCI_MANIFEST, registry._manifests[NAME, image][1])
    registry.inject(Reset(-1), times=None)
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        got = await node.get(f"manifests/{image}")
        assert (got.status, got.headers["Content-Type"]) == (200, OCI_MANIFEST)


@pytest.mark.parametrize("media_type", ["text/html", "", "a/b\x00c", "x" * 5000])
async def test_a_peer_may_not_say_what_type_a_manifest_has(tmp_path, registry, peer, media_type):
    # The bytes are proven by the digest, but not the type; it is in the bytes, too.
    image = add_lazy_image(registry, LAYER)
    peer.keep_manifest(image, media_type.replace("\x00", ""), registry._manifests[NAME, image][1])
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        got = await node.get(f"manifests/{image}")
        assert (got.status, got.headers["Content-Type"]) == (200, OCI_MANIFEST)


# Plain layers.


async def test_a_plain_layer_comes_from_a_peer_with_the_registry_down(tmp_path, registry, peer):
    data = noise(5 * MIB + 17)
    digest = Digest.of(data)
    peer.hold(digest, data, Layout.fixed(len(data)), whole=True)
    registry.inject(Reset(-1), times=None)
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        assert await node.read(digest) == data
        assert node.count("served_bytes", source="upstream") == 0


async def test_a_plain_layer_comes_from_a_real_node_with_the_registry_down(tmp_path, registry):
    data = noise(5 * MIB + 17)
    digest = registry.add_blob(NAME, data)
    async with running(tmp_path / "a", registry) as holder:
        assert await holder.read(digest) == data
        registry.inject(Reset(-1), times=None)
        registry.clear_log()
        async with running(tmp_path / "b", registry, peers=[holder.peer_url]) as node:
            assert await node.read(digest) == data
            assert await node.read(digest, "bytes=5-") == data[5:]
            assert registry.bytes_sent == 0


@pytest.mark.parametrize("wanted", [None, "bytes=0-", "bytes=1048576-2097151"])
@pytest.mark.parametrize("size", [300_000, 6 * MIB])
@pytest.mark.parametrize(
    "fault", [FlipBit(at=77), OtherBytes(), Endless(), Short(20_000), Stall(50)]
)
async def test_a_plain_layer_is_right_whatever_a_peer_gives(
    tmp_path, registry, peer, fault, size, wanted
):
    data = noise(size)
    digest = registry.add_blob(NAME, data)
    peer.hold(digest, data, Layout.fixed(size), whole=True)
    peer.inject(fault, path=BLOB_BYTES, times=None)
    if wanted and wanted.endswith("1") and size < 2 * MIB:
        wanted = "bytes=1000-1999"
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        got = await node.read(digest, wanted)
        first, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
        assert got == data[int(first) : int(last) + 1 if last else size]
        if isinstance(fault, FlipBit | OtherBytes | Endless) and blob_reads(peer):
            assert node.count("peer_blames") == 1
        asked, was_blamed = blob_reads(peer), node.count("peer_blames")
        assert await node.read(digest) == data
        if was_blamed:
            assert blob_reads(peer) == asked


async def test_of_two_peers_the_one_that_lied_is_blamed(tmp_path, registry, peer, caplog):
    data = noise(16 * MIB)
    digest = registry.add_blob(NAME, data)
    peer.hold(digest, data, Layout.fixed(len(data)), whole=True)
    peer.inject(FlipBit(at=77), path=BLOB_BYTES, times=None)
    async with FakePeer("honest") as honest:
        honest.hold(digest, data, Layout.fixed(len(data)), whole=True)
        async with running(tmp_path / "node", registry, peers=[peer.url, honest.url]) as node:
            assert await node.read(digest) == data
            if blob_reads(peer):
                blamed = [r.__dict__["peer"] for r in caplog.records if r.msg == "peer.blamed"]
                assert blamed == [f"peer {peer.address}"]
            asked = blob_reads(peer)
            again = noise(8 * MIB, seed=7)
            other = registry.add_blob(NAME, again)
            peer.hold(other, again, Layout.fixed(len(again)), whole=True)
            assert await node.read(other) == again
            if node.count("peer_blames"):
                assert blob_reads(peer) == asked


# A layer whose chunks are proven and whose bytes are still not the right ones.


@pytest.mark.parametrize("wanted", [None, "bytes=0-", "bytes=70000-"])
async def test_who_reads_to_the_end_gets_no_bit_that_only_chunks_prove(
    tmp_path, registry, peer, wanted, caplog
):
    # The peer's bytes inflate to the right chunks: a lazy client is served, containerd must not be.
    peer.hold(LAYER.digest, poisoned(LAYER, 2), LAYOUT)
    image = add_lazy_image(registry, LAYER)
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        await node.pull_manifest(image)
        lazy = await node.read(LAYER.digest, "bytes=0-299999")
        assert [i for i in range(300_000) if lazy[i] != LAYER.blob[i]] == [LAYOUT.starts[2] + 4]
        got = await node.read(LAYER.digest, wanted)
        start = {None: 0, "bytes=0-": 0, "bytes=70000-": 70_000}[wanted]
        assert got == LAYER.blob[start:]
        assert node.count("peer_blames") == 1
        assert "blob.mismatch" in caplog.messages
        assert await node.read(LAYER.digest, "bytes=0-299999") == LAYER.blob[:300_000]


async def test_what_a_peer_poisoned_is_not_passed_on_as_whole(tmp_path, registry, peer):
    peer.hold(LAYER.digest, poisoned(LAYER, 1), LAYOUT)
    image = add_lazy_image(registry, LAYER)
    async with running(tmp_path / "a", registry, peers=[peer.url]) as middle:
        await middle.pull_manifest(image)
        await middle.read(LAYER.digest, f"bytes=0-{LAYOUT.size - 1}")
        async with running(tmp_path / "b", registry, peers=[middle.peer_url]) as node:
            await node.pull_manifest(image)
            assert await node.read(LAYER.digest) == LAYER.blob


# Tags.


async def test_a_peers_memory_of_a_tag_answers_while_the_registry_fails(tmp_path, registry, peer):
    image = add_lazy_image(registry, LAYER)
    data = registry._manifests[NAME, image][1]
    peer.tag = TagNews(image, OCI_MANIFEST, len(data), age_s=60.0)
    peer.keep_manifest(image, OCI_MANIFEST, data)
    registry.inject(Answer(503), times=None)
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        got = await node.get("manifests/latest")
        assert (got.status, got.body) == (200, data)
        assert node.count("stale_tags", memory="peer") == 1
        async with node.session.head(node.url("manifests/latest")) as head:
            assert (head.status, head.headers["Docker-Content-Digest"]) == (200, str(image))


@pytest.mark.parametrize(
    "news",
    [
        TagNews(LAYER.digest, OCI_MANIFEST, 10, age_s=1e9),
        msgspec.msgpack.encode(["not a digest", "", 1, 1.0]),
        msgspec.msgpack.encode([str(LAYER.digest), "a\r\nX-Evil: 1", 1, 1.0]),
        msgspec.msgpack.encode([str(LAYER.digest), "a/b", 1, -5.0]),
        msgspec.msgpack.encode([str(LAYER.digest), "a/b", 1, float("nan")]),
    ],
    ids=["too old", "no digest", "header injection", "from the future", "no age"],
)
async def test_a_peers_memory_that_is_too_old_or_nonsense_is_an_error(
    tmp_path, registry, peer, news
):
    peer.tag = news if isinstance(news, TagNews) else TagNews(LAYER.digest, "a/b", 1, 1.0)
    if isinstance(news, bytes):
        peer.inject(Body(news), path="*/tags*", times=None)
    registry.inject(Answer(503), times=None)
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        got = await node.get("manifests/latest")
        assert got.status == 503
        assert "X-Evil" not in got.headers


async def test_no_error_is_logged_for_what_a_peer_did(tmp_path, registry, peer, caplog):
    peer.hold(LAYER.digest, LAYER.blob, LAYOUT)
    peer.inject(FlipBit(), path=BLOB_BYTES, times=None)
    image = add_lazy_image(registry, LAYER)
    async with running(tmp_path / "node", registry, peers=[peer.url]) as node:
        await node.pull_manifest(image)
        assert await node.read(LAYER.digest) == LAYER.blob
    assert [r.message for r in caplog.records if r.levelno >= logging.ERROR] == []
