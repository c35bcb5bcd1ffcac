"""The fast lane and the ordinary way answer alike: same headers, same bytes, same refusals."""

import asyncio
import itertools
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pcache.config import Address
from p2pcache.server.listeners import Listener
from p2pcache.server.short_path import ShortPathServer
from tests.fakes import FakeRegistry
from tests.integration.nodes import (
    NAME,
    REGISTRY,
    RunningNode,
    add_lazy_image,
    lazy_layer,
    running,
)

LAYER = lazy_layer()
PATH = f"/v2/{NAME}/blobs/{LAYER.digest}"
NS = f"?ns={REGISTRY}"


class OrdinaryServer(ShortPathServer):
    """One whose fast lane never has what is asked for, so that aiohttp answers everything."""

    def look_up(self, name: bytes) -> None:
        """Find nothing."""


class Lanes:
    """One node, its mirror's ports, and for each a twin without the fast lane."""

    def __init__(self, node: RunningNode, twins: Sequence[Listener]) -> None:
        self.node = node
        self.fast = [listener.port for listener in node.node.clients]
        self.plain = [twin.port for twin in twins]

    def taken(self) -> int:
        """How many answers did not pass the handler."""
        return self.node.count("mirror_requests", kind="blob", status="206") - self.handled

    handled = 0


@asynccontextmanager
async def lanes_of(tmp_path: Any) -> AsyncIterator[Lanes]:
    async with FakeRegistry() as registry:
        image = add_lazy_image(registry, LAYER)
        anywhere = Address("127.0.0.1", 0)
        async with running(tmp_path / "node", registry, mirror_for={REGISTRY: anywhere}) as node:
            await node.pull_manifest(image)
            await node.read(LAYER.digest)
            await node.read(LAYER.digest)
            twins = []
            lanes: Lanes | None = None
            for listener in node.node.clients:
                server = listener._web_server
                assert isinstance(server, ShortPathServer)
                handler = server.request_handler

                async def counted(
                    request: web.BaseRequest, handler: Any = handler
                ) -> web.StreamResponse:
                    response: web.StreamResponse = await handler(request)
                    if lanes is not None and response.status == 206:
                        lanes.handled += 1
                    return response

                server.request_handler = counted
                twin = Listener(anywhere)
                await twin.open(
                    OrdinaryServer(
                        handler, node.node.store, node.node.metrics, server._repository_of
                    )
                )
                twins.append(twin)
            lanes = Lanes(node, twins)
            lanes.handled = lanes.taken()
            try:
                yield lanes
            finally:
                for twin in twins:
                    await twin.close(1.0)


@pytest.fixture
async def lanes(tmp_path):
    async with lanes_of(tmp_path) as lanes:
        yield lanes


def request(target: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {target} HTTP/1.1", "Host: mirror", *headers, "", ""]).encode(
        "latin-1"
    )


async def talk(port: int, segments: Sequence[bytes], *, pause_s: float = 0.0) -> bytes:
    """Send *segments* one after the other, then say that nothing follows; return what came."""
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.transport.get_extra_info("socket").setsockopt(6, 1, 1)  # TCP_NODELAY
            for segment in segments:
                writer.write(segment)
                await asyncio.sleep(pause_s)
            got = bytearray()
            # aiohttp does not answer to the end of the stream: read until nothing more is due.
            while True:
                try:
                    async with asyncio.timeout(0.08 if got else 1.0):
                        block = await reader.read(1 << 20)
                except TimeoutError:
                    return bytes(got)
                if not block:
                    return bytes(got)
                got += block
        except ConnectionError:
            return bytes(got)
        finally:
            writer.transport.abort()


def comparable(answer: bytes) -> bytes:
    """Without what differs from one second, or one multipart answer, to the next."""
    answer = re.sub(rb"Date: [^\r]*", b"Date: now", answer)
    return re.sub(rb"(boundary=|--)[0-9a-f]{32}", b"\\1boundary", answer)


async def same(
    lanes: Lanes, segments: Sequence[bytes], which: int = 0, *, pause_s: float = 0.0
) -> bytes:
    async with asyncio.TaskGroup() as both:
        fast = both.create_task(talk(lanes.fast[which], segments, pause_s=pause_s))
        plain = both.create_task(talk(lanes.plain[which], segments, pause_s=pause_s))
    assert comparable(fast.result()) == comparable(plain.result())
    return fast.result()


