"""What this node has to tell the coordinators, and what it has told them.

Hides when news are due. The rules: only what a coordinator does not know yet is told, except that
leases are renewed for as long as the mirror says that bytes flow; what came on a lease is told at
once, what came from peers when there is time for it; what is held is told again now and then, and
soon to a coordinator that has forgotten, or has become one; what a grant allows counts as being
fetched for a moment, until the mirror has had the time to say so itself; and the memory of all this
is bounded.

The coordinators of a group, of a zone and of the whole cluster each see to it that nobody waits for
one who waits for him, but only as far as they know. So those of a larger scope are told of nothing
that is on its way from within a smaller one: the member to whom they send somebody waits for nobody
there, and no circle can lead through two scopes.
"""

from __future__ import annotations

import asyncio
import logging
import random
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from p2pcache.core.bounds import ANNOUNCE_S, FETCHING_S, REANNOUNCE_S, RENEW_S
from p2pcache.core.claims import REGION_PIECES, Claim, Cut, Grant, RegionKey
from p2pcache.core.layout import PieceMask
from p2pcache.core.model import Digest
from p2pcache.peers.directory import Directory, own_scopes
from p2pcache.peers.posting import State

logger = logging.getLogger(__name__)

Send = Callable[[RegionKey], asyncio.Future[Grant | None]]

_MAX_REGIONS: Final = 65_536
# Claims sent at once by one node, every `ANNOUNCE_S`.
_MAX_BURST: Final = 1024
# What is due within so long goes at once: timers fire a little early or late.
_TOGETHER_S: Final = 0.005
# Leases are renewed every `RENEW_S`; what comes from a peer just has to be believed further on. In
# a storm nearly all nodes read from peers, and the coordinator hears each of them this often.
_REMIND_S: Final = 0.6 * FETCHING_S
# What a grant allows counts as being done for so long, until the mirror says so itself.
_GRACE_S: Final = 0.3
# How often the list of members is looked at.
_LOOK_S: Final = 1.0
# News that went to a stand-in, or nowhere, are told again after so long.
_ASTRAY_S: Final = 5.0
# A coordinator that keeps forgetting is told everything again at most this often.
_FORGETFUL_S: Final = 2.0
# When a coordinator changes, all members tell the new one what they hold: spread over a time that
# grows with their number, this is one message of someone every few milliseconds.
_SPREAD_PER_MEMBER_S: Final = 0.003
_MAX_SPREAD_S: Final = 30.0
# News of what came from peers are spread in the same way, as long as the coordinator still believes
# that it is on its way.
_MAX_PUT_OFF_S: Final = 1.0


@dataclass(slots=True)
class _Told:
    """What a coordinator was last told of a region."""

    held: int
    fetching: int
    at: float
    address: str
    is_astray: bool
    """It went to a stand-in."""
    is_forgotten: bool = False
    """It has to be told again."""


@dataclass(slots=True)
class _Ledger:
    """What one coordinator was told."""

    incarnation: str
    due: float
    """When it is told everything again."""
    quiet_until: float = 0.0
    keys: dict[RegionKey, None] = field(default_factory=dict)


@dataclass(slots=True)
class _Far:
    """What concerns the coordinators of a larger scope."""

    claimed: set[int] = field(default_factory=set)
    """The regions that were claimed there, and so are announced there."""
    pieces: int = 0
    """What they, or those of a still larger scope, gave leave or sources for, and those of a
    smaller one have not since."""


