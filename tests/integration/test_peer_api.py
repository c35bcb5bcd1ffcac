"""The peer API end to end: a real client, HTTP on loopback, a real store, and hostile callers."""

from __future__ import annotations

import asyncio
import io
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from p2pcache.core.claims import (
    Claim,
    Claims,
    Cut,
    Grant,
    Grants,
    RegionKey,
    Source,
    encode_claims,
)
from p2pcache.core.credential import CLOCK_HEADER, REPLY_HEADER, REQUEST_HEADER, prove_request
from p2pcache.core.errors import (
    IntegrityError,
    SourceBusy,
    SourceError,
    SourceLacksBlob,
    SourceRefused,
    SourceUnavailable,
)
from p2pcache.core.layout import Layout, LayoutKind, PieceState
from p2pcache.core.model import Digest, Manifest, Repository, Tag, TagFact
from p2pcache.core.ranges import ByteRange
from p2pcache.core.wire import Hello
from p2pcache.metrics import Metrics
from p2pcache.pacing import Pacer
from p2pcache.peers.client import PeerClient
from p2pcache.peers.connections import Connections
from p2pcache.server.peer_api import MAX_CLAIMS_BODY, PeerApi
from p2pcache.store import Store
from tests.fakes import OCI_MANIFEST, Answer, Endless, Reset, Together
from tests.fakes_peer import FakePeer
from tests.integration.nodes import noise
from tests.timers import HeldTimer

SECRET = b"correct horse battery staple"
NOW = 1.7e9
PIECE = 10_000
COUNT = 12
DATA = noise(PIECE * COUNT)
DIGEST = Digest.of(DATA)
TOC = Digest.of(b"the table of contents")
LAYOUT = Layout(LayoutKind.TOC, len(DATA), array("Q", range(0, len(DATA), PIECE)))
CUT = Cut(DIGEST, "toc a/b?c=ä", COUNT, passes_on=True)
SMALL_MANIFEST = b'{"schemaVersion": 2}'


def bytes_of(first: int, last: int) -> bytes:
    return DATA[first * PIECE : (last + 1) * PIECE]


def span(first: int, last: int) -> ByteRange:
    return LAYOUT.span(range(first, last + 1))


@dataclass
class Giving:
    """What is on its way to a node: a test says when it comes, or that it does not."""

    cut: str = CUT.name
    promised: set[int] = field(default_factory=set)
    coming: dict[int, asyncio.Future[bytes | None]] = field(default_factory=dict)
    asked: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    toc: asyncio.Future[bytes | None] | None = None
    manifests: asyncio.Future[Manifest | None] | None = None

    def promise(self, *pieces: int) -> None:
        self.promised |= set(pieces)
        for piece in pieces:
            self.coming[piece] = asyncio.get_running_loop().create_future()

    def arrive(self, *pieces: int) -> None:
        for piece in pieces:
            self.coming[piece].set_result(bytes_of(piece, piece))

    def will_give(self, digest: Digest, cut: str, pieces: range) -> bool:
        return digest == DIGEST and cut == self.cut and self.promised.issuperset(pieces)

    async def piece(self, digest: Digest, cut: str, piece: int) -> bytes | None:
        assert (digest, cut) == (DIGEST, self.cut)
        self.asked.put_nowait(piece)
        return await asyncio.shield(self.coming[piece])

    async def tail(self, digest: Digest, toc_digest: Digest) -> bytes | None:
        self.asked.put_nowait(toc_digest)
        return None if self.toc is None else await asyncio.shield(self.toc)

    async def manifest(self, digest: Digest) -> Manifest | None:
        self.asked.put_nowait(digest)
        return None if self.manifests is None else await asyncio.shield(self.manifests)


class Coordinating:
    """A coordinator that tells what it was asked, and says what a test wants it to say."""

    def __init__(self) -> None:
        self.heard: list[Claims] = []
        self.answer: Callable[[Claims], Awaitable[Grants]] = self.one_each

    async def one_each(self, message: Claims) -> Grants:
        source = Source("10.0.0.1:1", 2, 3)
        return Grants("incarnation", tuple(Grant(1, (source,), 0.5) for _ in message.claims))

    async def handle(self, message: Claims) -> Grants:
        self.heard.append(message)
        return await self.answer(message)