TAKEN = {
    "ns in the query": (0, request(PATH + NS, "Range: bytes=100-199")),
    "ns in capitals": (0, request(PATH + NS.upper().replace("NS", "ns"), "Range: bytes=0-0")),
    "a header": (0, request(PATH, f"OCI-Namespace: {REGISTRY}", "Range: bytes=5-70005")),
    "a header below": (0, request(PATH, "Range: bytes=5-70005", f"oci-namespace: {REGISTRY}")),
    "a URL in a header": (0, request(PATH, "Range: bytes=5-9", f"OCI-Namespace: https://{REGISTRY}/")),
    "the listener": (1, request(PATH, "Accept-Encoding: identity", "Range: bytes=0-1")),
    "the listener, and ns": (1, request(PATH + "?ns=other.test", "Range: bytes=0-1")),
    "nothing but the digest": (0, request(PATH, "Range: bytes=0-49999")),
    "both": (0, request(PATH + NS, "OCI-Namespace: other.test", "Range: bytes=1-2")),
    "an empty header": (0, request(PATH, "OCI-Namespace: ", "Range: bytes=1-2")),
    "past the end": (0, request(PATH + NS, "Range: bytes=420000-999999999")),
    "zeros in front": (0, request(PATH + NS, "Range: bytes=0005-0009")),
    "all of it": (0, request(PATH + NS, f"Range: bytes=0-{len(LAYER.blob) - 1}")),
}  # fmt: skip


@pytest.mark.parametrize(("which", "sent"), TAKEN.values(), ids=TAKEN)
async def test_the_fast_lane_answers_header_for_header_as_the_ordinary_way(lanes, which, sent):
    answer = await same(lanes, [sent], which)
    assert answer.startswith(b"HTTP/1.1 206 ")
    assert lanes.taken() - lanes.handled >= 0
    before = lanes.handled
    await talk(lanes.fast[which], [sent])
    assert lanes.handled == before, "it went the ordinary way"


def blob_path(name: str) -> str:
    return f"/v2/{name}/blobs/{LAYER.digest}"


IN_RANGE = "Range: bytes=100-199"
NOT_TAKEN = {
    "a name that climbs": request(blob_path("../x") + NS, IN_RANGE),
    "a name with a hole": request(blob_path("a//b") + NS, IN_RANGE),
    "a name that starts with a dot": request(blob_path(".a") + NS, IN_RANGE),
    "a name that ends with a slash": request(blob_path("a/") + NS, IN_RANGE),
    "a name of slashes": request(blob_path("//") + NS, IN_RANGE),
    "a name with three dashes and dots": request(blob_path("a..b") + NS, IN_RANGE),
    "a registry that is none": request(PATH + "?ns=-a..b:", IN_RANGE),
    "a registry with a bad port": request(PATH + "?ns=a:b:c", IN_RANGE),
    "a bad registry in the header": request(PATH, "OCI-Namespace: a b", IN_RANGE),
    "two ranges": request(PATH + NS, IN_RANGE, "Range: bytes=5-6"),
    "two ranges, differently spelt": request(PATH + NS, "range: bytes=5-6", IN_RANGE),
    "two ranges apart": request(PATH + NS, IN_RANGE, "A: b", "C: d", "RANGE: bytes=5-6"),
    "two namespaces": request(PATH, "OCI-Namespace: a.test", IN_RANGE, "OCI-Namespace: b.test"),
    "Dragonfly's header": request(PATH, f"X-Dragonfly-Registry: https://{REGISTRY}", IN_RANGE),
    "a list of ranges": request(PATH + NS, "Range: bytes=0-1,5-6"),
    "an open end": request(PATH + NS, "Range: bytes=421000-"),
    "a suffix": request(PATH + NS, "Range: bytes=-5"),
    "backwards": request(PATH + NS, "Range: bytes=9-5"),
    "past the end": request(PATH + NS, "Range: bytes=999999999-9999999999"),
    "closing": request(PATH + NS, "Connection: close", IN_RANGE),
    "expecting": request(PATH + NS, "Expect: 100-continue", IN_RANGE),
    "with a body": request(PATH + NS, "Content-Length: 4", IN_RANGE) + b"body",
    "with an empty body": request(PATH + NS, "Content-Length: 0", IN_RANGE),
    "chunked": request(PATH + NS, "Transfer-Encoding: chunked", IN_RANGE) + b"0\r\n\r\n",
    "conditional": request(PATH + NS, 'If-Range: "x"', IN_RANGE),
    "another query": request(PATH + NS + "&x=1", IN_RANGE),
    "HTTP/1.0": request(PATH + NS, IN_RANGE).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "HEAD": request(PATH + NS, IN_RANGE).replace(b"GET", b"HEAD"),
    "a folded header": request(PATH + NS, "A: b", " folded", IN_RANGE),
    "a bare line feed": request(PATH + NS, "A: b\nRange: bytes=5-6", IN_RANGE),
    "a null byte": request(PATH + NS, "A: b\x00", IN_RANGE),
    "a header without a name": request(PATH + NS, ": b", IN_RANGE),
    "a space before the colon": request(PATH + NS, "A : b", IN_RANGE),
    "no header at all": request(PATH + NS, "nonsense", IN_RANGE),
    "many headers": request(PATH + NS, *[f"A{i}: b" for i in range(200)], IN_RANGE),
    "a long header": request(PATH + NS, "A: " + "b" * 20_000, IN_RANGE),
}  # fmt: skip