@dataclass(slots=True)
class _Known:
    """What this node has of one cut of a blob."""

    cut: Cut
    held: int = 0
    fetching: int = 0
    sourced: int = 0
    """Of what is being fetched, what a peer was named for: no lease is needed for it."""
    far: dict[str, _Far] = field(default_factory=dict)
    """By scope, of those beyond the smallest one."""

    @property
    def weight(self) -> int:
        """How many regions it may take."""
        return -(-self.cut.count // REGION_PIECES)


class Announcer:
    """The book of what is to be told. Whoever sends claims asks it for `state`."""

    def __init__(self, directory: Directory, rng: random.Random) -> None:
        self._directory = directory
        self._rng = rng
        self._known: OrderedDict[tuple[Digest, str], _Known] = OrderedDict()
        self._weight = 0
        self._told: dict[RegionKey, _Told] = {}
        self._ledgers: dict[str, _Ledger] = {}
        self._granted: dict[RegionKey, tuple[int, float]] = {}
        self._due: dict[RegionKey, float] = {}
        self._put_off: dict[RegionKey, float] = {}
        """When news that nobody waits for are told."""
        self._has_room = asyncio.Event()
        self._wake = asyncio.Event()
        self._wakes_at = 0.0
        self._seen_change = directory.changed_at
        self._scopes = own_scopes(directory)

    # What the mirror says.

    def note(self, cut: Cut, held: PieceMask, fetching: PieceMask) -> None:
        """Remember what this node has; see to it that the coordinators are told soon."""
        known = self._open(cut)
        touched = (known.held ^ held.bits) | (known.fetching ^ fetching.bits) | fetching.bits
        known.held, known.fetching = held.bits, fetching.bits
        if not touched:
            return
        now = _now()
        regions = zip(
            region_masks(cut.count, touched),
            region_masks(cut.count, held.bits),
            region_masks(cut.count, fetching.bits),
            strict=True,
        )
        for index, (is_touched, in_held, in_fetching) in enumerate(regions):
            if is_touched:
                for key in self._keys(known, index):
                    due = self._due_at(key, in_held, in_fetching & self._told_to(key, known), now)
                    if due is not None:
                        self._schedule(key, due)

    def note_rest(self, cut: Cut, held: PieceMask) -> None:
        """Some of what this node had is gone, and *held* is left: who was told hears it soon."""
        known = self._known.get((cut.digest, cut.name))
        if known is not None and known.cut.count == cut.count:
            self.note(cut, held, PieceMask(cut.count, known.fetching))

    def note_far_claim(self, cut: Cut, index: int, scope: str) -> None:
        """The region is claimed in a larger scope, so that it is announced there from now on."""
        self._open(cut).far.setdefault(scope, _Far()).claimed.add(index)

    def note_sources(self, cut: Cut, index: int, wanted: int, sourced: int) -> None:
        """Peers were named for *sourced*, out of the *wanted* pieces of a region."""
        known, shift = self._open(cut), index * REGION_PIECES
        known.sourced = known.sourced & ~(wanted << shift) | (sourced << shift)

    async def note_all(self, holdings: Iterable[tuple[Cut, PieceMask]]) -> None:
        """Announce what the store holds, as fast as it can be sent and no faster."""
        for cut, held in holdings:
            if (cut.digest, cut.name) not in self._known:
                self.note(cut, held, PieceMask(cut.count))
            while len(self._due) >= _MAX_BURST:
                self._has_room.clear()
                await self._has_room.wait()
            await asyncio.sleep(0)  # the store may hold thousands of blobs

    def _open(self, cut: Cut) -> _Known:
        name = (cut.digest, cut.name)
        known = self._known.get(name)
        if known is not None and known.cut.count == cut.count:
            self._known.move_to_end(name)
            return known
        if known is not None:
            self._drop(name)
        known = self._known[name] = _Known(cut)
        self._weight += known.weight
        while self._weight > _MAX_REGIONS and len(self._known) > 1:
            self._drop(next(iter(self._known)))
        return known

    def _drop(self, name: tuple[Digest, str]) -> None:
        known = self._known.pop(name)
        self._weight -= known.weight
        for index in range(known.weight):
            for scope in self._scopes:
                key = RegionKey(*name, index, scope)
                self._due.pop(key, None)
                self._put_off.pop(key, None)
                self._granted.pop(key, None)
                self._untell(key)

    def _keys(self, known: _Known, index: int) -> Iterator[RegionKey]:
        for number, scope in enumerate(self._scopes):
            if not number or ((far := known.far.get(scope)) and index in far.claimed):
                yield RegionKey(known.cut.digest, known.cut.name, index, scope)

    def _told_to(self, key: RegionKey, known: _Known) -> int:
        """What is being fetched of a region may be told to these coordinators: this part of it."""
        if key.scope == self._scopes[0]:
            return _REGION
        far = known.far.get(key.scope)
        return far.pieces >> key.index * REGION_PIECES & _REGION if far else 0

    # When it is due.

    def _due_at(self, key: RegionKey, held: int, fetching: int, now: float) -> float | None:
        told = self._told.get(key)
        if told is None:
            return self._news_at(key, held | fetching, now) if held or fetching else None
        if told.is_forgotten:
            return now + ANNOUNCE_S
        if (held, fetching) == (told.held, told.fetching):
            if fetching and now + ANNOUNCE_S >= told.at + self._renew_s(key, fetching):
                return now + ANNOUNCE_S
            return max(now + ANNOUNCE_S, told.at + _ASTRAY_S) if told.is_astray else None
        if (held | fetching) == (told.held | told.fetching) and fetching:
            # Askers are sent here for what is on its way as for what is held: each piece of a
            # region that arrives is no news in itself, but would be one more message of each node.
            return max(now + ANNOUNCE_S, told.at + self._renew_s(key, told.fetching))
        if told.held & ~held or told.fetching & ~(held | fetching):
            return now + ANNOUNCE_S
        news = held & ~told.held | fetching & ~(told.held | told.fetching)
        return self._news_at(key, news, now)

    def _news_at(self, key: RegionKey, news: int, now: float) -> float:
        """When *news* are due: at once, but for what comes from peers.

        Then the coordinator knows already that it is on its way, and nobody waits for the news. All
        get it at about the same moment, and what is told a little later goes with the next claim.
        """
        if self._leased(key, news):
            return now + ANNOUNCE_S
        if key not in self._put_off:
            members = len(self._directory.placement.members)
            spread_s = min(_MAX_PUT_OFF_S, members * _SPREAD_PER_MEMBER_S)
            self._put_off[key] = now + max(ANNOUNCE_S, self._rng.uniform(0.0, spread_s))
        return self._put_off[key]

    def _leased(self, key: RegionKey, pieces: int) -> int:
        """Those of *pieces* that this node got, or gets, on a lease of these coordinators."""
        known = self._known[key.digest, key.cut]
        sourced = known.sourced
        # What comes from beyond a scope comes on a lease of its coordinators.
        for scope in self._beyond(key.scope)[:1]:
            if far := known.far.get(scope):
                sourced &= ~far.pieces
        return pieces & ~(sourced >> key.index * REGION_PIECES)

    def _beyond(self, scope: str) -> tuple[str, ...]:
        """The scopes larger than *scope*."""
        return self._scopes[self._scopes.index(scope) + 1 :] if scope in self._scopes else ()

    def _renew_s(self, key: RegionKey, fetching: int) -> float:
        return RENEW_S if self._leased(key, fetching) else _REMIND_S

    def _schedule(self, key: RegionKey, due: float) -> None:
        self._due[key] = due = min(due, self._due.get(key, due))
        if due < self._wakes_at:
            self._wake.set()

    async def run(self, send: Send) -> None:
        """Tell the coordinators what is due, for ever."""
        look_at = 0.0
        while True:
            now = _now()
            try:
                if now >= look_at:
                    await self._look(now)
                    look_at = now + _LOOK_S
                self._tell(now, send)
            except Exception:  # a bug ends here, logged: the next round is told what is due then
                logger.exception("announcing.broken")
                look_at = now + _LOOK_S
            due = min(self._due.values(), default=look_at)
            self._wakes_at = min(look_at, max(due, now + ANNOUNCE_S))
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._wakes_at):
                    await self._wake.wait()

    def _tell(self, now: float, send: Send) -> None:
        ready = [key for key, at in self._due.items() if at <= now + _TOGETHER_S]
        ready.sort(key=self._due.__getitem__)
        for key in ready[:_MAX_BURST]:
            del self._due[key]
            if self._is_ahead(key, now):
                self._schedule(key, self._granted[key][1])
                continue
            # A claim may have told it meanwhile.
            state = self.state(key)
            due = self._due_at(key, state.held, state.fetching, now)
            if due is None:
                self._put_off.pop(key, None)
            elif due > now + ANNOUNCE_S:
                self._schedule(key, due)
            else:
                send(key).add_done_callback(partial(self._note_sent, key))
        if len(self._due) < _MAX_BURST:
            self._has_room.set()

    def _is_ahead(self, key: RegionKey, now: float) -> bool:
        """Say whether a grant allows more than the mirror has had the time to say."""
        known, granted = self._known.get((key.digest, key.cut)), self._granted.get(key)
        if known is None or granted is None or granted[1] <= now:
            return False
        said = (known.held | known.fetching) >> key.index * REGION_PIECES
        return bool(granted[0] & ~said)

    def _note_sent(self, key: RegionKey, answer: asyncio.Future[Grant | None]) -> None:
        if (answer.cancelled() or answer.result() is None) and self._is_known(key):
            self._schedule(key, _now() + _ASTRAY_S)

    async def _look(self, now: float) -> None:
        """Look who has become a coordinator, and who is to be told again."""
        if self._seen_change != self._directory.changed_at:
            self._seen_change = self._directory.changed_at
            scopes = own_scopes(self._directory)
            if scopes != self._scopes:
                self._start_over(scopes)
            for number, (key, told) in enumerate(list(self._told.items())):
                coordinators = self._directory.placement.coordinators(key)
                if not coordinators or coordinators[0].address != told.address:
                    self._tell_again(key, now + self._spread())
                if number % 256 == 255:
                    await asyncio.sleep(0)
        for address, ledger in list(self._ledgers.items()):
            if not ledger.keys:
                del self._ledgers[address]
            elif now >= ledger.due:
                ledger.due = self._next_round(now)
                for key in ledger.keys:
                    self._tell_again(key, now)

    def _start_over(self, scopes: tuple[str, ...]) -> None:
        """The cluster is divided in another way: other coordinators are told now."""
        self._scopes = scopes
        self._told.clear()
        self._ledgers.clear()
        self._granted.clear()
        self._due.clear()
        self._put_off.clear()
        for known in list(self._known.values()):
            known.far = {
                scope: _Far(far.claimed) for scope, far in known.far.items() if scope in scopes
            }
            for index, mask in enumerate(region_masks(known.cut.count, known.held)):
                if mask:
                    for key in self._keys(known, index):
                        self._schedule(key, _now() + self._spread())

    def _tell_again(self, key: RegionKey, due: float) -> None:
        told = self._told.get(key)
        if told is not None:
            told.is_forgotten = True
            self._schedule(key, due)

    def _spread(self) -> float:
        members = len(self._directory.placement.members)
        return self._rng.uniform(0.0, min(_MAX_SPREAD_S, members * _SPREAD_PER_MEMBER_S))

    def _next_round(self, now: float) -> float:
        return now + REANNOUNCE_S * self._rng.uniform(0.75, 1.0)

    # What is said, and what was.

    def state(self, key: RegionKey) -> State:
        """Return what there is to say of a region."""
        known = self._known.get((key.digest, key.cut))
        if known is None:
            return State(0, 0, passes_on=True)
        shift = key.index * REGION_PIECES
        held = (known.held >> shift) & _REGION
        fetching = (known.fetching >> shift) & self._told_to(key, known)
        granted = self._granted.get(key)
        if granted is not None:
            if granted[1] > _now():
                fetching |= granted[0]
            else:
                del self._granted[key]
        return State(held, fetching & ~held, known.cut.passes_on)

    def answered(
        self, address: str, rank: int, claim: Claim, grant: Grant, incarnation: str
    ) -> None:
        """Remember what *address* was told, and what it allows."""
        key, now = claim.key, _now()
        self._put_off.pop(key, None)
        known = self._known.get((key.digest, key.cut))
        if known is not None and key.scope in self._scopes:
            sourced = 0
            for source in grant.sources:
                sourced |= source.mask
            sourced &= claim.wanted & ~grant.leased
            allowed = sourced | grant.leased & claim.wanted
            self.note_sources(known.cut, key.index, claim.wanted, sourced)
            shift = key.index * REGION_PIECES
            known.fetching = known.fetching & ~(claim.wanted << shift) | (allowed << shift)
            self._note_way(known, key, claim.wanted, sourced, allowed)
            earlier, _ = self._granted.pop(key, (0, 0.0))
            if granted := earlier & ~claim.wanted | allowed:
                self._granted[key] = (granted, now + _GRACE_S)
            self._untell(key)
            fetching = claim.fetching & ~claim.wanted | allowed
            told = _Told(claim.held, fetching & ~claim.held, now, address, rank > 0)
            if told.held or told.fetching:
                self._told[key] = told
                self._ledger(address, incarnation, now).keys[key] = None
                if rank:
                    self._schedule(key, now + _ASTRAY_S)
                if claim.held & ~(known.held >> shift):  # lost while the claim was on its way
                    self._schedule(key, now + ANNOUNCE_S)
        self._note_incarnation(address, incarnation, now)

    def _note_way(
        self, known: _Known, key: RegionKey, wanted: int, sourced: int, allowed: int
    ) -> None:
        """Coordinators said from where to fetch what is *wanted*: from within their scope."""
        shift, number = key.index * REGION_PIECES, self._scopes.index(key.scope)
        for scope in self._scopes[1 : number + 1]:
            far = known.far.setdefault(scope, _Far())
            far.pieces = far.pieces & ~(wanted << shift) | (allowed << shift)
        for scope in self._scopes[number + 1 :]:
            larger_far = known.far.get(scope)
            if larger_far and larger_far.pieces & (sourced << shift):
                larger_far.pieces &= ~(sourced << shift)
                larger = RegionKey(key.digest, key.cut, key.index, scope)
                if granted := self._granted.get(larger):
                    self._granted[larger] = (granted[0] & ~sourced, granted[1])
                if larger in self._told:
                    self._schedule(larger, _now() + ANNOUNCE_S)

    def _is_known(self, key: RegionKey) -> bool:
        return (key.digest, key.cut) in self._known and key.scope in self._scopes

    def _untell(self, key: RegionKey) -> None:
        told = self._told.pop(key, None)
        if told is not None and told.address in self._ledgers:
            self._ledgers[told.address].keys.pop(key, None)

    def _ledger(self, address: str, incarnation: str, now: float) -> _Ledger:
        ledger = self._ledgers.get(address)
        if ledger is None:
            ledger = self._ledgers[address] = _Ledger(incarnation, self._next_round(now))
        return ledger

    def _note_incarnation(self, address: str, incarnation: str, now: float) -> None:
        ledger = self._ledgers.get(address)
        if ledger is None or ledger.incarnation == incarnation:
            return
        ledger.incarnation = incarnation
        start = max(now, ledger.quiet_until)
        ledger.quiet_until = start + _FORGETFUL_S
        for key in ledger.keys:
            told = self._told[key]
            if told.at < now:  # else it is in this very answer
                self._tell_again(key, start + self._spread())


_REGION: Final = (1 << REGION_PIECES) - 1


def region_masks(count: int, bits: int) -> tuple[int, ...]:
    """Return the masks of all regions of a blob of *count* pieces, in order."""
    regions = -(-count // REGION_PIECES)
    return struct.unpack(f"<{regions}Q", bits.to_bytes(regions * REGION_PIECES // 8, "little"))


def _now() -> float:
    return asyncio.get_running_loop().time()
