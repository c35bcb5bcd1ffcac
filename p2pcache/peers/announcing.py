"""What this node has to tell the coordinators, and what it has told them.

Hides when news are due. The rules: only what a coordinator does not know yet is told, except that
leases are renewed for as long as the mirror says that bytes flow; what is held is told again now
and then, and soon to a coordinator that has forgotten, or has become one; what a grant allows
counts as being fetched for a moment, until the mirror has had the time to say so itself; and the
memory of all this is bounded.
"""

from __future__ import annotations

import asyncio
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
from p2pcache.peers.directory import Directory, own_scope
from p2pcache.peers.posting import State

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
class _Known:
    """What this node has of one cut of a blob."""

    cut: Cut
    held: int = 0
    fetching: int = 0
    sourced: int = 0
    """Of what is being fetched, what a peer was named for: no lease is needed for it."""
    cluster: set[int] = field(default_factory=set)
    """The regions that were claimed from the whole cluster, beyond the own zone."""

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
        self._has_room = asyncio.Event()
        self._wake = asyncio.Event()
        self._wakes_at = 0.0
        self._seen_change = directory.changed_at
        self._scope = own_scope(directory)

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
                    due = self._due_at(key, in_held, in_fetching, now)
                    if due is not None:
                        self._schedule(key, due)

    def note_cluster_claim(self, cut: Cut, index: int) -> None:
        """The region is claimed beyond the zone, so that it is announced there from now on."""
        self._open(cut).cluster.add(index)

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
            for scope in {"", self._scope}:
                key = RegionKey(*name, index, scope)
                self._due.pop(key, None)
                self._granted.pop(key, None)
                self._untell(key)

    def _keys(self, known: _Known, index: int) -> Iterator[RegionKey]:
        if self._scope:
            yield RegionKey(known.cut.digest, known.cut.name, index, self._scope)
        if not self._scope or index in known.cluster:
            yield RegionKey(known.cut.digest, known.cut.name, index)

    # When it is due.

    def _due_at(self, key: RegionKey, held: int, fetching: int, now: float) -> float | None:
        told = self._told.get(key)
        if told is None:
            return now + ANNOUNCE_S if held or fetching else None
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
        return now + ANNOUNCE_S

    def _renew_s(self, key: RegionKey, fetching: int) -> float:
        known = self._known[key.digest, key.cut]
        return RENEW_S if fetching & ~(known.sourced >> key.index * REGION_PIECES) else _REMIND_S

    def _schedule(self, key: RegionKey, due: float) -> None:
        self._due[key] = due = min(due, self._due.get(key, due))
        if due < self._wakes_at:
            self._wake.set()

    async def run(self, send: Send) -> None:
        """Tell the coordinators what is due, for ever."""
        look_at = 0.0
        while True:
            now = _now()
            if now >= look_at:
                await self._look(now)
                look_at = now + _LOOK_S
            self._tell(now, send)
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
            if due is not None and due > now + ANNOUNCE_S:
                self._schedule(key, due)
            elif due is not None:
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
            scope = own_scope(self._directory)
            if scope != self._scope:
                self._start_over(scope)
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

    def _start_over(self, scope: str) -> None:
        """The cluster has got zones, or has none any more: other coordinators are told now."""
        self._scope = scope
        self._told.clear()
        self._ledgers.clear()
        self._granted.clear()
        self._due.clear()
        for known in list(self._known.values()):
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
        fetching = (known.fetching >> shift) & _REGION
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
        known = self._known.get((key.digest, key.cut))
        if known is not None and key.scope in ("", self._scope):
            sourced = 0
            for source in grant.sources:
                sourced |= source.mask
            sourced &= claim.wanted & ~grant.leased
            allowed = sourced | grant.leased & claim.wanted
            self.note_sources(known.cut, key.index, claim.wanted, sourced)
            shift = key.index * REGION_PIECES
            known.fetching = known.fetching & ~(claim.wanted << shift) | (allowed << shift)
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
        self._note_incarnation(address, incarnation, now)

    def _is_known(self, key: RegionKey) -> bool:
        return (key.digest, key.cut) in self._known and key.scope in ("", self._scope)

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
