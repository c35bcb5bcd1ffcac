"""What a process has used so far and holds now, as the kernel tells it.

Hides ``/proc`` (proc(5)) and the processor clocks of other processes (clock_getcpuclockid(3)). The
rule: to look costs the process nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
# linux/posix-timers.h: how the number of a process's clock is made of its id.
_CPUCLOCK_SCHED: Final = 2
# linux/tcp_states.h.
_ESTABLISHED: Final = "01"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used since its start."""

    cpu_s: float
    """To the nanosecond, threads that have ended included."""
    system_s: float
    """The part of it in the kernel; in ticks, of which there are only some 100 a second."""
    wakeups: int
    """How often its threads have waited for something: greetings, timers, answers."""
    reads: int
    """Calls of read(2), as uvloop makes one for what has come by a socket; 0 if not told."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What a process holds, in bytes."""

    rss: int
    """With all of the files that it maps, whoever else maps them."""
    pss: int
    """With a share of what others map, too; 0 if not told. The more processes, the less it is."""
    private: int
    """What would be free if it ended; 0 if not told."""
    peak: int
    """The most `rss` that it has ever had."""


def usage(pid: int) -> Usage:
    """What *pid* has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    wakeups = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ends meanwhile
            wakeups += _fields(task / "status")["voluntary_ctxt_switches"]
    reads = 0
    with suppress(PermissionError, FileNotFoundError):
        reads = _fields(Path(f"/proc/{pid}/io"))["syscr"]
    return Usage(
        cpu_s=time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED),
        system_s=int(fields[12]) / _TICKS_PER_S,
        wakeups=wakeups,
        reads=reads,
    )


def memory(pid: int) -> Memory:
    """What *pid* holds now."""
    status = _fields(Path(f"/proc/{pid}/status"))
    shares: dict[str, int] = {}
    with suppress(PermissionError, FileNotFoundError):
        shares = _fields(Path(f"/proc/{pid}/smaps_rollup"))
    return Memory(
        rss=status["VmRSS"] << 10,
        pss=shares.get("Pss", 0) << 10,
        private=(shares.get("Private_Clean", 0) + shares.get("Private_Dirty", 0)) << 10,
        peak=status["VmHWM"] << 10,
    )


def _fields(path: Path) -> dict[str, int]:
    """The lines of *path* that are a name and one number, with or without a unit."""
    found = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isdecimal():
            found[name] = int(words[0])
    return found


def connected(pids: Iterable[int], port: int) -> dict[int, set[str]]:
    """To which addresses each of *pids* has a connection at *port* that it has made itself."""
    there: dict[str, str] = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        address, _, number = fields[2].partition(":")
        if fields[3] == _ESTABLISHED and int(number, 16) == port:
            there[fields[9]] = str(IPv4Address(bytes.fromhex(address)[::-1]))
    found: dict[int, set[str]] = {}
    for pid in pids:
        found[pid] = set()
        descriptors: list[Path] = []
        with suppress(FileNotFoundError):  # it has ended
            descriptors += Path(f"/proc/{pid}/fd").iterdir()
        for descriptor in descriptors:
            with suppress(FileNotFoundError):
                target = str(descriptor.readlink())
                if target.startswith("socket:[") and target[8:-1] in there:
                    found[pid].add(there[target[8:-1]])
    return found
