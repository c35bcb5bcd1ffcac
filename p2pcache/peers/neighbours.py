"""A fixed list of peers, and what is known of each.

The rules: a peer that lied is left alone for a growing time, one that failed for moments; asking
around never takes longer than one question's patience; what a peer was seen to hold is trusted to
be held for a while, because holdings only grow until a blob is evicted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import aiohttp

from p2pcache.core.errors import IntegrityError, SourceError, SourceLacksBlob
from p2pcache.core.layout import PieceMask
from p2pcache.core.model import Digest, Manifest, Repository, Tag
from p2pcache.core.wire import Holding, TagNews
from p2pcache.metrics import Metrics
from p2pcache.peers.client import PeerClient
from p2pcache.ports import Offer, Peer

logger = logging.getLogger(__name__)

# News this young is not asked for again, whatever it lacks: a burst of reads asks once.
_FRESH_S: Final = 0.2
# News this old is asked for again even if it is enough.
_STALE_S: Final = 30.0
_MAX_BLOBS: Final = 4096


@dataclass(frozen=True, slots=True)
class _News:
    holding: Holding | None
    at: float


class StaticNeighbours:
    """The peers that ``--peer`` names. *own_id* recognises this node among them."""

    def __init__(
        self,
        urls: Sequence[str],
        own_id: str,
        session: aiohttp.ClientSession,
        secret: bytes | None,
        metrics: Metrics,
        *,
        now: Callable[[], float],
    ) -> None:
        self._own_id = own_id
        self._metrics = metrics
        on_bytes = metrics.fetched_bytes["peer"].inc
        self._peers = [PeerClient(url, session, secret, now, on_bytes) for url in urls]
        self._news: OrderedDict[Digest, dict[PeerClient, _News]] = OrderedDict()
        self._asking: dict[Digest, asyncio.Lock] = {}

    async def find(self, digest: Digest, wanted: PieceMask | None) -> Sequence[Offer]:
        """Return the peers with something of the blob, best first."""
        if not self._usable():
            return ()
        news = self._news.setdefault(digest, {})
        self._news.move_to_end(digest)
        if self._is_worth_asking(news, wanted):
            lock = self._asking.setdefault(digest, asyncio.Lock())
            try:
                async with lock:
                    if self._is_worth_asking(news, wanted):
                        await self._ask_around(digest, news)
            finally:
                if not lock.locked():
                    self._asking.pop(digest, None)
        while len(self._news) > _MAX_BLOBS:
            self._news.popitem(last=False)
        usable = set(self._usable())
        offers = [
            Offer(peer, item.holding)
            for peer, item in news.items()
            if peer in usable and item.holding is not None
        ]
        return sorted(offers, key=lambda offer: _expected_wait(offer.peer))

    def _usable(self) -> list[PeerClient]:
        now = time.monotonic()
        return [peer for peer in self._peers if not peer.is_myself and peer.record.is_usable(now)]

    def _is_worth_asking(self, news: dict[PeerClient, _News], wanted: PieceMask | None) -> bool:
        """Say whether what is known is too little or too old, and someone may know more."""
        now = time.monotonic()
        usable = self._usable()
        if not any(self._is_due(news.get(peer), now) for peer in usable):
            return False
        if wanted is None:
            return True
        bits = 0
        for peer in usable:
            item = news.get(peer)
            if item is None or item.holding is None or now - item.at > _STALE_S:
                continue
            if item.holding.is_whole:
                return False
            if item.holding.held.count == wanted.count:
                bits |= item.holding.held.bits
        return bool(wanted.bits & ~bits)

    def _is_due(self, item: _News | None, now: float) -> bool:
        return item is None or now - item.at > _FRESH_S

    async def _ask_around(self, digest: Digest, news: dict[PeerClient, _News]) -> None:
        now = time.monotonic()
        async with asyncio.TaskGroup() as questions:
            for peer in self._usable():
                if self._is_due(news.get(peer), now):
                    questions.create_task(self._ask(peer, digest, news))

    async def _ask(self, peer: PeerClient, digest: Digest, news: dict[PeerClient, _News]) -> None:
        try:
            holding = await peer.holding(digest)
        except SourceError as error:
            self.note(peer, error)
            return
        if holding is not None and holding.node == self._own_id:
            peer.is_myself = True
            return
        news[peer] = _News(holding, time.monotonic())

    async def manifest(self, digest: Digest) -> Manifest | None:
        """Return a manifest that some peer has, its bytes matching *digest*."""
        found: list[Manifest] = []
        done = asyncio.Event()

        async def ask(peer: PeerClient) -> None:
            try:
                manifest = await peer.manifest(digest)
            except SourceError as error:
                self.note(peer, error)
                return
            if manifest is not None:
                found.append(manifest)
                done.set()

        async def ask_all() -> None:
            async with asyncio.TaskGroup() as questions:
                for peer in self._usable():
                    questions.create_task(ask(peer))
            done.set()

        async with asyncio.TaskGroup() as race:
            asking = race.create_task(ask_all())
            await done.wait()
            asking.cancel()
        return found[0] if found else None

    async def tag(self, repository: Repository, tag: Tag) -> TagNews | None:
        """Return the freshest memory that a peer has of a tag."""
        heard: list[TagNews] = []

        async def ask(peer: PeerClient) -> None:
            try:
                news = await peer.tag(repository, tag)
            except SourceError as error:
                self.note(peer, error)
                return
            if news is not None:
                heard.append(news)

        async with asyncio.TaskGroup() as questions:
            for peer in self._usable():
                questions.create_task(ask(peer))
        return min(heard, key=lambda news: news.age_s, default=None)

    def note(self, peer: Peer, outcome: float | SourceError) -> None:
        """Remember a delivery, by its latency in seconds, or a failure."""
        if not isinstance(peer, PeerClient):
            raise TypeError(f"not a peer of this list: {peer!r}")
        now = time.monotonic()
        if isinstance(outcome, float):
            peer.record.note_delivery(outcome)
        elif isinstance(outcome, IntegrityError):
            peer.record.note_lie(outcome.reason, now)
            self._metrics.peer_blames.inc()
            logger.warning(
                "peer.blamed",
                extra={
                    "peer": peer.name,
                    "reason": outcome.reason,
                    "blames": peer.record.blames,
                    "shunned_s": round(peer.record.shunned_until - now),
                },
            )
        elif isinstance(outcome, SourceLacksBlob):
            self._forget(peer)  # it evicted something: what we knew of its holdings is old
        else:
            peer.record.note_failure(outcome.reason, now)
            logger.info("peer.failed", extra={"peer": peer.name, "reason": outcome.reason})

    def _forget(self, peer: PeerClient) -> None:
        for news in self._news.values():
            news.pop(peer, None)


def _expected_wait(peer: Peer) -> float:
    assert isinstance(peer, PeerClient)
    return peer.record.latency_s * (1 + peer.reading)
