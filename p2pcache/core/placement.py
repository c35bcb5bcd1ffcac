"""Who coordinates a region: weighted rendezvous hashing over the members.

Hides the hash. The rule: the answer depends on nothing but the region and the set of members, so
that nodes which know the same members agree without a word; and a member that joins or leaves moves
only the regions that it gains or loses itself.

Every member gets a score for the region, from a hash of both, and the best scores coordinate.
Weights follow the logarithmic method of Schindelhauer and Schomaker ("Weighted Distributed Hash
Tables", 2005): ``-weight / ln(1 - hash as a fraction)`` gives every member exactly its share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from heapq import nsmallest
from typing import Final

from xxhash import xxh64_intdigest, xxh128_digest

from p2pcache.core.bounds import COORDINATORS
from p2pcache.core.claims import RegionKey

# At about 1 KB each. A node works on a few images at once, of some hundred regions each.
_REMEMBERED: Final = 4096
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


class Placement:
    """The coordinators of every region, for one set of members. Immutable."""

    def __init__(self, members: Iterable[Member]) -> None:
        # An address given twice is one member, whichever way it came first.
        self.members: tuple[Member, ...] = tuple({m.address: m for m in sorted(members)}.values())
        self.zones: frozenset[str] = frozenset(m.zone for m in self.members if m.zone)
        pools = {
            zone: _classes(m for m in self.members if m.zone == zone) for zone in sorted(self.zones)
        }
        pools[""] = _classes(self.members)
        # A cached method would keep this object alive in a circle.
        self._find = lru_cache(_REMEMBERED)(partial(_find, pools))

    def coordinators(self, key: RegionKey, count: int = COORDINATORS) -> tuple[Member, ...]:
        """The members that coordinate *key*, best first; fewer if there are fewer.

        They are of the zone that *key* names, if it names one.
        """
        return self._find(key, count)


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


def _find(
    pools: Mapping[str, tuple[_Class, ...]], key: RegionKey, count: int
) -> tuple[Member, ...]:
    # The seeds are the members' own: one hash for each of them, of bytes that all share. What is
    # hashed is itself a hash, since XXH64 takes short input in one step.
    name = xxh128_digest(f"{key.digest}\0{key.cut}\0{key.index}\0{key.scope}".encode())
    best: list[tuple[float, Member]] = []
    for group in pools.get(key.scope, ()):
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
