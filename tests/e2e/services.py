"""The real programs on a machine: registry, containerd, snapshotter daemon.

Hides their configuration files and how to tell that they are ready. What p2pcache's own process
needs is in `mirrors`.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.machines import Machine, Process

HERE = Path(__file__).parent
PULL_LIMIT_S = 120.0
RUN_LIMIT_S = 90.0
REGISTRY_PORT = 5000
STATUS_OK = 200


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the registry's access log has it."""

    client: str
    agent: str
    method: str
    path: str
    status: int
    written: int


@dataclass(frozen=True, slots=True)
class Line:
    """A network line: what it adds to every answer, and the rate that all connections share."""

    delay_s: float
    bytes_per_s: int


class Registry:
    """A registry over a folder of blobs, and the witness of who read how much from it."""

    def __init__(
        self,
        machine: Machine,
        storage: Path,
        work: Path,
        *,
        line: Line | None = None,
        read_only: bool = True,
    ) -> None:
        """*line* is what lies between the registry and everyone else."""
        self._machine = machine
        self._line = line
        self.host = f"{machine.address or '127.0.0.1'}:{REGISTRY_PORT}"
        listen = f"127.0.0.1:{REGISTRY_PORT + 1}" if line else self.host
        mode = "readonly: {enabled: true}" if read_only else "readonly: {enabled: false}"
        self._config = work / "registry.yml"
        self._config.write_text(
            f"""version: 0.1
log: {{level: info, formatter: json, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: {storage}}}
  maintenance: {{uploadpurging: {{enabled: false}}, {mode}}}
http: {{addr: "{listen}"}}
"""
        )
        self._listen = listen
        self._process: Process | None = None

    def start(self) -> None:
        address, _, port = self._listen.partition(":")
        self._process = self._machine.start(
            "registry",
            "docker-registry",
            "serve",
            str(self._config),
            ready=lambda: self._machine.answers(address, int(port), "/v2/"),
        )
        if self._line:
            host, _, host_port = self.host.partition(":")
            self._machine.start(
                "slow-line",
                sys.executable,
                str(HERE / "slow_line.py"),
                *("--listen", self.host, "--to", self._listen),
                *("--delay", str(self._line.delay_s)),
                *("--bytes-per-second", str(self._line.bytes_per_s)),
                ready=lambda: self._machine.answers(host, int(host_port), "/v2/"),
            )

    def stop(self) -> None:
        """From now on connections are refused, as when the registry's host is up but it is not."""
        assert self._process is not None
        self._process.kill()

    def requests(self) -> list[Request]:
        """Every pull request answered so far, in order."""
        assert self._process is not None
        return list(_parse_log(self._process.log.read_text(errors="replace").splitlines()))

    def settled(self, *, quiet_s: float = 0.5, timeout_s: float = 10.0) -> list[Request]:
        """Return `requests` once no new one has come for *quiet_s* (or *timeout_s* have passed)."""
        deadline = time.monotonic() + timeout_s
        seen = self.requests()
        while True:
            time.sleep(quiet_s)
            now = self.requests()
            if len(now) == len(seen) or time.monotonic() > deadline:
                return now
            seen = now


def _parse_log(lines: Iterable[str]) -> Iterable[Request]:
    for line in lines:
        if '"response completed"' not in line:
            continue
        entry = json.loads(line)
        path = entry["http.request.uri"]
        if path.partition("?")[0] == "/v2/":
            continue
        client = entry["http.request.remoteaddr"].rpartition(":")[0]
        if client.startswith("127.0.0."):
            client = client.replace("127.0.0.", "10.231.0.")
        yield Request(
            client=client,
            agent=entry.get("http.request.useragent", ""),
            method=entry["http.request.method"],
            path=path,
            status=entry["http.response.status"],
            written=entry["http.response.written"],
        )


