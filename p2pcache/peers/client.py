"""The peer API from the asking side, for one peer.

Hides HTTP, proofs of the cluster secret, clocks that differ, and every way in which an answer can
be wrong. What comes back is either what was asked for in shape, or one of our errors; whether the
bytes are the right ones is for the caller to prove.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Final, TypeVar
from urllib.parse import quote, urlsplit

from p2pcache.config import Address
from p2pcache.core.bounds import HOLD_S
from p2pcache.core.claims import Claims, Cut, Grants, decode_grants, encode_claims
from p2pcache.core.credential import (
    CLOCK_HEADER,
    REPLY_HEADER,
    REQUEST_HEADER,
    check_clock,
    check_reply,
    prove_request,
)
from p2pcache.core.errors import (
    FormatError,
    IntegrityError,
    SourceBusy,
    SourceError,
    SourceLacksBlob,
    SourceRefused,
    SourceUnavailable,
)
from p2pcache.core.model import Digest, Manifest, Repository, Tag
from p2pcache.core.oci import MANIFEST_TYPES, MAX_MANIFEST_SIZE, parse_manifest
from p2pcache.core.peers import PeerRecord
from p2pcache.core.ranges import ByteRange, parse_content_range
from p2pcache.core.toc import MAX_TOC_COMPRESSED
from p2pcache.core.wire import (
    MEDIA_TYPE,
    PROTOCOL,
    Hello,
    Holding,
    TagNews,
    decode_hello,
    decode_holding,
    decode_tag,
)
from p2pcache.peers.answer import Answer
from p2pcache.peers.connections import Connections, Place

# A peer that sends nothing for so long while it should has stalled. Hedging acts much earlier.
NO_PROGRESS_S: Final = 3.0
# Who holds what, and other small questions, stand in the way of a container's read.
QUESTION_S: Final = 0.4
# Nobody waits for a hello.
HELLO_S: Final = 2.0
# A peer that holds an answer back gives up after HOLD_S; its word of that takes some time, too.
_HELD_S: Final = HOLD_S + 1.0
# What a peer may take for a table of contents once it has begun. One slower than this is no help.
_BODY_S: Final = 3.0
_SLOWEST_PEER: Final = 1 << 20

_MAX_SMALL_BODY: Final = 4 << 20
# The tail is the compressed table of contents and a footer of less than a hundred bytes.
_MAX_TAIL: Final = MAX_TOC_COMPRESSED + 1024
_MAX_BUSY_S: Final = 60.0
# The names of the headers that are looked at, as an `Answer` spells them.
_REPLY: Final = REPLY_HEADER.lower()
_CLOCK: Final = CLOCK_HEADER.lower()

_T = TypeVar("_T")


class NotCoordinating(SourceRefused):
    """It is too old to coordinate. It may still be asked for bytes."""


class PeerClient:
    """One other node, asked over the *connections* of its owner. *now* is Unix time."""

    def __init__(
        self,
        url: str,
        connections: Connections,
        secret: bytes | None,
        now: Callable[[], float],
        on_bytes: Callable[[int], None] = lambda count: None,
    ) -> None:
        parts = urlsplit(url)
        self.url = url
        self.address = address_of(url)
        self.name = f"peer {parts.netloc}"
        self.record = PeerRecord()
        self.reading = 0
        """How many reads from it are under way."""
        self.is_myself = False
        self._connections = connections
        self._place = Place.of(url)
        # What stands before the target of each request, and behind it (RFC 9112, section 3).
        self._base = f"{parts.path.rstrip('/')}/p2p/{PROTOCOL}/"
        self._head = f" HTTP/1.1\r\nHost: {parts.netloc.rpartition('@')[2]}\r\n"
        self._secret = secret
        self._now = now
        self._on_bytes = on_bytes
        self._clock_ahead_s = 0.0
        """By how much its clock is ahead of ours, as far as it had to tell."""

    def __repr__(self) -> str:
        return f"<{self.name}>"

    @property
    def hedge_after_s(self) -> float:
        """Without progress for so long, another source should be asked as well."""
        return self.record.hedge_after_s

    async def read(
        self, digest: Digest, part: ByteRange, *, cut: Cut | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield exactly the bytes of *part*, unproven. Raises `SourceError`.

        With *cut*, a peer that is itself still fetching some of it sends on what it has and holds
        the rest of the answer until more is there, for a bounded time.
        """
        left = len(part)
        target, patience_s = f"blobs/{digest}", NO_PROGRESS_S
        if cut is not None:
            target += f"?cut={_quoted(cut.name)}"
            patience_s = _HELD_S
        self.reading += 1
        answer: Answer | None = None
        try:
            answer, _ = await self._ask(target, patience_s, range_header=part.header)
            self._check_range(answer, part)
            while block := await answer.block():
                left -= len(block)
                self._on_bytes(len(block))
                # Whoever has all of the part looks no further: whether more follows is told before.
                if left < 0 or (not left and await answer.block()):
                    raise IntegrityError(self.name, "sent more than it was asked for")
                yield block
        except OSError as error:
            raise self._unavailable(error) from error
        finally:
            self.reading -= 1
            if answer is not None:
                answer.close()
        if left:
            raise SourceUnavailable(self.name, f"ended {left} bytes early")

    def _check_range(self, answer: Answer, part: ByteRange) -> None:
        if answer.status != 206:
            raise SourceUnavailable(self.name, f"answered a range with {answer.status}")
        try:
            got, _ = parse_content_range(answer.headers.get("content-range", ""))
        except FormatError as error:
            raise IntegrityError(self.name, str(error)) from error
        if got != part:
            raise IntegrityError(self.name, f"sent {got} instead of {part}")

    async def tail(self, digest: Digest, toc_digest: Digest) -> bytes | None:
        """Return the table of contents with what follows it, unproven; None if it has none.

        A peer that is itself still fetching it holds the answer for a bounded time. Raises
        `SourceError`.
        """
        target = f"blobs/{digest}/tail?toc={toc_digest}"
        with self._late(_HELD_S), suppress(SourceLacksBlob):
            async with asyncio.timeout(_HELD_S) as limit:
                answer, _ = await self._ask(target, _HELD_S)
                size = min(answer.content_length or 0, _MAX_TAIL)
                loop = asyncio.get_running_loop()
                limit.reschedule(loop.time() + _BODY_S + size / _SLOWEST_PEER)
                body = await self._body(answer, _MAX_TAIL)
                self._on_bytes(len(body))
                return body
        return None

    async def manifest(self, digest: Digest) -> Manifest | None:
        """Return a manifest, its bytes matching *digest*; None if it has none. Waits as `tail`."""
        with self._late(_HELD_S), suppress(SourceLacksBlob):
            async with asyncio.timeout(_HELD_S):
                answer, _ = await self._ask(f"manifests/{digest}", _HELD_S)
                body = await self._body(answer, min(_MAX_SMALL_BODY, MAX_MANIFEST_SIZE))
            if not digest.matches(body):
                raise IntegrityError(self.name, f"sent other bytes as manifest {digest}")
            claimed = answer.headers.get("content-type", "")
            return Manifest(digest, _media_type(body, claimed), body)
        return None

    async def holding(self, digest: Digest) -> Holding | None:
        """Ask what it holds of a blob; None if nothing. Raises `SourceError`."""
        with suppress(SourceLacksBlob):
            return await self._question(f"blobs/{digest}/holding", decode_holding, QUESTION_S)
        return None

    async def tag(self, repository: Repository, tag: Tag) -> TagNews | None:
        """Ask what it remembers of a tag; None if nothing. Raises `SourceError`."""
        registry, name = quote(repository.registry, safe=""), quote(repository.name, safe="")
        target = f"tags?registry={registry}&name={name}&tag={quote(tag.name, safe='')}"
        with suppress(SourceLacksBlob):
            return await self._question(target, decode_tag, QUESTION_S)
        return None

    async def hello(self) -> Hello | None:
        """Ask who it is; None if it is too old to say. Raises `SourceError`."""
        with suppress(SourceLacksBlob):
            return await self._question("hello", decode_hello, HELLO_S)
        return None

    async def claim(self, message: Claims, timeout_s: float) -> Grants:
        """Put claims to it as a coordinator; the answer has a grant for each.

        Raises `SourceError`, `NotCoordinating` if it is too old for that.
        """
        body = encode_claims(message)
        try:
            grants = await self._question("claims", decode_grants, timeout_s, body=body)
        except SourceLacksBlob as error:
            raise NotCoordinating(self.name, "does not coordinate: an older version?") from error
        if len(grants.grants) != len(message.claims):
            answered = f"{len(grants.grants)} grants for {len(message.claims)} claims"
            raise SourceUnavailable(self.name, answered)
        return grants

    async def _question(
        self, target: str, decode: Callable[[bytes], _T], timeout_s: float, *, body: bytes = b""
    ) -> _T:
        """Ask a small question whose answer nothing but the cluster secret can prove."""
        with self._late(timeout_s):
            async with asyncio.timeout(timeout_s):
                response, request_proof = await self._ask(target, NO_PROGRESS_S, body=body)
                answer = await self._body(response, _MAX_SMALL_BODY)
        proof = response.headers.get(_REPLY, "")
        secret = self._secret
        if secret is not None and not check_reply(secret, proof, request_proof, answer):
            raise SourceRefused(self.name, "its answer does not prove the cluster secret")
        try:
            return decode(answer)
        except FormatError as error:
            raise SourceUnavailable(self.name, str(error)) from error

    @contextmanager
    def _late(self, timeout_s: float) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise SourceUnavailable(self.name, f"no answer within {timeout_s} s") from error

    async def _body(self, answer: Answer, limit: int) -> bytes:
        """Read a body of at most *limit* bytes, and close *answer*."""
        blocks: list[bytes] = []
        left = limit
        try:
            while block := await answer.block():
                left -= len(block)
                if left < 0:
                    raise SourceUnavailable(self.name, f"answered with more than {limit} bytes")
                blocks.append(block)
        except OSError as error:
            raise self._unavailable(error) from error
        finally:
            answer.close()
        return b"".join(blocks)

    async def _ask(
        self, target: str, patience_s: float, *, range_header: str = "", body: bytes = b""
    ) -> tuple[Answer, str]:
        """Send a proven request, with *body* as a POST; return the answer and the request's proof.

        Raises `SourceError` unless the answer is a success. It must be closed.
        """
        try:
            answer, proof = await self._send(target, patience_s, range_header, body)
            if answer.status == 401 and self._learn_clock(answer, proof):
                answer.close()
                answer, proof = await self._send(target, patience_s, range_header, body)
            if answer.status in (200, 206):
                return answer, proof
            try:
                raise await self._refusal(answer)
            finally:
                answer.close()
        except (OSError, UnicodeError) as error:  # what a request is spelled of is ASCII
            raise self._unavailable(error) from error

    async def _send(
        self, target: str, patience_s: float, range_header: str, body: bytes
    ) -> tuple[Answer, str]:
        method, path = "POST" if body else "GET", self._base + target
        head = f"{method} {path}{self._head}"
        if range_header:
            head += f"Range: {range_header}\r\n"
        if body:
            head += f"Content-Type: {MEDIA_TYPE}\r\nContent-Length: {len(body)}\r\n"
        proof = ""
        if self._secret is not None:
            now = self._now() + self._clock_ahead_s
            proof = prove_request(self._secret, method, path, range_header, body, now=now)
            head += f"{REQUEST_HEADER}: {proof}\r\n"
        request = f"{head}\r\n".encode("ascii") + body
        return await self._connections.ask(self._place, request, patience_s), proof

    def _unavailable(self, error: OSError | UnicodeError) -> SourceUnavailable:
        return SourceUnavailable(self.name, str(error) or type(error).__name__)

    def _learn_clock(self, answer: Answer, proof: str) -> bool:
        """Take over the time that a refusal tells, if it proves to come from the peer."""
        if self._secret is None:
            return False
        told = check_clock(self._secret, answer.headers.get(_CLOCK, ""), proof)
        if told is None:
            return False
        self._clock_ahead_s = told - self._now()
        return True

    async def _refusal(self, answer: Answer) -> SourceError:
        status = answer.status
        if status == 404:
            return SourceLacksBlob(self.name, "does not hold it")
        if status in (401, 403):
            return SourceRefused(self.name, "refuses us: is the cluster secret the same?")
        if status == 503:
            after = answer.headers.get("retry-after")
            if after is not None or (await answer.block()).startswith(b"busy"):
                return SourceBusy(self.name, "is busy", retry_after_s=_seconds(after))
        return SourceUnavailable(self.name, f"answered {status}")


def address_of(url: str) -> str:
    """Return the HOST:PORT of a peer's *url*: what the member is called."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return str(Address(parts.hostname or "", port))


@lru_cache(maxsize=1024)
def _quoted(cut: str) -> str:
    """Spell the name of a cut as a query's value. Every read of a blob has the same one."""
    return quote(cut, safe="")


def _seconds(retry_after: str | None) -> float | None:
    """Return what a Retry-After header asks for, if that is a number (RFC 9110, section 10.2.3)."""
    text = (retry_after or "").strip()
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        return None
    return min(float(text), _MAX_BUSY_S)


def _media_type(manifest: bytes, claimed: str) -> str:
    """Return a manifest's type: what its bytes say, as the digest proves only them.

    A type decides how a client reads the bytes, so a peer is believed only where they are silent.
    """
    with suppress(FormatError):
        written = parse_manifest(manifest).media_type
        if written in MANIFEST_TYPES:
            return written
    return claimed if claimed.isascii() and claimed.isprintable() else ""