@pytest.mark.parametrize("sent", NOT_TAKEN.values(), ids=NOT_TAKEN)
async def test_every_doubt_goes_the_ordinary_way(lanes, sent):
    await same(lanes, [sent])
    before = lanes.node.count("served_bytes", source="local"), lanes.handled
    await talk(lanes.fast[0], [sent])
    served = lanes.node.count("served_bytes", source="local") - before[0]
    assert not served or lanes.handled > before[1]


SHORT = request(PATH + NS, "Range: bytes=100-199")
OTHER = request(PATH + NS, "Range: bytes=70000-140000")
SLOW = request(f"/v2/{NAME}/tags/list{NS}")


@pytest.mark.parametrize(
    "segments",
    [
        [SHORT + SHORT],
        [SHORT + OTHER + SLOW + SHORT],
        [SHORT[:10], SHORT[10:]],
        [SHORT[:-1], SHORT[-1:]],
        [SHORT[:-4], SHORT[-4:-2], SHORT[-2:]],
        [SHORT + OTHER[:10], OTHER[10:]],
        [SLOW + SHORT[:20], SHORT[20:] + OTHER],
        [b"\r\n", SHORT],
        [b"\r\n" + SHORT],
        [SHORT, b"\r\n\r\n", SHORT],
        # Headers that look like a request of their own once they are cut.
        [b"GET /v2/ HTTP/1.1\r\nHost: a\r\nX: ", SHORT],
        [SLOW + b"GET /v2/ HTTP/1.1\r\nHost: a\r\nX: ", SHORT],
        [SLOW, b"GET /v2/ HTTP/1.1\r\nHost: a\r\nX: ", SHORT],
        # A body that is a request.
        [request("/v2/", f"Content-Length: {len(SHORT)}"), SHORT, OTHER],
        [request("/v2/", f"Content-Length: {len(SHORT)}") + SHORT, OTHER],
        [request("/v2/", "Transfer-Encoding: chunked"), b"%x\r\n" % len(SHORT), SHORT,
         b"\r\n0\r\n\r\n"],
    ],
)  # fmt: skip
async def test_requests_in_any_pieces_get_the_same_answers(lanes, segments):
    assert await same(lanes, segments)
    # Long enough that what came before has been answered.
    assert await same(lanes, segments, pause_s=0.03)


PIECES = st.sampled_from(
    [SHORT, OTHER, SLOW, request("/v2/"), request(PATH, "Range: bytes=0-1"),
     request(PATH + NS, "Range: bytes=5-4"), request(blob_path("a//b") + NS, IN_RANGE),
     request("/v2/", "Content-Length: 5") + b"abcde"]
)  # fmt: skip


@pytest.fixture
async def shared(tmp_path):
    async with lanes_of(tmp_path) as lanes:
        yield lanes


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    requests=st.lists(PIECES, min_size=1, max_size=5), cuts=st.lists(st.floats(0, 1), max_size=8)
)
async def test_any_split_of_any_requests_gets_the_same_answers(shared, requests, cuts):
    stream = b"".join(requests)
    places = sorted({int(cut * len(stream)) for cut in cuts} | {0, len(stream)})
    segments = [stream[a:b] for a, b in itertools.pairwise(places)]
    await same(shared, segments)
