"""Connections to peers: what is an answer and what is not, how long it may take, what is kept."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from p2pcache.core.claims import Claims
from p2pcache.core.errors import SourceLacksBlob, SourceUnavailable
from p2pcache.core.layout import Layout
from p2pcache.core.model import Digest
from p2pcache.core.ranges import ByteRange
from p2pcache.peers import connections as module
from p2pcache.peers.answer import Answer
from p2pcache.peers.client import PeerClient
from p2pcache.peers.connections import Connections, Place
from tests.fakes import FakeHost, Hold, Reply, TestAuthority
from tests.fakes_peer import BLOB_BYTES, FakePeer
from tests.integration.nodes import MIB, noise

REQUEST = b"GET /x HTTP/1.1\r\nHost: peer\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-One: a\r\nx-one: b\r\n\r\nhello"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"2\r\nhe\r\n3;why=not\r\nllo\r\n0\r\nX-Behind: it\r\n\r\n"
)
PATIENCE_S = 5.0

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Host:
    """A server that says what a test wants it to say, and counts."""

    place: Place
    requests: int = 0
    connections: int = 0
    ended: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    """A permit for each connection that the client has ended."""


@asynccontextmanager
async def host_of(talk: Talk) -> AsyncIterator[Host]:
    host = Host(Place("", 0, is_tls=False))
    open_now: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host.connections += 1
        open_now.add(writer)
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                host.requests += 1
                await talk(reader, writer)
                if writer.is_closing():
                    break
        host.ended.release()
        open_now.discard(writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host.place = Place("127.0.0.1", server.sockets[0].getsockname()[1], is_tls=False)
    try:
        yield host
    finally:
        server.close()
        for writer in open_now:
            writer.transport.abort()


def saying(*segments: bytes, end: bool = False) -> Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for segment in segments:
            writer.write(segment)
            await writer.drain()
        if end:
            writer.close()

    return talk


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def body_of(answer: Answer) -> bytes:
    got = b""
    try:
        while block := await answer.block():
            got += block
    finally:
        answer.close()
    return got


async def ask(connections: Connections, host: Host, patience_s: float = PATIENCE_S) -> bytes:
    return await body_of(await connections.ask(host.place, REQUEST, patience_s))


# What is an answer.


async def say(*segments: bytes) -> tuple[int, dict[str, str], bytes]:
    """Have a peer say this and no more; return what is made of it."""
    async with (
        asyncio.timeout(PATIENCE_S),
        host_of(saying(*segments, end=True)) as host,
        Connections() as connections,
    ):
        answer = await connections.ask(host.place, REQUEST, PATIENCE_S)
        return answer.status, answer.headers, await body_of(answer)


@pytest.mark.parametrize("answer", [OK, CHUNKED])
def test_an_answer_is_the_same_however_it_comes_in_parts(answer):
    async def check(cuts: list[int]) -> None:
        borders = [0, *sorted(cut % len(answer) for cut in cuts), len(answer)]
        parts = [answer[a:b] for a, b in pairwise(borders)]
        status, headers, body = await say(*parts)
        assert (status, body) == (200, b"hello")
        assert headers.get("x-one") == ("a, b" if answer is OK else None)
        assert "x-behind" not in headers

    @given(st.lists(st.integers(0, 1000), max_size=5))
    def run(cuts):
        asyncio.run(check(cuts))

    run()


FRAGMENTS = [
    *re.findall(rb"[^\r\n]+|\r\n", OK + CHUNKED),
    b"\r", b"\n", b" ", b"\0", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n",
    b"Content-Length: 99999999999999999999\r\n", b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    b"HTTP/1.0 204 \r\n\r\n", b"ffffffffffffffffff\r\n", b"Connection: close\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
]  # fmt: skip


@given(
    st.one_of(
        st.lists(st.sampled_from(FRAGMENTS), max_size=12).map(b"".join),
        st.binary(max_size=200),
        st.tuples(st.sampled_from([OK, CHUNKED]), st.integers(0, 200), st.binary(max_size=3)).map(
            lambda t: t[0][: t[1]] + t[2] + t[0][t[1] + len(t[2]) :]
        ),
    )
)
def test_whatever_a_peer_says_is_an_answer_or_an_error_of_the_connection(said):
    async def check() -> None:
        with suppress(OSError):
            status, headers, body = await say(said)
            assert 200 <= status <= 999
            assert "content-length" in headers or "transfer-encoding" in headers
            assert len(body) <= len(said)

    asyncio.run(check())


NOT_ANSWERS = {
    "nothing": b"",
    "no head": b"hello",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "half a head": OK[:30],
    "half a body": OK[:-1],
    "half a chunk": CHUNKED[:70],
    "no last chunk": CHUNKED[: CHUNKED.index(b"0\r\nX-")],
    "not finished": b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
    "another protocol from now on": FRAGMENTS[-5],
    "an end that is not said": b"HTTP/1.1 200 OK\r\n\r\nhello",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "a length and chunks": CHUNKED.replace(b"\r\n", b"\r\nContent-Length: 5\r\n", 1),
    "a negative length": OK.replace(b"5", b"-5"),
    "a header without a name": OK.replace(b"X-One", b""),
    "a header with a line break": OK.replace(b": a", b": a\rb"),
    "a header on two lines": OK.replace(b": a", b": a\r\n b"),
    "many headers": OK.replace(b"X-One: a\r\n", b"X-One: a\r\n" * 65),
    "a long header": OK.replace(b": a", b": " + b"a" * (20 << 10)),
    "an endless head": b"HTTP/1.1 200 OK\r\nX: " + b"a" * MIB,
    "an endless status": b"HTTP/1.1 200 " + b"a" * MIB,
    "endless trailers": CHUNKED[:-2] + b"X: " + b"a" * MIB,
    "many trailers": CHUNKED[:-2] + b"X: a\r\n" * 10_000,
    "a long chunk header": CHUNKED.replace(b"why=not", b"why=" + b"a" * MIB),
    "a chunk that is too large": CHUNKED.replace(b"2\r\n", b"f" * 17 + b"\r\n"),
}


@pytest.mark.parametrize("said", NOT_ANSWERS.values(), ids=NOT_ANSWERS)
@pytest.mark.parametrize("size", [1 << 30, 1000])
async def test_what_is_no_answer_is_an_error_of_the_connection(said, size):
    with pytest.raises(ConnectionError):
        await say(*(said[at : at + size] for at in range(0, len(said), size)))


# What is kept, and what is not.


async def test_one_connection_serves_one_request_after_the_other():
    async with host_of(saying(OK)) as host, Connections() as connections:
        for _ in range(20):
            assert await ask(connections, host) == b"hello"
        assert (host.connections, host.requests) == (1, 20)


@pytest.mark.parametrize(
    "said", [OK.replace(b"X-One: a", b"Connection: close"), OK.replace(b"1.1", b"1.0"), OK + OK,
             OK + b"more", OK + b"HTTP/1.1 100 Continue\r\n\r\n"]
)  # fmt: skip
async def test_a_connection_whose_next_answer_would_be_doubtful_is_not_used_again(said):
    async with host_of(saying(said)) as host, Connections() as connections:
        for _ in range(3):
            assert await ask(connections, host) == b"hello"
        assert host.connections == 3


async def test_what_comes_without_being_asked_for_ends_the_connection():
    later = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        if not later.is_set():
            await later.wait()
            writer.write(OK.replace(b"hello", b"poison"[:5]))

    async with host_of(talk) as host, Connections() as connections:
        assert await ask(connections, host) == b"hello"
        later.set()
        async with asyncio.timeout(PATIENCE_S):
            await host.ended.acquire()
        assert await ask(connections, host) == b"hello"
        assert host.connections == 2


async def test_an_answer_that_is_not_read_to_its_end_ends_its_connection():
    async with host_of(saying(OK[:-2])) as host, Connections() as connections:
        answer = await connections.ask(host.place, REQUEST, PATIENCE_S)
        assert await answer.block()
        answer.close()
        answer.close()
        async with asyncio.timeout(PATIENCE_S):
            await host.ended.acquire()


async def test_who_is_cancelled_takes_the_connection_down():
    async with FakePeer() as peer, Connections() as connections:
        data = noise(100_000)
        digest = Digest.of(data)
        peer.hold(digest, data, Layout.fixed(len(data)))
        never = asyncio.Event()
        injection = peer.inject(Hold(never, after=1000), path=BLOB_BYTES)
        client = PeerClient(peer.url, connections, None, lambda: 0.0)
        begun = asyncio.Event()

        async def read() -> bytes:
            got = b""
            async with aclosing(client.read(digest, ByteRange(0, 100_000))) as blocks:
                async for block in blocks:
                    got += block
                    begun.set()
            return got

        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(read())
            await begun.wait()
            assert client.reading == 1
            reading.cancel()
        assert (client.reading, injection.hits) == (0, 1)
        assert await read() == data
        assert peer.connections == 2


async def test_a_request_is_sent_again_if_its_connection_was_being_closed():
    closing = iter([False, True, False, True, True])

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if next(closing):
            writer.close()
        else:
            writer.write(OK)

    async with host_of(talk) as host, Connections() as connections:
        assert await ask(connections, host) == b"hello"
        assert await ask(connections, host) == b"hello"
        assert (host.connections, host.requests) == (2, 3)
        with pytest.raises(ConnectionResetError):
            await ask(connections, host)
        assert host.requests == 5


async def test_a_request_that_was_answered_in_part_is_not_sent_again():
    async with host_of(saying(OK[:5], end=True)) as host, Connections() as connections:
        with pytest.raises(ConnectionError):
            await ask(connections, host)
        assert host.requests == 1


async def test_idle_connections_are_closed_in_the_end(monkeypatch):
    monkeypatch.setattr(module, "_IDLE_S", 0.05)
    async with host_of(saying(OK)) as host, Connections() as connections:
        assert await ask(connections, host) == b"hello"
        async with asyncio.timeout(PATIENCE_S):
            await host.ended.acquire()
        assert connections._pools == {}


async def test_leaving_ends_what_is_under_way_and_what_is_idle():
    async with host_of(saying(OK[:-1])) as host, host_of(saying(OK)) as other:
        async with Connections() as connections:
            assert await ask(connections, other) == b"hello"
            answer = await connections.ask(host.place, REQUEST, PATIENCE_S)
        with pytest.raises(ConnectionError):
            await body_of(answer)
        with pytest.raises(ConnectionError, match="stopping"):
            await ask(connections, host)
        async with asyncio.timeout(PATIENCE_S):
            await host.ended.acquire()
            await other.ended.acquire()


async def test_idle_connections_to_all_peers_together_are_bounded():
    async with (
        host_of(saying(OK)) as a,
        host_of(saying(OK)) as b,
        host_of(saying(OK)) as c,
        Connections(max_idle=2) as connections,
    ):
        for host in (a, b, a, c):  # of the two that are idle then, b is so for longer
            assert await ask(connections, host) == b"hello"
        async with asyncio.timeout(PATIENCE_S):
            await b.ended.acquire()
        assert await ask(connections, a) == b"hello"
        assert await ask(connections, c) == b"hello"
        assert (a.connections, b.connections, c.connections) == (1, 1, 1)
        assert await ask(connections, b) == b"hello"
        assert b.connections == 2


@pytest.mark.parametrize(
    "url",
    [
        "http://" + "x" * 64 + ".test:1",
        "http://a..test:1",
        "http://b\u00fccher.test:1",
        "http://127.0.0.1:1/b\u00fccher",
        "https://.test:1",
    ],
)
async def test_a_peer_that_cannot_be_looked_up_is_not_available(url):
    async with Connections() as connections:
        peer = PeerClient(url, connections, None, lambda: 0.0)
        with pytest.raises(SourceUnavailable):
            await peer.hello()
        with pytest.raises(SourceUnavailable):
            await peer.claim(Claims("", ()), 1.0)


# How long it may take, and how much memory.


@pytest.mark.parametrize("said", [b"", OK[:20], OK[:-1], CHUNKED[:60]])
async def test_silence_is_waited_for_as_long_as_was_said(said):
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await silent(reader, writer)

    async with host_of(talk) as host, Connections() as connections:
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(TimeoutError, match=r"nothing came for 0\.05 s"):
                await ask(connections, host, 0.05)
            await host.ended.acquire()
        assert host.requests == 1


async def test_a_patient_request_follows_a_hasty_one_on_the_same_connection():
    gate = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if host.requests == 2:
            await gate.wait()
        writer.write(OK)

    async with host_of(talk) as host, Connections() as connections:
        assert await ask(connections, host, 0.1) == b"hello"
        async with asyncio.TaskGroup() as tasks:
            asking = tasks.create_task(ask(connections, host, PATIENCE_S))
            # Until the alarm of the first one has gone off.
            asyncio.get_running_loop().call_later(0.2, gate.set)
        assert asking.result() == b"hello"
        assert host.connections == 1


async def test_a_reader_that_is_slow_holds_the_sender_back_and_is_not_taken_for_silence():
    size = 64 * MIB
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size
    sent = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(head)
        for _ in range(64):
            writer.write(bytes(MIB))
            await writer.drain()
            sent += MIB

    async with host_of(talk) as host, Connections() as connections:
        answer = await connections.ask(host.place, REQUEST, 0.05)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE_S):
            while not answer._line.is_paused:  # noqa: ASYNC110 - nobody is told of it
                await asyncio.sleep(0)
            # Longer than a silent peer would have had.
            due = loop.create_future()
            loop.call_later(0.2, due.set_result, None)
            await due
        assert answer._buffered <= 2 * MIB
        assert sent < size // 2
        assert len(await body_of(answer)) == size


async def test_a_peer_that_cannot_be_reached_is_an_error_at_once(unused_tcp_port):
    place = Place("127.0.0.1", unused_tcp_port, is_tls=False)
    async with Connections() as connections:
        with pytest.raises(ConnectionRefusedError):
            await connections.ask(place, REQUEST, PATIENCE_S)
        assert connections._pools == {}


async def test_a_name_without_addresses_is_an_error(monkeypatch):
    async with Connections() as connections:

        async def none(*args, **kwargs):
            return []

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", none)
        with pytest.raises(OSError, match="no address"):
            await connections.ask(Place("peer", 1, is_tls=False), REQUEST, PATIENCE_S)


async def test_the_other_addresses_of_a_name_are_tried_as_well(monkeypatch, unused_tcp_port):
    async with host_of(saying(OK)) as host, Connections() as connections:

        async def two(*args, **kwargs):
            return [(2, 1, 6, "", ("127.0.0.1", port)) for port in (unused_tcp_port, there)]

        there = host.place.port
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", two)
        host.place = Place("peer", 1, is_tls=False)
        assert await ask(connections, host) == b"hello"


async def test_requests_over_the_limit_wait_for_a_connection_but_not_for_long(monkeypatch):
    monkeypatch.setattr(module, "_MAX_CONNECTIONS", 2)
    monkeypatch.setattr(module, "_READY_S", 0.1)
    async with host_of(saying(OK)) as host, Connections() as connections:
        answers = [await connections.ask(host.place, REQUEST, PATIENCE_S) for _ in range(2)]
        with pytest.raises(TimeoutError):
            await ask(connections, host)
        monkeypatch.setattr(module, "_READY_S", PATIENCE_S)
        async with asyncio.TaskGroup() as tasks:
            third = tasks.create_task(ask(connections, host))
            assert await body_of(answers[0]) == b"hello"
        assert third.result() == b"hello"
        assert await body_of(answers[1]) == b"hello"
        assert host.connections == 2


async def test_so_many_that_they_could_not_be_served_in_time_are_refused(monkeypatch):
    monkeypatch.setattr(module, "_MAX_ASKING", 1)
    async with host_of(saying(OK)) as host, Connections() as connections:
        answer = await connections.ask(host.place, REQUEST, PATIENCE_S)
        with pytest.raises(ConnectionRefusedError):
            await ask(connections, host)
        assert await body_of(answer) == b"hello"
        assert await ask(connections, host) == b"hello"


# What a client makes of it.


async def test_errors_of_the_connection_are_those_of_the_source():
    async with host_of(saying(b"nonsense\r\n\r\n")) as host, Connections() as connections:
        url = f"http://127.0.0.1:{host.place.port}"
        client = PeerClient(url, connections, None, lambda: 0.0)
        with pytest.raises(SourceUnavailable, match="no answer") as caught:
            await client.hello()
        assert caught.value.source == client.name
        with pytest.raises(SourceUnavailable, match="no answer"):
            await anext(client.read(Digest.of(b""), ByteRange(0, 1)))


async def test_bytes_that_follow_what_was_asked_for_are_noticed_before_the_last_are_given():
    part = b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-4/9\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with (
        host_of(saying(part + b"5\r\nhello\r\n", b"1\r\n!\r\n0\r\n\r\n")) as host,
        Connections() as connections,
    ):
        url = f"http://127.0.0.1:{host.place.port}"
        client = PeerClient(url, connections, None, lambda: 0.0)
        async with aclosing(client.read(Digest.of(b""), ByteRange(0, 5))) as blocks:
            with pytest.raises(Exception, match="more than it was asked for"):
                await anext(blocks)


class Elsewhere(FakeHost):
    """A server that has nothing."""

    async def reply(self, request: web.BaseRequest) -> Reply:
        return Reply(404, CIMultiDict(), b"not held")


async def test_a_peer_may_be_reached_over_tls_and_under_a_path(tmp_path, monkeypatch):
    authority = TestAuthority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_file))
    module._tls_context.cache_clear()
    async with Elsewhere(tls=authority) as peer, Connections() as connections:
        client = PeerClient(f"{peer.url}/node/7/", connections, None, lambda: 0.0)
        with pytest.raises(SourceLacksBlob):
            await anext(client.read(Digest.of(b"lacking"), ByteRange(0, 1)))
        assert peer.log[0].path.startswith("/node/7/p2p/v1/blobs/")
        monkeypatch.delenv("SSL_CERT_FILE")
        module._tls_context.cache_clear()
        stranger = PeerClient(peer.url.replace("127.0.0.1", "localhost"), connections, None, float)
        with pytest.raises(SourceUnavailable, match=r"(?i)certificate"):
            await stranger.hello()
    module._tls_context.cache_clear()
