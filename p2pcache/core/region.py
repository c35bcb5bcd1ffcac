"""What a coordinator knows of one region: who holds its pieces, who waits for whom, and how busy
each of them is.

Hides the bookkeeping of the tree. The rules: a waiter and its sources know of each other; a member
stands in the bucket of its load, so that the least busy are found without looking at all; when the
root of a tree ends, whoever waits below it is no source any more; and there are never more than
`MAX_MEMBERS`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from p2pcache.core.bounds import FETCHING_S, HOLDING_S, LEASE_S

MAX_MEMBERS: Final = 512
"""Known in one region. Thousands may ask, but so many are enough to send them to."""
MAX_SOURCES: Final = 32
"""Named in one answer."""

# Waiters that are counted, but not known, by the member that they were sent to.
_MAX_GHOSTS: Final = 1024
# Loads above it are alike. A tree of thousands is some twelve deep.
_MAX_LOAD: Final = 63
# A source of more of the pieces is preferred to one that is less busy by so much: a request costs
# more than a little waiting. More than 2 makes chains out of trees.
_SLACK: Final = 2
# So many that could give everything are compared by how busy they are with other regions.
_ENOUGH: Final = 4
# So many with something to give are compared, if all is to be had from them: it bounds the work.
_MANY: Final = 64


@dataclass(slots=True)
class Lease:
    """Leave to read the pieces in *mask* from the upstream."""

    mask: int
    granted_at: float
    is_observed: bool = True
    """It was granted here, so that its duration is known."""


@dataclass(slots=True, eq=False)
class Known:
    """A member, as far as this region goes. All masks have one bit per piece."""

    address: str
    heard_at: float
    is_told: bool = True
    """It said so itself; else it was heard of by asking around."""
    held: int = 0
    fetching: int = 0
    doubted: int = 0
    """What it is fetching without prospect: its lease lapsed, or it waits for one whose did, or
    somebody found that it does not deliver."""
    leases: list[Lease] = field(default_factory=list)
    sources: dict[Known, int] = field(default_factory=dict)
    """Whom it was sent to, for which pieces."""
    waiters: dict[Known, None] = field(default_factory=dict)
    """Who was sent to it."""
    ghosts: int = 0
    levels: list[int] = field(default_factory=list)
    """Which pieces it gets over one member, over two, and so on: how deep it stands in the tree."""
    bucket: dict[Known, None] | None = None

    @property
    def leased(self) -> int:
        """The pieces that it may read from the upstream."""
        mask = 0
        for lease in self.leases:
            mask |= lease.mask
        return mask

    @property
    def awaited(self) -> int:
        """The pieces for which it was sent to others."""
        mask = 0
        for part in self.sources.values():
            mask |= part
        return mask

    @property
    def load(self) -> int:
        """How long one has to wait for it, roughly: who is served before, and how deep it is."""
        return min(_MAX_LOAD, len(self.waiters) + self.ghosts + len(self.levels))


@dataclass(frozen=True, slots=True)
class Query:
    """Whom *asker* may be sent to, for which pieces."""

    asker: Known
    wanted: int
    own: int = 0
    """The asker has a lease for them: only who holds them is a source."""
    avoid: Mapping[str, int] = field(default_factory=dict)
    below: Mapping[Known, int] = field(default_factory=dict)
    """Who waits for the asker: nobody waits for one who waits for him."""
    doubted: bool = False
    """Doubted members are welcome too."""

    def usable(self, member: Known, left: int) -> int:
        """Those of *left* for which *member* is a source."""
        fetching = member.fetching & ~self.own
        if not self.doubted:
            fetching &= ~member.doubted
        if fetching and self.below:
            fetching &= ~self.below.get(member, 0)
        usable = (member.held | fetching) & left
        if usable and self.avoid:
            usable &= ~self.avoid.get(member.address, 0)
        return usable if member is not self.asker else 0


class Region:
    """The members that have to do with one region. *loads* counts waiters over all regions."""

    def __init__(self, loads: Counter[str]) -> None:
        self._loads = loads
        # In the order in which they were last heard; the first is the first to be forgotten.
        self.members: dict[str, Known] = {}
        self._active: dict[Known, None] = {}
        self.lessees: dict[Known, None] = {}
        self._buckets: list[dict[Known, None]] = []
        self._ghosts: deque[tuple[float, Known]] = deque()

    @property
    def leased(self) -> int:
        """The pieces that somebody may read from the upstream."""
        mask = 0
        for member in self.lessees:
            mask |= member.leased
        return mask

    def offered(self, pieces: int, *, besides: Known) -> int:
        """Those of *pieces* that somebody *besides* has, or is fetching with prospect."""
        left = pieces
        for member in self.members.values():
            if not left:
                break
            if member is not besides:
                left &= ~(member.held | (member.fetching & ~member.doubted))
        return pieces & ~left

    # --- who is known -------------------------------------------------------------------------

    def hear(self, member: Known, now: float) -> None:
        """There is news of *member*, or from it."""
        member.heard_at = now
        if member.address in self.members:
            del self.members[member.address]
            self.members[member.address] = member
        if member in self._active:
            del self._active[member]
            self._active[member] = None

    def enter(self, member: Known) -> bool:
        """Make *member* known if there is room; say whether it is.

        In a full region the least useful one makes room: the deepest fetcher, else the holder that
        was silent longest, but never who has a lease. A mere fetcher is given no room.
        """
        if member.address not in self.members:
            if not member.address or not self._has_room_for(member):
                return False
            self.members[member.address] = member
        return True

    def settle(self, member: Known) -> None:
        """Bring the books in line after a change of *member*. Who has nothing is forgotten."""
        busy = bool(member.fetching or member.sources or member.doubted or member.leases)
        if not (busy or member.held):
            self.remove(member)
        elif self.enter(member):
            _list(self._active, member, listed=busy)
            _list(self.lessees, member, listed=bool(member.leases))
            self._place(member)

    def _has_room_for(self, member: Known) -> bool:
        if len(self.members) < MAX_MEMBERS:
            return True
        if not (member.held or member.leases):
            return False
        fetchers = [m for m in self._active if not m.leases and not m.held]
        if fetchers:
            self.remove(max(fetchers, key=lambda m: len(m.levels) - len(m.waiters)))
            return True
        if not member.leases:
            return False
        # There are fewer pieces, and so fewer leases, than members.
        self.remove(next(m for m in self.members.values() if not m.leases))
        return True

    def remove(self, member: Known) -> None:
        """Forget *member*; those below it lose their prospects."""
        self.orphan(member, ~0)
        for source in list(member.sources):
            self._unlink(member, source)
        for waiter in list(member.waiters):
            self._unlink(waiter, member)
        member.leases.clear()
        member.held = member.fetching = member.doubted = 0
        if member.bucket is not None:
            del member.bucket[member]
            member.bucket = None
        self._active.pop(member, None)
        self.lessees.pop(member, None)
        if self.members.get(member.address) is member:
            del self.members[member.address]

    def clear(self) -> None:
        """Forget everybody."""
        for member in list(self.members.values()):
            self.remove(member)

    def _place(self, member: Known) -> None:
        if not (member.held or member.fetching) or member.address not in self.members:
            target = None
        else:
            load = member.load
            while len(self._buckets) <= load:
                self._buckets.append({})
            target = self._buckets[load]
        if target is not member.bucket:
            if member.bucket is not None:
                del member.bucket[member]
            # At the end: those of one load are handed out in turn.
            if target is not None:
                target[member] = None
            member.bucket = target

    # --- who waits for whom -------------------------------------------------------------------

    def keep_waiting(self, member: Known, pieces: int) -> None:
        """*member* waits for others for no more than *pieces*."""
        for source, part in list(member.sources.items()):
            if part & pieces:
                member.sources[source] = part & pieces
            else:
                self._unlink(member, source)
        member.levels = [level & pieces for level in member.levels]
        _trim(member.levels)

    def send(self, member: Known, source: Known, pieces: int, now: float) -> None:
        """*member* is sent to *source* for *pieces*. If it is not known it is only counted."""
        if member.address not in self.members:
            source.ghosts += 1
            self._ghosts.append((now + FETCHING_S, source))
            if len(self._ghosts) > _MAX_GHOSTS:
                self._lay_ghost()
            self._place(source)
            return
        if source not in member.sources:
            source.waiters[member] = None
            self._loads[source.address] += 1
        member.sources[source] = member.sources.get(source, 0) | pieces
        levels = [pieces & source.held | pieces & ~_union(source.levels)]
        levels += [level & pieces & ~source.held for level in source.levels]
        for depth, level in enumerate(levels[:_MAX_LOAD]):
            if depth == len(member.levels):
                member.levels.append(0)
            member.levels[depth] |= level
        _trim(member.levels)
        self._place(source)
        self._place(member)

    def _unlink(self, member: Known, source: Known) -> None:
        del member.sources[source]
        del source.waiters[member]
        self._loads[source.address] -= 1
        if not self._loads[source.address]:
            del self._loads[source.address]
        self._place(source)

    def _lay_ghost(self) -> None:
        _, source = self._ghosts.popleft()
        source.ghosts -= 1
        self._place(source)

    def below(self, root: Known, pieces: int) -> dict[Known, int]:
        """Who waits for *root*, directly or not, and for which of *pieces*."""
        found: dict[Known, int] = {}
        todo = [(root, pieces)]
        while todo:
            member, part = todo.pop()
            for waiter in member.waiters:
                seen = found.get(waiter, 0)
                through = waiter.sources[member] & part & ~seen
                if through:
                    found[waiter] = seen | through
                    todo.append((waiter, through))
        return found

    def orphan(self, root: Known, pieces: int) -> None:
        """*root* will not deliver *pieces*: who waits for them below it is no source of them."""
        for waiter, lost in self.below(root, pieces).items():
            waiter.doubted |= lost & waiter.fetching

    # --- time ---------------------------------------------------------------------------------

    def expire(self, now: float, max_lease_age_s: float) -> Iterator[Lease]:
        """Forget what was not repeated in time, and yield the leases that lapsed."""
        while self._ghosts and self._ghosts[0][0] <= now:
            self._lay_ghost()
        for member in list(self.lessees):
            silent = now - member.heard_at >= LEASE_S
            lapsed = [
                lease
                for lease in member.leases
                if silent or now - lease.granted_at >= max_lease_age_s
            ]
            for lease in lapsed:
                member.leases.remove(lease)
                member.doubted |= lease.mask
                self.orphan(member, lease.mask)
                yield lease
            if lapsed:
                self.settle(member)
        while self._active and now - (first := next(iter(self._active))).heard_at >= FETCHING_S:
            self.orphan(first, first.fetching & ~first.held)
            first.fetching = first.doubted = 0
            self.keep_waiting(first, 0)
            self.settle(first)
        while self.members:
            oldest = next(iter(self.members.values()))
            if now - oldest.heard_at < HOLDING_S:
                break
            self.remove(oldest)

    # --- whom to ask --------------------------------------------------------------------------

    def choose(self, query: Query) -> tuple[list[tuple[Known, int]], list[tuple[Known, int]]]:
        """Return whom to ask for what, no piece twice, and spares in the same form."""
        left = query.wanted
        picks: list[tuple[Known, int]] = []
        seen: list[tuple[Known, int]] = []
        tier: list[tuple[Known, int]] = []
        last = -1
        covered = whole = 0
        enough = False
        for load, bucket in enumerate(self._buckets):
            if tier and load > last:
                left = self._cover(tier, left, picks)
                tier = []
            if not left:
                break
            for member in bucket:
                usable = query.usable(member, left)
                if not usable:
                    continue
                if not tier:
                    last, covered = load + _SLACK, 0
                tier.append((member, usable))
                seen.append((member, usable))
                covered |= usable
                whole += usable == left
                enough = whole == _ENOUGH or (len(tier) >= _MANY and covered & left == left)
                if enough:
                    break
            # One more than is needed is the spare.
            if enough or whole > 1:
                break
        if tier and left:
            left = self._cover(tier, left, picks)
        spares: list[tuple[Known, int]] = []
        picked = {member for member, _ in picks}
        self._cover([s for s in seen if s[0] not in picked], query.wanted & ~left, spares)
        return picks, spares

    def _cover(
        self, offers: list[tuple[Known, int]], left: int, picks: list[tuple[Known, int]]
    ) -> int:
        """Add to *picks* until *left* is covered; return what is not."""
        offers.sort(
            key=lambda o: (-o[1].bit_count(), o[0].load, not o[0].held, self._loads[o[0].address])
        )
        for member, usable in offers:
            part = usable & left
            if part and len(picks) < MAX_SOURCES:
                picks.append((member, part))
                left &= ~part
                if not left:
                    break
        return left


def _union(masks: list[int]) -> int:
    union = 0
    for mask in masks:
        union |= mask
    return union


def _list(members: dict[Known, None], member: Known, *, listed: bool) -> None:
    if listed:
        members.setdefault(member)
    else:
        members.pop(member, None)


def _trim(levels: list[int]) -> None:
    while levels and not levels[-1]:
        levels.pop()
