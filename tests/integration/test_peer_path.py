"""The fast lane of the peer API: the same answers, the same secret, the same limits."""

from __future__ import annotations

import asyncio
import re
import socket
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvloop
from aiohttp import web

from p2pcache.core.credential import REQUEST_HEADER, prove_request
from p2pcache.core.layout import Layout, LayoutKind, PieceState
from p2pcache.core.model import Digest
from p2pcache.core.ranges import ByteRange
from p2pcache.metrics import Metrics
from p2pcache.pacing import Pacer
from p2pcache.server import peer_path
from p2pcache.server.lane import Known
from p2pcache.server.peer_api import PeerApi
from p2pcache.server.peer_path import PeerPathServer
from p2pcache.store import Store
from tests.integration.nodes import MIB, noise

SECRET = b"correct horse battery staple"
NOW = 1.7e9
PIECE = 100_000
COUNT = 12
DATA = noise(PIECE * COUNT)
DIGEST = Digest.of(DATA)
LAYOUT = Layout(LayoutKind.TOC, len(DATA), array("Q", range(0, len(DATA), PIECE)))
HELD = 11
"""So many pieces are held; the rest is not."""
TARGET = f"/p2p/v1/blobs/{DIGEST}"


class OrdinaryServer(PeerPathServer):
    """One whose fast lane never has what is asked for, so that aiohttp answers everything."""

    def look_up(self, name: bytes) -> Known | None:
        return None


@dataclass
class Setup:
    store: Store
    metrics: Metrics
    fast: int = 0
    plain: int = 0
    handled: list[web.BaseRequest] = field(default_factory=list)

    def served(self) -> float:
        return float(self.metrics.peer_served_bytes._value.get())

    def busy(self) -> float:
        return float(self.metrics.peer_busy._value.get())


@asynccontextmanager
async def listening(
    tmp_path: Any, *, secret: bytes | None = SECRET, **settings: Any
) -> AsyncIterator[Setup]:
    async with Store(tmp_path / "store", 64 * MIB) as store:
        blob = await store.create(DIGEST, LAYOUT, toc_digest=Digest.of(b"toc"))
        with blob.reading():
            for piece in range(HELD):
                data = DATA[piece * PIECE : (piece + 1) * PIECE]
                await blob.write(piece, data, PieceState.HELD_UPSTREAM)
            await blob.read(ByteRange(0, HELD * PIECE))  # which checks it
        setup = Setup(store, Metrics())
        api = PeerApi(
            "node/1", store, store.memory, setup.metrics, secret, now=lambda: NOW, **settings
        )

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            setup.handled.append(request)
            return await api.handle(request)

        servers = [
            kind(handle, store, api.uploads, secret, now=lambda: NOW)
            for kind in (PeerPathServer, OrdinaryServer)
        ]
        loop = asyncio.get_running_loop()
        listeners = [await loop.create_server(server, "127.0.0.1", 0) for server in servers]
        setup.fast, setup.plain = (one.sockets[0].getsockname()[1] for one in listeners)
        try:
            yield setup
        finally:
            for listener, server in zip(listeners, servers, strict=True):
                listener.close()
                await server.shutdown(0.0)


@pytest.fixture
async def setup(tmp_path):
    async with listening(tmp_path) as setup:
        yield setup


