"""Hosts of the storm and the processes on them: network namespaces, or addresses of loopback.

Hides which of the two. The rule: no process outlives this one, however it ends, and what a process
used is read from the kernel, not from the process.
"""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol, Self

from tests.e2e.machines import CommandFailed, Machine, tail, wait_until

_READY_S: Final = 60.0


class Running(Protocol):
    """A process on a host."""

    log: Path

    @property
    def pid(self) -> int:
        """Its number."""

    def is_running(self) -> bool:
        """Whether it has not ended."""

    def kill(self) -> None:
        """End it at once."""

    def wait(self, timeout_s: float) -> int:
        """Return the exit status."""


class Host(Protocol):
    """A machine, or what stands for one."""

    name: str
    address: str
    own: str
    """The address at which only the host's own clients read: loopback where it has one."""
    netns: str | None

    def start(self, name: str, *command: str) -> Running:
        """Start a process; it is not waited for."""

    def get(self, address: str, port: int, path: str) -> tuple[int, str]:
        """Ask over HTTP from here."""


class OwnHost:
    """A host with a network of its own."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.name = machine.name
        self.address = machine.address
        self.own = "127.0.0.1"
        self.netns: str | None = f"/proc/{machine.init}/ns/net"

    def start(self, name: str, *command: str) -> Running:
        """See `Host`."""
        return self.machine.start(name, *command, ready=lambda: True)

    def get(self, address: str, port: int, path: str) -> tuple[int, str]:
        """See `Host`."""
        return self.machine.get(address, port, path)


class LoopbackProcess:
    """A process that stands on an address of loopback."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("ab") as out:
            # Killed with us, however we end.
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """See `Running`."""
        return self._process.pid

    def is_running(self) -> bool:
        """See `Running`."""
        return self._process.poll() is None

    def kill(self) -> None:
        """See `Running`."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)

    def wait(self, timeout_s: float) -> int:
        """See `Running`."""
        return self._process.wait(timeout_s)


class LoopbackHost:
    """An address of loopback."""

    def __init__(self, name: str, address: str, logs: Path) -> None:
        self.name = name
        self.address = self.own = address
        self.netns: str | None = None
        self._logs = logs

    def start(self, name: str, *command: str) -> Running:
        """See `Host`."""
        return LoopbackProcess(command, self._logs / f"{self.name}-{name}.log")

    def get(self, address: str, port: int, path: str) -> tuple[int, str]:
        """See `Host`."""
        connection = http.client.HTTPConnection(address, port, timeout=5)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()


def wait_for(what: str, processes: Iterable[Running], is_so: Callable[[], bool]) -> None:
    """Return when *is_so*; raises `CommandFailed` if a process ends or it takes too long."""
    watched = list(processes)

    def ready() -> bool:
        for process in watched:
            if not process.is_running():
                began = process.log.read_text(errors="replace")[:500]
                raise CommandFailed(f"{what} ended at its start:\n{began}\n{tail(process.log)}")
        return is_so()

    wait_until(what, ready, timeout_s=_READY_S)


def answers(host: Host, at: Host, port: int, path: str, *, own: bool = False) -> bool:
    """Tell whether a server on *at* says 200, asked from *host*."""
    try:
        return host.get(at.own if own else at.address, port, path)[0] == 200
    except OSError:
        return False


# -- what the kernel knows ----------------------------------------------------------------------


class ClientsCpu:
    """The processor time of the children that end within the block."""

    seconds = 0.0

    def __enter__(self) -> Self:
        self._before = os.times()
        return self

    def __exit__(self, *_: object) -> None:
        now, then = os.times(), self._before
        self.seconds = now.children_user - then.children_user
        self.seconds += now.children_system - then.children_system


def cpu_of(pids: Iterable[int]) -> float:
    """Processor seconds that these processes have used, and their children that have ended."""
    ticks = 0
    for pid in pids:
        with suppress(FileNotFoundError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_rss(pid: int) -> int:
    """The most memory that a process has ever had, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def busy_s() -> float:
    """Processor seconds that this machine has been busy, whoever with."""
    fields = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]))
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")
