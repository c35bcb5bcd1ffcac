"""The rig: one registry and some nodes on a network of their own, all real programs.

    with Rig(build_images(), nodes=2) as rig:
        first, second = rig.nodes
        ...

Every node has containerd, the stargz snapshotter and, unless told otherwise, p2pcache. Nothing of
it is left behind: see `machines`. A failure inside the `with` carries the end of every log.

`lazy_start` is the one scenario that the tests and the benchmark share.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from types import TracebackType

from tests.e2e.images import GZIP, REPOSITORY, START, Images
from tests.e2e.machines import Machine, Network, tail
from tests.e2e.mirrors import MIRROR_PORT, NAMELESS_PORT, Mirror, Setup
from tests.e2e.services import (
    Containerd,
    Line,
    Registry,
    Request,
    Snapshotter,
    Stargzd,
    mirror_config,
)
from tests.e2e.tools import build_stargzd, check_machine

SUBNET = "10.231.0."
REGISTRY_ADDRESS = SUBNET + "2"
FIRST_NODE = 11
FAR = Line(delay_s=0.040, bytes_per_s=12_500_000)
"""40 ms and 100 Mbit/s."""
SNAPSHOTTER_AGENT = "Go-http-client"


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the registry's access log says that one node read from it."""

    requests: list[Request] = field(repr=False)

    @property
    def bytes(self) -> int:
        return sum(request.written for request in self.requests)

    @property
    def blob_bytes(self) -> int:
        return sum(request.written for request in self.requests if "/blobs/" in request.path)

    @property
    def past_the_mirror(self) -> list[Request]:
        """Requests that the snapshotter or containerd sent to the registry themselves."""
        return [r for r in self.requests if r.agent.startswith((SNAPSHOTTER_AGENT, "containerd"))]


class Node:
    """A machine that runs containers. Get it from `Rig.nodes`."""

    def __init__(self, rig: Rig, machine: Machine, work: Path, setup: Snapshotter) -> None:
        work.mkdir()
        self.machine = machine
        self.mirror = Mirror(machine, work, rig.registry.host, rig.secret)
        self._rig = rig
        self._setup = setup
        self._binary = build_stargzd(setup.version)
        self._work = work
        self._lives = 0
        self._has_mirror = False
        self._stargzd: Stargzd
        self._containerd: Containerd

    def start(self, mirror: Setup | None) -> None:
        """Start everything; without *mirror*, containers read straight from the registry."""
        if mirror is not None:
            self._has_mirror = True
            self.mirror.start(mirror)
        self._start_runtime()

    def forget(self) -> None:
        """Give containerd and the snapshotter empty folders; p2pcache runs on with its store."""
        self._containerd.stop()
        self._stargzd.stop()
        self._start_runtime()

    def pull_lazily(self, tag: str) -> None:
        """Mount the image; little of it is read."""
        self._containerd.pull_lazily(self._rig.reference(tag))

    def run(self, tag: str, command: Sequence[str] = START) -> str:
        """Run *command* in a container of the lazily pulled image; return what it wrote."""
        return self._containerd.run(self._rig.reference(tag), *command, snapshotter="stargz")

    def pull(self, tag: str) -> None:
        """Pull the image as containerd does without a lazy snapshotter."""
        self._containerd.pull(self._rig.reference(tag))

    def run_pulled(self, tag: str, command: Sequence[str] = START) -> str:
        """Run *command* in a container of the pulled image."""
        return self._containerd.run(self._rig.reference(tag), *command, snapshotter="overlayfs")

    def pull_past_the_mirror(self, tag: str) -> None:
        """Pull the image straight from the registry, into containerd and nowhere else."""
        self._containerd.ctr("image", "pull", "--plain-http", self._rig.reference(tag))

    def remove(self, tag: str) -> None:
        """Have containerd throw away all that it has of the pulled image."""
        self._containerd.ctr("image", "rm", "--sync", self._rig.reference(tag))

    @property
    def content(self) -> Path:
        """The content store of the containerd that is started first, whether it is there or not."""
        return self._work / "life-1/containerd/io.containerd.content.v1.content"

    def traffic(self) -> Traffic:
        """What this node has read from the registry so far."""
        requests = self._rig.registry.settled()
        return Traffic([r for r in requests if r.client == self.machine.address])

    def _start_runtime(self) -> None:
        registry = self._rig.registry.host
        through_hosts_dir = self._setup.hosts == "hosts-dir"
        if not self._has_mirror:
            hosts_toml = f'server = "http://{registry}"\n\n[host."http://{registry}"]\n'
            hosts_toml += '  capabilities = ["pull", "resolve"]\n'
            mirrors = mirror_config(registry, None, names_registry=False)
        else:
            hosts_toml = self.mirror.hosts_toml(names_registry=through_hosts_dir)
            has_header = self._setup.version != "0.12"
            port = MIRROR_PORT if has_header else NAMELESS_PORT
            mirrors = mirror_config(registry, f"127.0.0.1:{port}", names_registry=has_header)
        self._lives += 1
        work = self._work / f"life-{self._lives}"
        work.mkdir()
        self._stargzd = Stargzd(self.machine, work, self._binary)
        self._containerd = Containerd(self.machine, work, snapshotter=self._stargzd.socket)
        hosts_dir = self._containerd.use_hosts(registry, hosts_toml)
        self._stargzd.start(self._setup, mirrors, hosts_dir if through_hosts_dir else None)
        self._containerd.start()