def request(
    wanted: str = "bytes=0-99",
    *headers: str,
    target: str = TARGET,
    secret: bytes | None = SECRET,
    now: float = NOW,
    proven: str | None = None,
) -> bytes:
    lines = [f"GET {target} HTTP/1.1", "Host: peer", f"Range: {wanted}", *headers]
    if secret is not None:
        proof = prove_request(secret, "GET", target, proven or wanted, now=now)
        lines.append(f"{REQUEST_HEADER}: {proof}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


async def answers(port: int, *requests: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Send *requests* on one connection, each when the one before is answered."""
    got = []
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for sent in requests:
                writer.write(sent)
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.rstrip().split("\r\n")
                headers = dict(line.split(": ", 1) for line in lines)
                body = await reader.readexactly(int(headers["Content-Length"]))
                got.append((int(first.split()[1]), headers, body))
        finally:
            writer.transport.abort()
    return got


def comparable(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, dict[str, str], bytes]:
    status, headers, body = answer
    told = {k: v for k, v in headers.items() if k not in ("Date", "Server")}
    told.pop("P2PCache-Clock", None)
    return status, told, body


TAKEN = {
    "a byte": request("bytes=0-0"),
    "some": request("bytes=99990-100010"),
    "with zeros in front": request("bytes=0005-0009"),
    "a piece": request("bytes=100000-199999"),
    "most": request(f"bytes=0-{MIB - 1}"),
    "a cut": request(target=f"{TARGET}?cut=toc%2065536%20x"),
    "other headers": request("bytes=5-6", "Accept-Encoding: identity", "User-Agent: x/1 (y)"),
}


@pytest.mark.parametrize("sent", TAKEN.values(), ids=TAKEN)
async def test_the_fast_lane_answers_as_the_ordinary_way(setup, sent):
    (fast,) = await answers(setup.fast, sent)
    assert not setup.handled
    served = setup.served()
    (plain,) = await answers(setup.plain, sent)
    assert len(setup.handled) == 1
    assert comparable(fast) == comparable(plain)
    assert fast[0] == 206
    assert served == len(fast[2]) == setup.served() - served


async def test_one_connection_takes_both_ways_in_turns(setup):
    hello = request(target=f"{TARGET}/holding")
    sent = [request("bytes=5-9"), hello, request("bytes=1-300000"), hello, request("bytes=0-1")]
    got = await answers(setup.fast, *sent)
    assert [status for status, _, _ in got] == [206, 200, 206, 200, 206]
    assert got[2][2] == DATA[1:300_001]
    assert len(setup.handled) == 2


NOT_TAKEN = {
    "no proof": (401, request(secret=None)),
    "another secret": (401, request(secret=b"another secret, long enough")),
    "a proof of another range": (401, request("bytes=0-98", proven="bytes=0-99")),
    "a proof of another spelling": (401, request("bytes=00-99", proven="bytes=0-99")),
    "a proof of another time": (401, request(now=NOW - 3600)),
    "a proof of another blob": (
        401,
        request().replace(str(DIGEST).encode(), str(Digest.of(b"")).encode()),
    ),
    "a proof of another cut": (401, request(target=f"{TARGET}?cut=a").replace(b"cut=a", b"cut=b")),
    "no proof at first": (401, request("bytes=0-9", f"{REQUEST_HEADER}: v1 1 {'0' * 64}")),
    "two ranges": (206, request("bytes=0-9", "Range: bytes=5-6")),
    "an open end": (404, request("bytes=5-")),
    "what is not held": (404, request("bytes=1100000-1100001")),
    "in part not held": (404, request("bytes=1099999-1100001")),
    "past the end": (416, request("bytes=1200000-1200001")),
    "backwards": (400, request("bytes=9-5")),
    "another blob": (404, request(target=f"/p2p/v1/blobs/{Digest.of(b'')}")),
    "another query": (206, request(target=f"{TARGET}?x=1")),
    "closing": (206, request("bytes=0-9", "Connection: close")),
    "with a body": (206, request("bytes=0-9", "Content-Length: 0")),
}


@pytest.mark.parametrize(("status", "sent"), NOT_TAKEN.values(), ids=NOT_TAKEN)
async def test_every_doubt_goes_the_ordinary_way(setup, status, sent):
    (fast,) = await answers(setup.fast, sent)
    assert len(setup.handled) == 1
    (plain,) = await answers(setup.plain, sent)
    assert comparable(fast) == comparable(plain)
    assert fast[0] == status


async def test_more_than_a_block_goes_the_ordinary_way(setup):
    (got,) = await answers(setup.fast, request(f"bytes=0-{MIB}"))
    assert (len(setup.handled), got[0], len(got[2])) == (1, 206, MIB + 1)


async def test_without_a_secret_nothing_need_be_proven(tmp_path):
    async with listening(tmp_path, secret=None) as setup:
        got = await answers(setup.fast, request(secret=None), request())
        assert [status for status, _, _ in got] == [206, 206]
        assert not setup.handled


async def test_what_was_dropped_is_given_no_more(setup):
    blob = setup.store.find(DIGEST)
    (before,) = await answers(setup.fast, request())
    await blob.drop([0])
    (after,) = await answers(setup.fast, request())
    await setup.store.forget(DIGEST)
    (gone,) = await answers(setup.fast, request("bytes=200000-200009"))
    assert (before[0], after[0], gone[0]) == (206, 404, 404)


# Limits.


async def test_over_the_limit_of_uploads_only_what_is_small_is_given(tmp_path):
    async with listening(tmp_path, max_uploads=0) as setup:
        small, large = await answers(setup.fast, request("bytes=0-65535"), request("bytes=0-65536"))
        assert (small[0], large[0], large[2]) == (206, 503, b"busy\n")
        assert (len(setup.handled), setup.busy()) == (1, 1)


async def test_the_limit_of_bytes_a_second_is_kept(tmp_path):
    pacer = Pacer(1000.0, burst=150_000)
    async with listening(tmp_path, uploads=pacer) as setup:
        first, second, third = await answers(
            setup.fast, *[request(f"bytes=0-{size - 1}") for size in (60_000, 60_000, 60_000)]
        )
        assert (first[0], second[0], third[0]) == (206, 206, 503)
        assert len(setup.handled) == 1
        assert setup.served() == 120_000


def narrow(port: int) -> socket.socket:
    """A connection whose receiver takes little before it must be read from."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    return sock


async def check_slow(tmp_path: Any) -> None:
    """A peer that takes nothing holds an upload, until it takes it or is given up."""
    async with listening(tmp_path, max_uploads=1) as setup:
        large = request("bytes=0-999999")
        with narrow(setup.fast) as slow:
            slow.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=slow.dup())
            sent = 0
            async with asyncio.timeout(10):
                while True:
                    # What the sender's kernel takes is not the node's: fill that first.
                    writer.write(large)
                    sent += 1
                    (other,) = await answers(setup.fast, large)
                    if other[0] == 503:
                        break
                    assert not setup.handled, "what is slow went the ordinary way"
                    assert sent < 50
                assert len(setup.handled) == 1
                (small,) = await answers(setup.fast, request("bytes=0-65535"))
                assert small[0] == 206
                for _ in range(sent):
                    assert b" 206 " in await reader.readuntil(b"\r\n\r\n")
                    assert await reader.readexactly(1_000_000) == DATA[:1_000_000]
                while (await answers(setup.fast, large))[0][0] == 503:
                    pass
            writer.transport.abort()


async def test_a_peer_that_takes_nothing_holds_an_upload(tmp_path):
    await check_slow(tmp_path)


def test_a_peer_that_takes_nothing_holds_an_upload_on_the_loop_in_use(tmp_path):
    uvloop.run(check_slow(tmp_path))


async def test_a_peer_that_takes_nothing_for_too_long_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(peer_path, "SEND_S", 0.2)
    async with listening(tmp_path, max_uploads=1) as setup:
        large = request("bytes=0-999999")
        with narrow(setup.fast) as slow:
            slow.setblocking(False)
            _, writer = await asyncio.open_connection(sock=slow.dup())
            async with asyncio.timeout(10):
                while (await answers(setup.fast, large))[0][0] != 503:
                    writer.write(large)
                while (await answers(setup.fast, large))[0][0] == 503:
                    pass
            writer.transport.abort()


def test_the_request_of_our_own_client_is_one_for_the_lane():
    sent = request("bytes=5-9", target=f"{TARGET}?cut=toc%2065536%20sha256%3A{'0' * 64}")
    match = peer_path._REQUEST.fullmatch(sent)
    assert match is not None
    assert match.groups()[1:] == (str(DIGEST).encode(), b"5", b"9")
    assert re.search(REQUEST_HEADER.encode(), sent)
