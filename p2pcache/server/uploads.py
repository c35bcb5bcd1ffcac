"""Bytes for peers: what is held, and what is on its way here.

Hides waiting, limits and the sending of what is longer than one block. The rules: an answer's
headers go out once its first bytes are in hand, so that until then a peer hears quickly that it
must ask elsewhere; an answer that cannot be finished is cut off, never padded; over a limit a peer
is told at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Final, TypeVar, TypeVarTuple, Unpack

from aiohttp import web

from p2pcache.core.bounds import HOLD_S
from p2pcache.core.errors import BadRange, P2PCacheError, RequestError, StoreError
from p2pcache.core.layout import LayoutKind, PieceState
from p2pcache.core.model import Digest, Manifest
from p2pcache.core.oci import OCTET_STREAM
from p2pcache.core.pacing import Saturated
from p2pcache.core.ranges import ByteRange, parse_range
from p2pcache.metrics import Metrics
from p2pcache.pacing import Pacer
from p2pcache.ports import BlobStore, Giver, StoredBlob

logger = logging.getLogger(__name__)

_BLOCK: Final = 1 << 20
# What fits into a connection's buffer is written without waiting for the peer: no upload to count.
_MIN_UPLOAD: Final = 64 << 10
# A peer that takes nothing for so long is gone, or will not miss what it did not take.
SEND_S: Final = 30.0
# The giver gives up after HOLD_S; beyond that it is not waited for, whatever keeps it.
_WAIT_S: Final = HOLD_S + 0.5
# As in `p2pcache.core.claims`.
_MAX_CUT: Final = 255

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class TooBusy(P2PCacheError):
    """A limit of this node is reached: tell the peer at once."""


class Slots:
    """A limit on how many do something at the same time. Nobody waits for a slot."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take a slot for the length of a block. Raises `TooBusy`."""
        if not self.are_left:
            raise TooBusy
        self.take()
        try:
            yield
        finally:
            self.give_back()

    @property
    def are_left(self) -> bool:
        """There is a slot to take."""
        return self._taken < self._limit

    def take(self) -> None:
        """Take a slot. Where no block has its length: else `taken` is safer."""
        self._taken += 1

    def give_back(self) -> None:
        """Give a slot back."""
        self._taken -= 1


class _NotComing(P2PCacheError):
    """A piece that was on its way did not arrive, or may not be given."""


