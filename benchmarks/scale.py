"""What does a cluster of thousands take to start one image on every node at once?

    python -m benchmarks.scale [--nodes 100 1000 5000] [--deaths 0 0.05 0.2] [--zones 1]
                               [--spread 2] [--link-mbit 1000] [--upstream-mbit 1000]
                               [--seed 1] [--json PATH]

The real placement, coordinator and locator code on every node of a simulated cluster: only the
clock, the network and the mirror around them are simulated. Each node pulls lazily: a manifest,
three tables of contents, then 300 pieces (20 MB) out of 5,000 in 70 bursts with 10 ms of thinking
between them, the same pieces in the same order on all nodes, which begin within the spread. The
dying die at random moments of the storm, half of them with a reset and half without a word, and
stay in the list of members. Latencies are 0.2 to 1 ms one way within a zone and 1 to 2 ms between
two, and 30 ms to the first byte from the registry; its bandwidth is the same for any number of
nodes. To answer a message takes 0.25 ms, and 0.05 ms for each claim in it; to prove a piece 1 ms.

A result depends on the seed alone, but for what the simulation itself takes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from benchmarks.simulation.image import make_image
from benchmarks.simulation.storm import Outcome, Setting, simulate

MAX_UPSTREAM_RATIO: Final = 1.05
MAX_PEAK_RATE: Final = 500.0

_COLUMNS: Final = (
    ("nodes", 6),
    ("deaths", 7),
    ("upstream", 9),
    ("busiest/s", 10),
    ("its mean", 9),
    ("all mean", 9),
    ("claims", 9),
    ("depth", 6),
    ("mean", 6),
    ("last s", 7),
    ("÷ alone", 8),
    ("wall s", 7),
    ("cpu s", 7),
)


def main() -> None:
    """Simulate, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--deaths", type=float, nargs="+", default=[0, 0.05, 0.2])
    parser.add_argument("--zones", type=int, default=1)
    parser.add_argument("--spread", type=float, default=2.0, help="seconds")
    parser.add_argument("--link-mbit", type=float, default=1000)
    parser.add_argument("--upstream-mbit", type=float, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if min(args.nodes) < 1 or args.zones < 1 or not all(0 <= share < 1 for share in args.deaths):
        parser.error("there must be nodes and zones, and not all of them may die")
    setting = Setting(
        nodes=1,
        deaths=0.0,
        zones=args.zones,
        spread_s=args.spread,
        link_mbit=args.link_mbit,
        upstream_mbit=args.upstream_mbit,
        seed=args.seed,
    )
    print("".join(f"{name:>{width}}" for name, width in _COLUMNS))
    outcomes = run(setting, args.nodes, args.deaths)
    _say_goals(outcomes)
    if args.json:
        document = {"setting": asdict(setting), "storms": [asdict(o) for o in outcomes]}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


def run(base: Setting, nodes: Sequence[int], deaths: Sequence[float]) -> list[Outcome]:
    """Run one node alone, then every storm; print a line for each."""
    image = make_image(base.seed)
    alone = simulate(replace(base, nodes=1, deaths=0.0, zones=1), image)
    outcomes = []
    for count in nodes:
        for share in deaths:
            dying_s = base.spread_s + alone.last_s
            setting = replace(base, nodes=count, deaths=share, dying_s=dying_s)
            outcome = simulate(setting, image)
            outcome = replace(outcome, time_ratio=outcome.last_s / alone.last_s)
            outcomes.append(outcome)
            print(_line(outcome), flush=True)
    return outcomes


def _line(outcome: Outcome) -> str:
    cells = (
        str(outcome.nodes),
        f"{outcome.deaths:.0%}",
        f"{outcome.upstream_ratio:.3f}",
        f"{outcome.peak_rate:.0f}",
        f"{outcome.mean_rate:.0f}",
        f"{outcome.average_rate:.1f}",
        str(outcome.claims),
        str(outcome.max_hops),
        f"{outcome.mean_hops:.1f}",
        f"{outcome.last_s:.2f}",
        f"{outcome.time_ratio:.2f}",
        f"{outcome.wall_s:.0f}",
        f"{outcome.processor_s:.0f}",
    )
    return "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))


def _say_goals(outcomes: Sequence[Outcome]) -> None:
    print(
        "\nupstream: bytes read there by bytes one node needs. busiest/s: messages in the busiest"
    )
    print("second of the busiest member. depth: hops from the upstream, the most and the mean.")
    for outcome in outcomes:
        missed = []
        if not outcome.deaths and outcome.upstream_ratio > MAX_UPSTREAM_RATIO:
            missed.append(f"upstream {outcome.upstream_ratio:.3f}, not {MAX_UPSTREAM_RATIO}")
        if outcome.peak_rate > MAX_PEAK_RATE:
            missed.append(f"busiest {outcome.peak_rate:.0f}/s, not {MAX_PEAK_RATE:.0f}")
        if outcome.finished + outcome.died < outcome.nodes:
            missed.append(f"only {outcome.finished} finished")
        if missed:
            print(f"{outcome.nodes} nodes, {outcome.deaths:.0%} dying: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
