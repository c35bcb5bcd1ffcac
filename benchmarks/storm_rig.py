"""The place of the storm: one registry behind a line, hosts for nodes, and clients let go at once.

Hides how the line is made. As root every host has a network of its own on one bridge, and the
registry's host sends at the upstream rate at most (``tc``, token bucket). Without root the hosts
are addresses 127.77.0.N, and the registry paces what it sends. The rule: nothing outlives the rig.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from benchmarks.storm_hosts import (
    ClientsCpu,
    Host,
    LoopbackHost,
    OwnHost,
    Running,
    answers,
    busy_s,
    cpu_of,
    peak_rss,
    wait_for,
)
from tests.e2e.machines import CommandFailed, Machine, Network, tail

SUBNET: Final = "10.231.0."
LOOPBACK: Final = "127.77.0."
REGISTRY_NUMBER: Final = 2
CACHE_NUMBER: Final = 3
FIRST_NODE: Final = 11
MAX_NODES: Final = 200
REGISTRY_PORT: Final = 5000
CLIENT_PROCESSES: Final = 2
PREFIX: Final = "p2pcache-storm-"

_CHECKOUT: Final = Path(__file__).parents[1]
_QUIET_S: Final = 0.5
_SETTLE_S: Final = 15.0
# A node keeps what it has on a disk of its own. Here they would share one.
_MEMORY: Final = Path("/dev/shm")
# The token bucket: some milliseconds at the full rate, and room for what waits.
_BURST_S: Final = 0.004
_SMALLEST_BURST: Final = 64 << 10
_QUEUE_S: Final = 0.5


@dataclass(slots=True)
class Line:
    """The way to the registry."""

    mbit: float
    delay_ms: float = 0.0


@dataclass(slots=True)
class Storm:
    """One storm, measured."""

    clients: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    upstream_bytes: int = 0
    upstream_requests: int = 0
    wire_bytes: int = 0
    wire_drops: int = 0
    window_s: float = 0.0
    cpu_s: dict[str, float] = field(default_factory=dict)
    """Processor seconds of the `nodes`, the `registry`, the `clients`, and `machine`: all."""
    max_rss_bytes: int = 0
    counters: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def total(self, name: str) -> int:
        """The sum of one count over the clients."""
        return sum(client[name] for client in self.clients)


class Rig:
    """The registry's host, a host for a shared cache, and *count* nodes' hosts."""

    def __init__(self, image: Path, count: int, line: Line, *, own_networks: bool) -> None:
        self.image = image
        self.line = line
        self.own_networks = own_networks
        self._count = count
        self._stack = ExitStack()
        self._logs = Path()
        self.work = Path()
        self.nodes: list[Host] = []
        self.registry_host: Host
        self.cache_host: Host
        self._registry: Running
        self._network: Network | None = None

    def __enter__(self) -> Self:
        remove_leftovers()
        with ExitStack() as stack:
            self.work = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
            stack.callback(shutil.rmtree, self.work, ignore_errors=True)
            self._logs = self.work / "logs"
            self._logs.mkdir()
            if self.own_networks:
                self._network = stack.enter_context(Network(self._logs))
            self._stack = stack
            self.registry_host = self._host("registry", REGISTRY_NUMBER)
            self.cache_host = self._host("cache", CACHE_NUMBER)
            self.nodes = [
                self._host(f"node-{number + 1}", FIRST_NODE + number)
                for number in range(self._count)
            ]
            self._introduce()
            self._shape()
            self._start_registry()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, KeyboardInterrupt):
            for log in sorted(self._logs.iterdir())[-8:]:
                error.add_note(f"--- {log.name}\n{tail(log)}")
        self._stack.close()

    @property
    def registry_url(self) -> str:
        """Where the registry is."""
        return f"http://{self.registry_host.address}:{REGISTRY_PORT}"

    def folder(self, name: str, size: int) -> Path:
        """A new folder for up to *size* bytes: in memory if there is room for twice as much."""
        with suppress(OSError):
            room = os.statvfs(_MEMORY)
            if min(room.f_bavail * room.f_frsize, _available_memory()) > 2 * size:
                folder = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-{name}-", dir=_MEMORY)
                self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
                return Path(folder)
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.work))

    def _host(self, name: str, number: int) -> Host:
        if self._network is None:
            return LoopbackHost(name, f"{LOOPBACK}{number}", self._logs)
        machine = self._stack.enter_context(Machine(name, self._logs))
        self._network.attach(machine, f"{SUBNET}{number}")
        return OwnHost(machine)

    def _introduce(self) -> None:
        """Tell every host every other's link address, for good.

        The kernel keeps 1024 learned ones at most, of all networks on this machine together: not
        enough for 32 hosts that talk to each other.
        """
        machines = [
            host.machine
            for host in (self.registry_host, self.cache_host, *self.nodes)
            if isinstance(host, OwnHost)
        ]
        batch = self.work / "neighbours"
        links = {each.address: f"02:00:00:00:00:{i + 1:02x}" for i, each in enumerate(machines)}
        batch.write_text(
            "".join(
                f"neighbour replace {address} lladdr {link} dev eth0 nud permanent\n"
                for address, link in links.items()
            )
        )
        for machine in machines:
            machine.run("ip", "link", "set", "eth0", "address", links[machine.address])
            machine.run("ip", "-batch", str(batch))

    def _shape(self) -> None:
        if isinstance(self.registry_host, OwnHost) and self.line.mbit:
            rate = self.line.mbit * 1e6 / 8
            burst = max(_SMALLEST_BURST, int(rate * _BURST_S))
            limit = burst + max(_SMALLEST_BURST, int(rate * _QUEUE_S))
            shape = ["rate", f"{self.line.mbit * 1e6:.0f}bit", "burst", str(burst)]
            self.registry_host.machine.run(
                *("tc", "qdisc", "add", "dev", "eth0", "root", "tbf"), *shape, "limit", str(limit)
            )

    def _start_registry(self) -> None:
        host = self.registry_host
        paced = 0.0 if self.own_networks else self.line.mbit
        self._registry = host.start(
            "registry",
            *(sys.executable, str(Path(__file__).with_name("storm_registry.py"))),
            *("--image", str(self.image), "--listen", f"{host.address}:{REGISTRY_PORT}"),
            *("--mbit", str(paced), "--delay-ms", str(self.line.delay_ms)),
        )
        self._stack.callback(self._registry.kill)
        wait_for(
            "the registry", [self._registry], lambda: answers(host, host, REGISTRY_PORT, "/v2/")
        )

    # -- what is measured ------------------------------------------------------------------------

    def counters(self) -> dict[str, Any]:
        """What the registry has sent so far."""
        host = self.registry_host
        status, text = host.get(host.address, REGISTRY_PORT, "/storm/counters")
        if status != 200:
            raise CommandFailed(f"the registry does not tell its counters: {status}")
        found: dict[str, Any] = json.loads(text)
        return found

    def _wire(self) -> tuple[int, int]:
        """Bytes that have left the registry's host, headers and all; what the queue has dropped."""
        if not isinstance(self.registry_host, OwnHost):
            return 0, 0
        table = Path(f"/proc/{self.registry_host.machine.init}/net/dev").read_text()
        line = next(line for line in table.splitlines() if line.strip().startswith("eth0:"))
        shown = self.registry_host.machine.run("tc", "-s", "qdisc", "show", "dev", "eth0")
        dropped = shown.partition("(dropped ")[2].partition(",")[0]
        return int(line.split()[9]), int(dropped or 0)

    def settled(self) -> dict[str, Any]:
        """`counters` once nothing has been asked or sent for a while; bounded."""
        deadline = time.monotonic() + _SETTLE_S
        seen, since = self.counters(), time.monotonic()
        while (now := time.monotonic()) < deadline:
            time.sleep(0.05)
            found = self.counters()
            if found != seen or found["inFlight"]:
                seen, since = found, now
            elif now - since >= _QUIET_S:
                break
        return seen

    def measure(self, storm: Callable[[], list[dict[str, Any]]], nodes: Sequence[Running]) -> Storm:
        """Have *storm* happen; say what it took. It returns what became of each client."""
        found = Storm()
        before, wire = self.settled(), self._wire()
        pids = [process.pid for process in nodes]
        cpu = cpu_of(pids), cpu_of([self._registry.pid]), busy_s()
        began = time.monotonic()
        with ClientsCpu() as clients:
            found.clients = storm()
        found.window_s = time.monotonic() - began
        found.cpu_s = {
            "nodes": cpu_of(pids) - cpu[0],
            "registry": cpu_of([self._registry.pid]) - cpu[1],
            "clients": clients.seconds,
            "machine": busy_s() - cpu[2],
        }
        found.max_rss_bytes = max(map(peak_rss, pids), default=0)
        start = min(client["began"] for client in found.clients)
        found.seconds = sorted(client["ended"] - start for client in found.clients)
        found.window_s = max(found.window_s, found.seconds[-1])
        for client in found.clients:
            found.notes += [f"{client['name']}: {note}" for note in client["notes"]]
        after, wire_after = self.settled(), self._wire()
        for kind in ("manifestBytes", "blobBytes"):
            found.upstream_bytes += after[kind] - before[kind]
        found.upstream_requests = after["requests"] - before["requests"]
        found.wire_bytes, found.wire_drops = (
            now - then for now, then in zip(wire_after, wire, strict=True)
        )
        return found


