"""The peer API from the asking side, for one peer.

Hides HTTP, proofs of the cluster secret, and every way in which an answer can be wrong. What comes
back is either what was asked for in shape, or one of our errors; whether the bytes are the right
ones is for the caller to prove.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Final, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from p2pcache.core.credential import (
    REPLY_HEADER,
    REQUEST_HEADER,
    check_reply,
    prove_request,
)
from p2pcache.core.errors import (
    FormatError,
    IntegrityError,
    SourceLacksBlob,
    SourceRefused,
    SourceUnavailable,
)
from p2pcache.core.model import Digest, Manifest, Repository, Tag
from p2pcache.core.oci import MANIFEST_TYPES, MAX_MANIFEST_SIZE, parse_manifest
from p2pcache.core.peers import PeerRecord
from p2pcache.core.ranges import ByteRange, parse_content_range
from p2pcache.core.wire import PROTOCOL, Holding, TagNews, decode_holding, decode_tag

# A peer is a neighbour: one that does not answer a connection within a second is not there.
CONNECT_S: Final = 1.0
# A peer that sends nothing for so long while it should has stalled. Hedging acts much earlier.
NO_PROGRESS_S: Final = 3.0
# Who holds what, and other small questions, stand in the way of a container's read.
QUESTION_S: Final = 0.4

_MAX_SMALL_BODY: Final = 4 << 20
_BLOCK: Final = 256 << 10

_T = TypeVar("_T")


class PeerClient:
    """One other node. Shares the *session* of its owner."""

    def __init__(
        self,
        url: str,
        session: aiohttp.ClientSession,
        secret: bytes | None,
        now: Callable[[], float],
        on_bytes: Callable[[int], None] = lambda count: None,
    ) -> None:
        parts = urlsplit(url)
        self.url = url
        self.name = f"peer {parts.netloc}"
        self.record = PeerRecord()
        self.reading = 0
        """How many reads from it are under way."""
        self.is_myself = False
        self._session = session
        self._secret = secret
        self._now = now
        self._on_bytes = on_bytes

    def __repr__(self) -> str:
        return f"<{self.name}>"

    @property
    def hedge_after_s(self) -> float:
        """Without progress for so long, another source should be asked as well."""
        return self.record.hedge_after_s

    async def read(self, digest: Digest, part: ByteRange) -> AsyncGenerator[bytes, None]:
        """Yield exactly the bytes of *part*, unproven. Raises `SourceError`."""
        left = len(part)
        self.reading += 1
        try:
            async with self._get(f"blobs/{digest}", range_header=part.header) as response:
                self._check_range(response, part)
                async for block in response.content.iter_chunked(_BLOCK):
                    left -= len(block)
                    self._on_bytes(len(block))
                    if left < 0:
                        raise IntegrityError(self.name, "sent more than it was asked for")
                    yield block
        finally:
            self.reading -= 1
        if left:
            raise SourceUnavailable(self.name, f"ended {left} bytes early")

    def _check_range(self, response: aiohttp.ClientResponse, part: ByteRange) -> None:
        if response.status != 206:
            raise SourceUnavailable(self.name, f"answered a range with {response.status}")
        try:
            got, _ = parse_content_range(response.headers.get("Content-Range", ""))
        except FormatError as error:
            raise IntegrityError(self.name, str(error)) from error
        if got != part:
            raise IntegrityError(self.name, f"sent {got} instead of {part}")

    async def holding(self, digest: Digest) -> Holding | None:
        """Ask what it holds of a blob; None if nothing. Raises `SourceError`."""
        body, _ = await self._ask(f"blobs/{digest}/holding", signed=True)
        return None if body is None else self._decoded(decode_holding, body)

    async def tag(self, repository: Repository, tag: Tag) -> TagNews | None:
        """Ask what it remembers of a tag; None if nothing. Raises `SourceError`."""
        registry, name = quote(repository.registry, safe=""), quote(repository.name, safe="")
        target = f"tags?registry={registry}&name={name}&tag={quote(tag.name, safe='')}"
        body, _ = await self._ask(target, signed=True)
        return None if body is None else self._decoded(decode_tag, body)

    async def manifest(self, digest: Digest) -> Manifest | None:
        """Ask for a manifest; None if it has none. Raises `SourceError`."""
        body, headers = await self._ask(f"manifests/{digest}", signed=False)
        if body is None:
            return None
        if not digest.matches(body):
            raise IntegrityError(self.name, f"sent other bytes as manifest {digest}")
        return Manifest(digest, _media_type(body, headers.get("Content-Type", "")), body)

    async def _ask(self, target: str, *, signed: bool) -> tuple[bytes | None, Mapping[str, str]]:
        """Ask a small question. None if the peer has no answer."""
        try:
            async with asyncio.timeout(QUESTION_S), self._get(target) as response:
                body = await response.content.read(_MAX_SMALL_BODY + 1)
                while len(body) <= _MAX_SMALL_BODY and (more := await response.content.readany()):
                    body += more
                request_proof = response.request_info.headers.get(REQUEST_HEADER, "")
                headers = CIMultiDict(response.headers)
        except SourceLacksBlob:
            return None, {}
        except TimeoutError as error:
            raise SourceUnavailable(self.name, f"no answer within {QUESTION_S} s") from error
        if len(body) > min(_MAX_SMALL_BODY, MAX_MANIFEST_SIZE):
            raise SourceUnavailable(self.name, "answered a small question with a large body")
        if signed and self._secret is not None:
            proof = headers.get(REPLY_HEADER, "")
            if not check_reply(self._secret, proof, request_proof, body):
                raise SourceRefused(self.name, "its answer does not prove the cluster secret")
        return body, headers

    def _decoded(self, decode: Callable[[bytes], _T], body: bytes) -> _T:
        try:
            return decode(body)
        except FormatError as error:
            raise SourceUnavailable(self.name, str(error)) from error

    @asynccontextmanager
    async def _get(
        self, target: str, *, range_header: str = ""
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a proven request. Raises `SourceError` unless the answer is a success."""
        path = f"/p2p/{PROTOCOL}/{target}"
        headers = {"Range": range_header} if range_header else {}
        if self._secret is not None:
            headers[REQUEST_HEADER] = prove_request(
                self._secret, "GET", path, range_header, now=self._now()
            )
        try:
            async with self._session.get(
                URL(self.url + path, encoded=True), headers=headers, allow_redirects=False
            ) as response:
                if response.status == 404:
                    raise SourceLacksBlob(self.name, "does not hold it")
                if response.status in (401, 403):
                    raise SourceRefused(self.name, "refuses us: is the cluster secret the same?")
                if response.status not in (200, 206):
                    raise SourceUnavailable(self.name, f"answered {response.status}")
                yield response
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
            raise SourceUnavailable(self.name, reason) from error


def _media_type(manifest: bytes, claimed: str) -> str:
    """Return a manifest's type: what its bytes say, as the digest proves only them.

    A type decides how a client reads the bytes, so a peer is believed only where they are silent.
    """
    with suppress(FormatError):
        written = parse_manifest(manifest).media_type
        if written in MANIFEST_TYPES:
            return written
    return claimed if claimed.isascii() and claimed.isprintable() else ""


def peer_session() -> aiohttp.ClientSession:
    """Return a session for peers: one pool, keep-alive, no cookies, no proxies."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, limit_per_host=128, keepalive_timeout=60),
        timeout=aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_S, sock_read=NO_PROGRESS_S, connect=CONNECT_S * 2
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
        headers={"Accept-Encoding": "identity"},
    )