@dataclass
class Setup:
    """A node's peer listener, and another node's client of it. Their clocks are the test's."""

    store: Store
    giving: Giving
    coordinating: Coordinating
    metrics: Metrics
    session: aiohttp.ClientSession
    connections: Connections
    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    there: float = NOW
    here: float = NOW

    def client(self, secret: bytes | None = SECRET) -> PeerClient:
        return PeerClient(self.url, self.connections, secret, lambda: self.here)

    def proof(self, method: str, target: str, body: bytes = b"") -> dict[str, str]:
        return {REQUEST_HEADER: prove_request(SECRET, method, target, "", body, now=self.there)}

    def busy(self) -> float:
        return float(self.metrics.peer_busy._value.get())


@asynccontextmanager
async def listening(tmp_path, **settings: Any) -> AsyncIterator[Setup]:
    async with (
        Store(tmp_path / "store", 64 << 20) as store,
        aiohttp.ClientSession() as session,
        Connections() as connections,
    ):
        setup = Setup(store, Giving(), Coordinating(), Metrics(), session, connections)
        options: dict[str, Any] = {
            "giver": setup.giving,
            "coordination": setup.coordinating,
            "hello": lambda: Hello("node/1", "zone", "127.0.0.1:9"),
        } | settings
        api = PeerApi(
            "node/1", store, store.memory, setup.metrics, SECRET, now=lambda: setup.there, **options
        )

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            setup.requests.append((request.method, request.path_qs))
            return await api.handle(request)

        server = web.Server(handle, access_log=None, handler_cancellation=True)
        runner = web.ServerRunner(server, shutdown_timeout=0.0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        setup.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield setup
        finally:
            await runner.cleanup()


@pytest.fixture
async def setup(tmp_path):
    async with listening(tmp_path) as setup:
        yield setup


async def hold(setup: Setup, *pieces: int, state: PieceState = PieceState.HELD_UPSTREAM) -> None:
    blob = await setup.store.create(DIGEST, LAYOUT, toc_digest=TOC)
    with blob.reading():
        for piece in pieces:
            await blob.write(piece, bytes_of(piece, piece), state)


async def read(peer: PeerClient, part: ByteRange, cut: Cut | None = None) -> bytes:
    got = b""
    async with aclosing(peer.read(DIGEST, part, cut=cut)) as blocks:
        async for block in blocks:
            got += block
    return got


def claims(count: int = 1, sender: str = "10.0.0.2:1") -> Claims:
    keys = [RegionKey(DIGEST, "toc", index) for index in range(count)]
    return Claims(sender, tuple(Claim(key, held=1, wanted=6, lease_limit=2) for key in keys))


# Claims.


async def test_claims_go_there_and_grants_come_back(setup):
    grants = await setup.client().claim(claims(3), 5.0)
    assert setup.coordinating.heard == [claims(3)]
    assert grants.incarnation == "incarnation"
    assert grants.grants == (Grant(1, (Source("10.0.0.1:1", 2, 3),), 0.5),) * 3
    assert setup.requests == [("POST", "/p2p/v1/claims")]


async def test_claims_with_another_secret_reach_no_coordinator(setup):
    with pytest.raises(SourceRefused):
        await setup.client(b"another secret, long enough").claim(claims(), 5.0)
    with pytest.raises(SourceRefused):
        await setup.client(None).claim(claims(), 5.0)
    assert setup.coordinating.heard == []


async def test_claims_cannot_be_changed_on_their_way(setup):
    url, target = f"{setup.url}/p2p/v1/claims", "/p2p/v1/claims"
    body, other = encode_claims(claims()), encode_claims(claims(sender="10.6.6.6:1"))
    assert len(body) == len(other)
    right = setup.proof("POST", target, body)
    without = setup.proof("POST", target)
    moved = {REQUEST_HEADER: without[REQUEST_HEADER] + right[REQUEST_HEADER][-65:]}
    for proof, sent in [(right, other), (right, b""), (without, other), (moved, body)]:
        async with setup.session.post(url, data=sent, headers=proof) as response:
            assert response.status in (400, 401), (proof, sent)
            assert CLOCK_HEADER not in response.headers
    assert setup.coordinating.heard == []
    async with setup.session.post(url, data=body, headers=right) as response:
        assert (response.status, REPLY_HEADER in response.headers) == (200, True)


@pytest.mark.parametrize("body", [b"\xc1", b"\x93", b"x" * 100, encode_claims(claims()) + b"\0"])
async def test_nonsense_instead_of_claims_is_refused(setup, body):
    proof = setup.proof("POST", "/p2p/v1/claims", body)
    url = f"{setup.url}/p2p/v1/claims"
    async with setup.session.post(url, data=body, headers=proof) as response:
        assert response.status == 400
    assert setup.coordinating.heard == []


async def test_a_body_that_is_too_large_or_of_unknown_size_is_not_read(setup):
    body = bytes(MAX_CLAIMS_BODY + 1)
    url = f"{setup.url}/p2p/v1/claims"
    proof = setup.proof("POST", "/p2p/v1/claims", body)
    async with setup.session.post(url, data=io.BytesIO(body), headers=proof) as response:
        assert response.status == 413

    async def blocks():
        yield body[:10]

    async with setup.session.post(url, data=blocks(), headers=proof) as response:
        assert response.status == 411


async def test_an_answer_with_too_few_grants_is_none(setup):
    async def none(message: Claims) -> Grants:
        return Grants("x")

    setup.coordinating.answer = none
    with pytest.raises(SourceUnavailable, match="0 grants for 2 claims"):
        await setup.client().claim(claims(2), 5.0)


async def test_a_coordinator_that_does_not_answer_is_given_up_in_time(setup):
    async def never(message: Claims) -> Grants:
        await asyncio.Event().wait()
        return Grants("never")

    setup.coordinating.answer = never
    with pytest.raises(SourceUnavailable, match=r"no answer within 0\.05 s"):
        await setup.client().claim(claims(), 0.05)
    # Who is more patient is told.
    with pytest.raises(SourceBusy):
        await setup.client().claim(claims(), 10.0)


async def test_an_older_version_refuses_claims_and_says_no_hello(setup):
    async with FakePeer() as old:
        peer = PeerClient(old.url, setup.connections, None, lambda: NOW)
        with pytest.raises(SourceRefused, match="older version"):
            await peer.claim(claims(), 5.0)
        assert await peer.hello() is None
        assert await peer.tail(DIGEST, TOC) is None


async def test_claims_are_sent_again_when_an_idle_connection_was_just_closed(setup):
    async with FakePeer() as old:
        old.inject(Reset(-1))
        peer = PeerClient(old.url, setup.connections, None, lambda: NOW)
        with pytest.raises(SourceRefused, match="older version"):
            await peer.claim(claims(), 5.0)
        old.inject(Reset(-1), times=2)
        with pytest.raises(SourceUnavailable):
            await peer.claim(claims(), 5.0)
        assert len(old.requests("*/claims", "POST")) == 4


async def test_an_answer_that_proves_nothing_is_not_believed(setup):
    async with FakePeer(secret=b"another secret, long enough") as liar:
        liar.hold(DIGEST, DATA, LAYOUT)
        peer = PeerClient(liar.url, setup.connections, SECRET, lambda: NOW)
        with pytest.raises(SourceRefused, match="does not prove"):
            await peer.holding(DIGEST)


# Who is there, and what is asked in other words.


async def test_a_node_says_who_it_is(setup):
    assert await setup.client().hello() == Hello("node/1", "zone", "127.0.0.1:9")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("HEAD", f"blobs/{DIGEST}", 405),
        ("PUT", f"blobs/{DIGEST}", 405),
        ("POST", "hello", 405),
        ("GET", "claims", 405),
        ("DELETE", "claims", 405),
        ("GET", "nothing", 404),
        ("GET", "blobs/sha256:x", 400),
        ("GET", f"blobs/{DIGEST}/tail", 400),
        ("GET", f"blobs/{DIGEST}/tail?toc=x", 400),
        ("GET", f"blobs/{DIGEST}?cut=x", 404),
        ("GET", "../v2/hello", 404),
    ],
)
async def test_what_is_not_spoken_is_refused_politely(setup, method, path, status):
    target = f"/p2p/v1/{path}" if not path.startswith("..") else "/p2p/v2/hello"
    proof = setup.proof(method, target)
    async with setup.session.request(method, setup.url + target, headers=proof) as response:
        assert response.status == status
        assert ("Allow" in response.headers) == (status == 405)


