"""What does one node cost that does nothing?

    python -m benchmarks.idle [--nodes 100] [--images 20] [--seconds 60] [--json PATH]

So many real ``p2pcache serve`` processes on addresses of loopback, each told of all. Once all have
greeted each other, a client starts lazy images (5 layers, some 3,000 files and folders each, none
in common) through the first one. When that has settled, nothing is asked of anybody for so many
seconds, and the kernel tells what each process uses and holds. In the same run: a node without
members and images, and an interpreter that has imported aiohttp and then waits.

A member is greeted every 24 to 36 seconds: a shorter time may show no greeting at all, or all of
them. What a node holds is told to the coordinators every 3 to 4 minutes: a minute shows little of
it. All processes share this machine's cores and caches, which makes each dearer than it would be
alone ("busy": how much of the cores was used by anybody). Memory is "RSS", as a cluster has one
node a machine; the processes here share the libraries that they map ("PSS").

100 nodes take some 6 GB of memory, and some three minutes before the measurement. Exits with 0
whatever is measured, so that the bounds are the reader's to judge.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any, Final

import p2pcache
from benchmarks.idle_images import Image, make_images
from benchmarks.idle_usage import Memory, Usage, connected, memory, usage
from benchmarks.storm_arms import add_counters
from benchmarks.storm_hosts import (
    LoopbackHost,
    LoopbackProcess,
    Running,
    answers,
    busy_s,
    wait_for,
)
from benchmarks.storm_rig import PREFIX, remove_leftovers
from p2pcache.demo.registry import Contents, Registry
from p2pcache.demo.replay import Replay, open_session
from tests.e2e.machines import CommandFailed, tail

MAX_CPU_SHARE: Final = 0.01
MAX_RSS: Final = 128 << 20
MAX_NODES: Final = 200

REGISTRY: Final = "registry.test"
MIRROR_PORT: Final = 29900
PEER_PORT: Final = 29901
STATUS_PORT: Final = 29902

_CHECKOUT: Final = Path(p2pcache.__file__).parents[1]
_PYTHON: Final = ("env", f"--chdir={_CHECKOUT}", sys.executable)
_WAITING: Final = "import aiohttp.web, signal; print('waiting', flush=True); signal.pause()"
_MEMORY: Final = Path("/dev/shm")
_SUBNETS: Final = tuple(f"127.78.{number}." for number in range(16))
# The last addresses of the subnet: who takes it, and the node that is alone.
_TAKEN, _ALONE = 254, 253
# So many processes start at once.
_BATCH: Final = 8
_SPARE: Final = 1 << 30
# One that greeted another too early tries again within a minute.
_GREETED_S: Final = 180.0
_SETTLE_S: Final = 60.0
# Settled is: so many seconds in a row, in each of which no process used more than this share.
_CALM_S: Final = 5
_CALM_SHARE: Final = 0.05


@dataclass(frozen=True, slots=True)
class Cost:
    """What one process cost while nothing was asked of it, or what several did."""

    cpu_share: float
    """Of one core."""
    system_share: float
    wakeups_per_s: float
    reads_per_s: float
    claims_per_s: float
    """Answered as a coordinator."""
    rss: float
    pss: float
    private: float
    peak_rss: float

    @staticmethod
    def of(costs: Sequence[Cost], summary: Callable[[Iterable[float]], float]) -> Cost:
        """One summary of each figure."""
        return Cost(*(summary(each) for each in zip(*(_values(c) for c in costs), strict=True)))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    args = _parse(argv)
    signal.signal(signal.SIGTERM, _leave)
    document = measure(args.nodes, args.images, args.entries, args.seconds)
    print(table(document))
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def measure(nodes: int, images: int, entries: int, seconds: float) -> dict[str, Any]:
    """Start everything, measure, end everything; return what the JSON file says."""
    with Rig(nodes) as rig:
        _tell(f"making {images} images")
        made = make_images(images, entries)
        rig.start({f"idle/app-{number + 1}": image.contents for number, image in enumerate(made)})
        rig.wait_until_greeted()
        rig.read(made)
        files = sum(len(image.start_up.files) for image in made)
        total = sum(image.entries for image in made)
        size = sum(image.size for image in made)
        del made
        rig.settle()
        costs, busy = rig.watch(seconds)
    floor, alone, first, *others = costs
    rows = {"interpreter": floor, "alone": alone}
    if others:
        rows |= {"memberMedian": Cost.of(others, median), "memberMax": Cost.of(others, max)}
    rows["withImages"] = first
    worst = Cost.of([first, *others], max)
    return {
        "nodes": nodes,
        "images": images,
        "imageBytes": size,
        "entries": total,
        "filesRead": files,
        "seconds": seconds,
        "cores": os.cpu_count(),
        "busyShare": round(busy, 4),
        "rows": {name: _rounded(cost, floor, alone) for name, cost in rows.items()},
        "bounds": {
            "cpuShare": {"most": round(worst.cpu_share, 6), "bound": MAX_CPU_SHARE},
            "rss": {"most": round(worst.rss), "bound": MAX_RSS},
        },
    }


def table(document: dict[str, Any]) -> str:
    """What a person reads."""
    nodes, images = document["nodes"], document["images"]
    names = {
        "interpreter": "interpreter, aiohttp",
        "alone": "node alone, no images",
        "memberMedian": f"the other {nodes - 1}: median",
        "memberMax": f"the other {nodes - 1}: most",
        "withImages": f"node with {images} images",
    }
    lines = [
        f"{nodes} nodes; {images} images, {document['entries']} files and folders; "
        f"{document['seconds']:g} s; {document['cores']} cores, busy {document['busyShare']:.0%}",
        f"{'':24}{'CPU %':>8}{'kernel':>8}{'wakes/s':>9}{'reads/s':>9}{'claims/s':>9}"
        f"{'RSS MiB':>9}{'PSS':>7}{'own':>7}{'peak':>7}{'CPU÷alone':>11}{'RSS÷alone':>11}",
    ]
    for name, row in document["rows"].items():
        sizes = [row[key] / (1 << 20) for key in ("rss", "pss", "private", "peak_rss")]
        by_alone = row["cpuPerAlone"]
        lines.append(
            f"{names[name]:24}{row['cpu_share'] * 100:8.3f}{row['system_share'] * 100:8.3f}"
            f"{row['wakeups_per_s']:9.1f}{row['reads_per_s']:9.1f}{row['claims_per_s']:9.2f}"
            f"{sizes[0]:9.1f}{sizes[1]:7.1f}{sizes[2]:7.1f}{sizes[3]:7.1f}"
            f"{'-' if by_alone is None else format(by_alone, '.2f'):>11}{row['rssPerAlone']:11.2f}"
        )
    cpu, rss = document["bounds"]["cpuShare"], document["bounds"]["rss"]
    lines += [
        _verdict("idle CPU", cpu["most"] * 100, cpu["bound"] * 100, "% of one core"),
        _verdict("memory", rss["most"] / (1 << 20), rss["bound"] / (1 << 20), "MiB"),
    ]
    return "\n".join(lines)


def _verdict(what: str, most: float, bound: float, unit: str) -> str:
    answer = "met" if most <= bound else "NOT MET"
    return f"{what}: {most:.2f} {unit} at most, {bound:g} allowed: {answer}"


def _rounded(cost: Cost, floor: Cost, alone: Cost) -> dict[str, Any]:
    found: dict[str, Any] = {name: round(value, 6) for name, value in asdict(cost).items()}
    found["cpuPerAlone"] = (
        round(cost.cpu_share / alone.cpu_share, 3) if alone.cpu_share > 0 else None
    )
    found["rssPerAlone"] = round(cost.rss / alone.rss, 3)
    found["rssPerInterpreter"] = round(cost.rss / floor.rss, 3)
    return found


def _values(cost: Cost) -> list[float]:
    return list(asdict(cost).values())


class Rig:
    """The processes, a registry in this one, and a folder for the stores. Nothing outlives it."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._stack = ExitStack()
        self._folder = Path()
        self._subnet = ""
        self._alone: LoopbackHost
        self._nodes: list[LoopbackHost] = []
        self._processes: list[Running] = []
        """The interpreter, the node that is alone, the node with images, all others."""
        # The registry answers only while something runs on it: nothing else needs it.
        self._runner = asyncio.Runner()

    def __enter__(self) -> Rig:
        remove_leftovers()
        with ExitStack() as stack:
            self._subnet = stack.enter_context(_Subnet()).prefix
            place = _MEMORY if _has_room(_MEMORY) else None
            self._folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-idle-", dir=place))
            stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
            stack.enter_context(self._runner)
            stack.callback(self._kill)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _kill(self) -> None:
        # All are told before any is waited for.
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.kill()

    # -- before the measurement ------------------------------------------------------------------

    def start(self, repositories: dict[str, Contents]) -> None:
        """Start everything; return when all say that they are ready."""
        registry = Registry(repositories)

        async def open_registry() -> None:
            await registry.__aenter__()

        async def close_registry() -> None:
            await registry.__aexit__(None, None, None)

        self._runner.run(open_registry())
        self._stack.callback(lambda: self._runner.run(close_registry()))
        secret = self._folder / "secret"
        secret.touch(mode=0o600)
        secret.write_text(secrets.token_hex(32))
        waiting = LoopbackProcess([*_PYTHON, "-c", _WAITING], self._folder / "interpreter.log")
        self._processes.append(waiting)
        self._alone = self._host("alone", _ALONE)
        self._start_batch([self._alone], registry.url, [])
        self._nodes = [self._host(f"node-{n}", n) for n in range(1, self._count + 1)]
        members = ["--cluster-secret-file", str(secret)]
        for node in self._nodes:
            members += ["--peer", f"http://{node.address}:{PEER_PORT}"]
        for first in range(0, self._count, _BATCH):
            self._start_batch(self._nodes[first : first + _BATCH], registry.url, members)
            _tell(f"{min(first + _BATCH, self._count)} nodes are ready")
        wait_for("the interpreter", [waiting], lambda: "waiting" in waiting.log.read_text())

    def _host(self, name: str, number: int) -> LoopbackHost:
        return LoopbackHost(name, f"{self._subnet}{number}", self._folder)

    def _start_batch(
        self, nodes: Sequence[LoopbackHost], registry: str, members: Sequence[str]
    ) -> None:
        for node in nodes:
            command = [
                *(*_PYTHON, "-m", "p2pcache", "serve", "--node-name", node.name),
                *("--store", str(self._folder / node.name), "--store-size", str(_SPARE)),
                *("--mirror-listen", f"{node.address}:{MIRROR_PORT}"),
                *("--peer-listen", f"{node.address}:{PEER_PORT}"),
                *("--status-listen", f"{node.address}:{STATUS_PORT}"),
                *("--upstream", f"{REGISTRY}={registry}", "--log-level", "warning"),
                *members,
            ]
            if members:
                command += ["--advertise", f"{node.address}:{PEER_PORT}"]
            self._processes.append(node.start("p2pcache", *command))
        for node in nodes:
            wait_for(
                node.name,
                self._processes,
                lambda node=node: answers(  # type: ignore[misc]
                    node, node, STATUS_PORT, "/readyz"
                ),
            )

    def wait_until_greeted(self) -> None:
        """Return when each node has greeted all others: it keeps the connections for the next time.

        Raises `CommandFailed`.
        """
        addresses = {node.address for node in self._nodes}
        left = {
            process.pid: addresses - {node.address}
            for node, process in zip(self._nodes, self._processes[2:], strict=True)
        }
        deadline = time.monotonic() + _GREETED_S
        while left:
            for pid, found in connected(left, PEER_PORT).items():
                left[pid] -= found
            left = {pid: missing for pid, missing in left.items() if missing}
            if left and time.monotonic() > deadline:
                raise CommandFailed(f"{len(left)} nodes have not greeted all after {_GREETED_S} s")
            self._check()
            if left:
                time.sleep(1)
        _tell("all have greeted all")

    def read(self, images: Sequence[Image]) -> None:
        """Have a client start all *images* through the first node, one after the other."""
        mirror = f"http://{self._nodes[0].address}:{MIRROR_PORT}"

        async def start_all() -> None:
            async with open_session() as session:
                for image in images:
                    found = await Replay(session, mirror, REGISTRY, image.start_up).run()
                    if found.mismatches:
                        raise CommandFailed(f"wrong bytes: {found.mismatches[:3]}")

        self._runner.run(start_all())
        _tell(f"{len(images)} images have been started")

    def settle(self) -> None:
        """Return when all have been calm for some seconds; after a while in any case."""
        deadline = time.monotonic() + _SETTLE_S
        calm = 0
        before = self._cpu()
        while calm < _CALM_S and time.monotonic() < deadline:
            time.sleep(1)
            self._check()
            now = self._cpu()
            most = max(each - then for each, then in zip(now, before, strict=True))
            calm = calm + 1 if most < _CALM_SHARE else 0
            before = now
        _tell("calm" if calm >= _CALM_S else "not calm; measuring all the same")

    def _cpu(self) -> list[float]:
        return [usage(process.pid).cpu_s for process in self._processes]

    # -- the measurement -------------------------------------------------------------------------

    def watch(self, seconds: float) -> tuple[list[Cost], float]:
        """What each process costs within *seconds*; and how busy the cores are, whoever with."""
        claims = self._claims()
        busy, began = busy_s(), time.monotonic()
        before = [(usage(process.pid), time.monotonic()) for process in self._processes]
        time.sleep(seconds)
        self._check()
        after = [(usage(process.pid), time.monotonic()) for process in self._processes]
        busy = (busy_s() - busy) / (time.monotonic() - began) / (os.cpu_count() or 1)
        memories = [memory(process.pid) for process in self._processes]
        answered = [now - then for now, then in zip(self._claims(), claims, strict=True)]
        return [
            _cost(then, now, stopped - started, count, held)
            for (then, started), (now, stopped), count, held in zip(
                before, after, answered, memories, strict=True
            )
        ], busy

    def _claims(self) -> list[float]:
        """How many claims each process has answered: the interpreter none."""
        found = [0.0]
        for node in (self._alone, *self._nodes):
            counters: dict[str, float] = {}
            add_counters(counters, node.get(node.address, STATUS_PORT, "/metrics")[1])
            found.append(counters["p2pcache_answered_claims_total"])
        return found

    def _check(self) -> None:
        for process in self._processes:
            if not process.is_running():
                raise CommandFailed(f"a process has ended:\n{tail(process.log)}")