class Rig:
    """A registry, and nodes whose machines are up; `start_nodes` starts the programs on them."""

    def __init__(
        self,
        images: Images,
        *,
        nodes: int = 2,
        snapshotter: Snapshotter | None = None,
        line: Line | None = None,
    ) -> None:
        """*line* leads to the registry, such as `FAR`; without one it is as near as it can be."""
        self.images = images
        self._count = nodes
        self._snapshotter = snapshotter or Snapshotter()
        self._line = line
        self._stack = ExitStack()
        self._logs = Path()
        self.secret = Path()
        self.nodes: list[Node] = []

    def __enter__(self) -> Rig:
        check_machine()
        _remove_leftovers()
        with ExitStack() as stack:
            work = Path(gettempdir(), f"p2pcache-e2e-{os.getpid()}-{secrets.token_hex(3)}")
            work.mkdir()
            stack.callback(shutil.rmtree, work, ignore_errors=True)
            self._logs = work / "logs"
            self._logs.mkdir()
            self.secret = work / "secret"
            self.secret.write_text(secrets.token_hex(32))
            self.secret.chmod(0o600)
            self._network = stack.enter_context(Network(self._logs))
            self._stack = stack
            machine = self.machine("registry", REGISTRY_ADDRESS)
            self.registry = Registry(machine, self.images.storage, work, line=self._line)
            self.registry.start()
            for number in range(self._count):
                name = f"node-{chr(ord('a') + number)}"
                machine = self.machine(name, f"{SUBNET}{FIRST_NODE + number}")
                self.nodes.append(Node(self, machine, work / name, self._snapshotter))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            for log in sorted(self._logs.iterdir()):
                error.add_note(f"--- {log.name}\n{tail(log)}")
        self._stack.close()

    def machine(self, name: str, address: str) -> Machine:
        """One more machine on the network, for whatever a test wants to put in between."""
        machine = self._stack.enter_context(Machine(name, self._logs))
        self._network.attach(machine, address)
        return machine

    def reference(self, tag: str) -> str:
        return f"{self.registry.host}/{REPOSITORY}:{tag}"

    def start_nodes(self, *, mirrors: bool = True) -> None:
        """Start all nodes' programs; with *mirrors*, p2pcache too, each told of all others."""
        for node in self.nodes:
            others = [other.mirror.url for other in self.nodes if other is not node]
            node.start(Setup(peers=others) if mirrors else None)


@dataclass(frozen=True, slots=True)
class LazyStart:
    """One lazy start of a container, measured."""

    pull_s: float
    run_s: float
    upstream_bytes: int
    upstream_requests: int
    output: str

    @property
    def total_s(self) -> float:
        return self.pull_s + self.run_s


def lazy_start(node: Node, tag: str = GZIP, command: Sequence[str] = START) -> LazyStart:
    """Pull *tag* lazily on *node* and run *command*; tell the time and what the registry gave.

    For a benchmark: in `Rig(build_images(), nodes=2, line=FAR)`, after
    `start_nodes(mirrors=False)`, it is the start without a mirror. After `start_nodes()` it is the
    start with a cold mirror on the first node, with a peer on the second, and with a warm mirror
    on either once that has been told to `forget`.
    """
    before = node.traffic()
    began = time.monotonic()
    node.pull_lazily(tag)
    pulled = time.monotonic()
    output = node.run(tag, command)
    ran = time.monotonic()
    after = node.traffic()
    return LazyStart(
        pull_s=pulled - began,
        run_s=ran - pulled,
        upstream_bytes=after.bytes - before.bytes,
        upstream_requests=len(after.requests) - len(before.requests),
        output=output,
    )


def _remove_leftovers() -> None:
    """Folders of runs that were killed. Their processes and mounts went with them."""
    for folder in Path(gettempdir()).glob("p2pcache-e2e-[0-9]*-*"):
        if not Path(f"/proc/{folder.name.split('-')[2]}").exists():
            shutil.rmtree(folder, ignore_errors=True)