async def test_a_node_without_these_parts_says_so(tmp_path):
    async with listening(tmp_path, giver=None, coordination=None, hello=None) as setup:
        peer = setup.client()
        with pytest.raises(SourceRefused):
            await peer.claim(claims(), 5.0)
        assert await peer.hello() is None
        assert await peer.tail(DIGEST, TOC) is None
        assert await peer.manifest(DIGEST) is None
        await hold(setup, 0)
        assert await read(peer, span(0, 0), CUT) == bytes_of(0, 0)
        with pytest.raises(SourceLacksBlob):
            await read(peer, span(0, 1), CUT)


async def test_small_questions_are_answered(setup):
    peer = setup.client()
    assert await peer.holding(DIGEST) is None
    await hold(setup, 1, 2)
    holding = await peer.holding(DIGEST)
    assert holding is not None
    assert (holding.node, list(holding.held), holding.toc_digest) == ("node/1", [1, 2], TOC)
    repository, tag = Repository("docker.io", "library/alpine"), Tag.parse("latest")
    assert await peer.tag(repository, tag) is None
    await setup.store.memory.put_tag(repository, tag, TagFact(DIGEST, "a/b", 7, NOW - 60))
    news = await peer.tag(repository, tag)
    assert news is not None
    assert (news.digest, news.size, news.age_s) == (DIGEST, 7, 60.0)


