"""Who is asked for which pieces.

Pieces that a peer holds come from peers, the rest from the upstream; neighbouring pieces with the
same sources become one run, and so one request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from p2pcache.core.layout import Layout, PieceMask

# Long enough that a request's fixed cost vanishes, short enough that a failed source costs little
# and several sources share a long read.
MAX_RUN_BYTES: Final = 8 << 20

Peer = TypeVar("Peer")


@dataclass(frozen=True, slots=True)
class Run(Generic[Peer]):
    """Consecutive *pieces*, and the peers that hold all of them, best first.

    The upstream is the last source of every run and is not listed.
    """

    pieces: range
    peers: tuple[Peer, ...]


def assign(
    pieces: Iterable[int],
    layout: Layout,
    holders: Sequence[tuple[Peer, PieceMask]],
    *,
    max_bytes: int = MAX_RUN_BYTES,
) -> list[Run[Peer]]:
    """Cut the wanted *pieces*, given in ascending order, into runs.

    *holders* are the peers, best first, with what they hold. A run ends where the set of holders
    changes, where a piece is not wanted, or at *max_bytes*.
    """
    runs: list[Run[Peer]] = []
    start = stop = 0
    peers: tuple[Peer, ...] = ()
    for piece in pieces:
        piece_peers = tuple(peer for peer, held in holders if piece in held)
        if start < stop == piece and peers == piece_peers:
            size = layout.range_of(piece).stop - layout.starts[start]
            if size <= max_bytes:
                stop = piece + 1
                continue
        if start < stop:
            runs.append(Run(range(start, stop), peers))
        start, stop, peers = piece, piece + 1, piece_peers
    if start < stop:
        runs.append(Run(range(start, stop), peers))
    return runs
