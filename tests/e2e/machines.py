"""Hosts of their own on this machine, joined by a bridge: network, mounts and processes apart.

Hides namespaces. Rule: nothing outlives its machine. Every process of a machine is in its process
namespace, whose first process dies with this one, however this one ends; its mounts, FUSE and
overlay included, and its network interfaces are in namespaces that end with the last process.
"""

from __future__ import annotations

import ctypes
import http.client
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

CLONE_NEWNET = 0x40000000
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
OWN_NAMESPACES = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
READY_LIMIT_S = 30.0
LOG_TAIL_LINES = 12


class CommandFailed(Exception):
    """A command on a machine exited with an error or took too long."""


class Process:
    """A process on a machine, whose output goes to *log*."""

    def __init__(self, name: str, entered: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.log = log
        self._entered = entered

    @property
    def pid(self) -> int:
        """The process as this machine's kernel numbers it, not as its own namespace does."""
        return _only_child(self._entered.pid)

    def is_running(self) -> bool:
        return self._entered.poll() is None

    def wait(self, timeout_s: float) -> int:
        """Return the exit status."""
        return self._entered.wait(timeout_s)

    def terminate(self, *, timeout_s: float = 15.0) -> int:
        """Ask it to end (SIGTERM), wait for that, and return the exit status."""
        with suppress(ProcessLookupError, StopIteration):
            os.kill(self.pid, signal.SIGTERM)
        try:
            return self.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise CommandFailed(f"{self.name} ignored SIGTERM for {timeout_s} s") from None

    def kill(self) -> None:
        """End it without asking (SIGKILL)."""
        with suppress(ProcessLookupError):
            os.killpg(self._entered.pid, signal.SIGKILL)
        self._entered.wait(10)

    def listens_on(self, port: int) -> bool:
        """Tell whether this very process holds a listening TCP socket on *port*."""
        # It has only just been asked for, or it has ended.
        with suppress(OSError, StopIteration):
            process = Path(f"/proc/{self.pid}")
            inodes = set()
            for table in ("tcp", "tcp6"):
                for line in (process / "net" / table).read_text().splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                        inodes.add(f"socket:[{fields[9]}]")
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    if os.readlink(descriptor) in inodes:
                        return True
        return False


class Machine:
    """One host. Use as a context manager; `Network.attach` gives it an address."""

    def __init__(self, name: str, logs: Path) -> None:
        self.name = name
        self.address = ""
        self.processes: list[Process] = []
        self._logs = logs
        self._holder: subprocess.Popen[bytes] | None = None
        self._init = 0

    def __enter__(self) -> Machine:
        self._holder = subprocess.Popen(
            [*DIES_WITH_US, "unshare", *OWN_NAMESPACES, "sleep", "infinity"],
            stderr=subprocess.DEVNULL,  # it complains of a signal mask on its way out
            start_new_session=True,
        )
        try:
            wait_until(f"machine {self.name}", self._has_init, timeout_s=10)
            self._init = _only_child(self._holder.pid)
            # Shims and runc keep state below /run, under names that two machines would share.
            self.run("mount", "-t", "tmpfs", "tmpfs", "/run")
            self.run("ip", "link", "set", "lo", "up")
        except BaseException:
            self._holder.kill()  # its first process goes with it
            self._holder.wait()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._holder is not None
        with suppress(ProcessLookupError):
            os.kill(self._init, signal.SIGKILL)
        self._holder.wait(30)
        for process in self.processes:
            process.wait(30)

    def start(
        self,
        name: str,
        *command: str,
        ready: Callable[[], bool],
        timeout_s: float = READY_LIMIT_S,
    ) -> Process:
        """Start a long-lived *command* and return when *ready* says so; it is killed at the end."""
        log = self.log_of(name)
        with log.open("ab") as out:
            entered = subprocess.Popen(
                [*self._enter(), *command], stdout=out, stderr=out, start_new_session=True
            )
        process = Process(f"{self.name}/{name}", entered, log)
        self.processes.append(process)

        def is_ready() -> bool:
            if not process.is_running():
                raise CommandFailed(f"{process.name} ended at its start; see {log.name}")
            return ready()

        wait_until(f"{process.name} to be ready", is_ready, timeout_s=timeout_s)
        return process

    def log_of(self, name: str) -> Path:
        """Where the process that is or will be started as *name* writes."""
        return self._logs / f"{self.name}-{name}.log"

    def run(self, *command: str, timeout_s: float = 60.0) -> str:
        """Run *command* to its end and return what it wrote; raises `CommandFailed`."""
        try:
            done = subprocess.run(
                [*self._enter(), *command],
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            out = (error.stdout or b"")[-2000:]
            problem = f"{command} on {self.name}: {timeout_s} s passed: {out!r}"
            raise CommandFailed(problem) from None
        if done.returncode:
            said = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            raise CommandFailed(f"{command} on {self.name}: status {done.returncode}:\n{said}")
        return done.stdout

    def get(self, address: str, port: int, path: str, *, timeout_s: float = 5.0) -> tuple[int, str]:
        """Ask over HTTP, from this machine's network; return status and body."""
        connection = http.client.HTTPConnection(address, port, timeout=timeout_s)
        try:
            with self._network():
                connection.connect()
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def answers(self, address: str, port: int, path: str) -> bool:
        """Tell whether a server here says 200."""
        try:
            return self.get(address, port, path)[0] == 200
        except OSError:
            return False

    @property
    def init(self) -> int:
        """The process id whose namespaces are this machine's."""
        return self._init

    def _has_init(self) -> bool:
        assert self._holder is not None
        with suppress(OSError, StopIteration):
            child = _only_child(self._holder.pid)
            return Path(f"/proc/{child}/comm").read_text() == "sleep\n"
        return False

    def _enter(self) -> list[str]:
        return ["nsenter", "--target", str(self._init), "--mount", "--net", "--pid", "--"]

    @contextmanager
    def _network(self) -> Iterator[None]:
        """Sockets that this thread opens meanwhile belong to the machine's network."""
        with (
            Path("/proc/thread-self/ns/net").open() as home,
            Path(f"/proc/{self._init}/ns/net").open() as there,
        ):
            _set_namespace(there.fileno())
            try:
                yield
            finally:
                _set_namespace(home.fileno())


class Network:
    """A bridge that machines are attached to, in a namespace of its own: no route leads out."""

    def __init__(self, logs: Path) -> None:
        self._hub = Machine("hub", logs)
        self._stack = ExitStack()
        self._ports = 0

    def __enter__(self) -> Network:
        with ExitStack() as stack:
            stack.enter_context(self._hub)
            self._hub.run("ip", "link", "add", "name", "br0", "type", "bridge")
            self._hub.run("ip", "link", "set", "br0", "up")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def attach(self, machine: Machine, address: str) -> None:
        """Join *machine* to the bridge as *address*/24."""
        self._ports += 1
        port = f"port{self._ports}"
        # Only the network is entered: both process ids are those of this machine's /proc.
        link = ["nsenter", "--target", str(self._hub.init), "--net", "ip", "link"]
        peer = ["peer", "name", "eth0", "netns", str(machine.init)]
        subprocess.run([*link, "add", "name", port, "type", "veth", *peer], check=True)
        subprocess.run([*link, "set", port, "master", "br0", "up"], check=True)
        machine.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        machine.run("ip", "link", "set", "eth0", "up")
        machine.address = address


def wait_until(what: str, is_so: Callable[[], bool], *, timeout_s: float) -> None:
    """Return when *is_so*; raises `CommandFailed` when it has not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            raise CommandFailed(f"waited {timeout_s} s for {what}")
        time.sleep(0.02)


def tail(log: Path) -> str:
    """The last lines of a log, for a failure report."""
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join(_shortened(line) for line in lines)


def _shortened(line: str) -> str:
    # What a line of JSON is about is at its start, where a traceback was raised at its end.
    return line if len(line) <= 500 else f"{line[:200]} ... {line[-300:]}"


def _only_child(pid: int) -> int:
    return next(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def _set_namespace(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
