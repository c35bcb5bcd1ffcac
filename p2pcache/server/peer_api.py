"""The peer API: what this node tells and gives to other nodes, under ``/p2p/v1/``.

Only what is held or on its way is given: nothing is fetched on a peer's behalf, so that requests
cannot run in circles. With a cluster secret every request must prove it, before its body is read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from aiohttp import web

from p2pcache.core.claims import Claims, Grants, decode_claims, encode_grants
from p2pcache.core.credential import (
    CLOCK_HEADER,
    REPLY_HEADER,
    REQUEST_HEADER,
    Verdict,
    judge_request,
    prove_clock,
    prove_reply,
    proves_body,
)
from p2pcache.core.errors import FormatError, RangeNotSatisfiable, RequestError
from p2pcache.core.layout import Layout, LayoutKind, PieceMask
from p2pcache.core.model import Digest, Repository, Tag
from p2pcache.core.oci import OCTET_STREAM
from p2pcache.core.wire import (
    MEDIA_TYPE,
    PROTOCOL,
    Hello,
    Holding,
    TagNews,
    encode_hello,
    encode_holding,
    encode_tag,
)
from p2pcache.metrics import Metrics
from p2pcache.pacing import Pacer
from p2pcache.ports import BlobStore, Giver, Memory
from p2pcache.server.uploads import Slots, TooBusy, Uploads, plain

logger = logging.getLogger(__name__)

MAX_CLAIMS_BODY: Final = 1 << 20
# The body of a claim travels in the packets of its head, or right behind them.
_BODY_S: Final = 2.0
# A claimant has long gone to the next coordinator by then.
_COORDINATE_S: Final = 1.0
_MAX_CLAIMANTS: Final = 1024

_PREFIX: Final = f"/p2p/{PROTOCOL}/"


class Coordination(Protocol):
    """The coordinator's part of this node."""

    def handle(self, message: Claims) -> Awaitable[Grants]:
        """Answer claims with a grant for each, soon. Never fails."""