@dataclass(frozen=True, slots=True)
class Want:
    """What clients do: how long a program thinks between reads, how many layers it pulls at once,
    and when we stop waiting.
    """

    think_ms: float
    parallel: int
    limit_s: float


def run_clients(
    rig: Rig, hosts_of: dict[str, list[dict[str, Any]]], want: Want
) -> list[dict[str, Any]]:
    """Let a client start on each node of *hosts_of* at one moment; the hosts it asks, in order."""
    tasks = [
        {"name": host.name, "netns": host.netns, "hosts": hosts_of[host.name]}
        for host in rig.nodes
        if host.name in hosts_of
    ]
    count = min(CLIENT_PROCESSES, len(tasks))
    processes: list[subprocess.Popen[str]] = []
    deadline = time.monotonic() + want.limit_s
    try:
        for share in (tasks[n::count] for n in range(count)):
            process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL"),
                    *(sys.executable, "-m", "benchmarks.storm_client"),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=_CHECKOUT,
            )
            processes.append(process)
            _tell(
                process,
                {
                    "image": str(rig.image),
                    "think_s": want.think_ms / 1000,
                    "parallel": want.parallel,
                    "clients": share,
                },
            )
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise CommandFailed("a client process ended at its start")
        for process in processes:
            _tell(process, "go")
        results: list[dict[str, Any]] = []
        for process in processes:
            said, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            results += json.loads(said)
        return results
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"not all clients were done after {want.limit_s:.0f} s") from None
    finally:
        for process in processes:
            with process:  # closes its pipes, waits for its end
                process.kill()


def _tell(process: subprocess.Popen[str], message: object) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()


def remove_leftovers() -> None:
    """Folders of storms that were killed. Their processes and networks went with them."""
    for place in (Path(tempfile.gettempdir()), _MEMORY):
        for folder in place.glob(f"{PREFIX}[0-9]*-*"):
            if not Path(f"/proc/{folder.name.split('-')[2]}").exists():
                shutil.rmtree(folder, ignore_errors=True)


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
