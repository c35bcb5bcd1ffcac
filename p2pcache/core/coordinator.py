"""The coordinator of a region: who reads its pieces from the upstream, and who asks whom.

Pure: time is an argument, in monotonic seconds of this process; no other clock matters. The rules:

* A piece has at most one live lease. It ends when its holder says that it has the piece, no longer
  mentions it, is silent for `LEASE_S`, or takes much longer than leases usually do.
* Whoever asks for a piece that somebody has, or is getting, is sent there, and is then itself one
  to whom the next are sent: the askers form a tree. Nobody is sent to one who waits for him.
* That holds for one scope. No circle leads through two because a claim in a larger scope tells only
  of what is on its way on that scope's leave or from its sources, not from within a smaller one.
* A claim says everything, so that nothing is lost with what was known here, but some requests.

A waiter is sent to the member with the fewest waiters and the shortest way to the bytes, which
keeps the tree about as deep as the logarithm of its size. One source for all the pieces that are
asked for at once is preferred to several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from p2pcache.core.bounds import MAX_LEASE_AGE_S, MIN_LEASE_AGE_S, RETRY_S
from p2pcache.core.claims import Claim, Grant, RegionKey, Source
from p2pcache.core.region import MAX_MEMBERS, MAX_SOURCES, Known, Lease, Query, Region

# RFC 6298, section 2: the gains of the retransmission timer.
_GAIN: Final = 1 / 8
_DEVIATION_GAIN: Final = 1 / 4


class _Pace:
    """How long leases take, and so how old they may get: after RFC 6298."""

    def __init__(self) -> None:
        self._mean_s = 0.0
        self._deviation_s = 0.0
        self._backoff = 1.0
        self._is_known = False

    def observe(self, duration_s: float) -> None:
        """A lease led to its piece after *duration_s*."""
        off = duration_s - self._mean_s
        if self._is_known:
            self._deviation_s += _DEVIATION_GAIN * (abs(off) - self._deviation_s)
            self._mean_s += _GAIN * off
        else:
            self._mean_s, self._deviation_s = duration_s, duration_s / 2
            self._is_known = True
        self._backoff = 1.0

    def back_off(self) -> None:
        """A lease lapsed. If the upstream got slow for all, the limit must not stay too short."""
        self._backoff = min(2 * self._backoff, MAX_LEASE_AGE_S / MIN_LEASE_AGE_S)

    @property
    def limit_s(self) -> float:
        """The age at which a lease ends."""
        if not self._is_known:
            return MAX_LEASE_AGE_S
        usual = max(MIN_LEASE_AGE_S, self._mean_s + 4 * self._deviation_s)
        return min(MAX_LEASE_AGE_S, self._backoff * usual)


class Coordinator:
    """What one node knows of the regions that it coordinates. All of it may be lost at any time."""

    def __init__(self, *, max_regions: int = 16384, max_nodes: int = 200_000) -> None:
        if max_regions < 1 or max_nodes < MAX_MEMBERS:
            raise ValueError("a coordinator needs room for one region")
        self._max_regions = max_regions
        self._max_nodes = max_nodes
        # In the order in which they were last claimed; the first is the first to be forgotten.
        self._regions: dict[RegionKey, Region] = {}
        self._nodes = 0
        self._loads: Counter[str] = Counter()
        self._pace = _Pace()
        self.granted = 0
        """Pieces leased so far."""
        self.lapsed = 0
        """Leased pieces whose lease lapsed."""

    @property
    def regions(self) -> int:
        """Regions of which anything is known."""
        return len(self._regions)

    @property
    def nodes(self) -> int:
        """Members known, counted in every region."""
        return self._nodes

    def live_leases(self, now: float) -> int:
        """Pieces that somebody may read from the upstream now."""
        for key, region in [item for item in self._regions.items() if item[1].lessees]:
            before = len(region.members)
            self._note_time(region, now)
            self._account(key, region, before)
        return sum(region.leased.bit_count() for region in self._regions.values())

    def is_cold(self, key: RegionKey) -> bool:
        """Say whether nothing is known of the region."""
        return key not in self._regions

    def answer(self, sender: str, claim: Claim, now: float) -> Grant:
        """Take note of what *sender* says, and say what it is to do.

        A sender that cannot be reached, "", gets all that others get, but nobody is sent to it. Its
        leases are not kept: what it reads helps nobody, so that nobody waits for it.
        """
        region = self._region(claim.key)
        before = len(region.members)
        self._note_time(region, now)
        asker = region.members.get(sender) or Known(sender, now)
        self._note_failures(region, asker, claim)
        self._note_statement(region, asker, claim, now)
        grant = self._grant(region, asker, claim, now)
        self._account(claim.key, region, before)
        return grant

    def learn(self, key: RegionKey, address: str, held: int, now: float) -> None:
        """Take note of what others say, or it was asked, that *address* holds.

        What it has claimed itself counts more.
        """
        region = self._region(key)
        before = len(region.members)
        self._note_time(region, now)
        member = region.members.get(address) or Known(address, now, is_told=False)
        if not member.is_told:
            lost = member.held & ~held
            member.held = held
            region.hear(member, now)
            region.settle(member)
            region.orphan(member, lost)
        self._account(key, region, before)

    def forget_member(self, address: str) -> None:
        """*address* is no member any more."""
        for key, region in list(self._regions.items()):
            member = region.members.get(address)
            if member is not None:
                before = len(region.members)
                region.remove(member)
                self._account(key, region, before)

    # --- what a claim says --------------------------------------------------------------------

    def _note_failures(self, region: Region, asker: Known, claim: Claim) -> None:
        for address, mask in claim.failed:
            member = region.members.get(address)
            if member is None or member is asker:
                continue
            lost = (member.held | member.fetching) & mask
            member.held &= ~mask
            # It may say again that it is fetching them; that is then not taken for a lease.
            member.doubted |= lost
            member.fetching &= ~mask
            _end_leases(member, mask)
            region.orphan(member, lost)
            region.settle(member)

    def _note_statement(self, region: Region, asker: Known, claim: Claim, now: float) -> None:
        held = claim.held
        wanted = claim.wanted & ~held
        fetching = claim.fetching & ~held & ~wanted
        self._note_leases(asker, held, fetching | wanted, now)
        lost = (asker.held | asker.fetching) & ~held & ~fetching & ~wanted
        lost |= asker.held & wanted
        region.orphan(asker, lost)
        region.keep_waiting(asker, fetching)
        asker.is_told = True
        asker.held = held
        asker.doubted &= fetching
        adopted = 0
        if not claim.passes_on:
            # What comes from a peer is not given on, and only leases tell what does not.
            fetching &= asker.leased
        elif asker.address:
            adopted = _adoptable(region, asker, fetching)
        asker.fetching = fetching | (asker.leased & wanted)
        if adopted:
            asker.leases.append(Lease(adopted, now, is_observed=False))
        region.hear(asker, now)

    def _note_leases(self, asker: Known, held: int, mentioned: int, now: float) -> None:
        for lease in asker.leases:
            is_done = lease.mask & held and not lease.mask & mentioned
            if is_done and lease.is_observed:
                self._pace.observe(now - lease.granted_at)
        _end_leases(asker, ~mentioned)

    # --- what is answered ---------------------------------------------------------------------

    def _grant(self, region: Region, asker: Known, claim: Claim, now: float) -> Grant:
        wanted = claim.wanted & ~claim.held
        if not wanted:
            region.settle(asker)
            return Grant()
        failed = _by_address(claim.failed)
        avoid = _by_address((*claim.failed, *claim.stalled))
        own = asker.leased & wanted
        below = region.below(asker, wanted) if asker.waiters else {}
        picks, spares = region.choose(Query(asker, wanted, own, avoid, below))
        left = wanted & ~_pieces(picks)

        # Its own leases first: the answer that granted them may have been lost.
        leased = _lowest(own & left, claim.lease_limit)
        free = left & ~own & ~region.leased
        fresh = _lowest(free, claim.lease_limit - leased.bit_count())
        leased |= fresh
        left &= ~leased
        # Better one that is stalled than none, and better one that is doubted.
        for doubted in (False, True):
            if left:
                query = Query(asker, left, avoid=failed, below=below, doubted=doubted)
                more, more_spares = region.choose(query)
                picks += more
                spares += more_spares
                left &= ~_pieces(more)
        self.granted += fresh.bit_count()
        _end_leases(asker, wanted & ~leased)
        if fresh and asker.address:
            asker.leases.append(Lease(fresh, now))
        asker.fetching = asker.fetching & ~wanted | leased
        sent = _send(region, asker, picks[:MAX_SOURCES], claim, now)
        region.orphan(asker, wanted & ~leased & ~_pieces(sent))
        region.settle(asker)
        return Grant(
            leased,
            tuple(
                Source(member.address, part, member.held)
                for member, part in (sent + spares)[:MAX_SOURCES]
            ),
            RETRY_S if wanted & ~leased & ~_pieces(sent) else 0.0,
        )

    # --- bounds -------------------------------------------------------------------------------

    def _region(self, key: RegionKey) -> Region:
        region = self._regions.pop(key, None) or Region(self._loads)
        self._regions[key] = region
        return region

    def _note_time(self, region: Region, now: float) -> None:
        limit_s = self._pace.limit_s
        outlasted = False
        for lease in region.expire(now, limit_s):
            self.lapsed += lease.mask.bit_count()
            outlasted |= now - lease.granted_at >= limit_s
        if outlasted:
            self._pace.back_off()

    def _account(self, key: RegionKey, region: Region, before: int) -> None:
        """Note how many members *region* gained, and forget the oldest regions if need be."""
        self._nodes += len(region.members) - before
        if not region.members:
            del self._regions[key]
        while len(self._regions) > self._max_regions or self._nodes > self._max_nodes:
            oldest = next(iter(self._regions))
            self._nodes -= len(self._regions[oldest].members)
            self._regions.pop(oldest).clear()


def _adoptable(region: Region, asker: Known, fetching: int) -> int:
    """Which of the pieces that *asker* is fetching it seems to read from the upstream.

    Nobody else has them, and it was not sent to anybody for them: another coordinator granted the
    lease, or this one before it forgot everything.
    """
    unknown = fetching & ~asker.doubted & ~asker.leased & ~asker.awaited
    unknown &= ~region.leased
    return unknown & ~region.offered(unknown, besides=asker)


def _send(
    region: Region, asker: Known, picks: list[tuple[Known, int]], claim: Claim, now: float
) -> list[tuple[Known, int]]:
    region.enter(asker)
    # To make room for the asker, one of them may have been forgotten.
    picks = [pick for pick in picks if pick[0].address in region.members]
    for source, part in picks:
        region.send(asker, source, part, now)
        if claim.passes_on:
            asker.fetching |= part
            asker.doubted |= part & source.doubted & ~source.held
    return picks


def _end_leases(member: Known, mask: int) -> None:
    for lease in member.leases:
        lease.mask &= ~mask
    member.leases = [lease for lease in member.leases if lease.mask]


def _pieces(picks: Iterable[tuple[Known, int]]) -> int:
    mask = 0
    for _, part in picks:
        mask |= part
    return mask


def _by_address(complaints: Iterable[tuple[str, int]]) -> dict[str, int]:
    masks: dict[str, int] = {}
    for address, mask in complaints:
        masks[address] = masks.get(address, 0) | mask
    return masks


def _lowest(mask: int, count: int) -> int:
    """The *count* lowest bits of *mask*."""
    if mask.bit_count() <= count:
        return mask
    lowest = 0
    for _ in range(count):
        bit = mask & -mask
        lowest |= bit
        mask ^= bit
    return lowest
