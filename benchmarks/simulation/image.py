"""What every node reads: an image in three layers, and the order in which a start reads it.

The rule: made from the seed alone, and the same for all nodes, as the reads of one program are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from p2pcache.core.claims import Cut, cut_name
from p2pcache.core.layout import LayoutKind
from p2pcache.core.model import Digest

LAYER_PIECES: Final = (2600, 1600, 800)
MANIFEST_BYTES: Final = 2_000
TAIL_BYTES: Final = 60
"""Of a table of contents, gzipped, for each piece of its layer."""
PIECE_BYTES: Final = (60_000, 73_000)
BURSTS: Final = 70
READ_PIECES: Final = 300
# A program reads near where it read last, until it turns to something else.
_STAYS: Final = 0.6
_NEAR: Final = 32
_MAX_RUNS: Final = 3


@dataclass(frozen=True, slots=True)
class Part:
    """A manifest, a table of contents or a layer: what is cut in pieces, and their sizes."""

    index: int
    cut: Cut
    sizes: Sequence[int]
    toc_digest: Digest | None = None
    """Of a layer."""


@dataclass(frozen=True, slots=True)
class Burst:
    """Pieces that a program needs together."""

    part: Part
    pieces: Sequence[int]


@dataclass(frozen=True, slots=True)
class Image:
    """The parts, and the bursts in order."""

    parts: Sequence[Part]
    bursts: Sequence[Burst]

    @property
    def bytes_needed(self) -> int:
        """What one node reads of it."""
        return sum(burst.part.sizes[piece] for burst in self.bursts for piece in burst.pieces)


def make_image(seed: int) -> Image:
    """Return the image of *seed*: a manifest, then the tables of contents, then the bursts."""
    rng = random.Random(seed)
    manifest = Digest.of(b"manifest %d" % seed)
    parts = [Part(0, Cut.of_manifest(manifest), [MANIFEST_BYTES])]
    layers: list[Part] = []
    for number, count in enumerate(LAYER_PIECES):
        layer, toc = (Digest.of(b"%s %d of %d" % (w, number, seed)) for w in (b"layer", b"toc"))
        parts.append(Part(1 + number, Cut.of_tail(layer, toc), [TAIL_BYTES * count]))
        cut = Cut(layer, cut_name(LayoutKind.TOC, toc), count, passes_on=True)
        sizes = [rng.randint(*PIECE_BYTES) for _ in range(count)]
        layers.append(Part(1 + len(LAYER_PIECES) + number, cut, sizes, toc))
    opening = [Burst(part, [0]) for part in parts]
    return Image([*parts, *layers], [*opening, *_bursts(layers, rng)])


def _bursts(layers: Sequence[Part], rng: random.Random) -> list[Burst]:
    seen: set[tuple[int, int]] = set()
    bursts: list[Burst] = []
    layer, place = layers[0], 0
    for number in range(BURSTS):
        wanted = (number + 1) * READ_PIECES // BURSTS - len(seen)
        if number and rng.random() >= _STAYS:
            layer = rng.choices(layers, weights=LAYER_PIECES)[0]
            place = rng.randrange(layer.cut.count)
        pieces: list[int] = []
        runs = rng.randint(1, min(_MAX_RUNS, wanted))
        while len(pieces) < wanted:
            start = place + rng.randint(-_NEAR, _NEAR)
            for piece in range(start, start + -(-wanted // runs)):
                is_new = 0 <= piece < layer.cut.count and (layer.index, piece) not in seen
                if is_new and len(pieces) < wanted:
                    seen.add((layer.index, piece))
                    pieces.append(piece)
            place += len(pieces) == 0  # wherever everything has been read, move on
        bursts.append(Burst(layer, sorted(pieces)))
    return bursts
