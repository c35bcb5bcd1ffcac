"""The fast lane of the peer API: one range of a blob that is held, for a peer that is proven.

While many nodes start one image this is what each asks of the others, thousands of times. All rules
of the ordinary way hold here, too: the secret is proven first, the limits are those of `Uploads`,
and an answer that a peer does not take is an upload until it does, or until it is given up.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from p2pcache.core.credential import REQUEST_HEADER, Verdict, judge_request
from p2pcache.core.model import Digest
from p2pcache.core.oci import OCTET_STREAM
from p2pcache.core.wire import PROTOCOL
from p2pcache.ports import BlobStore
from p2pcache.server.lane import HEADERS, LaneConnection, LaneServer, unusual
from p2pcache.server.uploads import SEND_S, Uploads

# What is held is given whatever the query says of what is not.
_REQUEST = re.compile(
    rb"GET (/p2p/%b/blobs/(sha256:[0-9a-f]{64})(?:\?cut=[A-Za-z0-9%%._~-]{0,768})?)%b"
    % (PROTOCOL.encode("ascii"), HEADERS)
)
_RANGE = re.compile(rb"\r\nRange: (bytes=\d+-\d+)\r\n")
_PROOF = re.compile(rb"\r\n%b: ([ -~]*)\r\n" % REQUEST_HEADER.encode("ascii"), re.IGNORECASE)
_UNUSUAL = unusual()


class PeerPathServer(LaneServer):
    """A server of peers: *handler* is that of the peer API, *uploads* its limits.

    *now* is Unix time.
    """

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        store: BlobStore,
        uploads: Uploads,
        secret: bytes | None,
        *,
        now: Callable[[], float],
    ) -> None:
        # A peer that has been served by another one must not keep its place here.
        super().__init__(handler, store, _Connection, handler_cancellation=True)
        self.uploads = uploads
        self._secret = secret
        self._now = now

    def head_of(self, digest: Digest) -> bytes:
        """Return the constant part of the answers from a blob, the status line first."""
        return f"HTTP/1.1 206 Partial Content\r\nContent-Type: {OCTET_STREAM}\r\n".encode("ascii")

    def is_proven(self, target: bytes, request: bytes) -> bool:
        """Say whether *request* proves the cluster secret, if there is one."""
        if self._secret is None:
            return True
        proof, wanted = _PROOF.search(request), _RANGE.search(request)
        if proof is None or wanted is None:
            return False
        verdict = judge_request(
            self._secret,
            proof[1].decode("ascii").strip(),
            "GET",
            target.decode("ascii"),
            wanted[1].decode("ascii"),
            now=self._now(),
        )
        return verdict is Verdict.PROVEN


class _Connection(LaneConnection):
    """One peer."""

    __slots__ = ("_server", "_slow")

    def __init__(self, server: PeerPathServer, **kwargs: Any) -> None:  # noqa: ANN401 - aiohttp's
        super().__init__(server, **kwargs)
        self._server = server
        self._slow: asyncio.TimerHandle | None = None

    def answer(self, data: bytes) -> bool:
        """Answer a range of a held blob."""
        match = _REQUEST.fullmatch(data)
        if match is None or _UNUSUAL.search(data) is not None:
            return False
        target, digest, first, last = match.groups()
        server = self._server
        if not server.is_proven(target, data):
            return False
        known = server.look_up(digest)
        sent = 0 if known is None else self.send(known, first, last)
        if not sent:
            return False
        server.uploads.note_sent(sent)
        transport = self.transport
        # What the peer did not take is in memory.
        if self._paused and transport is not None:
            server.uploads.begin()
            self._slow = self._loop.call_later(SEND_S, transport.abort)
        return True

    def admit(self, count: int) -> bool:
        """Keep the limits."""
        return self._server.uploads.admit_now(count)

    def take_back(self, count: int) -> None:
        """Give back what was not used of them."""
        self._server.uploads.take_back(count)

    def resume_writing(self) -> None:
        """The peer has taken nearly all."""
        super().resume_writing()
        self._end_upload()

    def connection_lost(self, exc: BaseException | None) -> None:
        """The peer has left."""
        self._end_upload()
        super().connection_lost(exc)

    def _end_upload(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None
            self._server.uploads.end()