class PeerApi:
    """Answers peers. *now* is Unix time.

    Without a *giver* it gives only what is held; without *coordination* it coordinates nothing;
    without *hello* it does not say who it is.
    """

    def __init__(
        self,
        node_id: str,
        store: BlobStore,
        memory: Memory,
        metrics: Metrics,
        secret: bytes | None,
        *,
        now: Callable[[], float],
        giver: Giver | None = None,
        coordination: Coordination | None = None,
        hello: Callable[[], Hello] | None = None,
        uploads: Pacer | None = None,
        max_uploads: int = 256,
        max_waiting: int = 512,
    ) -> None:
        self._node_id = node_id
        self._store = store
        self._memory = memory
        self._metrics = metrics
        self._secret = secret
        self._now = now
        self._coordination = coordination
        self._hello = hello
        self.uploads = Uploads(
            store,
            giver,
            metrics,
            pacer=uploads or Pacer(None),
            max_uploads=max_uploads,
            max_waiting=max_waiting,
        )
        self._claimants = Slots(_MAX_CLAIMANTS)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer any request: the handler of a low-level aiohttp server."""
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        if not request.path.startswith(_PREFIX):
            return plain(404, f"this node speaks {_PREFIX}")
        words = request.path.removeprefix(_PREFIX).split("/")
        method = "POST" if words == ["claims"] else "GET"
        if request.method != method:
            response = plain(405, f"only {method}")
            response.headers["Allow"] = method
            return response
        try:
            return await self._answer(request, words)
        except RangeNotSatisfiable as error:
            response = plain(416, str(error))
            response.headers["Content-Range"] = f"bytes */{error.size}"
            return response
        except (RequestError, FormatError) as error:
            return plain(400, str(error))
        except TooBusy:
            self._metrics.peer_busy.inc()
            response = plain(503, "busy")
            # There are other nodes to ask; this one may be free in the next moment.
            response.headers["Retry-After"] = "0"
            return response

    def _refusal(self, request: web.BaseRequest) -> web.Response | None:
        """Return what to say to a request that does not prove the secret; None if it does."""
        if self._secret is None:
            return None
        now = self._now()
        proof = request.headers.get(REQUEST_HEADER, "")
        verdict = judge_request(
            self._secret,
            proof,
            request.method,
            request.raw_path,
            request.headers.get("Range", ""),
            now=now,
        )
        if verdict is Verdict.PROVEN:
            return None
        response = plain(401, "prove the cluster secret in the header " + REQUEST_HEADER)
        if verdict is Verdict.STALE:
            response.headers[CLOCK_HEADER] = prove_clock(self._secret, proof, now=now)
        return response

    async def _answer(self, request: web.BaseRequest, words: list[str]) -> web.StreamResponse:
        match words:
            case ["blobs", digest]:
                return await self.uploads.blob(request, Digest.parse(digest))
            case ["blobs", digest, "holding"]:
                return await self._holding(request, Digest.parse(digest))
            case ["blobs", digest, "tail"]:
                return await self.uploads.tail(request, Digest.parse(digest))
            case ["manifests", digest]:
                return await self._manifest(Digest.parse(digest))
            case ["tags"]:
                return self._tag(request)
            case ["claims"] if self._coordination is not None:
                return await self._claims(request, self._coordination)
            case ["hello"] if self._hello is not None:
                return self._signed(request, encode_hello(self._hello()))
            case _:
                return plain(404, "no such path")

    async def _holding(self, request: web.BaseRequest, digest: Digest) -> web.Response:
        stored = self._store.find(digest)
        if stored is None or not stored.held:
            manifest = await self._memory.manifest(digest)
            if manifest is None:
                return plain(404, "not held")
            size, kind = len(manifest.data), LayoutKind.FIXED
            everything = PieceMask.full(Layout.fixed(size).count)
            holding = Holding(self._node_id, size, kind, None, everything, is_whole=True)
            return self._signed(request, encode_holding(holding))
        layout = stored.layout
        toc_offset = layout.starts[-1] if layout.kind is LayoutKind.TOC else None
        holding = Holding(
            self._node_id,
            layout.size,
            layout.kind,
            toc_offset,
            stored.held,
            stored.is_whole,
            stored.toc_digest,
        )
        return self._signed(request, encode_holding(holding))

    async def _manifest(self, digest: Digest) -> web.Response:
        manifest = await self._memory.manifest(digest) or await self.uploads.manifest(digest)
        if manifest is None:
            return plain(404, "not held")
        await self.uploads.admit(len(manifest.data))
        headers = {"Content-Type": manifest.media_type or OCTET_STREAM}
        return web.Response(body=manifest.data, headers=headers)

    def _tag(self, request: web.BaseRequest) -> web.Response:
        query = request.query
        repository = Repository.parse(query.get("registry", ""), query.get("name", ""))
        fact = self._memory.tag(repository, Tag.parse(query.get("tag", "")))
        if fact is None:
            return plain(404, "not known")
        age_s = max(0.0, self._now() - fact.seen_at)
        return self._signed(
            request, encode_tag(TagNews(fact.digest, fact.media_type, fact.size, age_s))
        )

    async def _claims(self, request: web.BaseRequest, coordination: Coordination) -> web.Response:
        with self._claimants.taken():
            length = request.content_length
            if length is None or length > MAX_CLAIMS_BODY:
                return plain(411 if length is None else 413, f"at most {MAX_CLAIMS_BODY} bytes")
            try:
                async with asyncio.timeout(_BODY_S):
                    body = await request.read()
            except TimeoutError:
                return plain(408, "the body did not come")
            except (ConnectionError, web.RequestPayloadError):
                return plain(400, "the body broke off")
            if self._secret is not None and not proves_body(request.headers[REQUEST_HEADER], body):
                return plain(401, "the proof is for another body")
            message = decode_claims(body)
            try:
                async with asyncio.timeout(_COORDINATE_S):
                    grants = await coordination.handle(message)
            except TimeoutError as error:
                raise TooBusy from error
        return self._signed(request, encode_grants(grants))

    def _signed(self, request: web.BaseRequest, body: bytes) -> web.Response:
        response = web.Response(body=body, content_type=MEDIA_TYPE)
        if self._secret is not None:
            proof = prove_reply(self._secret, request.headers[REQUEST_HEADER], body)
            response.headers[REPLY_HEADER] = proof
        return response
