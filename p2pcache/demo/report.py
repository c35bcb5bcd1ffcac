"""What the demo found, for people and for programs.

Hides wording and layout. The rule it keeps: every number that is printed is one that was counted,
and the JSON document has the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_BAR_WIDTH: Final = 44
_SHOWN: Final = 10
_UNITS: Final = ("B", "kB", "MB", "GB")


@dataclass(frozen=True, slots=True)
class NodeResult:
    """One node's start, seen by its client and by its own counters."""

    node: str
    requests: int
    requested_bytes: int
    served_local: int
    served_peer: int
    served_upstream: int
    fetched_peer: int
    fetched_upstream: int
    files: int
    mismatches: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """What the whole run came to. Byte counts of the registry are what it sent."""

    image: str
    layers: int
    image_bytes: int
    image_files: int
    registry_delay_s: float
    upstream_bytes: int
    upstream_bytes_one_node: int
    upstream_bytes_without_mirror: int
    seconds_without_mirror: float
    mismatches_without_mirror: tuple[str, ...]
    nodes: tuple[NodeResult, ...]
    seconds: float

    @property
    def mismatches(self) -> tuple[str, ...]:
        """Files that differed from the original, with and without the mirror, and where."""
        return (
            *(f"without p2pcache: {name}" for name in self.mismatches_without_mirror),
            *(f"{node.node}: {name}" for node in self.nodes for name in node.mismatches),
        )


def render_json(result: Result) -> str:
    """The result as one JSON document."""
    document = {
        "nodes": len(result.nodes),
        "imageBytes": result.image_bytes,
        "requestedBytes": sum(node.requested_bytes for node in result.nodes),
        "upstreamBytes": result.upstream_bytes,
        "upstreamBytesOneNode": result.upstream_bytes_one_node,
        "upstreamBytesWithoutMirror": result.upstream_bytes_without_mirror,
        "peerBytes": sum(node.fetched_peer for node in result.nodes),
        "mismatches": len(result.mismatches),
        "seconds": round(result.seconds, 3),
        "perNode": [
            {
                "node": node.node,
                "requests": node.requests,
                "requestedBytes": node.requested_bytes,
                "localBytes": node.served_local,
                "peerBytes": node.served_peer,
                "upstreamBytes": node.served_upstream,
                "fetchedPeerBytes": node.fetched_peer,
                "fetchedUpstreamBytes": node.fetched_upstream,
                "files": node.files,
                "mismatches": list(node.mismatches),
                "seconds": round(node.seconds, 3),
            }
            for node in result.nodes
        ],
    }
    return json.dumps(document, indent=2)


def format_bytes(count: int) -> str:
    """Three digits or so and a unit: ``12.3 MB``."""
    value, unit = float(count), 0
    while value >= 999.5 and unit + 1 < len(_UNITS):
        value, unit = value / 1000, unit + 1
    digits = 0 if unit == 0 or value >= 99.95 else 1
    return f"{value:.{digits}f} {_UNITS[unit]}"


def render_text(result: Result, *, ascii_only: bool = False) -> str:
    """The result as a table and a comparison. *ascii_only*: for terminals that know no more."""
    rule, bar = ("-", "#") if ascii_only else ("─", "█")
    nodes = _count(len(result.nodes), "node")
    after = ", one after the other" if len(result.nodes) > 1 else ""
    lines = [
        "",
        f"{nodes} lazily started {result.image}{after}.",
        "",
        f"  image      {format_bytes(result.image_bytes)} in {result.layers} eStargz layers, "
        f"{result.image_files:,} files of this machine's Python",
        f"  start-up   opens {result.nodes[0].files:,} files, asking as containerd and the "
        "stargz snapshotter do",
        f"  registry   on this machine, {result.registry_delay_s * 1000:.0f} ms to the first byte",
        "",
        *_table(result, rule),
        "",
        "  What the registry sent",
        *_bars(result, bar),
        "",
        *_verdict(result),
        "",
    ]
    return "\n".join(lines)


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _table(result: Result, rule: str) -> list[str]:
    heads = ("node", "asked for", "had it", "from peers", "from registry", "time")
    rows = [
        (
            node.node,
            format_bytes(node.requested_bytes),
            format_bytes(node.served_local),
            format_bytes(node.served_peer),
            format_bytes(node.served_upstream),
            f"{node.seconds:.2f} s",
        )
        for node in result.nodes
    ]
    total = (
        "total",
        format_bytes(sum(node.requested_bytes for node in result.nodes)),
        format_bytes(sum(node.served_local for node in result.nodes)),
        format_bytes(sum(node.served_peer for node in result.nodes)),
        format_bytes(sum(node.served_upstream for node in result.nodes)),
        f"{sum(node.seconds for node in result.nodes):.2f} s",
    )
    widths = [max(map(len, column)) for column in zip(heads, *rows, total, strict=True)]
    line = "  " + rule * (sum(widths) + 3 * (len(widths) - 1))
    return [
        _row(heads, widths),
        line,
        *(_row(row, widths) for row in rows),
        line,
        _row(total, widths),
    ]


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
    return "  " + "   ".join(padded).rstrip()


def _bars(result: Result, bar: str) -> list[str]:
    nodes = _count(len(result.nodes), "node")
    values = {
        f"{nodes} without p2pcache": result.upstream_bytes_without_mirror,
        "1 node with p2pcache": result.upstream_bytes_one_node,
        f"{nodes} with p2pcache": result.upstream_bytes,
    }
    longest = max(*values.values(), 1)
    width = max(map(len, values))
    return [
        f"    {label.ljust(width)}  {format_bytes(value).rjust(8)}  "
        f"{bar * max(1, round(value / longest * _BAR_WIDTH))}"
        for label, value in values.items()
    ]


def _verdict(result: Result) -> list[str]:
    wrong = result.mismatches
    if wrong:
        return [
            f"  WRONG: {_count(len(wrong), 'file')} not like the original:",
            *(f"    {name}" for name in wrong[:_SHOWN]),
            *([f"    and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []),
        ]
    count = len(result.nodes)
    opened = _count(sum(node.files for node in result.nodes), "opened file")
    direct_s = result.seconds_without_mirror / count
    times = [f"{direct_s:.2f} s without p2pcache", f"{result.nodes[0].seconds:.2f} s on node-1"]
    if count > 1:
        others = [node.seconds for node in result.nodes[1:]]
        times.append(f"{sum(others) / len(others):.2f} s on later nodes")
    lines = [
        f"  All {opened} were compared with the originals: no difference.",
        f"  A start took {', '.join(times)}.",
    ]
    if count > 1:
        ratio = result.upstream_bytes / max(result.upstream_bytes_one_node, 1)
        lines.append(f"  {count} nodes cost the registry {ratio:.2f} times what one node costs.")
    return lines
