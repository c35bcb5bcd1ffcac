"""What the storm compares: p2pcache, no mirror, one shared pull-through cache.

Hides flags, configuration files and readiness. The rule: every storm starts with empty stores, with
every server up before the first client starts, and leaves no process and no file.
"""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from prometheus_client.parser import text_string_to_metric_families

import p2pcache
from benchmarks.storm_hosts import Running, answers, wait_for
from benchmarks.storm_image import Plan
from benchmarks.storm_rig import REGISTRY_PORT, Rig, Storm, Want, run_clients

REGISTRY: Final = "registry.test"
MIRROR_PORT: Final = 29900
PEER_PORT: Final = 29901
STATUS_PORT: Final = 29902
CACHE_PORT: Final = 5000
ZONE: Final = "zone-a"

_CHECKOUT: Final = Path(p2pcache.__file__).parents[1]
_PYTHON: Final = ("env", f"--chdir={_CHECKOUT}", sys.executable, "-m", "p2pcache")
_SPARE: Final = 256 << 20


class Arm(Protocol):
    """One of the ways to get an image to many nodes."""

    name: str

    def storm(self, rig: Rig, plan: Plan, count: int, want: Want) -> Storm:
        """Start the image on the first *count* nodes at once, with everything empty before."""


class NoMirror:
    """Every client reads the registry itself."""

    name = "no mirror"

    def storm(self, rig: Rig, plan: Plan, count: int, want: Want) -> Storm:
        """See `Arm`."""
        hosts = {node.name: [registry_host(rig)] for node in rig.nodes[:count]}
        return rig.measure(lambda: run_clients(rig, hosts, want), [])


class SharedCache:
    """One docker-registry as a pull-through cache, on a host of its own that is not shaped."""

    name = "pull-through cache"

    def __init__(self) -> None:
        program = shutil.which("docker-registry")
        if program is None:
            raise SystemExit("this arm needs docker-registry: apt-get install docker-registry")
        self._program = program

    def storm(self, rig: Rig, plan: Plan, count: int, want: Want) -> Storm:
        """See `Arm`."""
        host = rig.cache_host
        with emptied(rig, "cache", plan.image_bytes) as folder:
            config = folder / "config.yml"
            config.write_text(
                f"""version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: {folder / "data"}}}
  cache: {{blobdescriptor: inmemory}}
http: {{addr: "{host.address}:{CACHE_PORT}"}}
proxy: {{remoteurl: "{rig.registry_url}"}}
"""
            )
            process = host.start(f"cache-{folder.name}", self._program, "serve", str(config))
            with ended([process]):
                wait_for("the cache", [process], lambda: answers(host, host, CACHE_PORT, "/v2/"))
                first = {"address": host.address, "port": CACHE_PORT}
                hosts = {node.name: [first, registry_host(rig)] for node in rig.nodes[:count]}
                return rig.measure(lambda: run_clients(rig, hosts, want), [process])


class P2pcache:
    """``p2pcache serve`` on every node, each told of all."""

    name = "p2pcache"

    def __init__(self) -> None:
        help_text = subprocess.run(
            [*_PYTHON, "serve", "--help"], capture_output=True, text=True, check=True
        ).stdout
        self._flags = frozenset(re.findall(r"--[a-z-]+", help_text))

    def storm(self, rig: Rig, plan: Plan, count: int, want: Want) -> Storm:
        """See `Arm`."""
        # Each node keeps what it read, and some of it twice for a moment.
        with emptied(rig, "nodes", count * (plan.image_bytes + _SPARE)) as folder:
            secret = folder / "secret"
            secret.touch(mode=0o600)
            secret.write_text(secrets.token_hex(32))
            processes: list[Running] = []
            with ended(processes):
                nodes = rig.nodes[:count]
                for node in nodes:
                    command = self._command(rig, node.name, count, folder, plan)
                    processes.append(node.start(f"p2pcache-{folder.name}", *command))
                for node in nodes:
                    wait_for(
                        f"p2pcache on {node.name}",
                        processes,
                        lambda node=node: answers(  # type: ignore[misc]
                            node, node, STATUS_PORT, "/readyz", own=True
                        ),
                    )
                hosts = {
                    node.name: [
                        {"address": node.own, "port": MIRROR_PORT, "ns": REGISTRY},
                        registry_host(rig),
                    ]
                    for node in nodes
                }
                storm = rig.measure(lambda: run_clients(rig, hosts, want), processes)
                for node in nodes:
                    status, page = node.get(node.own, STATUS_PORT, "/metrics")
                    if status == 200:
                        add_counters(storm.counters, page)
        return storm

    def _command(self, rig: Rig, name: str, count: int, folder: Path, plan: Plan) -> list[str]:
        me = next(node for node in rig.nodes if node.name == name)
        command = [
            *(*_PYTHON, "serve", "--node-name", name, "--store", str(folder / name)),
            *("--store-size", str(plan.image_bytes + _SPARE)),
            *("--mirror-listen", f"{me.own}:{MIRROR_PORT}"),
            *("--peer-listen", f"{me.address}:{PEER_PORT}"),
            *("--status-listen", f"{me.own}:{STATUS_PORT}"),
            *("--upstream", f"{REGISTRY}={rig.registry_url}"),
            *("--cluster-secret-file", str(folder / "secret"), "--log-level", "warning"),
        ]
        knows_itself = "--advertise" in self._flags
        if knows_itself:
            command += ["--advertise", f"{me.address}:{PEER_PORT}"]
        if "--zone" in self._flags:
            command += ["--zone", ZONE]
        for node in rig.nodes[:count]:
            # One that cannot tell its own address would ask itself.
            if knows_itself or node is not me:
                command += ["--peer", f"http://{node.address}:{PEER_PORT}"]
        return command


def registry_host(rig: Rig) -> dict[str, Any]:
    """The registry, as clients are told of it."""
    return {"address": rig.registry_host.address, "port": REGISTRY_PORT}


def add_counters(sums: dict[str, float], page: str) -> None:
    """Add every counter of p2pcache's on a metrics *page* to *sums*."""
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name.startswith("p2pcache_") and sample.name.endswith(("_total", "_count")):
                labels = ",".join(
                    f'{key}="{value}"' for key, value in sorted(sample.labels.items())
                )
                name = f"{sample.name}{{{labels}}}" if labels else sample.name
                sums[name] = sums.get(name, 0.0) + sample.value


@contextmanager
def emptied(rig: Rig, name: str, size: int) -> Iterator[Path]:
    """A new folder that is gone afterwards."""
    folder = rig.folder(name, size)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ended(processes: list[Running]) -> Iterator[None]:
    """Kill all *processes* on leaving: their stores are thrown away anyhow."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