class Containerd:
    """containerd with its own root, without CRI; *snapshotter* is a lazy one's socket."""

    def __init__(self, machine: Machine, work: Path, *, snapshotter: Path | None = None) -> None:
        self._machine = machine
        self._socket = work / "containerd.sock"
        self.root = work / "containerd"
        self._hosts = work / "certs.d"
        self._hosts.mkdir()
        self._config = work / "containerd.toml"
        text = f"""version = 2
root = "{self.root}"
state = "{work / "containerd-state"}"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[debug]
  level = "error"
[grpc]
  address = "{self._socket}"
"""
        if snapshotter is not None:
            text += f"""[proxy_plugins.stargz]
  type = "snapshot"
  address = "{snapshotter}"
"""
        self._config.write_text(text)
        # cgroups are named after containers, and all machines share one cgroup tree.
        self._prefix = f"{machine.name}-{secrets.token_hex(4)}"
        self._containers = 0
        self._process: Process | None = None

    def start(self) -> None:
        self._process = self._machine.start(
            "containerd",
            *("containerd", "--config", str(self._config)),
            ready=self._is_ready,
        )

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()

    def use_hosts(self, registry: str, hosts_toml: str) -> Path:
        """Install *hosts_toml* for *registry*; returns the certs.d folder."""
        folder = self._hosts / registry
        folder.mkdir(exist_ok=True)
        (folder / "hosts.toml").write_text(hosts_toml)
        return self._hosts

    def ctr(self, *arguments: str, timeout_s: float = PULL_LIMIT_S) -> str:
        command = ("ctr-remote", "--address", str(self._socket), *arguments)
        return self._machine.run(*command, timeout_s=timeout_s)

    def pull(self, reference: str) -> None:
        """Pull whole layers and unpack them with overlayfs."""
        self.ctr("image", "pull", "--hosts-dir", str(self._hosts), reference)

    def pull_lazily(self, reference: str) -> None:
        self.ctr("image", "rpull", "--hosts-dir", str(self._hosts), reference)

    def run(
        self, reference: str, *command: str, snapshotter: str, timeout_s: float = RUN_LIMIT_S
    ) -> str:
        """Run *command* in a new container, and return what it wrote."""
        self._containers += 1
        name = f"{self._prefix}-{self._containers}"
        flags = ("--rm", f"--snapshotter={snapshotter}")
        return self.ctr("run", *flags, reference, name, *command, timeout_s=timeout_s)

    def _is_ready(self) -> bool:
        # `ctr version` would wait for a socket that is not there yet.
        return self._socket.exists() and "Server:" in self.ctr("version", timeout_s=20)


@dataclass(frozen=True, slots=True)
class Snapshotter:
    """How a node's lazy snapshotter is set up."""

    version: str = "0.18"
    """Release line of the stargz snapshotter: `0.12` or `0.18`."""
    hosts: str = "config"
    """Where it finds mirrors: `config` (its config.toml) or `hosts-dir` (certs.d)."""
    fetches_in_background: bool = False
    """Off by default: reads then tell what the containers themselves needed."""


class Stargzd:
    """The stargz snapshotter's daemon."""

    def __init__(self, machine: Machine, work: Path, binary: Path) -> None:
        self._machine = machine
        self._binary = binary
        self._work = work
        self.socket = work / "stargz.sock"
        self._config = work / "stargz.toml"
        self._process: Process | None = None

    def start(self, setup: Snapshotter, mirrors: str, hosts_dir: Path | None) -> None:
        """*mirrors* is the part of config.toml that `mirror_config` makes."""
        no_background = str(not setup.fetches_in_background).lower()
        self._config.write_text(f"no_background_fetch = {no_background}\n{mirrors}")
        more = ("-hosts-dir", str(hosts_dir)) if hosts_dir else ()
        self._process = self._machine.start(
            f"stargzd-{setup.version}",
            str(self._binary),
            *("-address", str(self.socket), "-root", str(self._work / "stargz")),
            *("-config", str(self._config), "-log-level", "info", *more),
            ready=self.socket.exists,
        )

    def stop(self) -> None:
        """Its mounts go with it: no container may be running."""
        assert self._process is not None
        self._process.terminate()


def mirror_config(registry: str, mirror: str | None, *, names_registry: bool) -> str:
    """The mirrors of *registry* for the snapshotter's config.toml, best first.

    Its own host is always tried last, but as HTTPS: so it is listed, as plain HTTP, too.
    *names_registry*: the mirror is told the registry in a header, which 0.12 cannot do.
    """
    text = ""
    if mirror is not None:
        text += f'[[resolver.host."{registry}".mirrors]]\n  host = "{mirror}"\n  insecure = true\n'
        if names_registry:
            text += f'  header = {{ OCI-Namespace = ["{registry}"] }}\n'
    return (
        text + f'[[resolver.host."{registry}".mirrors]]\n  host = "{registry}"\n  insecure = true\n'
    )
