"""Asking around: what other nodes hold of a blob, when no coordinator can say.

The rules: asking around never takes longer than one question's patience, and never goes to more
than `MAX_ASKED` peers; what a peer was seen to hold is trusted to be held for a while, because
holdings only grow until a blob is evicted.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from p2pcache.core.errors import SourceError
from p2pcache.core.layout import PieceMask
from p2pcache.core.model import Digest, Manifest, Repository, Tag
from p2pcache.core.wire import Holding, TagNews
from p2pcache.peers.directory import Contact, Directory, some_peers
from p2pcache.ports import Offer

# News this young is not asked for again, whatever it lacks: a burst of reads asks once.
_FRESH_S: Final = 0.2
# News this old is asked for again even if it is enough.
_STALE_S: Final = 30.0
_MAX_BLOBS: Final = 4096


@dataclass(frozen=True, slots=True)
class _News:
    holding: Holding | None
    at: float


class Asking:
    """Asks the members of *directory*. Failures are told to *note*, like those of any read.

    *own_id* recognises this node in an answer, as long as the list does not.
    """

    def __init__(
        self, directory: Directory, note: Callable[[Contact, SourceError], None], own_id: str
    ) -> None:
        self._directory = directory
        self._note = note
        self._own_id = own_id
        self._news: OrderedDict[Digest, dict[str, _News]] = OrderedDict()
        self._asking: dict[Digest, asyncio.Lock] = {}

    async def find(self, digest: Digest, wanted: PieceMask | None) -> Sequence[Offer]:
        """Return the peers with something of the blob, best first."""
        peers = self._peers(digest)
        if not peers:
            return ()
        news = self._news.setdefault(digest, {})
        self._news.move_to_end(digest)
        if _is_worth_asking(peers, news, wanted):
            lock = self._asking.setdefault(digest, asyncio.Lock())
            try:
                async with lock:
                    if _is_worth_asking(peers, news, wanted):
                        await self._ask_around(digest, peers, news)
            finally:
                if not lock.locked():
                    self._asking.pop(digest, None)
        while len(self._news) > _MAX_BLOBS:
            self._news.popitem(last=False)
        offers = [
            (peer, Offer(peer, item.holding))
            for peer in self._peers(digest)  # some may have been found to be down
            if (item := news.get(peer.address)) is not None and item.holding is not None
        ]
        return [offer for _, offer in sorted(offers, key=lambda pair: _expected_wait(pair[0]))]

    def _peers(self, question: object) -> list[Contact]:
        return some_peers(self._directory, str(question))

    async def _ask_around(
        self, digest: Digest, peers: Sequence[Contact], news: dict[str, _News]
    ) -> None:
        now = asyncio.get_running_loop().time()
        known = {peer.address for peer in peers}
        for gone in [address for address in news if address not in known]:
            del news[gone]
        async with asyncio.TaskGroup() as questions:
            for peer in peers:
                if _is_due(news.get(peer.address), now):
                    questions.create_task(self._ask(peer, digest, news))

    async def _ask(self, peer: Contact, digest: Digest, news: dict[str, _News]) -> None:
        try:
            holding = await peer.holding(digest)
        except SourceError as error:
            self._note(peer, error)
            return
        if holding is not None and holding.node == self._own_id:
            holding = None
        news[peer.address] = _News(holding, asyncio.get_running_loop().time())

    async def manifest(self, digest: Digest) -> Manifest | None:
        """Return a manifest that some peer has, its bytes matching *digest*."""
        found: list[Manifest] = []
        done = asyncio.Event()

        async def ask(peer: Contact) -> None:
            try:
                manifest = await peer.manifest(digest)
            except SourceError as error:
                self._note(peer, error)
                return
            if manifest is not None:
                found.append(manifest)
                done.set()

        async def ask_all() -> None:
            async with asyncio.TaskGroup() as questions:
                for peer in self._peers(digest):
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

        async def ask(peer: Contact) -> None:
            try:
                news = await peer.tag(repository, tag)
            except SourceError as error:
                self._note(peer, error)
                return
            if news is not None:
                heard.append(news)

        async with asyncio.TaskGroup() as questions:
            for peer in self._peers(f"{repository}:{tag}"):
                questions.create_task(ask(peer))
        return min(heard, key=lambda news: news.age_s, default=None)

    def forget(self, address: str) -> None:
        """What was heard from this peer of its holdings is old: it lacked what it had said."""
        for news in self._news.values():
            news.pop(address, None)


def _is_worth_asking(
    peers: Sequence[Contact], news: dict[str, _News], wanted: PieceMask | None
) -> bool:
    """Say whether what is known is too little or too old, and someone may know more."""
    now = asyncio.get_running_loop().time()
    if not any(_is_due(news.get(peer.address), now) for peer in peers):
        return False
    if wanted is None:
        return True
    bits = 0
    for peer in peers:
        item = news.get(peer.address)
        if item is None or item.holding is None or now - item.at > _STALE_S:
            continue
        if item.holding.is_whole:
            return False
        if item.holding.held.count == wanted.count:
            bits |= item.holding.held.bits
    return bool(wanted.bits & ~bits)


def _is_due(item: _News | None, now: float) -> bool:
    return item is None or now - item.at > _FRESH_S


def _expected_wait(peer: Contact) -> float:
    return peer.record.latency_s * (1 + peer.reading)
