"""Reading manifests and byte ranges of blobs from registries.

Hides tokens, redirects, retries and everything that registries get wrong. The rules it keeps:
what it returns as a manifest matches its digest; what it yields of a blob is exactly the range
asked for, resumed at the byte reached if a connection breaks; Authorization goes to the
registry's own scheme, host and port and nowhere else; every wait and every body is bounded.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, aclosing, closing, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self, TypeVar

from aiohttp import ClientResponse

from p2pcache.core.errors import (
    BadDigest,
    BadName,
    FormatError,
    IntegrityError,
    SourceBusy,
    SourceLacksBlob,
    SourceRefused,
    SourceUnavailable,
)
from p2pcache.core.model import Descriptor, Digest, Manifest, Reference, Repository, Tag
from p2pcache.core.pacing import Priority
from p2pcache.core.partial import read_delivery
from p2pcache.core.ranges import ByteRange, parse_content_range
from p2pcache.pacing import Pacer
from p2pcache.upstream.auth import Authenticator
from p2pcache.upstream.bounded import BoundedMap
from p2pcache.upstream.credentials import CredentialStore
from p2pcache.upstream.dialogue import REDIRECTS, Dialogue, Question
from p2pcache.upstream.endpoint import Endpoint, UpstreamConfig, check_endpoints
from p2pcache.upstream.intake import Intake
from p2pcache.upstream.transport import (
    READ_AHEAD,
    Deadline,
    HostResting,
    Transport,
    retry_after_s,
)

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

MAX_MANIFEST_BYTES: Final = 16 << 20
MAX_FORWARDED_BYTES: Final = 16 << 20

_REGISTRIES: Final = 256
# A connection that brought this much before it broke was worth having: the count of tries restarts.
_PROGRESS_BYTES: Final = 1 << 20
_FORWARDED_HEADERS: Final = ("Content-Type", "Docker-Content-Digest", "OCI-Filters-Applied")
_FORWARDED_QUERY: Final = frozenset({"n", "last", "artifactType"})


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A registry's answer that is passed on as it is."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


class Upstream:
    """Reads from any registry: the real thing behind `p2pcache.ports.Upstream`.

    An async context manager that owns its connections. *on_bytes* is told of every body byte read
    for a registry, those in vain included, *on_request* of every answer's status; both are called
    with the registry's name and must return at once. *pacer* limits the bytes of all bodies.
    """

    def __init__(
        self,
        config: UpstreamConfig,
        *,
        on_bytes: Callable[[str, int], None] | None = None,
        on_request: Callable[[str, int], None] | None = None,
        pacer: Pacer | None = None,
    ) -> None:
        self._patience = config.patience
        self._on_bytes = on_bytes
        check_endpoints(config)  # a mistake should show at startup, not at the first read
        self._pacer = pacer or Pacer(None)
        # Under a limit what lies in the connections' buffers should be little beside it.
        read_ahead = self._pacer.block if self._pacer.is_limited else READ_AHEAD
        self._transport = Transport(config.patience, config.ca_file, read_ahead=read_ahead)
        auth = Authenticator(self._transport, CredentialStore(config.registry_config))
        self._dialogue = Dialogue(config, self._transport, auth, on_request)
        self._ignores_ranges: BoundedMap[str, bool] = BoundedMap(_REGISTRIES)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._transport)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def manifest(
        self,
        repository: Repository,
        reference: Reference,
        accept: Sequence[str],
        *,
        deadline_s: float | None = None,
    ) -> Manifest:
        """Return a manifest whose bytes match the digest asked for, or the one that came along.

        Raises `SourceLacksBlob`, `SourceRefused`, `SourceUnavailable`, or `IntegrityError` if
        they do not match, or are more than 16 MiB.
        """
        question = Question(repository, f"manifests/{reference}", headers=_accept(accept))
        deadline = self._deadline(deadline_s)
        source = self._dialogue.endpoint(repository.registry).source

        async def attempt() -> Manifest:
            async with self._dialogue.answer(question, deadline) as response:
                _refuse(response, source, expected=(200,))
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise IntegrityError(source, "manifest in an encoding not asked for")
                data = await self._body(response, repository, deadline, MAX_MANIFEST_BYTES)
                named = reference if isinstance(reference, Digest) else _named_digest(response)
                if named is not None and not named.matches(data):
                    raise IntegrityError(source, f"manifest does not match {named}")
                return Manifest(named or Digest.of(data), _media_type(response, source), data)

        return await self._persist(attempt, deadline)

    async def resolve(
        self,
        repository: Repository,
        tag: Tag,
        accept: Sequence[str],
        *,
        deadline_s: float | None = None,
    ) -> Descriptor:
        """Return what *tag* points at now, without reading the manifest if that can be avoided."""
        deadline = self._deadline(deadline_s)
        question = Question(repository, f"manifests/{tag}", method="HEAD", headers=_accept(accept))
        source = self._dialogue.endpoint(repository.registry).source

        async def attempt() -> Descriptor | None:
            async with self._dialogue.answer(question, deadline) as response:
                _refuse(response, source, expected=(200, 400, 405, 501))
                digest, size = _named_digest(response), response.content_length
                if response.status != 200 or digest is None or size is None:
                    return None
                if not response.headers.get("Content-Type"):
                    return None
                return Descriptor(_media_type(response, source), digest, size)

        found = await self._persist(attempt, deadline)
        if found is not None:
            return found
        manifest = await self.manifest(
            repository, tag, accept, deadline_s=max(0.0, deadline.left())
        )
        return Descriptor(manifest.media_type, manifest.digest, len(manifest.data))

    async def blob_size(
        self, repository: Repository, digest: Digest, *, deadline_s: float | None = None
    ) -> int:
        """Return a blob's size in bytes.

        A HEAD goes to the registry alone: the storage behind it signs addresses for GET. If the
        registry redirects or does not say, the first byte is read, and the way there remembered.
        """
        deadline = self._deadline(deadline_s)
        source = self._dialogue.endpoint(repository.registry).source
        head = Question(repository, f"blobs/{digest}", method="HEAD", follow=False)
        probe = Question(repository, f"blobs/{digest}", headers={"Range": "bytes=0-0"}, blob=digest)

        async def ask_head() -> int | None:
            async with self._dialogue.answer(head, deadline) as response:
                _refuse(response, source, expected=(200, 400, 405, 501, *REDIRECTS))
                return response.content_length if response.status == 200 else None

        async def ask_first_byte() -> int:
            async with self._dialogue.answer(probe, deadline) as response:
                _refuse(response, source, expected=(200, 206, 416))
                content_range = response.headers.get("Content-Range", "")
                if response.status == 200 and response.content_length is not None:
                    return response.content_length
                if response.status == 416 and content_range == "bytes */0":
                    return 0
                try:
                    return parse_content_range(content_range)[1]
                except FormatError as error:
                    raise IntegrityError(source, f"size unknown: {error}") from error

        size = await self._persist(ask_head, deadline)
        return await self._persist(ask_first_byte, deadline) if size is None else size

    async def read(
        self,
        repository: Repository,
        digest: Digest,
        part: ByteRange,
        size: int,
        *,
        deadline_s: float | None = None,
        priority: Priority = Priority.DEMAND,
        pausing: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> AsyncGenerator[bytes, None]:
        """Yield exactly the bytes of *part* of a blob of *size* bytes, unproven, in blocks.

        Whoever may stop early wraps it in `contextlib.aclosing`, which ends the request. A body
        that breaks off is resumed; a registry that ignores ranges is read from the start, and the
        bytes before *part* dropped. *pausing* is entered whenever it waits for the limit of this
        node rather than for the registry; that takes nothing off the time for the read, unless
        the caller gave it. Raises `SourceLacksBlob`, `SourceRefused`, `SourceUnavailable`, or
        `IntegrityError` if the answer contradicts *part* or *size*.
        """
        if part.stop > size:
            raise ValueError(f"{part} reaches past {size} bytes")
        patience = self._patience
        slack_s = len(part) / patience.slowest_bytes_per_s if deadline_s is None else 0.0
        firm = deadline_s is not None
        intake = Intake(
            self._pacer,
            self._dialogue.endpoint(repository.registry).source,
            self._deadline(deadline_s).later(slack_s),
            firm=firm,
            priority=priority,
            pausing=pausing,
        )
        position, tried = part.start, 0
        with closing(intake):
            while position < part.stop:
                began_at, wanted = position, ByteRange(position, part.stop)
                # Small reads fit into the buffers on the way: their turn comes before the request.
                await intake.room(len(wanted))
                question = Question(
                    repository,
                    f"blobs/{digest}",
                    headers={"Range": wanted.header},
                    blob=digest,
                    priority=priority,
                )
                try:
                    async with aclosing(
                        self._read_once(question, wanted, size, intake, firm=firm)
                    ) as blocks:
                        async for block in blocks:
                            position += len(block)
                            yield block
                except SourceUnavailable as error:
                    tried = 1 if position - began_at >= _PROGRESS_BYTES else tried + 1
                    await self._pause(error, tried, intake.deadline)

    async def forward(
        self,
        repository: Repository,
        kind: str,
        query: Sequence[tuple[str, str]] = (),
        accept: Sequence[str] = (),
        *,
        deadline_s: float | None = None,
    ) -> Forwarded:
        """Return the registry's answer to ``tags/list`` or ``referrers/DIGEST``, as it is.

        Of *query* only the parameters that the distribution spec knows are sent. Links to further
        pages are made relative, so that a client follows them to the mirror. Raises `BadName` for
        another *kind*; `SourceRefused` and `SourceUnavailable`, not for 404.
        """
        if kind != "tags/list":
            head, slash, digest = kind.partition("/")
            if head != "referrers" or not slash:
                raise BadName("list to forward", kind)
            Digest.parse(digest)
        known = tuple(pair for pair in query if pair[0] in _FORWARDED_QUERY)
        question = Question(repository, kind, headers=_accept(accept), query=known)
        deadline = self._deadline(deadline_s)
        endpoint = self._dialogue.endpoint(repository.registry)

        async def attempt() -> Forwarded:
            async with self._dialogue.answer(question, deadline) as response:
                if response.status in (401, 403, 429) or response.status >= 500:
                    _refuse(response, endpoint.source, expected=())
                headers = {
                    name: response.headers[name]
                    for name in _FORWARDED_HEADERS
                    if name in response.headers
                }
                if "Link" in response.headers:
                    headers["Link"] = _relative(endpoint, response.headers["Link"])
                data = await self._body(response, repository, deadline, MAX_FORWARDED_BYTES)
                return Forwarded(response.status, headers, data)

        return await self._persist(attempt, deadline)

    async def _read_once(
        self, question: Question, wanted: ByteRange, size: int, intake: Intake, *, firm: bool
    ) -> AsyncGenerator[bytes, None]:
        """Yield what one answer brings of the *wanted* bytes: all of them, or fewer."""
        repository = question.repository
        source = self._dialogue.endpoint(repository.registry).source
        async with self._dialogue.answer(question, intake.deadline) as response:
            _refuse(response, source, expected=(200, 206))
            try:
                delivery = read_delivery(
                    response.status,
                    response.headers.get("Content-Range"),
                    response.content_length,
                    wanted,
                    size,
                )
            except FormatError as error:
                raise IntegrityError(source, str(error)) from error
            if response.status == 200 and wanted != ByteRange(0, size):
                self._note_ignored_range(repository.registry)
                if not firm:
                    slack_s = delivery.skip / self._patience.slowest_bytes_per_s
                    intake.deadline = intake.deadline.later(slack_s)
            skip, left = delivery.skip, len(delivery.part)
            while left:
                most = await intake.room(skip + left)
                block = await self._block(response, repository, intake.deadline, most)
                intake.took(len(block))
                if not block:
                    raise SourceUnavailable(source, f"body ended {left} bytes early")
                skip, block = max(0, skip - len(block)), block[skip:]
                # The end is looked at before the last bytes are handed over: who has them all may
                # go away, and by then the connection should be free for the next request.
                if len(block) >= left and delivery.ends:
                    extra = block[left:] or await self._block(response, repository, intake.deadline)
                    if extra:
                        raise IntegrityError(source, f"body longer than {len(delivery.part)} bytes")
                if block:
                    block = block[:left]
                    left -= len(block)
                    yield block

    # Retries.

    async def _persist(self, attempt: Callable[[], Awaitable[_T]], deadline: Deadline) -> _T:
        """Try until it works, it is no use, or the tries or the time have run out."""
        tried = 0
        while True:
            try:
                return await attempt()
            except SourceUnavailable as error:
                tried += 1
                await self._pause(error, tried, deadline)

    async def _pause(self, error: SourceUnavailable, tried: int, deadline: Deadline) -> None:
        """Wait before the next try, or raise *error* if there should be none."""
        wait_s = self._patience.pause_s * 2 ** (tried - 1) * random.uniform(0.5, 1.5)
        if error.retry_after_s is not None:
            # A little later than allowed, or the gate would still be shut.
            wait_s = max(wait_s, error.retry_after_s + 0.01)
        if (
            tried >= self._patience.attempts
            or isinstance(error, HostResting | SourceBusy)
            or (error.retry_after_s or 0.0) > self._patience.retry_after_s
            or wait_s >= deadline.left()
        ):
            raise error
        logger.debug("upstream.again", extra={"source": error.source, "error": error.reason})
        await asyncio.sleep(wait_s)

    # Small things.

    def _deadline(self, deadline_s: float | None) -> Deadline:
        return Deadline.after(self._patience.total_s if deadline_s is None else deadline_s)

    async def _block(
        self,
        response: ClientResponse,
        repository: Repository,
        deadline: Deadline,
        most: int | None = None,
    ) -> bytes:
        source = self._dialogue.endpoint(repository.registry).source
        block = await self._transport.block(response, source, deadline, most=most)
        if self._on_bytes is not None and block:
            self._on_bytes(repository.registry, len(block))
        return block

    async def _body(
        self, response: ClientResponse, repository: Repository, deadline: Deadline, limit: int
    ) -> bytes:
        source = self._dialogue.endpoint(repository.registry).source
        intake = Intake(self._pacer, source, deadline, firm=True)
        data = await self._transport.body(response, source, deadline, limit, pay=intake.pay)
        if self._on_bytes is not None:
            self._on_bytes(repository.registry, len(data))
        return data

    def _note_ignored_range(self, registry: str) -> None:
        if self._ignores_ranges.get(registry) is None:
            self._ignores_ranges.put(registry, True)
            logger.warning("upstream.range_ignored", extra={"registry": registry})


def _refuse(response: ClientResponse, source: str, *, expected: Sequence[int]) -> None:
    """Raise the error that the status calls for, unless it is *expected*."""
    status = response.status
    if status in expected:
        return
    text = f"answered {status}"
    if status in (404, 410):
        raise SourceLacksBlob(source, text)
    if status == 416:
        raise IntegrityError(source, "says that a range within the blob is past its end")
    if status in (408, 425, 429) or status >= 500:
        raise SourceUnavailable(source, text, retry_after_s=retry_after_s(response))
    if status >= 400:
        raise SourceRefused(source, text)
    raise SourceUnavailable(source, f"answered {status}, which makes no sense here")


def _accept(media_types: Sequence[str]) -> dict[str, str]:
    return {"Accept": ", ".join(media_types)} if media_types else {}


def _named_digest(response: ClientResponse) -> Digest | None:
    """Return the digest that came along; one of an algorithm that is not known is none."""
    try:
        return Digest.parse(response.headers.get("Docker-Content-Digest", ""))
    except BadDigest:
        return None


def _media_type(response: ClientResponse, source: str) -> str:
    text = response.headers.get("Content-Type", "").partition(";")[0].strip()
    if not text:
        raise IntegrityError(source, "manifest without a media type")
    return text


def _relative(endpoint: Endpoint, link: str) -> str:
    """Return a Link header (RFC 8288) that leads to the same path on whoever passes it on."""
    base = str(endpoint.base).rstrip("/")
    path = endpoint.base.raw_path.rstrip("/")
    for prefix in (f"<{base}/v2/", f"<{path}/v2/"):
        if link.startswith(prefix):
            return "</v2/" + link[len(prefix) :]
    return link
