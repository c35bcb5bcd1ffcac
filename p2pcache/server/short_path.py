"""The fast lane for the commonest request: one range of a blob that is held.

A lazily started container waits for dozens of such reads, one after the other. They are recognised
in the bytes as they come in and answered in the same call, before aiohttp parses anything; every
other request, and every doubt, goes the ordinary way. The answer is the same, header for header.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any, Final

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from p2pcache.core.model import Digest
from p2pcache.core.oci import OCTET_STREAM
from p2pcache.metrics import Metrics
from p2pcache.ports import BlobStore, StoredBlob

# A request as every HTTP client writes it; a strange spelling takes the ordinary way.
_REQUEST = re.compile(
    rb"GET /v2/[a-z0-9._/-]{1,255}/blobs/(sha256:[0-9a-f]{64})"
    rb"(?:\?ns=([A-Za-z0-9.:-]{1,255}))? HTTP/1\.1\r\n"
    rb"(?:[^\r]+\r\n)*?Range: bytes=(\d{1,18})-(\d{1,18})\r\n",
)
_NAMESPACE = re.compile(rb"\r\nOCI-Namespace: ([A-Za-z0-9.:-]{1,255})\r\n", re.IGNORECASE)
# Headers that change what is to be answered, or how: not for this lane.
_UNUSUAL = re.compile(
    rb"\r\n(?:connection|expect|content-length|transfer-encoding|if-|range:.*,)", re.IGNORECASE
)
_END: Final = b"\r\n\r\n"

# 256 ranges of a large blob fit into one header; a longer one is answered with 400.
MAX_HEADER_BYTES: Final = 16 << 10
KEEP_ALIVE_S: Final = 600.0

_MAX_REQUEST: Final = 8192
_MAX_ANSWER: Final = 1 << 20
_MAX_KNOWN: Final = 4096


class ShortPathServer(web.Server):
    """A low-level aiohttp server whose connections take the fast lane where they can."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        store: BlobStore,
        metrics: Metrics,
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
            f"Content-Type: {OCTET_STREAM}\r\n"
            f"Docker-Content-Digest: {digest}\r\n"
            f'ETag: "{digest}"\r\n'
            f"Accept-Ranges: bytes\r\n"
        ).encode("ascii")


class _Connection(RequestHandler):
    """One client. Idle means that aiohttp waits for a request and has not seen a part of one."""

    __slots__ = ("_lane", "_partial")

    def __init__(self, server: ShortPathServer, **kwargs: Any) -> None:  # noqa: ANN401 - aiohttp's
        super().__init__(server, **kwargs)
        self._lane = server
        self._partial = False

    def data_received(self, data: bytes) -> None:
        """Answer here if this is a whole request of the right kind, else pass it on."""
        waiter = self._waiter
        idle = waiter is not None and not waiter.done() and not self._messages
        if idle and not self._partial and self._answer(data):
            return
        super().data_received(data)
        self._partial = idle and waiter is not None and not waiter.done()

    def _answer(self, data: bytes) -> bool:
        if len(data) > _MAX_REQUEST or data.find(_END) != len(data) - 4:
            return False
        match = _REQUEST.match(data)
        transport = self.transport
        if match is None or transport is None or self._paused or self._close:
            return False
        if _UNUSUAL.search(data) is not None:
            return False
        name, namespace, first, last = match.groups()
        lane = self._lane
        known = lane.look_up(name)
        if known is None:
            return False
        size = known.stored.layout.size
        start, stop = int(first), min(int(last) + 1, size)
        if not 0 < stop - start <= _MAX_ANSWER:
            return False
        body = known.stored.read_held_now(start, stop)
        if body is None:
            return False
        if namespace is None and (named := _NAMESPACE.search(data)):
            namespace = named[1]
        head = b"%bContent-Range: bytes %d-%d/%d\r\nContent-Length: %d\r\nDate: %b\r\n%b\r\n" % (
            known.head,
            start,
            stop - 1,
            size,
            stop - start,
            lane.date(),
            b"OCI-Namespace: %b\r\n" % namespace.lower() if namespace else b"",
        )
        transport.writelines((head, body))
        lane.count_bytes(stop - start)
        lane.count_request()
        self._next_keepalive_close_time = self._loop.time() + KEEP_ALIVE_S
        return True
