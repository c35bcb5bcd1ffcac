"""Who coordinates a region, for whom: weighted rendezvous hashing over the members.

Hides the hashes. The rules: the answer depends on nothing but the region and the set of members, so
that nodes which know the same members agree without a word; a member that joins or leaves moves
only the regions that it gains or loses itself; and no more than about `MAX_GROUP` members claim
from the same coordinators, because all of them do so at the same moment.

So the members of a zone, or of a cluster that is not divided into zones, are split into groups if
they are many: into a power of two of them, by a hash of the address. A group is a scope of its own,
as a zone is, and its name says how it is made: ``zone~3/8`` are those members of ``zone`` whose
hash is 3 modulo 8. If there are many groups, some of them make a larger one: ``zone~3/64`` and
``zone~11/64`` are both in ``zone~3/8``. Nodes that do not agree on how many groups there are do
agree on who is in each. A member that joins or leaves changes no group but its own, except where
their number doubles.

Every member gets a score for the region, from a hash of both, and the best scores coordinate.
Weights follow the logarithmic method of Schindelhauer and Schomaker ("Weighted Distributed Hash
Tables", 2005): ``-weight / ln(1 - hash as a fraction)`` gives every member exactly its share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from heapq import nsmallest
from typing import Final

from xxhash import xxh64_intdigest, xxh128_digest

from p2pcache.core.bounds import COORDINATORS
from p2pcache.core.claims import RegionKey

# At about 1 KB each. A node works on a few images at once, of some hundred regions each.
_REMEMBERED: Final = 4096
MAX_GROUP: Final = 32
"""So many members are coordinated as one group, give or take what chance does. In a storm each of
them claims some ten times in the second in which all are at the same region."""
# And so many groups, as a power of two.
_MAX_GROUPS_BITS: Final = 5

_MAX_POOLS: Final = 1024
# Groups are made with another hash than coordinators are chosen with.
_GROUP_SEED: Final = 0x67726F7570
# A zone that is a label of Kubernetes has no "~".
_GROUP = re.compile(r"(.*)~(\d{1,5})/(\d{1,5})", re.DOTALL | re.ASCII)
# The name of a group is a name in a claim, too.
_MAX_ZONE: Final = 240
_HASHES: Final = 1 << 64
_BELOW_ONE: Final = 1 - 2**-53


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """A node of the cluster, as everyone knows it."""

    address: str
    zone: str = ""
    weight: float = 1.0
    """Its share of the regions, relative to the others'; none if 0: it is about to leave."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"not a weight: {self.weight}")


@dataclass(frozen=True, slots=True)
class _Class:
    """Members of one weight: among them the plain hashes decide, without a logarithm."""

    weight: float
    members: tuple[Member, ...]
    seeds: tuple[int, ...]
    """Hashes of their addresses."""


@dataclass(frozen=True, slots=True)
class _Pool:
    """The members of a scope."""

    members: tuple[Member, ...]
    classes: tuple[_Class, ...]


class Placement:
    """The scopes and the coordinators of every region, for one set of members. Immutable."""

    def __init__(self, members: Iterable[Member]) -> None:
        # An address given twice is one member, whichever way it came first.
        self.members: tuple[Member, ...] = tuple({m.address: m for m in sorted(members)}.values())
        zones: dict[str, list[Member]] = {}
        for member in self.members:
            zones.setdefault(member.zone, []).append(member)
        self.zones: frozenset[str] = frozenset(zones) - {""}
        # What is split into groups: each zone, and who is in none; or a cluster without zones.
        split: Mapping[str, Iterable[Member]] = zones
        if len(self.zones) < 2:
            split = {"": self.members}
        self._groups = {zone: _groups(zone, some) for zone, some in split.items()}
        whole = {**zones, "": self.members}
        # Cached methods would keep this object alive in a circle.
        self._pool = lru_cache(_MAX_POOLS)(partial(_pool, whole, split))
        self._find = lru_cache(_REMEMBERED)(partial(_find, self._pool))

    def scopes(self, address: str, zone: str) -> tuple[str, ...]:
        """Return where the member at *address*, in *zone*, claims: first in its group, if it is in
        one, and at last in the whole cluster, "". Each scope contains the one before it.
        """
        zone = zone if zone in self._groups else ""
        bits = self._groups.get(zone, 1).bit_length() - 1
        steps = -(-bits // _MAX_GROUPS_BITS)
        counts = [1 << bits * step // steps for step in range(steps, 0, -1)]
        number = _group_hash(address)
        groups = [f"{zone}~{number % count}/{count}" for count in counts]
        return (*groups, zone, "") if zone else (*groups, "")

    def within(self, scope: str) -> tuple[Member, ...]:
        """Return the members of *scope*: of the cluster, of a zone, or of a group."""
        return self._pool(scope).members

    def coordinators(self, key: RegionKey, count: int = COORDINATORS) -> tuple[Member, ...]:
        """The members that coordinate *key*, best first; fewer if there are fewer.

        They are members of the scope that *key* names.
        """
        return self._find(key, count)


def _groups(zone: str, members: Iterable[Member]) -> int:
    """The least power of two with which groups are, on average, not too large."""
    if len(zone) > _MAX_ZONE:
        return 1
    return 1 << (max(0, sum(1 for _ in members) - 1) // MAX_GROUP).bit_length()


def _group_hash(address: str) -> int:
    return xxh64_intdigest(address.encode(), _GROUP_SEED)


def _pool(
    whole: Mapping[str, Iterable[Member]], split: Mapping[str, Iterable[Member]], scope: str
) -> _Pool:
    members = tuple(whole.get(scope, ()))
    group = None if members else _GROUP.fullmatch(scope)
    if group and (count := int(group[3])):
        number, within = int(group[2]), split.get(group[1], ())
        members = tuple(m for m in within if _group_hash(m.address) % count == number)
    return _Pool(members, _classes(members))


def _classes(members: Iterable[Member]) -> tuple[_Class, ...]:
    weights: dict[float, list[Member]] = {}
    for member in members:
        if member.weight > 0:
            weights.setdefault(member.weight, []).append(member)
    return tuple(
        _Class(
            weight,
            tuple(group),
            tuple(xxh64_intdigest(member.address.encode()) for member in group),
        )
        for weight, group in weights.items()
    )


def _find(pool: Callable[[str], _Pool], key: RegionKey, count: int) -> tuple[Member, ...]:
    # The seeds are the members' own: one hash for each of them, of bytes that all share. What is
    # hashed is itself a hash, since XXH64 takes short input in one step.
    name = xxh128_digest(f"{key.digest}\0{key.cut}\0{key.index}\0{key.scope}".encode())
    best: list[tuple[float, Member]] = []
    for group in pool(key.scope).classes:
        # For one input XXH64 maps seeds to hashes one to one: no two members tie.
        hashes = [xxh64_intdigest(name, seed) for seed in group.seeds]
        best += [
            (_score(lowest, group.weight), group.members[hashes.index(lowest)])
            for lowest in nsmallest(count, hashes)
        ]
    # Scores of different weights might tie as floats: then the members' own order decides.
    best.sort(reverse=True)
    return tuple(member for _, member in best[:count])


def _score(member_hash: int, weight: float) -> float:
    # The lowest hash is best: near 0 a float still tells all of them apart.
    fraction = min((member_hash + 0.5) / _HASHES, _BELOW_ONE)
    return -weight / math.log1p(-fraction)