@pytest.mark.parametrize(
    ("wanted", "status"),
    [
        ("bytes=120000-", 416),
        ("bytes=0-1,5-6", 400),
        ("bytes=9-1", 400),
        ("lines=1-2", 400),
        ("bytes=0-9", 206),
    ],
)
async def test_one_range_within_the_blob_is_given(setup, wanted, status):
    await hold(setup, 0)
    target = f"/p2p/v1/blobs/{DIGEST}?cut=x"
    headers = {
        "Range": wanted,
        REQUEST_HEADER: prove_request(SECRET, "GET", target, wanted, now=NOW),
    }
    async with setup.session.get(setup.url + target, headers=headers) as response:
        assert response.status == status
    long = f"/p2p/v1/blobs/{DIGEST}?cut={'x' * 256}"
    headers["Range"] = "bytes=10000-10001"
    headers[REQUEST_HEADER] = prove_request(SECRET, "GET", long, headers["Range"], now=NOW)
    async with setup.session.get(setup.url + long, headers=headers) as response:
        assert response.status == 400


async def test_a_blob_that_was_dropped_while_it_was_waited_for_is_cut_or_refused(setup):
    blob = await setup.store.create(DIGEST, LAYOUT, toc_digest=TOC)
    await hold(setup, 0, 2)
    setup.giving.promise(1)
    async with aclosing(setup.client().read(DIGEST, span(0, 2), cut=CUT)) as blocks:
        assert await anext(blocks) == bytes_of(0, 0)
        await blob.drop([2])
        setup.giving.promise(2)
        setup.giving.coming[2].set_result(None)
        setup.giving.arrive(1)
        with pytest.raises(SourceUnavailable):
            async for _ in blocks:
                pass


# Clocks.


@pytest.mark.parametrize("off", [3600.0, -3600.0, 86400.0, -NOW, 601.0])
async def test_nodes_with_other_clocks_share_after_one_more_request(setup, off):
    setup.here = NOW + off
    peer = setup.client()
    await hold(setup, 0, 1)
    assert await read(peer, span(0, 1)) == bytes_of(0, 1)
    assert len(setup.requests) == 2
    assert (await peer.claim(claims(), 5.0)).grants
    assert (await peer.hello()) is not None
    assert len(setup.requests) == 4
    # Somebody sets the clock right.
    setup.here = NOW
    assert (await peer.claim(claims(), 5.0)).grants
    assert len(setup.requests) == (5 if abs(off) < 600 else 6)


async def test_a_replayed_request_is_refused_when_its_time_is_over(setup):
    target = f"/p2p/v1/blobs/{DIGEST}/holding"
    await hold(setup, 0)
    proof = setup.proof("GET", target)
    for later, status in [(0.0, 200), (599.0, 200), (601.0, 401), (3600.0, 401), (-601.0, 401)]:
        setup.there = NOW + later
        async with setup.session.get(setup.url + target, headers=proof) as response:
            assert response.status == status, later


@pytest.mark.parametrize("clock", ["", "v1 1700003600 " + "0" * 64, "v1 1700003600"])
async def test_nobody_without_the_secret_moves_a_clock(setup, clock):
    async with FakePeer(secret=SECRET) as host:
        host.hold(DIGEST, DATA, LAYOUT)
        host.inject(Answer(401, {CLOCK_HEADER: clock}))
        peer = PeerClient(host.url, setup.connections, SECRET, lambda: NOW)
        with pytest.raises(SourceRefused):
            await peer.holding(DIGEST)
        assert len(host.log) == 1
        assert await peer.holding(DIGEST) is not None
        assert host.log[-1].headers[REQUEST_HEADER].split(" ")[1] == str(int(NOW))


