"""The fast lane for the commonest request: one range of a blob that is held.

A lazily started container waits for dozens of such reads, one after the other. They are recognised
in the bytes as they come in and answered in the same call, before aiohttp parses anything; every
other request, and every doubt, goes the ordinary way. The answer is the same, header for header.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any, Final

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from p2pcache.core.errors import RequestError
from p2pcache.core.model import Digest, Repository
from p2pcache.core.oci import OCTET_STREAM, ErrorCode, error_body
from p2pcache.metrics import Metrics
from p2pcache.ports import BlobStore, StoredBlob
from p2pcache.server.file_sending import FileSender

logger = logging.getLogger(__name__)

# A request as every HTTP client writes it; a strange spelling takes the ordinary way. Any other
# byte than these in a header is for aiohttp to judge: it refuses some.
_REQUEST = re.compile(
    rb"GET /v2/([a-z0-9._/-]{1,255})/blobs/(sha256:[0-9a-f]{64})"
    rb"(?:\?ns=([A-Za-z0-9.:-]{1,255}))? HTTP/1\.1\r\n"
    rb"(?:[A-Za-z0-9-]+: [ -~]*\r\n){0,32}?"
    rb"Range: bytes=(\d{1,18})-(\d{1,18})\r\n"
    rb"(?:[A-Za-z0-9-]+: [ -~]*\r\n){0,32}\r\n",
)
_NAMESPACE = re.compile(rb"\r\nOCI-Namespace: ([^\r]*)\r\n", re.IGNORECASE)
# Headers that change what is to be answered, or how: not for this lane.
_UNUSUAL = re.compile(
    rb"\r\n(?:connection|expect|content-length|transfer-encoding|upgrade|te|trailer|if-[a-z-]+"
    rb"|x-dragonfly-registry|sec-[a-z0-9-]+|range:[^\r]*\r\n(?:[^\r]+\r\n)*range"
    rb"|oci-namespace:[^\r]*\r\n(?:[^\r]+\r\n)*oci-namespace):",
    re.IGNORECASE,
)
_END: Final = b"\r\n\r\n"

# 256 ranges of a large blob fit into one header; a longer one is answered with 400.
MAX_HEADER_BYTES: Final = 16 << 10
KEEP_ALIVE_S: Final = 600.0

_MAX_REQUEST: Final = 8192
_MAX_ANSWER: Final = 1 << 20
# Below this, copying costs less than the calls that avoid it.
_MIN_FILE: Final = 16 << 10
_MAX_KNOWN: Final = 4096


class ShortPathServer(web.Server):
    """A low-level aiohttp server whose connections take the fast lane where they can."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        store: BlobStore,
        metrics: Metrics,
        repository_of: Callable[[str | None, str, Digest], Repository | None],
    ) -> None:
        super().__init__(
            handler,
            access_log=None,
            max_field_size=MAX_HEADER_BYTES,
            keepalive_timeout=KEEP_ALIVE_S,
        )
        self.store = store
        self.count_bytes = metrics.served_bytes["local"].inc
        self.count_request = metrics.requests.labels("blob", "206").inc
        self.known: dict[bytes, _Known] = {}
        self._repository_of = repository_of
        self._namespaces: dict[tuple[bytes, bytes], bytes] = {}
        self._second = 0
        self._date = b""

    def __call__(self) -> RequestHandler:
        """Return the protocol of a new connection."""
        return _Connection(self, loop=self._loop, **self._kwargs)

    def look_up(self, name: bytes) -> _Known | None:
        """Return the stored blob of this digest text, if there is one."""
        known = self.known.get(name)
        digest = known.digest if known else Digest.parse(name.decode("ascii"))
        stored = self.store.find(digest)
        if stored is None:
            self.known.pop(name, None)
            return None
        if known is None or known.stored is not stored:
            if len(self.known) >= _MAX_KNOWN:
                self.known.clear()
            known = self.known[name] = _Known(digest, stored)
        return known

    def namespace(self, registry: bytes, name: bytes, digest: Digest) -> bytes | None:
        """Return the answer's header that names the registry; None if the request is not sound."""
        line = self._namespaces.get((registry, name))
        if line is not None:
            return line
        try:
            repository = self._repository_of(
                registry.decode("ascii") or None, name.decode("ascii"), digest
            )
        except RequestError:
            return None
        if repository is None:
            return b""
        line = f"OCI-Namespace: {repository.registry}\r\n".encode("ascii")
        if registry:  # else manifests have told, and may tell otherwise later
            if len(self._namespaces) >= _MAX_KNOWN:
                self._namespaces.clear()
            self._namespaces[registry, name] = line
        return line

    def date(self) -> bytes:
        """The value of a Date header."""
        now = int(time.time())  # noqa: TID251 - the Date header tells the time of day
        if self._second != now:
            self._second = now
            self._date = formatdate(now, usegmt=True).encode("ascii")
        return self._date


