"""How soon does a container start when the registry is far, and what is read from there?

    python -m benchmarks.lazy_start [--rounds 3] [--image gzip|zstdchunked] [--json PATH]

The real stack of the end-to-end tests: containerd, the stargz snapshotter, a registry 40 ms and
100 Mbit/s away, and p2pcache on every node. An image is pulled lazily and its container run, in
four situations: without a mirror; with a cold mirror that has no peer with the image; on a second
node whose peer has started it; and again on that node once containerd and the snapshotter have
forgotten everything. Two workloads: the one that the image was optimised for, and one that
reads what nobody foresaw. Needs root, and what the end-to-end tests need.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from tests.e2e.images import GZIP, START, ZSTD, Images, build_images, unforeseen
from tests.e2e.rig import FAR, LazyStart, Node, Rig, lazy_start

SITUATIONS: Final = ("no mirror", "cold mirror", "second node", "warm mirror")
WORKLOADS: Final[dict[str, tuple[str, ...]]] = {"foreseen": START, "unforeseen": unforeseen()}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--image", choices=[GZIP, ZSTD], default=GZIP)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    images = build_images()
    results = []
    for workload, command in WORKLOADS.items():
        starts: dict[str, list[LazyStart]] = {name: [] for name in SITUATIONS}
        over_fetch = [_one_round(images, args.image, command, starts) for _ in range(args.rounds)]
        results.append(_report(workload, starts, over_fetch))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def _one_round(
    images: Images, tag: str, command: Sequence[str], starts: dict[str, list[LazyStart]]
) -> float:
    """Start once in every situation; return upstream bytes by bytes that the snapshotter got."""
    with Rig(images, nodes=1, line=FAR) as rig:
        rig.start_nodes(mirrors=False)
        starts["no mirror"].append(lazy_start(rig.nodes[0], tag, command))
    with Rig(images, nodes=2, line=FAR) as rig:
        rig.start_nodes()
        first, second = rig.nodes
        cold = lazy_start(first, tag, command)
        starts["cold mirror"].append(cold)
        over_fetch = _blob_bytes_ratio(first)
        starts["second node"].append(lazy_start(second, tag, command))
        second.forget()
        starts["warm mirror"].append(lazy_start(second, tag, command))
    outputs = {found[-1].output for found in starts.values()}
    assert len(outputs) == 1, f"the containers did not read the same: {outputs}"
    return over_fetch


def _blob_bytes_ratio(node: Node) -> float:
    """What the upstream gave of blobs, by what clients of the mirror got of them."""
    return node.traffic().blob_bytes / sum(node.mirror.served_bytes().values())


def _report(
    workload: str, starts: dict[str, list[LazyStart]], over_fetch: list[float]
) -> dict[str, Any]:
    base = median(start.total_s for start in starts["no mirror"])
    print(f"\n{workload} workload, registry 40 ms and 100 Mbit/s away")
    print(
        f"{'':14}{'pull s':>9}{'run s':>9}{'total s':>9}{'÷ none':>9}"
        f"{'upstream MB':>13}{'requests':>10}"
    )
    rows: dict[str, dict[str, float]] = {}
    for name, found in starts.items():
        row = rows[name] = {
            "pull_s": median(start.pull_s for start in found),
            "run_s": median(start.run_s for start in found),
            "total_s": median(start.total_s for start in found),
            "upstream_bytes": median(start.upstream_bytes for start in found),
            "upstream_requests": median(start.upstream_requests for start in found),
        }
        row["ratio"] = row["total_s"] / base
        print(
            f"{name:14}{row['pull_s']:9.2f}{row['run_s']:9.2f}{row['total_s']:9.2f}"
            f"{row['ratio']:9.2f}{row['upstream_bytes'] / 1e6:13.2f}"
            f"{row['upstream_requests']:10.0f}"
        )
    ratio = median(over_fetch)
    print(f"over-fetch of the cold mirror: {ratio:.2f} upstream bytes for one that was asked for")
    return {"workload": workload, "situations": rows, "over_fetch": ratio}


if __name__ == "__main__":
    main()