async def test_a_clock_told_to_another_request_moves_none(setup):
    # An answer that was overheard, hours ago, is shown to another node.
    setup.here = NOW + 3600
    target = f"/p2p/v1/blobs/{DIGEST}/holding"
    proof = {REQUEST_HEADER: prove_request(SECRET, "GET", target, "", now=NOW + 3600)}
    async with setup.session.get(setup.url + target, headers=proof) as response:
        clock = response.headers[CLOCK_HEADER]
    async with FakePeer(secret=SECRET) as host:
        host.inject(Answer(401, {CLOCK_HEADER: clock}), times=None)
        peer = PeerClient(host.url, setup.connections, SECRET, lambda: NOW + 7200)
        with pytest.raises(SourceRefused):
            await peer.holding(DIGEST)
        assert len(host.log) == 1


async def test_a_node_that_keeps_telling_another_time_is_asked_twice_at_most(setup):
    peer = setup.client()
    ticks = iter(range(1, 100))

    class Jumping(Setup):
        @property
        def there(self) -> float:
            return NOW + 10_000 * next(ticks)

        @there.setter
        def there(self, value: float) -> None:
            pass

    setup.__class__ = Jumping
    with pytest.raises(SourceRefused):
        await peer.hello()
    assert len(setup.requests) == 2


# What is held, and what is on its way.


async def test_held_bytes_are_given(setup):
    await hold(setup, *range(COUNT))
    peer = setup.client()
    for part in [ByteRange(0, 1), span(3, 3), ByteRange(5, 119_000), span(0, COUNT - 1)]:
        for cut in (None, CUT):
            assert await read(peer, part, cut) == DATA[part.start : part.stop]
    assert setup.giving.asked.empty()
    assert setup.metrics.peer_served_bytes._value.get() == 2 * (1 + PIECE + 118_995 + len(DATA))


@pytest.mark.parametrize("state", [PieceState.STAGED_PEER, PieceState.STAGED_UPSTREAM])
async def test_what_is_not_proven_is_given_by_the_giver_alone(setup, state):
    await hold(setup, 0, state=state)
    peer = setup.client()
    for cut in (None, CUT):
        with pytest.raises(SourceLacksBlob):
            await read(peer, span(0, 0), cut)
    setup.giving.promise(0)
    setup.giving.arrive(0)
    with pytest.raises(SourceLacksBlob):
        await read(peer, span(0, 0))
    assert await read(peer, span(0, 0), CUT) == bytes_of(0, 0)


async def test_an_answer_waits_for_what_is_on_its_way(setup):
    await hold(setup, 1)
    giving = setup.giving
    giving.promise(0, 2, 3)
    part = ByteRange(100, span(0, 3).stop - 100)
    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(read(setup.client(), part, CUT))
        for piece in (0, 2, 3):
            assert await giving.asked.get() == piece
            assert not reading.done()
            giving.arrive(piece)
    assert reading.result() == DATA[part.start : part.stop]


async def test_bytes_flow_on_before_the_last_piece_is_there(setup):
    await hold(setup)
    setup.giving.promise(0, 1)
    setup.giving.arrive(0)
    got = b""
    async with aclosing(setup.client().read(DIGEST, span(0, 1), cut=CUT)) as blocks:
        async for block in blocks:
            got += block
            if len(got) == PIECE:
                setup.giving.arrive(1)
    assert got == bytes_of(0, 1)


async def test_a_first_piece_that_does_not_come_is_a_plain_no(setup):
    await hold(setup)
    setup.giving.promise(0, 1)
    setup.giving.coming[0].set_result(None)
    with pytest.raises(SourceLacksBlob):
        await read(setup.client(), span(0, 1), CUT)


async def test_an_answer_is_cut_when_a_later_piece_does_not_come(setup, caplog):
    caplog.set_level("INFO")
    await hold(setup)
    setup.giving.promise(0, 1)
    setup.giving.arrive(0)
    setup.giving.coming[1].set_result(None)
    with pytest.raises(SourceUnavailable):
        await read(setup.client(), span(0, 1), CUT)
    assert "upload.cut" in caplog.messages


