"""A read-only OCI registry on loopback that counts every body byte it sends.

Hides the pull half of the distribution specification: manifests by tag and digest, blobs, ranges,
error bodies. The rule it keeps: what is counted is what was written to the connection, so a
reader that hangs up early is charged only for what it was sent.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from aiohttp import web

from p2pcache.core.errors import BadRange, RangeNotSatisfiable, RequestError
from p2pcache.core.model import Digest, Tag, parse_reference
from p2pcache.core.ranges import multipart_heads, parse_range

# One write to the connection: small enough that a reader that goes away is noticed soon.
_SLICE: Final = 1 << 18
_MAX_RECORDS: Final = 10_000
_BOUNDARY: Final = "p2pcache-demo-part"
_OCTETS: Final = "application/octet-stream"
# distribution-spec, "Endpoints". The repository name may hold slashes, so it is matched greedily.
_PATH = re.compile(r"/v2/(?P<name>.+)/(?P<kind>manifests|blobs|tags)/(?P<reference>[^/]+)")


@dataclass(frozen=True, slots=True)
class Contents:
    """What one repository of the registry holds."""

    manifests: Mapping[Digest, tuple[str, bytes]]
    """Media type and body of each manifest."""
    tags: Mapping[Tag, Digest]
    blobs: Mapping[Digest, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request gets: the body is the *parts*, one after the other."""

    status: int
    headers: Mapping[str, str]
    parts: Sequence[bytes | memoryview] = field(repr=False, default=())

    @property
    def size(self) -> int:
        """The length of the body."""
        return sum(map(len, self.parts))


@dataclass(slots=True)
class Record:
    """One request, and how much of the answer's body has been sent."""

    phase: str
    method: str
    path: str
    range: str
    status: int = 0
    body_bytes: int = 0


@dataclass(slots=True)
class Tally:
    """What was sent during one phase."""

    requests: int = 0
    body_bytes: int = 0


def answer(
    repositories: Mapping[str, Contents], method: str, path: str, range_header: str
) -> Answer:
    """Decide what the request gets. The body belongs to HEAD too; the caller leaves it out."""
    if method not in {"GET", "HEAD"}:
        return _refuse(405, "UNSUPPORTED", "this registry is read-only")
    if path in {"/v2", "/v2/"}:
        return Answer(200, {"Content-Type": "application/json"}, (b"{}",))
    match = _PATH.fullmatch(path)
    if match is None:
        return _refuse(404, "UNSUPPORTED", "no such endpoint")
    contents = repositories.get(match["name"])
    if contents is None:
        return _refuse(404, "NAME_UNKNOWN", "no such repository")
    if match["kind"] == "tags":
        if match["reference"] != "list":
            return _refuse(404, "UNSUPPORTED", "no such endpoint")
        return _list_tags(match["name"], contents)
    try:
        reference = parse_reference(match["reference"])
    except RequestError as error:
        return _refuse(400, "DIGEST_INVALID", str(error))
    if match["kind"] == "manifests":
        digest = contents.tags.get(reference) if isinstance(reference, Tag) else reference
        if digest is None or digest not in contents.manifests:
            return _refuse(404, "MANIFEST_UNKNOWN", "no such manifest")
        media_type, body = contents.manifests[digest]
        headers = {"Content-Type": media_type, "Docker-Content-Digest": str(digest)}
        return Answer(200, headers, (body,))
    if isinstance(reference, Tag):
        return _refuse(400, "DIGEST_INVALID", "a blob is named by its digest")
    if reference not in contents.blobs:
        return _refuse(404, "BLOB_UNKNOWN", "no such blob")
    return _serve_blob(reference, contents.blobs[reference], range_header)