def _cost(then: Usage, now: Usage, seconds: float, claims: float, held: Memory) -> Cost:
    return Cost(
        cpu_share=(now.cpu_s - then.cpu_s) / seconds,
        system_share=(now.system_s - then.system_s) / seconds,
        wakeups_per_s=(now.wakeups - then.wakeups) / seconds,
        reads_per_s=(now.reads - then.reads) / seconds,
        claims_per_s=claims / seconds,
        rss=held.rss,
        pss=held.pss,
        private=held.private,
        peak_rss=held.peak,
    )


class _Subnet:
    """Addresses of loopback that no other run of this benchmark uses.

    Nodes let others listen on their addresses: two clusters there would become one.
    """

    def __init__(self) -> None:
        for prefix in _SUBNETS:
            self._guard = socket.socket()
            try:
                self._guard.bind((f"{prefix}{_TAKEN}", PEER_PORT))
            except OSError:
                self._guard.close()
            else:
                self.prefix = prefix
                return
        raise CommandFailed("all subnets are taken by other runs")

    def __enter__(self) -> _Subnet:
        return self

    def __exit__(self, *_: object) -> None:
        self._guard.close()


def _has_room(place: Path) -> bool:
    with suppress(OSError):
        room = os.statvfs(place)
        return room.f_bavail * room.f_frsize > 2 * _SPARE
    return False


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=_count, default=100)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--entries", type=int, default=3000, help="files and folders an image")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
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