async def test_a_piece_that_became_held_while_it_was_waited_for_is_read_from_the_store(setup):
    await hold(setup)
    setup.giving.promise(0)
    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(read(setup.client(), span(0, 0), CUT))
        await setup.giving.asked.get()
        await hold(setup, 0)
        setup.giving.coming[0].set_result(None)
    assert reading.result() == bytes_of(0, 0)


async def test_a_piece_of_another_size_is_never_given(setup):
    await hold(setup)
    setup.giving.promise(0)
    setup.giving.coming[0].set_result(bytes(PIECE + 1))
    with pytest.raises(SourceLacksBlob):
        await read(setup.client(), span(0, 0), CUT)


async def test_a_node_does_not_wait_for_what_it_is_not_fetching(setup):
    await hold(setup, 1)
    setup.giving.promise(0)
    peer = setup.client()
    other = Cut(DIGEST, "another", COUNT, passes_on=True)
    for part, cut in [(span(0, 0), other), (span(0, 2), CUT), (span(0, 0), None)]:
        with pytest.raises(SourceLacksBlob):
            await read(peer, part, cut)
    assert setup.giving.asked.empty()


async def test_who_leaves_while_waiting_is_waited_for_no_more(tmp_path):
    async with listening(tmp_path, max_waiting=1) as setup:
        await hold(setup)
        setup.giving.promise(0)
        peer = setup.client()
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(read(peer, span(0, 0), CUT))
            await setup.giving.asked.get()
            first.cancel()
        async with asyncio.timeout(3.0), asyncio.TaskGroup() as tasks:
            second = tasks.create_task(patient(read, peer, span(0, 0), CUT))
            await setup.giving.asked.get()
            setup.giving.arrive(0)
        assert second.result() == bytes_of(0, 0)


