"""The OCI distribution API of the mirror: ``GET`` and ``HEAD`` under ``/v2/``.

OCI distribution-spec 1.1. Two rules of this module: headers go out only when the first bytes are
in hand, because until then a quick 404 lets the client try its next host; and a body that cannot
be finished is cut, never padded or ended early as if complete.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, closing
from types import MappingProxyType
from typing import Final
from uuid import uuid4

from aiohttp import web

from p2pcache.core.errors import (
    BadDigest,
    BadName,
    BadRange,
    BlobUnavailable,
    RangeNotSatisfiable,
    RegistryUnknown,
    RequestError,
)
from p2pcache.core.model import Digest, Reference, Repository, Tag, parse_registry
from p2pcache.core.oci import (
    MANIFEST_TYPES,
    OCTET_STREAM,
    ErrorCode,
    Resource,
    Route,
    error_body,
    parse_path,
)
from p2pcache.core.ranges import ByteRange, multipart_heads, parse_range
from p2pcache.metrics import Metrics
from p2pcache.mirror.active import Origin
from p2pcache.mirror.reading import Segment
from p2pcache.mirror.service import Mirror, OpenBlob
from p2pcache.server.file_sending import FileSender

logger = logging.getLogger(__name__)

_JSON: Final = "application/json"
_API_VERSION: Final = MappingProxyType(
    {"Docker-Distribution-API-Version": "registry/2.0", "Server": "p2pcache"}
)

# Requests being answered at once on one listener; a node's clients have some dozens.
MAX_WAITING: Final = 1024

# A client that takes nothing for so long holds up a place and keeps a blob from eviction.
SEND_S: Final = 120.0

# An answer up to this size is put together first and sent in one write.
_SINGLE_WRITE: Final = 1 << 20
# How much of a file goes out before other connections have a turn: some 100 µs.
_FILE_BLOCK: Final = 1 << 20

# The one table from error to status and code (distribution-spec, "Error Codes").
_ERRORS: Final[tuple[tuple[type[Exception], int, ErrorCode], ...]] = (
    (RangeNotSatisfiable, 416, ErrorCode.SIZE_INVALID),
    (BadRange, 400, ErrorCode.UNSUPPORTED),
    (BadDigest, 400, ErrorCode.DIGEST_INVALID),
    (BadName, 400, ErrorCode.NAME_INVALID),
    (RegistryUnknown, 404, ErrorCode.NAME_UNKNOWN),
    (RequestError, 400, ErrorCode.UNSUPPORTED),
)


class MirrorApi:
    """Answers one listener's requests. *registry* is what clients of this listener mean."""

    def __init__(
        self,
        mirror: Mirror,
        metrics: Metrics,
        registry: str | None = None,
    ) -> None:
        self.mirror = mirror
        self.metrics = metrics
        self._registry = registry
        self._waiting = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer any request: the handler of a low-level aiohttp server."""
        kind = "other"
        started = time.perf_counter()
        response: web.StreamResponse
        self._waiting += 1
        try:
            if request.method not in ("GET", "HEAD"):
                response = _error(405, ErrorCode.UNSUPPORTED, "this is a read-only mirror")
                response.headers["Allow"] = "GET, HEAD"
            elif self._waiting > MAX_WAITING:
                # Not 429: containerd asks the same host six times then, and 503 sends it on.
                response = _error(503, ErrorCode.TOO_MANY_REQUESTS, "too many requests at once")
            elif (route := parse_path(request.path)) is None:
                response = _error(404, ErrorCode.UNSUPPORTED, "no such path; see /v2/")
            else:
                kind = route.resource.value
                response = await self._answer(request, route)
        except RequestError as error:
            response = _refusal(error)
        except BlobUnavailable as error:
            response = _unavailable(error, kind)
        finally:
            self._waiting -= 1
        self.metrics.requests.labels(kind, str(response.status)).inc()
        logger.info(
            "request",
            extra={
                "method": request.method,
                "path": request.raw_path,
                "range": request.headers.get("Range", "")[:200],
                "status": response.status,
                "seconds": round(time.perf_counter() - started, 4),
                "agent": request.headers.get("User-Agent", "")[:100],
            },
        )
        return response

    async def _answer(self, request: web.BaseRequest, route: Route) -> web.StreamResponse:
        if route.resource is Resource.BASE:
            return web.Response(body=b"{}", content_type=_JSON, headers=_API_VERSION)
        repository = self._repository(request, route)
        match route.resource:
            case Resource.BLOB:
                assert isinstance(route.reference, Digest)
                return await self._blob(request, repository, route.reference)
            case Resource.MANIFEST:
                return await self._manifest(request, repository, route)
            case _:
                return await self._forward(request, repository, route)

    def _repository(self, request: web.BaseRequest, route: Route) -> Repository | None:
        """Find out which registry is meant, as the clients differ in how they say it."""
        registry = (
            request.query.get("ns")
            or request.headers.get("OCI-Namespace")
            or request.headers.get("X-Dragonfly-Registry")
        )
        return self.repository_of(registry, route.name, route.reference)

    def repository_of(
        self, registry: str | None, name: str, reference: Reference | None
    ) -> Repository | None:
        """Return the repository called *name*, of the *registry* that the client named if any.

        Raises `RequestError`.
        """
        registry = registry or self._registry
        if registry:
            # Dragonfly's header holds a URL.
            host = registry.removeprefix("https://").removeprefix("http://").rstrip("/")
            return Repository.parse(parse_registry(host), name)
        Repository.parse("unknown", name)
        if isinstance(reference, Digest):
            return self._remembered(reference, name)
        raise RegistryUnknown(
            f"which registry's {name}? add ?ns=HOST, a header OCI-Namespace, or --mirror-for"
        )

    def _remembered(self, digest: Digest, name: str) -> Repository | None:
        """The repository that manifests told of, of the same name if there are several."""
        facts = self.mirror.facts(digest)
        if facts is None or not facts.repositories:
            return None
        same = [known for known in facts.repositories if known.name == name]
        return (same or facts.repositories)[0]

    # -- manifests ---------------------------------------------------------------------------

    async def _manifest(
        self, request: web.BaseRequest, repository: Repository | None, route: Route
    ) -> web.StreamResponse:
        accept = _accepted(request)
        manifests = self.mirror.manifests
        if isinstance(route.reference, Tag):
            assert repository is not None
            if request.method == "HEAD":
                found = await manifests.resolve(repository, route.reference, accept)
                head = _headers(found.digest, found.media_type, repository)
                return _HeadResponse(found.size, head)
            manifest = await manifests.get_tag(repository, route.reference, accept)
        else:
            assert isinstance(route.reference, Digest)
            manifest = await manifests.get(route.reference, repository, accept)
        headers = _headers(manifest.digest, manifest.media_type, repository)
        if request.method == "HEAD":
            return _HeadResponse(len(manifest.data), headers)
        return web.Response(body=manifest.data, headers=headers)

    async def _forward(
        self, request: web.BaseRequest, repository: Repository | None, route: Route
    ) -> web.StreamResponse:
        """Pass referrers and tag lists through: they are the upstream's to say."""
        if repository is None:
            raise RegistryUnknown(f"which registry's {route.name}?")
        path = "tags/list"
        if route.resource is Resource.REFERRERS:
            path = f"referrers/{route.reference}"
        answer = await self.mirror.forward(
            repository, path, tuple(request.query.items()), request.headers.getall("Accept", [])
        )
        headers = {**_API_VERSION, **answer.headers}
        if request.method == "HEAD":
            return _HeadResponse(len(answer.body), headers, answer.status)
        return web.Response(status=answer.status, headers=headers, body=answer.body)

    # -- blobs -------------------------------------------------------------------------------

    async def _blob(
        self, request: web.BaseRequest, repository: Repository | None, digest: Digest
    ) -> web.StreamResponse:
        headers = _headers(digest, OCTET_STREAM, repository) | {"Accept-Ranges": "bytes"}
        if request.method == "HEAD":
            return _HeadResponse(await self.mirror.size_of(digest, repository), headers)
        started = time.perf_counter()
        async with self.mirror.open(digest, repository) as blob:
            header = request.headers.get("Range")
            requested = parse_range(header, blob.size) if header else None
            if requested is None:
                parts = (ByteRange(0, blob.size),) if blob.size else ()
                answer = _Answer(200, headers, blob.size, parts)
            elif len(requested.parts) == 1:
                answer = _partial(requested.parts[0], blob.size, headers)
            else:
                answer = _multipart(requested.parts, blob.size, headers)
            # Whoever takes all of it will check all of it.
            everything = sum(map(len, answer.parts)) >= blob.size
            exact = requested is None or requested.open_ended or everything
            transport = request.transport
            large = len(answer.parts) == 1 and answer.length > _SINGLE_WRITE
            if large and blob.is_whole and transport is not None and not transport.is_closing():
                return await self._send_whole(request, transport, blob, answer, exact=exact)
            return await self._send(request, blob, answer, started, exact=exact)

    async def _send(
        self,
        request: web.BaseRequest,
        blob: OpenBlob,
        answer: _Answer,
        started: float,
        *,
        exact: bool,
    ) -> web.StreamResponse:
        async with aclosing(blob.read(answer.parts, exact=exact)) as segments:
            body = answer.interleave(self._counted(segments, started))
            async with aclosing(body):
                first = await anext(body, b"")
                if answer.length <= _SINGLE_WRITE:
                    blocks = [first] + [block async for block in body]
                    return web.Response(
                        status=answer.status, headers=answer.headers, body=b"".join(blocks)
                    )
                response = web.StreamResponse(status=answer.status, headers=answer.headers)
                response.content_length = answer.length
                try:
                    await response.prepare(request)
                    await _write(response, first)
                    async for block in body:
                        await _write(response, block)
                except BlobUnavailable as error:
                    logger.error("answer.cut", extra={"path": request.path, "reason": str(error)})
                    _cut(request)
                except (ConnectionError, TimeoutError):
                    logger.debug("client.left", extra={"path": request.path})
                    _cut(request)
                    return response
                else:
                    await response.write_eof()
                return response

    async def _send_whole(
        self,
        request: web.BaseRequest,
        transport: asyncio.Transport,
        blob: OpenBlob,
        answer: _Answer,
        *,
        exact: bool,
    ) -> web.StreamResponse:
        """Send a large part of a whole blob, without copying what the page cache has of it."""
        [part] = answer.parts
        position = part.start
        response = web.StreamResponse(status=answer.status, headers=answer.headers)
        response.content_length = answer.length
        count_bytes = self.metrics.served_bytes["local"].inc
        try:
            sender = FileSender(transport)
        except OSError:
            logger.debug("client.left", extra={"path": request.path})
            return response
        with closing(sender):
            try:
                while position < part.stop:
                    stop = min(position + _FILE_BLOCK, part.stop)
                    file = blob.file_now(position, stop) if position > part.start else None
                    if file is None:
                        wanted = (ByteRange(position, stop),)
                        async with aclosing(blob.read(wanted, exact=exact)) as segments:
                            async for segment in segments:
                                if not response.prepared:
                                    await response.prepare(request)
                                    if transport.is_closing():
                                        raise ConnectionResetError
                                    # From now on a drained transport is an empty one.
                                    transport.set_write_buffer_limits(high=0)
                                await _write(response, segment.data)
                                position += len(segment.data)
                                self.metrics.served_bytes[segment.origin.value].inc(
                                    len(segment.data)
                                )
                        async with asyncio.timeout(SEND_S):
                            await request.writer.drain()
                    elif sent := sender.send_some(file, position, stop):
                        position += sent
                        count_bytes(sent)
                        await asyncio.sleep(0)  # a fast client must not keep the loop for itself
                    else:
                        async with asyncio.timeout(SEND_S):
                            await sender.writable()
            except BlobUnavailable as error:
                if not response.prepared:
                    raise
                logger.error("answer.cut", extra={"path": request.path, "reason": str(error)})
                _cut(request)
            except OSError:
                logger.debug("client.left", extra={"path": request.path})
                _cut(request)
            else:
                await response.write_eof()
            finally:
                if not transport.is_closing():  # uvloop refuses this on a closed one
                    transport.set_write_buffer_limits()
        return response

    async def _counted(
        self, segments: AsyncIterator[Segment], started: float
    ) -> AsyncGenerator[bytes, None]:
        served = self.metrics.served_bytes
        waited = False
        async for segment in segments:
            if not waited and segment.origin is not Origin.LOCAL:
                self.metrics.first_byte_s.observe(time.perf_counter() - started)
            waited = True
            served[segment.origin.value].inc(len(segment.data))
            yield segment.data