def _serve_blob(digest: Digest, data: bytes, range_header: str) -> Answer:
    headers = {
        "Content-Type": _OCTETS,
        "Docker-Content-Digest": str(digest),
        "Accept-Ranges": "bytes",
        "ETag": f'"{digest}"',
    }
    view = memoryview(data)
    try:
        wanted = parse_range(range_header, len(data)) if range_header else None
    except RangeNotSatisfiable as error:
        refusal = _refuse(416, "RANGE_INVALID", str(error))
        unsatisfied = {**refusal.headers, "Content-Range": f"bytes */{error.size}"}
        return Answer(416, unsatisfied, refusal.parts)
    except BadRange as error:
        return _refuse(400, "RANGE_INVALID", str(error))
    if wanted is None:
        return Answer(200, headers, (view,))
    bodies = [view[part.start : part.stop] for part in wanted.parts]
    if len(bodies) == 1:
        headers["Content-Range"] = wanted.parts[0].content_range(len(data))
        return Answer(206, headers, bodies)
    heads, end = multipart_heads(wanted.parts, len(data), _BOUNDARY, _OCTETS)
    headers["Content-Type"] = f"multipart/byteranges; boundary={_BOUNDARY}"
    framed = [part for pair in zip(heads, bodies, strict=True) for part in pair]
    return Answer(206, headers, (*framed, end))


def _list_tags(name: str, contents: Contents) -> Answer:
    body = json.dumps({"name": name, "tags": sorted(tag.name for tag in contents.tags)})
    return Answer(200, {"Content-Type": "application/json"}, (body.encode(),))


def _refuse(status: int, code: str, message: str) -> Answer:
    """An error body as the distribution specification words it ("Error Codes")."""
    body = json.dumps({"errors": [{"code": code, "message": message}]})
    return Answer(status, {"Content-Type": "application/json"}, (body.encode(),))


@dataclass(slots=True)
class Registry:
    """Serves *repositories* on 127.0.0.1 while it is entered as an async context manager.

    *delay_s* passes before each answer: a real registry is never as near as loopback. Set `phase`
    to count what follows under another name. Only bodies of manifests and blobs are counted.
    """

    repositories: Mapping[str, Contents]
    delay_s: float = 0.0
    phase: str = ""
    tallies: dict[str, Tally] = field(default_factory=dict)
    records: deque[Record] = field(default_factory=lambda: deque(maxlen=_MAX_RECORDS))
    in_flight: int = 0
    url: str = ""
    _runner: web.ServerRunner | None = None

    async def __aenter__(self) -> Self:
        self._runner = web.ServerRunner(web.Server(self._handle, access_log=None))
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        except BaseException:
            await self._runner.cleanup()
            raise
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def requests(self) -> int:
        """How many requests were begun, in all phases."""
        return sum(tally.requests for tally in self.tallies.values())

    @property
    def total(self) -> int:
        """The body bytes that were sent, in all phases."""
        return sum(tally.body_bytes for tally in self.tallies.values())

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        header = request.headers.get("Range", "")
        record = Record(self.phase, request.method, request.path, header)
        tally = self.tallies.setdefault(self.phase, Tally())
        tally.requests += 1
        self.records.append(record)
        self.in_flight += 1
        try:
            await asyncio.sleep(self.delay_s)
            reply = answer(self.repositories, request.method, request.path, header)
            record.status = reply.status
            return await self._send(request, reply, record, tally)
        finally:
            self.in_flight -= 1

    async def _send(
        self, request: web.BaseRequest, reply: Answer, record: Record, tally: Tally
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=reply.status, headers=reply.headers)
        response.headers["Docker-Distribution-API-Version"] = "registry/2.0"
        response.content_length = reply.size
        counts = reply.status in {200, 206} and _PATH.fullmatch(request.path) is not None
        # A client that hangs up early is not our trouble: mirrors and snapshotters do it.
        with suppress(ConnectionError):
            await response.prepare(request)
            for piece in _slices(reply.parts) if request.method != "HEAD" else ():
                await response.write(piece)
                if counts:
                    record.body_bytes += len(piece)
                    tally.body_bytes += len(piece)
            await response.write_eof()
        return response


def _slices(parts: Sequence[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    for part in parts:
        for start in range(0, len(part), _SLICE):
            yield part[start : start + _SLICE]