class Uploads:
    """Gives blobs, tables of contents and manifests. Without a *giver* only what is held.

    At most *max_uploads* answers are being sent, and *max_waiting* wait for their first bytes.
    *pacer* limits the bytes a second.
    """

    def __init__(
        self,
        store: BlobStore,
        giver: Giver | None,
        metrics: Metrics,
        *,
        pacer: Pacer,
        max_uploads: int,
        max_waiting: int,
    ) -> None:
        self._pacer = pacer
        self._store = store
        self._giver = giver
        self._metrics = metrics
        self._uploads = Slots(max_uploads)
        self._waiting = Slots(max_waiting)

    async def blob(self, request: web.BaseRequest, digest: Digest) -> web.StreamResponse:
        """Answer with a range of a blob. Raises `RequestError` or `TooBusy`."""
        stored = self._store.find(digest)
        if stored is None:
            return plain(404, "not held")
        layout = stored.layout
        part = _one_range(request, layout.size)
        pieces = layout.covering(part)
        headers = {
            "Content-Type": OCTET_STREAM,
            "Content-Range": part.content_range(layout.size),
        }
        self._refuse_if_over()
        try:
            if stored.held.covers(pieces):
                if len(part) <= _MIN_UPLOAD:
                    if not self._pacer.admit_now(len(part)):
                        raise TooBusy
                    with stored.reading():
                        data = await _read(stored, part.start, part.stop)
                    self._metrics.peer_served_bytes.inc(len(part))
                    return web.Response(status=206, headers=headers, body=data)
                with self._uploads.taken(), stored.reading():
                    async with aclosing(_held_blocks(stored, part)) as blocks:
                        first = await anext(blocks)
                        return await self._send(request, 206, headers, len(part), first, blocks)
            cut = _cut_of(request)
            if cut and self._giver and _will_give(self._giver, stored, cut, pieces):
                with stored.reading():
                    async with aclosing(_coming(self._giver, stored, cut, part)) as blocks:
                        with self._waiting.taken():
                            first = await anext(blocks)
                        with self._uploads.taken():
                            return await self._send(request, 206, headers, len(part), first, blocks)
        except StoreError as error:
            logger.warning("upload.failed", extra={"digest": str(digest), "reason": str(error)})
            return plain(404, "no longer held")
        except _NotComing as error:
            logger.debug("upload.not_coming", extra={"digest": str(digest), "reason": str(error)})
            return plain(404, "it did not come")
        return plain(404, "not all of it is held")

    def admit_now(self, count: int) -> bool:
        """Let an answer of *count* held bytes go, if that takes no waiting.

        False says that it must go the ordinary way, which waits, or says that there are too many.
        """
        if count > _MIN_UPLOAD and (self._pacer.is_limited or not self._uploads.are_left):
            return False
        return not self._pacer.is_over() and self._pacer.admit_now(count)

    async def admit(self, count: int) -> None:
        """Return once an answer of *count* bytes may go, soon. Raises `TooBusy`."""
        self._refuse_if_over()
        try:
            async with asyncio.timeout(_WAIT_S):
                await self._pacer.admit(count)
        except (TimeoutError, Saturated) as error:
            raise TooBusy from error

    def take_back(self, count: int) -> None:
        """What was let go was not sent, and will go the ordinary way."""
        self._pacer.give_back(count)

    def note_sent(self, count: int) -> None:
        """Count what was let go and sent."""
        self._metrics.peer_served_bytes.inc(count)

    def begin(self) -> None:
        """An answer that was let go is not taken at once: it is being sent until `end`."""
        self._uploads.take()

    def end(self) -> None:
        """It was taken, or is given up."""
        self._uploads.give_back()

    async def tail(self, request: web.BaseRequest, digest: Digest) -> web.StreamResponse:
        """Answer with a blob's table of contents and what follows it."""
        toc_digest = Digest.parse(request.query.get("toc", ""))
        self._refuse_if_over()
        data = await self._held_tail(digest, toc_digest)
        if data is None and self._giver is not None:
            data = await self._awaited(self._giver.tail, digest, toc_digest)
        if data is None:
            return plain(404, "not held")
        headers = {"Content-Type": OCTET_STREAM}
        with self._uploads.taken():
            return await self._send(request, 200, headers, len(data), data)

    async def _held_tail(self, digest: Digest, toc_digest: Digest) -> bytes | None:
        stored = self._store.find(digest)
        if stored is None or stored.toc_digest != toc_digest:
            return None
        layout = stored.layout
        last = layout.count - 1
        if layout.kind is not LayoutKind.TOC or not _is_held(stored, last):
            return None
        tail = layout.range_of(last)
        try:
            with stored.reading():
                return await _read(stored, tail.start, tail.stop)
        except StoreError as error:
            logger.warning("upload.failed", extra={"digest": str(digest), "reason": str(error)})
            return None

    def _refuse_if_over(self) -> None:
        if self._pacer.is_over():
            raise TooBusy

    async def manifest(self, digest: Digest) -> Manifest | None:
        """Return a manifest that is being fetched. Raises `TooBusy`."""
        self._refuse_if_over()
        if self._giver is None:
            return None
        return await self._awaited(self._giver.manifest, digest)

    async def _awaited(
        self, ask: Callable[[Unpack[_Ts]], Awaitable[_T | None]], *what: *_Ts
    ) -> _T | None:
        try:
            with self._waiting.taken():
                return await _in_time(ask(*what))
        except _NotComing:
            return None

    async def _send(
        self,
        request: web.BaseRequest,
        status: int,
        headers: dict[str, str],
        length: int,
        block: bytes | memoryview,
        more: AsyncGenerator[bytes | memoryview, None] | None = None,
    ) -> web.StreamResponse:
        """Send *block* and *more*, *length* bytes in all, or cut the connection."""
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = length
        left = length
        step = self._pacer.block if self._pacer.is_limited else _BLOCK
        try:
            await response.prepare(request)
            while True:
                for start in range(0, len(block), step):
                    some = memoryview(block)[start : start + step]
                    async with asyncio.timeout(SEND_S):
                        await self._pacer.admit(len(some))
                    async with asyncio.timeout(SEND_S):
                        await response.write(some)
                    self._metrics.peer_served_bytes.inc(len(some))
                left -= len(block)
                if left <= 0 or more is None:
                    break
                block = await anext(more)
            async with asyncio.timeout(SEND_S):
                await response.write_eof()
        except (StoreError, _NotComing, Saturated) as error:
            logger.info("upload.cut", extra={"reason": str(error)})
            _cut_off(request)
        except (ConnectionError, TimeoutError):
            logger.debug("peer.left")
            _cut_off(request)
        return response


