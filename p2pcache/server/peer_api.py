"""The peer API: what this node tells and gives to other nodes, under ``/p2p/v1/``.

Only what is held is given: nothing is fetched on a peer's behalf, so that requests cannot run in
circles. With a cluster secret every request must prove it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from aiohttp import web

from p2pcache.core.credential import (
    REPLY_HEADER,
    REQUEST_HEADER,
    check_request,
    prove_reply,
)
from p2pcache.core.errors import RangeNotSatisfiable, RequestError, StoreError
from p2pcache.core.layout import LayoutKind
from p2pcache.core.model import Digest, Repository, Tag
from p2pcache.core.oci import OCTET_STREAM
from p2pcache.core.ranges import ByteRange, parse_range
from p2pcache.core.wire import (
    MEDIA_TYPE,
    PROTOCOL,
    Holding,
    TagNews,
    encode_holding,
    encode_tag,
)
from p2pcache.metrics import Metrics
from p2pcache.ports import BlobStore, Memory, StoredBlob

logger = logging.getLogger(__name__)

_BLOCK: Final = 1 << 20
_MAX_UPLOADS: Final = 256
# A peer that takes nothing for so long is gone, or will not miss what it did not take.
_SEND_S: Final = 30.0


class PeerApi:
    """Answers peers. *now* is Unix time."""

    def __init__(
        self,
        node_id: str,
        store: BlobStore,
        memory: Memory,
        metrics: Metrics,
        secret: bytes | None,
        *,
        now: Callable[[], float],
    ) -> None:
        self._node_id = node_id
        self._store = store
        self._memory = memory
        self._metrics = metrics
        self._secret = secret
        self._now = now
        self._uploads = 0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer any request: the handler of a low-level aiohttp server."""
        if not self._is_proven(request):
            return _plain(401, "prove the cluster secret in the header " + REQUEST_HEADER)
        if request.method != "GET":
            return _plain(405, "only GET")
        prefix = f"/p2p/{PROTOCOL}/"
        if not request.path.startswith(prefix):
            return _plain(404, f"this node speaks {prefix}")
        try:
            return await self._answer(request, request.path.removeprefix(prefix).split("/"))
        except RangeNotSatisfiable as error:
            response = _plain(416, str(error))
            response.headers["Content-Range"] = f"bytes */{error.size}"
            return response
        except RequestError as error:
            return _plain(400, str(error))

    def _is_proven(self, request: web.BaseRequest) -> bool:
        if self._secret is None:
            return True
        return check_request(
            self._secret,
            request.headers.get(REQUEST_HEADER, ""),
            request.method,
            request.raw_path,
            request.headers.get("Range", ""),
            now=self._now(),
        )

    async def _answer(self, request: web.BaseRequest, words: list[str]) -> web.StreamResponse:
        match words:
            case ["blobs", digest]:
                return await self._blob(request, Digest.parse(digest))
            case ["blobs", digest, "holding"]:
                return self._holding(request, Digest.parse(digest))
            case ["manifests", digest]:
                manifest = await self._memory.manifest(Digest.parse(digest))
                if manifest is None:
                    return _plain(404, "not held")
                headers = {"Content-Type": manifest.media_type or OCTET_STREAM}
                return web.Response(body=manifest.data, headers=headers)
            case ["tags"]:
                return self._tag(request)
            case _:
                return _plain(404, "no such path")

    def _holding(self, request: web.BaseRequest, digest: Digest) -> web.Response:
        stored = self._store.find(digest)
        if stored is None or not stored.held:
            return _plain(404, "not held")
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

    def _tag(self, request: web.BaseRequest) -> web.Response:
        query = request.query
        repository = Repository.parse(query.get("registry", ""), query.get("name", ""))
        fact = self._memory.tag(repository, Tag.parse(query.get("tag", "")))
        if fact is None:
            return _plain(404, "not known")
        age_s = max(0.0, self._now() - fact.seen_at)
        return self._signed(
            request, encode_tag(TagNews(fact.digest, fact.media_type, fact.size, age_s))
        )

    def _signed(self, request: web.BaseRequest, body: bytes) -> web.Response:
        response = web.Response(body=body, content_type=MEDIA_TYPE)
        if self._secret is not None:
            proof = prove_reply(self._secret, request.headers[REQUEST_HEADER], body)
            response.headers[REPLY_HEADER] = proof
        return response

    async def _blob(self, request: web.BaseRequest, digest: Digest) -> web.StreamResponse:
        stored = self._store.find(digest)
        if stored is None:
            return _plain(404, "not held")
        size = stored.layout.size
        requested = parse_range(request.headers.get("Range", "bytes=0-"), size)
        if requested is None or len(requested.parts) != 1:
            return _plain(400, "ask for one range of bytes")
        part = requested.parts[0]
        if not stored.held.covers(stored.layout.covering(part)):
            return _plain(404, "not all of it is held")
        if self._uploads >= _MAX_UPLOADS:
            return _plain(503, "busy")
        self._uploads += 1
        try:
            with stored.reading():
                return await self._upload(request, stored, part)
        except StoreError as error:
            logger.warning("upload.failed", extra={"digest": str(digest), "reason": str(error)})
            return _plain(404, "no longer held")
        finally:
            self._uploads -= 1

    async def _upload(
        self, request: web.BaseRequest, stored: StoredBlob, part: ByteRange
    ) -> web.StreamResponse:
        headers = {
            "Content-Type": OCTET_STREAM,
            "Content-Range": part.content_range(stored.layout.size),
        }
        data = await _read(stored, part.start, min(part.start + _BLOCK, part.stop))
        self._metrics.peer_served_bytes.inc(len(part))
        if len(data) == len(part):
            return web.Response(status=206, headers=headers, body=data)
        response = web.StreamResponse(status=206, headers=headers)
        response.content_length = len(part)
        position = part.start
        try:
            await response.prepare(request)
            while True:
                async with asyncio.timeout(_SEND_S):
                    await response.write(data)
                position += len(data)
                if position >= part.stop:
                    break
                data = await _read(stored, position, min(position + _BLOCK, part.stop))
        except StoreError as error:
            logger.warning("upload.cut", extra={"reason": str(error)})
            if request.transport is not None:
                request.transport.abort()
        except (ConnectionError, TimeoutError):
            logger.debug("peer.left")
            if request.transport is not None:
                request.transport.abort()
        else:
            await response.write_eof()
        return response


async def _read(stored: StoredBlob, start: int, stop: int) -> bytes:
    data = stored.read_held_now(start, stop)
    return await stored.read(ByteRange(start, stop)) if data is None else data


def _plain(status: int, text: str) -> web.Response:
    return web.Response(status=status, text=text + "\n")
