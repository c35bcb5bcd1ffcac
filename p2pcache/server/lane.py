"""The fast lane: answers given in the very call in which a request comes in, ahead of aiohttp.

Hides aiohttp's connection class, which is pinned for that, and the order of requests on one
connection. The rule: only a request that came whole, alone, and while the connection was idle is
looked at here; every other one, and every doubt, goes the ordinary way.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any, Final

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from p2pcache.core.model import Digest
from p2pcache.ports import BlobStore, StoredBlob
from p2pcache.server.file_sending import FileSender

# A request's head, with exactly one Range header of one range, as every HTTP client writes it; a
# strange spelling takes the ordinary way. Any other byte than these in a header is for aiohttp to
# judge: it refuses some.
HEADERS: Final = (
    rb" HTTP/1\.1\r\n"
    rb"(?:[A-Za-z0-9-]+: [ -~]*\r\n){0,32}?"
    rb"Range: bytes=(\d{1,18})-(\d{1,18})\r\n"
    rb"(?:[A-Za-z0-9-]+: [ -~]*\r\n){0,32}\r\n"
)
# Headers that change what is to be answered, or how.
_UNUSUAL: Final = (
    rb"connection|expect|content-length|transfer-encoding|upgrade|te|trailer|if-[a-z-]+"
    rb"|sec-[a-z0-9-]+|range:[^\r]*\r\n(?:[^\r]+\r\n)*range"
)
_END: Final = b"\r\n\r\n"
_MAX_REQUEST: Final = 8192
_MAX_ANSWER: Final = 1 << 20
# Below this, copying costs less than the calls that avoid it.
_MIN_FILE: Final = 16 << 10
_MAX_KNOWN: Final = 4096


def unusual(*also: bytes) -> re.Pattern[bytes]:
    """Return what finds headers that are not for the lane, those that match *also* among them."""
    return re.compile(rb"\r\n(?:" + b"|".join((_UNUSUAL, *also)) + rb"):", re.IGNORECASE)


class Known:
    """A blob that was asked for before, with the constant part of its answers."""

    __slots__ = ("digest", "head", "stored")

    def __init__(self, digest: Digest, stored: StoredBlob, head: bytes) -> None:
        self.digest = digest
        self.stored = stored
        self.head = head


class LaneServer(web.Server):
    """A low-level aiohttp server whose connections take the fast lane where they can.

    *connection* makes their protocols: a subclass of `LaneConnection`.
    """

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        store: BlobStore,
        connection: Callable[..., LaneConnection],
        **settings: Any,  # noqa: ANN401 - aiohttp's
    ) -> None:
        super().__init__(handler, access_log=None, **settings)
        self.store = store
        self.known: dict[bytes, Known] = {}
        self._connection = connection
        self._second = 0
        self._date = b""

    def __call__(self) -> RequestHandler:
        """Return the protocol of a new connection."""
        return self._connection(self, loop=self._loop, **self._kwargs)

    def head_of(self, digest: Digest) -> bytes:
        """Return the constant part of the answers from a blob, the status line first."""
        raise NotImplementedError

    def look_up(self, name: bytes) -> Known | None:
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
            known = self.known[name] = Known(digest, stored, self.head_of(digest))
        return known

    def date(self) -> bytes:
        """The value of a Date header."""
        now = int(time.time())  # noqa: TID251 - the Date header tells the time of day
        if self._second != now:
            self._second = now
            self._date = formatdate(now, usegmt=True).encode("ascii")
        return self._date


class LaneConnection(RequestHandler):
    """One client. Idle means that aiohttp waits for a request and has not seen a part of one."""

    __slots__ = ("_partial", "_sender", "lane")

    def __init__(self, server: LaneServer, **kwargs: Any) -> None:  # noqa: ANN401 - aiohttp's
        super().__init__(server, **kwargs)
        self.lane = server
        self._partial = False
        self._sender: FileSender | None = None

    def answer(self, data: bytes) -> bool:
        """Answer the request *data* if it is one for the lane; say whether it was."""
        raise NotImplementedError

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
        if (
            idle
            and not self._partial
            and len(data) <= _MAX_REQUEST
            and data.find(_END) == len(data) - 4
            and self.transport is not None
            and not (self._paused or self._close or self._force_close)
            and self.answer(data)
        ):
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
            return
        super().data_received(data)
        if data:
            # What follows the end of a request is the beginning of another one, or of a body.
            # aiohttp may hold it while it answers: from then on it must see all that comes.
            self._partial = not data.endswith(_END)

    def admit(self, count: int) -> bool:
        """Say, just before it is done, whether so many bytes may be sent now."""
        return True

    def take_back(self, count: int) -> None:
        """What was admitted was not sent after all."""

    def send(self, known: Known, first: bytes, last: bytes, more: bytes = b"") -> int:
        """Send the bytes from *first* to *last*, with *more* in the head; return how many.

        None are sent if they are not at hand, or must not be sent now: that takes the ordinary way.
        """
        size = known.stored.layout.size
        start, stop = int(first), min(int(last) + 1, size)
        count = stop - start
        transport = self.transport
        if not 0 < count <= _MAX_ANSWER or transport is None:
            return 0
        file = known.stored.file_held_now(start, stop) if count >= _MIN_FILE else None
        body = known.stored.read_held_now(start, stop) if file is None else None
        if (file is None and body is None) or not self.admit(count):
            return 0
        head = b"%b%bContent-Range: bytes %d-%d/%d\r\nContent-Length: %d\r\nDate: %b\r\n\r\n" % (
            known.head,
            more,
            start,
            stop - 1,
            size,
            count,
            self.lane.date(),
        )
        if body is not None:
            transport.writelines((head, body))
        elif file is not None and not self._send_file(transport, head, file, start, count):
            self.take_back(count)
            return 0
        return count

    def _send_file(
        self, transport: asyncio.Transport, head: bytes, file: int, start: int, count: int
    ) -> bool:
        if self._sender is None:
            try:
                self._sender = FileSender(transport)
            except OSError:  # no descriptor left, or nobody there
                return False
        return self._sender.send(head, file, start, count)