class _Answer:
    """Status, headers and framing of a blob's answer, before its bytes."""

    def __init__(
        self,
        status: int,
        headers: Mapping[str, str],
        length: int,
        parts: Sequence[ByteRange],
        heads: Sequence[bytes] = (),
        end: bytes = b"",
    ) -> None:
        self.status = status
        self.headers = headers
        self.length = length
        self.parts = parts
        self._heads = heads
        self._end = end

    async def interleave(self, blocks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """Yield the body: *blocks*, with what stands before each part and at the end."""
        if not self._heads:
            async for block in blocks:
                yield block
            return
        # Blocks never span two parts: each part is read to its end before the next begins.
        for part, head in zip(self.parts, self._heads, strict=True):
            left = len(part)
            pending = head
            while left:
                block = await anext(blocks)
                left -= len(block)
                yield pending + block
                pending = b""
        yield self._end


def _partial(part: ByteRange, size: int, headers: Mapping[str, str]) -> _Answer:
    return _Answer(206, {**headers, "Content-Range": part.content_range(size)}, len(part), (part,))


def _multipart(parts: Sequence[ByteRange], size: int, headers: Mapping[str, str]) -> _Answer:
    boundary = uuid4().hex
    heads, end = multipart_heads(parts, size, boundary, OCTET_STREAM)
    length = sum(map(len, heads)) + sum(map(len, parts)) + len(end)
    content_type = f"multipart/byteranges; boundary={boundary}"
    return _Answer(206, {**headers, "Content-Type": content_type}, length, parts, heads, end)


class _HeadResponse(web.Response):
    """An answer to HEAD: it announces a length and sends nothing."""

    def __init__(self, size: int, headers: Mapping[str, str], status: int = 200) -> None:
        super().__init__(status=status, headers={**headers, "Content-Length": str(size)})


def _headers(digest: Digest, media_type: str, repository: Repository | None) -> dict[str, str]:
    headers = {
        **_API_VERSION,
        "Content-Type": media_type or OCTET_STREAM,
        "Docker-Content-Digest": str(digest),
        "ETag": f'"{digest}"',
    }
    if repository is not None:
        headers["OCI-Namespace"] = repository.registry
    return headers


def _accepted(request: web.BaseRequest) -> tuple[str, ...]:
    given = [
        item.strip()
        for line in request.headers.getall("Accept", [])
        for item in line.split(",")
        if item.strip()
    ]
    return tuple(given) or MANIFEST_TYPES


def _error(status: int, code: ErrorCode, message: str) -> web.Response:
    body = error_body(code, message)
    return web.Response(status=status, body=body, content_type=_JSON, headers=_API_VERSION)


def _refusal(error: RequestError) -> web.Response:
    status, code = next((s, c) for kind, s, c in _ERRORS if isinstance(error, kind))
    response = _error(status, code, str(error))
    if isinstance(error, RangeNotSatisfiable):
        response.headers["Content-Range"] = f"bytes */{error.size}"
    return response


def _unavailable(error: BlobUnavailable, kind: str) -> web.Response:
    """404 sends the client to its next host at once; 503 says that asking again may help."""
    unknown = ErrorCode.MANIFEST_UNKNOWN if kind == "manifest" else ErrorCode.BLOB_UNKNOWN
    if error.missing:
        return _error(404, unknown, str(error))
    logger.warning("answer.unavailable", extra={"kind": kind, "reason": str(error)})
    return _error(503, unknown, str(error))


async def _write(response: web.StreamResponse, block: bytes) -> None:
    async with asyncio.timeout(SEND_S):
        await response.write(block)


def _cut(request: web.BaseRequest) -> None:
    """End the connection so that the client sees a body that was cut, not one that ended."""
    if request.transport is not None:
        request.transport.abort()