def plain(status: int, text: str) -> web.Response:
    """Return an answer that people may read."""
    return web.Response(status=status, text=text + "\n")


def _one_range(request: web.BaseRequest, size: int) -> ByteRange:
    requested = parse_range(request.headers.get("Range", "bytes=0-"), size)
    if requested is None or len(requested.parts) != 1:
        raise BadRange("ask for one range of bytes")
    return requested.parts[0]


def _cut_of(request: web.BaseRequest) -> str:
    """Return how the peer cuts the blob, "" if it does not want to wait."""
    if not request.query_string:
        return ""
    cut = request.query.get("cut", "")
    if len(cut) > _MAX_CUT:
        raise RequestError("the name of the cut is too long")
    return cut


def _is_held(stored: StoredBlob, piece: int) -> bool:
    return stored.is_whole or stored.state_of(piece) >= PieceState.HELD_UPSTREAM


def _will_give(giver: Giver, stored: StoredBlob, cut: str, pieces: range) -> bool:
    """Say whether all *pieces* that are not held have arrived or are on their way."""
    first: int | None = None
    for piece in (*pieces, pieces.stop):
        if piece == pieces.stop or _is_held(stored, piece):
            if first is not None and not giver.will_give(stored.digest, cut, range(first, piece)):
                return False
            first = None
        elif first is None:
            first = piece
    return True


async def _held_blocks(
    stored: StoredBlob, part: ByteRange
) -> AsyncGenerator[bytes | memoryview, None]:
    for start in range(part.start, part.stop, _BLOCK):
        yield await _read(stored, start, min(start + _BLOCK, part.stop))


async def _coming(
    giver: Giver, stored: StoredBlob, cut: str, part: ByteRange
) -> AsyncGenerator[bytes | memoryview, None]:
    """Yield the bytes of *part* as its pieces come. Raises `_NotComing` or `StoreError`."""
    layout = stored.layout
    for piece in layout.covering(part):
        place = layout.range_of(piece)
        wanted = place.overlap(part)
        assert wanted is not None
        data = None
        if not _is_held(stored, piece):
            data = await _in_time(giver.piece(stored.digest, cut, piece))
            # Cut otherwise here than there: these would be other bytes than those asked for.
            if data is not None and len(data) != len(place):
                raise _NotComing(f"piece {piece} has another size")
            if data is None and not _is_held(stored, piece):
                raise _NotComing(f"piece {piece} did not come")
        if data is None:
            yield await _read(stored, wanted.start, wanted.stop)
        else:
            yield memoryview(data)[wanted.start - place.start : wanted.stop - place.start]


async def _in_time(coming: Awaitable[_T]) -> _T:
    try:
        async with asyncio.timeout(_WAIT_S):
            return await coming
    except TimeoutError as error:
        raise _NotComing(f"nothing within {_WAIT_S} s") from error


async def _read(stored: StoredBlob, start: int, stop: int) -> bytes:
    data = stored.read_held_now(start, stop)
    return await stored.read(ByteRange(start, stop)) if data is None else data


def _cut_off(request: web.BaseRequest) -> None:
    if request.transport is not None:
        request.transport.abort()