class _Known:
    """A blob that was asked for before, with the constant part of its answers."""

    __slots__ = ("digest", "head", "stored")

    def __init__(self, digest: Digest, stored: StoredBlob) -> None:
        self.digest = digest
        self.stored = stored
        self.head = (
            f"HTTP/1.1 206 Partial Content\r\n"
            f"Docker-Distribution-API-Version: registry/2.0\r\n"
            f"Server: p2pcache\r\n"
            f"Content-Type: {OCTET_STREAM}\r\n"
            f"Docker-Content-Digest: {digest}\r\n"
            f'ETag: "{digest}"\r\n'
        ).encode("ascii")


class _Connection(RequestHandler):
    """One client. Idle means that aiohttp waits for a request and has not seen a part of one."""

    __slots__ = ("_lane", "_partial", "_sender")

    def __init__(self, server: ShortPathServer, **kwargs: Any) -> None:  # noqa: ANN401 - aiohttp's
        super().__init__(server, **kwargs)
        self._lane = server
        self._partial = False
        self._sender: FileSender | None = None

    def connection_lost(self, exc: BaseException | None) -> None:
        """Let go of the connection."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Answer here if this is a whole request of the right kind, else pass it on."""
        waiter = self._waiter
        idle = waiter is not None and not waiter.done() and not self._messages
        if idle and not self._partial and self._answer(data):
            return
        super().data_received(data)
        if data:
            # What follows the end of a request is the beginning of another one, or of a body.
            # aiohttp may hold it while it answers: from then on it must see all that comes.
            self._partial = not data.endswith(_END)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what could not be parsed, or a bug: only the second is worth an error's line."""
        if status != 400:
            return super().handle_error(request, status, exc, message)
        logger.debug("request.malformed", extra={"reason": message})
        reason = (message or "malformed").partition("\n")[0][:200]
        response = web.Response(
            status=400,
            body=error_body(ErrorCode.UNSUPPORTED, f"not a request: {reason}"),
            content_type="application/json",
            headers={"Server": "p2pcache"},
        )
        response.force_close()
        return response

    def _answer(self, data: bytes) -> bool:
        if len(data) > _MAX_REQUEST or data.find(_END) != len(data) - 4:
            return False
        match = _REQUEST.fullmatch(data)
        transport = self.transport
        if match is None or transport is None or self._paused or self._close or self._force_close:
            return False
        if _UNUSUAL.search(data) is not None:
            return False
        name, digest, registry, first, last = match.groups()
        lane = self._lane
        known = lane.look_up(digest)
        if known is None:
            return False
        if registry is None:
            named = _NAMESPACE.search(data)
            registry = named[1].strip() if named else b""
        namespace = lane.namespace(registry, name, known.digest)
        if namespace is None:
            return False
        size = known.stored.layout.size
        start, stop = int(first), min(int(last) + 1, size)
        if not 0 < stop - start <= _MAX_ANSWER:
            return False
        file = known.stored.file_held_now(start, stop) if stop - start >= _MIN_FILE else None
        body = known.stored.read_held_now(start, stop) if file is None else None
        if file is None and body is None:
            return False
        head = (
            b"%b%bAccept-Ranges: bytes\r\nContent-Range: bytes %d-%d/%d\r\n"
            b"Content-Length: %d\r\nDate: %b\r\n\r\n"
        ) % (known.head, namespace, start, stop - 1, size, stop - start, lane.date())
        if body is not None:
            transport.writelines((head, body))
        elif file is not None:
            sender = self._sender
            if sender is None:
                sender = self._sender = FileSender(transport)
            if not sender.send(head, file, start, stop - start):
                return False
        lane.count_bytes(stop - start)
        lane.count_request()
        self._next_keepalive_close_time = self._loop.time() + KEEP_ALIVE_S
        return True
