"""What the storm found: a table, a JSON document, a picture.

Hides layout. The rule: every ratio is between two storms of one invocation, round by round, and the
figures of all rounds stand beside their medians.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.storm_image import Plan
from benchmarks.storm_rig import Storm

UPSTREAM_GOAL: Final = 1.02
TIME_GOAL: Final = 1.3
_NOTES: Final = 12

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Round:
    """One storm, and the same with one node just before."""

    alone: Storm
    all: Storm

    @property
    def upstream_ratio(self) -> float:
        """Bytes of the upstream ÷ what one node takes from it."""
        return self.all.upstream_bytes / max(self.alone.upstream_bytes, 1)

    @property
    def time_ratio(self) -> float:
        """Time to the last ÷ time of one node alone."""
        return self.all.seconds[-1] / self.alone.seconds[-1]


def describe(rounds: Sequence[Round], plan: Plan) -> Row:
    """The figures of one arm: medians, and what went wrong in all rounds."""
    storms = [each.all for each in rounds]
    cores = os.cpu_count() or 1

    def middle(values: Sequence[float]) -> float:
        return round(median(values), 4)

    return {
        "nodes": len(storms[0].seconds),
        "upstreamBytes": int(median(storm.upstream_bytes for storm in storms)),
        "upstreamRatio": middle([each.upstream_ratio for each in rounds]),
        "upstreamPerAsked": middle([s.upstream_bytes / plan.asked_bytes for s in storms]),
        "worstUpstreamRatio": round(max(each.upstream_ratio for each in rounds), 4),
        "firstSeconds": middle([storm.seconds[0] for storm in storms]),
        "medianSeconds": middle([median(storm.seconds) for storm in storms]),
        "lastSeconds": middle([storm.seconds[-1] for storm in storms]),
        "timeRatio": middle([each.time_ratio for each in rounds]),
        "worstTimeRatio": round(max(each.time_ratio for each in rounds), 4),
        "mismatches": sum(_wrong(each, "mismatches") for each in rounds),
        "errors": sum(_wrong(each, "errors") for each in rounds),
        "fallbacks": sum(_wrong(each, "fallbacks") for each in rounds),
        "retries": sum(_wrong(each, "retries") for each in rounds),
        "oneNodeSeconds": middle([each.alone.seconds[-1] for each in rounds]),
        "oneNodeUpstreamBytes": int(median(each.alone.upstream_bytes for each in rounds)),
        "overFetch": middle([each.alone.upstream_bytes / plan.asked_bytes for each in rounds]),
        "cpuSeconds": middle([storm.cpu_s["nodes"] for storm in storms]),
        "cpuShare": middle([_share(storm, "nodes", cores) for storm in storms]),
        "machineShare": middle([_share(storm, "machine", cores) for storm in storms]),
        "cpuSecondsClients": middle([storm.cpu_s["clients"] for storm in storms]),
        "cpuSecondsRegistry": middle([storm.cpu_s["registry"] for storm in storms]),
        "cpuSecondsMachine": middle([storm.cpu_s["machine"] for storm in storms]),
        "oneNodeCpuSeconds": middle([each.alone.cpu_s["nodes"] for each in rounds]),
        "maxRssBytes": max(storm.max_rss_bytes for storm in storms),
        "upstreamRequests": int(median(storm.upstream_requests for storm in storms)),
        "wireBytes": int(median(storm.wire_bytes for storm in storms)),
        "wireDrops": sum(storm.wire_drops for storm in storms),
        "counters": storms[-1].counters,
        "notes": [note for each in rounds for note in each.alone.notes + each.all.notes][:_NOTES],
        "rounds": [
            {
                "seconds": [round(second, 3) for second in each.all.seconds],
                "oneNodeSeconds": round(each.alone.seconds[-1], 3),
                "upstreamBytes": each.all.upstream_bytes,
                "oneNodeUpstreamBytes": each.alone.upstream_bytes,
                "cpuSeconds": each.all.cpu_s,
            }
            for each in rounds
        ],
    }


def _wrong(each: Round, name: str) -> int:
    return each.alone.total(name) + each.all.total(name)


def _share(storm: Storm, part: str, cores: int) -> float:
    return storm.cpu_s[part] / (storm.window_s * cores)


def table(arms: Mapping[str, Row]) -> str:
    """The arms, a line each. Processor time: servers, clients and registry, and all of the machine.

    `node` is the time and the upstream bytes of one node alone, in the same arm.
    """
    heads = (
        "", "upstream MB", "ratio", "first s", "median s", "last s", "÷ 1 node", "1 node s",
        "1 node MB", "wrong", "errors", "past", "cpu s", "clients", "registry", "busy", "RSS MB",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for name, arm in arms.items():
        if "failed" in arm:
            rows.append((name, f"failed: {arm['failed'].splitlines()[0]}"))
            continue
        rows.append(
            (
                name,
                f"{arm['upstreamBytes'] / 1e6:.1f}",
                f"{arm['upstreamRatio']:.3f}",
                f"{arm['firstSeconds']:.2f}",
                f"{arm['medianSeconds']:.2f}",
                f"{arm['lastSeconds']:.2f}",
                f"{arm['timeRatio']:.2f}",
                f"{arm['oneNodeSeconds']:.2f}",
                f"{arm['oneNodeUpstreamBytes'] / 1e6:.1f}",
                f"{arm['mismatches']}",
                f"{arm['errors']}",
                f"{arm['fallbacks']}",
                f"{arm['cpuSeconds']:.1f}",
                f"{arm['cpuSecondsClients']:.1f}",
                f"{arm['cpuSecondsRegistry']:.1f}",
                f"{arm['machineShare']:.0%}",
                f"{arm['maxRssBytes'] / 1e6:.0f}",
            )
        )
    whole = [row for row in rows if len(row) == len(heads)]
    widths = [max(len(row[i]) for row in [heads, *whole]) for i in range(len(heads))]
    widths[0] = max(len(row[0]) for row in [heads, *rows])
    lines = []
    for row in [heads, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def verdict(arm: Row) -> str:
    """Whether an arm reaches the goals of the design."""
    ratios = (arm["worstUpstreamRatio"], arm["worstTimeRatio"])
    reached = [
        value <= goal for value, goal in zip(ratios, (UPSTREAM_GOAL, TIME_GOAL), strict=True)
    ]
    return (
        f"upstream {ratios[0]:.3f} (goal {UPSTREAM_GOAL}: {'yes' if reached[0] else 'NO'}), "
        f"time {ratios[1]:.2f} (goal {TIME_GOAL}: {'yes' if reached[1] else 'NO'}), worst round"
    )


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Draw time and upstream ratio of every arm, as PNG."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    arms = {name: arm for name, arm in document["arms"].items() if "failed" not in arm}
    names = list(arms)[::-1]
    figure, (times, ratios) = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.75 * len(names)), layout="constrained", sharey=True
    )
    nodes, mbit = document["nodes"], document["upstreamMbit"]
    figure.suptitle(
        f"{nodes} nodes start one {document['image']['kind']} image at once, "
        f"registry at {mbit:g} Mbit/s"
    )
    colours = ["#1f6f8b" if name == "p2pcache" else "#b8c4cc" for name in names]
    rows = range(len(names))
    last = [arms[name]["lastSeconds"] for name in names]
    times.barh(rows, last, color=colours, label="last node")
    for row, name in zip(rows, names, strict=True):
        arm = arms[name]
        is_last = row == len(names) - 1
        for key, marker, label in (
            ("firstSeconds", "|", "first node"),
            ("medianSeconds", "d", "median node"),
            ("oneNodeSeconds", "o", "one node alone"),
        ):
            is_bar = marker == "|"
            times.plot(
                arm[key],
                row,
                marker,
                color="#222222",
                markeredgecolor="#222222" if is_bar else "white",
                markersize=12 if is_bar else 7,
                label=label if is_last else None,
            )
        times.annotate(
            f"{arm['lastSeconds']:.1f} s", (arm["lastSeconds"], row), xytext=(5, 0),
            textcoords="offset points", va="center",
        )  # fmt: skip
        ratios.annotate(
            f"{arm['upstreamPerAsked']:.2f}", (arm["upstreamPerAsked"], row), xytext=(5, 0),
            textcoords="offset points", va="center",
        )  # fmt: skip
    times.set_yticks(rows, names)
    times.set_xlabel("seconds until started")
    times.set_xlim(0, 1.18 * max(last))
    times.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=4, frameon=False, fontsize=8
    )
    # Of what a client asks for: an arm whose one node reads too much shows here as well.
    shown = [arms[name]["upstreamPerAsked"] for name in names]
    ratios.barh(rows, shown, color=colours)
    ratios.axvline(1, color="#222222", linewidth=0.8, linestyle=":")
    ratios.set_xlim(0, 1.15 * max(*shown, 1.0))
    ratios.set_xlabel("bytes read from the registry ÷ bytes that one client asks for")
    for axes in (times, ratios):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
