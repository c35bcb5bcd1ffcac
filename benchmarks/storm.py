"""How much does the registry send, and when has the last node started, when N start at once?

    python -m benchmarks.storm --nodes 8 --image lazy --upstream-mbit 100 [--json PATH] [--plot PNG]

N real ``p2pcache serve`` processes with empty stores, one client on each, all clients at one
moment; before that the same with one node, for the ratios. In the same run: no mirror, one shared
docker-registry as a pull-through cache, and Spegel if its program is given. As root every node has
a network of its own, and the registry's is shaped by ``tc``; otherwise nodes are addresses of
loopback and the registry paces itself (`--loopback` does so for root too).

*lazy*: what containerd and the stargz snapshotter ask for at a start that touches some 20 MB of an
image of three eStargz layers; `--think-ms` lets the program think between its reads. Every range
is compared with the image. *plain*: containerd's reads of whole layers (`--layers`, `--layer-mb`,
`--parallel`), each hashed. "past" counts requests that went past the mirror to the registry.

All share this machine's cores: "busy" is how much of them was used by anybody, "cpu s" what the
compared servers used, all N together. Above some 80 % the cores are what is measured: lower the
upstream rate. A storm lasts as long as the line needs for the bytes: at 100 Mbit/s 2 s per 20 MB
(lazy) and 21 s per 250 MB (plain), N times that without a mirror: lazy N=32 takes one minute, plain
N=32 twelve. The pull-through cache reads whole layers, twice, while they are cold: one minute and
more for lazy, with any N. Making the lazy image takes half a minute, once.

Spegel is one Go program (``go build`` in its repository); it hears of new content from containerd
2.1 or newer, which Debian's newer releases have: ``dpkg-deb -x`` and `--containerd` are enough.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

from benchmarks.storm_arms import Arm, NoMirror, P2pcache, SharedCache
from benchmarks.storm_image import LAZY, PLAIN, Plan, lazy_image, plain_image, read_plan
from benchmarks.storm_report import Round, Row, describe, plot, table, verdict
from benchmarks.storm_rig import MAX_NODES, Line, Rig, Want
from benchmarks.storm_spegel import Spegel
from tests.e2e.machines import CommandFailed

ARMS: Final = ("p2pcache", "no-mirror", "cache", "spegel")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON and a picture."""
    args = _parse(argv)
    signal.signal(signal.SIGTERM, _leave)
    arms = _choose_arms(args)
    _tell("making the image, or finding it")
    if args.image == LAZY:
        image = lazy_image()
    else:
        image = plain_image(args.layers, round(args.layer_mb * 1e6))
    document = measure(image, arms, args)
    print(table(document["arms"]))
    for name, arm in document["arms"].items():
        for note in arm.get("notes", ()):
            print(f"{name}: {note}", file=sys.stderr)
    ours = document["arms"].get(P2pcache.name, {})
    if "upstreamRatio" in ours:
        print(f"p2pcache: {verdict(ours)}")
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if args.plot:
        plot(document, args.plot)
    wrong = any(arm.get("mismatches") for arm in document["arms"].values())
    return 1 if wrong or "failed" in ours else 0


def measure(image: Path, arms: Sequence[Arm], args: argparse.Namespace) -> dict[str, Any]:
    """Run every arm; return what the JSON file says."""
    plan = read_plan(image)
    own_networks = os.geteuid() == 0 and not args.loopback
    line = Line(args.upstream_mbit, args.upstream_delay_ms)
    want = Want(args.think_ms, args.parallel, args.limit)
    found: dict[str, Row] = {}
    with Rig(image, args.nodes, line, own_networks=own_networks) as rig:
        for arm in arms:
            try:
                found[arm.name] = _run(arm, rig, plan, want, args)
            except CommandFailed as error:
                # The other arms are worth having all the same.
                print(f"{arm.name}: {error}", file=sys.stderr)
                found[arm.name] = {"nodes": args.nodes, "failed": str(error)}
    direct = found.get(NoMirror.name, {}).get("oneNodeSeconds")
    for row in found.values():
        if direct and "failed" not in row:
            row["timePerDirect"] = round(row["lastSeconds"] / direct, 4)
    return {
        "nodes": args.nodes,
        "image": {
            "kind": plan.kind,
            "bytes": plan.image_bytes,
            "layers": [layer.size for layer in plan.layers],
            "askedBytes": plan.asked_bytes,
            "requests": sum(len(layer.mount) + 2 for layer in plan.layers) + len(plan.reads),
        },
        "upstreamMbit": args.upstream_mbit,
        "upstreamDelayMs": args.upstream_delay_ms,
        "thinkMs": args.think_ms,
        "network": "namespaces, tc" if own_networks else "loopback, paced registry",
        "cores": os.cpu_count(),
        "rounds": args.rounds,
        "arms": found,
    }


def _run(arm: Arm, rig: Rig, plan: Plan, want: Want, args: argparse.Namespace) -> Row:
    rounds = []
    for number in range(args.rounds):
        which = f", round {number + 1}" if args.rounds > 1 else ""
        began = time.monotonic()
        alone = arm.storm(rig, plan, 1, want)
        _tell(f"{arm.name}{which}: one node {alone.seconds[-1]:.2f} s")
        whole = alone if args.nodes == 1 else arm.storm(rig, plan, args.nodes, want)
        rounds.append(Round(alone, whole))
        _tell(
            f"{arm.name}{which}: {args.nodes} nodes {whole.seconds[-1]:.2f} s, upstream ratio "
            f"{rounds[-1].upstream_ratio:.3f} ({time.monotonic() - began:.0f} s in all)"
        )
    return describe(rounds, plan)


def _choose_arms(args: argparse.Namespace) -> list[Arm]:
    arms: list[Arm] = []
    if "p2pcache" in args.arms:
        arms.append(P2pcache())
    if "no-mirror" in args.arms:
        arms.append(NoMirror())
    if "cache" in args.arms:
        arms.append(SharedCache())
    if "spegel" in args.arms and args.spegel:
        arms.append(Spegel(args.spegel, args.containerd))
    return arms


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=_count, default=8)
    parser.add_argument("--image", choices=[LAZY, PLAIN], default=LAZY)
    parser.add_argument("--upstream-mbit", type=float, default=100.0, help="0: not shaped")
    parser.add_argument("--upstream-delay-ms", type=float, default=0.0, help="before each answer")
    parser.add_argument("--think-ms", type=float, default=8.0, help="mean, between lazy reads")
    parser.add_argument("--layers", type=int, default=1, help="of the plain image")
    parser.add_argument("--layer-mb", type=float, default=250.0)
    parser.add_argument("--parallel", type=int, default=3, help="plain layers that a client pulls")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--spegel", type=Path, help="Spegel's program, v0.7")
    parser.add_argument("--containerd", type=Path, help="2.1 or newer, with ctr beside it")
    parser.add_argument("--loopback", action="store_true", help="no namespaces, even as root")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for one storm")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args(argv)


def _count(text: str) -> int:
    count = int(text)
    if not 1 <= count <= MAX_NODES:
        raise argparse.ArgumentTypeError(f"1 to {MAX_NODES}")
    return count


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _leave(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds as Ctrl-C does, so that nothing is left behind."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
