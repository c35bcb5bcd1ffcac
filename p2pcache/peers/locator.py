"""Where pieces are: from the coordinators, from memory, or by asking around.

Hides claims, zones and members that are not what a coordinator believes. The rules: looking never
fails and soon ends; without other members, or without any coordinator that answers, the upstream is
free; one node of a group, and one of a zone, reads a piece from beyond it, as far as coordinators
can tell; a member that lied is not used, and whoever names it is told.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, cast

from p2pcache.core.bounds import RETRY_S
from p2pcache.core.claims import (
    Claims,
    Cut,
    Grant,
    Grants,
    RegionKey,
    Source,
    region_mask,
    region_pieces,
)
from p2pcache.core.errors import IntegrityError, SourceBusy, SourceError, SourceLacksBlob
from p2pcache.core.layout import PieceMask
from p2pcache.core.model import Digest, Manifest, Repository, Tag
from p2pcache.core.wire import TagNews
from p2pcache.metrics import Metrics
from p2pcache.peers.announcing import Announcer
from p2pcache.peers.asking import Asking
from p2pcache.peers.directory import Contact, Directory, has_others, own_scopes
from p2pcache.peers.posting import Complaints, Posting, Question
from p2pcache.ports import Lead, Located, Offer, Peer, Search

logger = logging.getLogger(__name__)

# What a grant told of holders beyond the pieces that were asked for.
_YOUNG_S: Final = 10.0
_MAX_REGIONS: Final = 4096
_MAX_HOLDERS: Final = 8
# Of a region, to be asked for the same pieces: the first, and a spare.
_ENOUGH_HOLDERS: Final = 2
# A member that failed so often in a row, and is shunned, is more likely gone than slow.
_GONE_FAILURES: Final = 2
_MAX_LIARS: Final = 16


@dataclass(slots=True)
class _Found:
    """What one search has led to so far."""

    leads: list[Lead] = field(default_factory=list)
    retry_s: float = 0.0

    def wait(self, retry_s: float) -> None:
        """Some pieces have no source: ask again after *retry_s*."""
        retry_s = retry_s or RETRY_S
        self.retry_s = min(retry_s, self.retry_s or retry_s)


class Locator:
    """The `Neighbours` of a node. *handle* is its own coordinator; its tasks live in *tasks*.

    *own_id* is what a holding of this node says, should it ask itself unawares.
    """

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        directory: Directory,
        handle: Callable[[Claims], Awaitable[Grants]],
        metrics: Metrics,
        rng: random.Random,
        *,
        own_id: str,
    ) -> None:
        self._directory = directory
        self._metrics = metrics
        self._announcer = Announcer(directory, rng)
        self._posting = Posting(tasks, directory, handle, metrics, self._announcer)
        self._asking = Asking(directory, self.note, own_id)
        self._holders = _Holders(rng)
        self._liars: OrderedDict[str, None] = OrderedDict()

    async def run(self) -> None:
        """Tell the coordinators what is announced, for ever."""
        await self._announcer.run(lambda key: self._posting.send(key, Question()))

    # Where pieces are.

    async def locate(self, search: Search) -> Located:
        """Ask the coordinators where the wanted pieces are."""
        if not has_others(self._directory):
            return Located((), search.wanted, 0.0)
        cut, found = search.cut, _Found()
        self._announcer.note(cut, search.held, search.fetching)
        wants: dict[int, int] = {}
        for index in cut.regions(search.wanted):
            wanted = region_mask(search.wanted, index)
            if not self._remember(search, index, wanted, found):
                wants[index] = wanted
        free: dict[int, int] = {}
        leased: dict[int, int] = {}
        for number, scope in enumerate(own_scopes(self._directory)):
            if number:
                # The leave of a scope is to fetch it from beyond: the coordinators of the next one
                # say from where. If there is none that answers, they are asked in its place.
                wants = {i: free.get(i, 0) | leased.get(i, 0) for i in sorted({*free, *leased})}
                for index in wants:
                    self._announcer.note_far_claim(cut, index, scope)
            free, leased = await self._claim(search, scope, wants, search.lease_limit, found)
        # Without leave, no more than with it: a coordinator may be there again in a moment.
        free = _first(free, max(1, search.lease_limit) - _count(leased))
        self._metrics.unleased_pieces.inc(_count(free))
        upstream = PieceMask(cut.count)
        for index, mask in (*free.items(), *leased.items()):
            upstream |= region_pieces(cut.count, index, mask)
        return Located(found.leads, upstream, found.retry_s)

    def _remember(self, search: Search, index: int, wanted: int, found: _Found) -> bool:
        """Use what is known of holders, if that covers all that is *wanted* of the region."""
        key = RegionKey(search.cut.digest, search.cut.name, index)
        avoid = dict(_in_region(search.failed, index))
        for address, mask in _in_region(search.stalled, index):
            avoid[address] = avoid.get(address, 0) | mask
        holders = self._holders.covering(key, wanted, avoid, self._usable)
        if holders:
            self._announcer.note_sources(search.cut, index, wanted, wanted)
        for peer, mask in holders:
            pieces = region_pieces(search.cut.count, index, mask)
            found.leads.append(Lead(peer, pieces, holds_all=True))
        return bool(holders)

    def _usable(self, address: str) -> Contact | None:
        peer = self._directory.peer(address)
        return peer if peer and peer.record.is_usable(_now()) else None

    async def _claim(
        self, search: Search, scope: str, wants: dict[int, int], limit: int, found: _Found
    ) -> tuple[dict[int, int], dict[int, int]]:
        """Claim what *wants* says of each region; return what is free and what is leased.

        Coordinators that name members which are of no use here are asked a second time, and so are
        those that were allowed fewer leases than others left over.
        """
        free: dict[int, int] = {}
        leased: dict[int, int] = {}
        useless: dict[int, dict[str, int]] = {}
        for is_last in (False, True):
            again: dict[int, int] = {}
            starved: dict[int, int] = {}
            for key, question in self._send(search, scope, wants, limit - _count(leased), useless):
                index, wanted = key.index, question.wanted
                grant = await question.answer
                if grant is None:
                    free[index] = wanted
                    continue
                leased[index] = leased.get(index, 0) | grant.leased & wanted
                sourceless = wanted & ~grant.leased
                sourced, useless[index] = self._take_sources(
                    search.cut, key, sourceless, grant, found
                )
                sourceless &= ~sourced
                lost = sourceless & _union(useless[index].values())
                if lost and not is_last:
                    again[index] = lost
                elif sourceless and question.lease_limit < wanted.bit_count():
                    starved[index] = sourceless
                if sourceless & ~again.get(index, 0):
                    found.wait(grant.retry_s)
            if _count(leased) < limit:
                again.update(starved)
            wants = again
            if not wants:
                break
        return free, {index: mask for index, mask in leased.items() if mask}

    def _send(
        self,
        search: Search,
        scope: str,
        wants: Mapping[int, int],
        limit: int,
        useless: Mapping[int, Mapping[str, int]],
    ) -> list[tuple[RegionKey, Question]]:
        """Send a claim for each region. The first regions may have the leases first."""
        sent = []
        liars = self._shunned_liars()
        for index, wanted in wants.items():
            share = min(max(limit, 0), wanted.bit_count())
            limit -= share
            key = RegionKey(search.cut.digest, search.cut.name, index, scope)
            failed = [*useless.get(index, {}).items(), *_in_region(search.failed, index)]
            failed += ((liar, wanted) for liar in liars)
            question = Question(wanted, share, failed, _in_region(search.stalled, index))
            self._posting.send(key, question)
            sent.append((key, question))
        return sent

    def _take_sources(
        self, cut: Cut, key: RegionKey, wanted: int, grant: Grant, found: _Found
    ) -> tuple[int, dict[str, int]]:
        """Turn sources into leads; return what they cover, and those that are of no use."""
        covered = 0
        of_no_use: dict[str, int] = {}
        good: list[tuple[bool, Contact, Source]] = []
        now = _now()
        for source in grant.sources:
            peer = self._directory.peer(source.address)
            if not source.mask & wanted:
                continue  # another question's, in the same claim
            if peer is None or _is_shunned(peer, now):
                of_no_use[source.address] = of_no_use.get(source.address, 0) | source.mask & wanted
                continue
            good.append((not peer.record.is_usable(now), peer, source))
        # One that has failed a moment ago stands behind the others.
        for _, peer, source in sorted(good, key=lambda item: item[0]):
            mask = source.mask & wanted
            pieces = region_pieces(cut.count, key.index, mask)
            if pieces:
                found.leads.append(Lead(peer, pieces, holds_all=not mask & ~source.held))
                covered |= mask
            self._holders.note(RegionKey(key.digest, key.cut, key.index), source)
        return covered, of_no_use

    def _shunned_liars(self) -> list[str]:
        now = _now()
        liars = []
        for address in list(self._liars):
            peer = self._directory.peer(address)
            if peer is None or peer.record.is_usable(now):
                del self._liars[address]
            else:
                liars.append(address)
        return liars

    # What this node has.

    def announce(self, cut: Cut, held: PieceMask, fetching: PieceMask) -> None:
        """Tell the coordinators, soon, what this node has of a blob and what it is fetching."""
        self._announcer.note(cut, held, fetching)

    def announce_rest(self, cut: Cut, held: PieceMask) -> None:
        """Tell those who were told more that only *held* is left; what is fetched stays so."""
        self._announcer.note_rest(cut, held)

    async def announce_all(self, holdings: Iterable[tuple[Cut, PieceMask]]) -> None:
        """Tell the coordinators all that the store holds, at a pace that leaves them in peace."""
        try:
            await self._announcer.note_all(holdings)
        except Exception:  # a bug ends here, logged: what is read is announced all the same
            logger.exception("announcing.broken")

    # Asking around.

    async def find(self, digest: Digest, wanted: PieceMask | None) -> Sequence[Offer]:
        """Return the peers with something of the blob, best first."""
        return await self._asking.find(digest, wanted)

    async def manifest(self, digest: Digest) -> Manifest | None:
        """Return a manifest that some peer has, its bytes matching *digest*."""
        return await self._asking.manifest(digest)

    async def tag(self, repository: Repository, tag: Tag) -> TagNews | None:
        """Return the freshest memory that a peer has of a tag."""
        return await self._asking.tag(repository, tag)

    def note(self, peer: Peer, outcome: float | SourceError) -> None:
        """Remember a delivery, by its latency in seconds, or a failure."""
        self._directory.note(peer, outcome)
        if isinstance(outcome, float | SourceBusy):
            return
        address = _address(peer)
        self._holders.forget(address)
        if isinstance(outcome, IntegrityError | SourceLacksBlob):
            self._asking.forget(address)
        if isinstance(outcome, IntegrityError):
            self._liars[address] = None
            self._liars.move_to_end(address)
            while len(self._liars) > _MAX_LIARS:
                self._liars.popitem(last=False)


class _Holders:
    """Who holds what of the regions that were claimed a moment ago."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._regions: OrderedDict[RegionKey, dict[str, tuple[int, float]]] = OrderedDict()

    def note(self, key: RegionKey, source: Source) -> None:
        """A coordinator knows that *source* holds something of the region."""
        if not source.held:
            return
        region = self._regions.setdefault(key, {})
        self._regions.move_to_end(key)
        region.pop(source.address, None)
        region[source.address] = (source.held, _now())
        if len(region) > _MAX_HOLDERS:
            del region[next(iter(region))]
        while len(self._regions) > _MAX_REGIONS:
            self._regions.popitem(last=False)

    def forget(self, address: str) -> None:
        """It lacked what it was said to hold, or failed."""
        for region in self._regions.values():
            region.pop(address, None)

    def covering(
        self,
        key: RegionKey,
        wanted: int,
        avoid: Mapping[str, int],
        reach: Callable[[str], Contact | None],
    ) -> list[tuple[Contact, int]]:
        """Return holders of all that is *wanted*, with what each is to be asked for; or none.

        As few as possible first, then a spare.
        """
        since = _now() - _YOUNG_S
        holders: list[tuple[Contact, int]] = []
        for address, (held, at) in self._regions.get(key, {}).items():
            mask = held & wanted & ~avoid.get(address, 0)
            if mask and at >= since and (peer := reach(address)) is not None:
                holders.append((peer, mask))
        # Many readers may know the same holders: they must not all go to the same one.
        self._rng.shuffle(holders)
        holders.sort(key=lambda holder: -holder[1].bit_count())
        chosen: list[tuple[Contact, int]] = []
        covered = 0
        for peer, mask in holders:
            if covered == wanted and len(chosen) >= _ENOUGH_HOLDERS:
                break
            if mask & ~covered or covered == wanted:
                chosen.append((peer, mask))
                covered |= mask
        return chosen if covered == wanted else []


def _union(masks: Iterable[int]) -> int:
    union = 0
    for mask in masks:
        union |= mask
    return union


def _count(masks: Mapping[int, int]) -> int:
    return sum(mask.bit_count() for mask in masks.values())


def _first(masks: Mapping[int, int], count: int) -> dict[int, int]:
    """The first *count* pieces of some regions."""
    first: dict[int, int] = {}
    for index, mask in masks.items():
        kept = mask
        while kept.bit_count() > max(0, count):
            kept ^= 1 << kept.bit_length() - 1
        if kept:
            first[index] = kept
        count -= kept.bit_count()
    return first


def _in_region(peers: Mapping[Peer, PieceMask], index: int) -> Complaints:
    masks = ((_address(peer), region_mask(pieces, index)) for peer, pieces in peers.items())
    return [(address, mask) for address, mask in masks if mask]


def _address(peer: Peer) -> str:
    return cast(Contact, peer).address  # leads and offers name nothing but members


def _is_shunned(peer: Contact, now: float) -> bool:
    """Say whether it lied, or has been silent for longer than a restart takes."""
    record = peer.record
    return not record.is_usable(now) and (record.blames > 0 or record.failures >= _GONE_FAILURES)


def _now() -> float:
    return asyncio.get_running_loop().time()