async def patient(ask: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
    """Ask again as long as the answer is that there are too many."""
    while True:
        try:
            return await ask(*arguments)
        except SourceBusy:
            await asyncio.sleep(0)


# Limits.


async def test_a_node_over_its_limit_of_waiting_requests_says_so_at_once(tmp_path):
    async with listening(tmp_path, max_waiting=2) as setup:
        await hold(setup, 5)
        giving = setup.giving
        giving.promise(0)
        loop = asyncio.get_running_loop()
        giving.toc, giving.manifests = loop.create_future(), loop.create_future()
        peer = setup.client()
        digest = Digest.of(SMALL_MANIFEST)
        manifest = Manifest(digest, OCI_MANIFEST, SMALL_MANIFEST)
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(peer.tail(DIGEST, TOC))
            await giving.asked.get()
            also = tasks.create_task(peer.manifest(digest))
            await giving.asked.get()
            for ask in (
                peer.tail(DIGEST, TOC),
                peer.manifest(digest),
                read(peer, span(0, 0), CUT),
            ):
                with pytest.raises(SourceBusy) as caught:
                    await ask
                assert caught.value.retry_after_s == 0.0
            assert setup.busy() == 3
            # What need not wait is given.
            assert await read(peer, span(5, 5), CUT) == bytes_of(5, 5)
            giving.toc.set_result(b"the tail")
            giving.manifests.set_result(manifest)
        assert waiting.result() == b"the tail"
        assert also.result() == manifest
        giving.arrive(0)
        assert await read(peer, span(0, 0), CUT) == bytes_of(0, 0)


async def test_a_node_over_its_limit_of_uploads_says_so_at_once(tmp_path):
    async with listening(tmp_path, max_uploads=1) as setup:
        await hold(setup, *range(1, COUNT))
        setup.giving.promise(0)
        peer = setup.client()
        # An answer that has begun and waits for its next piece is an upload.
        await hold(setup, 1)
        setup.giving.promise(0)
        blob = setup.store.find(DIGEST)
        assert blob is not None
        await blob.drop([2])
        setup.giving.promise(2)
        async with aclosing(peer.read(DIGEST, span(1, 2), cut=CUT)) as blocks:
            assert await anext(blocks) == bytes_of(1, 1)
            with pytest.raises(SourceBusy):
                await read(peer, span(3, COUNT - 1))
            assert await read(peer, span(3, 3)) == bytes_of(3, 3)
            setup.giving.arrive(2)
            assert await anext(blocks) == bytes_of(2, 2)
        async with asyncio.timeout(3.0):
            assert await patient(read, peer, span(3, COUNT - 1)) == bytes_of(3, COUNT - 1)


@pytest.mark.parametrize(
    ("status", "headers", "body", "expected", "retry_s"),
    [
        (503, {}, b"busy\n", SourceBusy, None),
        (503, {"Retry-After": "2"}, b"", SourceBusy, 2.0),
        (503, {"Retry-After": "99999"}, b"", SourceBusy, 60.0),
        (503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b"", SourceBusy, None),
        (503, {"Retry-After": "9" * 5000}, b"", SourceBusy, None),
        (503, {}, b"oops", SourceUnavailable, None),
        (500, {"Retry-After": "2"}, b"busy", SourceUnavailable, None),
        (403, {}, b"", SourceRefused, None),
        (404, {}, b"", SourceLacksBlob, None),
        (200, {}, b"x", SourceUnavailable, None),
    ],
)
async def test_refusals_are_told_apart(setup, status, headers, body, expected, retry_s):
    async with FakePeer() as host:
        host.inject(Answer(status, headers, body))
        peer = PeerClient(host.url, setup.connections, None, lambda: NOW)
        with pytest.raises(SourceError) as caught:
            await read(peer, span(0, 0))
        assert type(caught.value) is expected
        assert getattr(caught.value, "retry_after_s", None) == retry_s


# Tables of contents and manifests.


async def test_a_held_tail_is_given_at_once(setup):
    await hold(setup, COUNT - 1)
    assert await setup.client().tail(DIGEST, TOC) == bytes_of(COUNT - 1, COUNT - 1)
    assert setup.giving.asked.empty()


async def test_a_tail_under_another_table_of_contents_is_not_given(setup):
    await hold(setup, COUNT - 1)
    assert await setup.client().tail(DIGEST, Digest.of(b"other")) is None


async def test_a_tail_on_its_way_is_waited_for(setup):
    setup.giving.toc = asyncio.get_running_loop().create_future()
    tail = noise(3 << 20)
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(setup.client().tail(DIGEST, TOC))
        assert await setup.giving.asked.get() == TOC
        setup.giving.toc.set_result(tail)
    assert asking.result() == tail


async def test_a_manifest_in_memory_is_given_and_one_on_its_way_is_waited_for(setup):
    manifest = Manifest(Digest.of(SMALL_MANIFEST), OCI_MANIFEST, SMALL_MANIFEST)
    setup.giving.manifests = asyncio.get_running_loop().create_future()
    peer = setup.client()
    async with asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(peer.manifest(manifest.digest))
        await setup.giving.asked.get()
        setup.giving.manifests.set_result(manifest)
    assert asking.result() == manifest
    await setup.store.memory.put_manifest(manifest)
    assert await peer.manifest(manifest.digest) == manifest
    assert setup.giving.asked.empty()


async def test_a_tail_that_never_ends_is_given_up(setup):
    async with FakePeer() as host:
        peer = PeerClient(host.url, setup.connections, None, lambda: NOW)
        host.inject(Answer(200, {}, b"tail"))
        assert await peer.tail(DIGEST, TOC) == b"tail"
        host.inject(Together((Answer(200), Endless())))
        with pytest.raises(SourceUnavailable, match="more than"):
            await peer.tail(DIGEST, TOC)


async def test_a_manifest_that_is_another_one_is_a_lie(setup):
    async with FakePeer() as host:
        peer = PeerClient(host.url, setup.connections, None, lambda: NOW)
        host.keep_manifest(DIGEST, OCI_MANIFEST, SMALL_MANIFEST)
        with pytest.raises(IntegrityError):
            await peer.manifest(DIGEST)


async def test_over_the_upload_limit_manifests_and_tails_are_refused_as_blobs_are(tmp_path):
    digest = Digest.of(SMALL_MANIFEST)
    timer = HeldTimer()
    pacer = Pacer(64 << 10, timer=timer)
    async with listening(tmp_path, uploads=pacer) as setup, asyncio.TaskGroup() as tasks:
        await setup.store.memory.put_manifest(Manifest(digest, OCI_MANIFEST, SMALL_MANIFEST))
        peer = setup.client()
        assert await peer.manifest(digest) is not None
        waiting = tasks.create_task(pacer.admit(1 << 20))
        while not pacer.is_over():  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0)
        for question in (peer.manifest(digest), peer.tail(DIGEST, TOC)):
            with pytest.raises(SourceBusy):
                await question
        assert setup.busy() == 2
        waiting.cancel()
