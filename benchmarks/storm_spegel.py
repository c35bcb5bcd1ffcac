"""The Spegel arm: containerd 2.1 or newer and Spegel 0.7 on every node.

Hides their flags and configuration. The rule: the client is containerd's own (``ctr content
fetch``: its resolver, its retries, its digests) wherever layers are pulled whole, since Spegel
shares what is in containerd's content store and nothing else.

A lazy start is played by the same client as in the other arms, with Spegel as its mirror: what a
lazy snapshotter reads is never in the content store, so what is seen is how its requests fall
through. Needs network namespaces: Spegel's peers find each other by their interfaces' addresses.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.storm_arms import REGISTRY, emptied, ended, registry_host
from benchmarks.storm_hosts import Host, OwnHost, Running, answers, wait_for
from benchmarks.storm_image import LAZY, Plan
from benchmarks.storm_rig import Rig, Storm, Want, run_clients
from tests.e2e.machines import CommandFailed, tail

MIRROR_PORT: Final = 5000
ROUTER_PORT: Final = 5001
BOOTSTRAP_PORT: Final = 5002
NAMESPACE: Final = "k8s.io"

_POLL_S: Final = 0.005
_OLDEST: Final = (2, 1)
_SPARE: Final = 64 << 20


class Spegel:
    """A containerd and a Spegel of its own on every node."""

    name = "spegel"

    def __init__(self, program: Path, containerd: Path | None) -> None:
        self._spegel = str(program.absolute())
        found = containerd or shutil.which("containerd")
        if found is None:
            raise SystemExit("the Spegel arm needs containerd 2.1 or newer: --containerd")
        self._containerd = str(Path(found).absolute())
        self._ctr = str(Path(found).absolute().with_name("ctr"))
        said = subprocess.run(
            [self._containerd, "--version"], capture_output=True, text=True, check=True
        ).stdout.split()
        version = tuple(map(int, said[2].lstrip("v").split("~")[0].split("+")[0].split(".")[:2]))
        if version < _OLDEST:
            # Before that, containerd does not tell of new content: Spegel would share nothing.
            raise SystemExit(f"containerd {said[2]} is too old for Spegel: --containerd")

    def storm(self, rig: Rig, plan: Plan, count: int, want: Want) -> Storm:
        """See `benchmarks.storm_arms.Arm`."""
        nodes = rig.nodes[:count]
        if not all(isinstance(node, OwnHost) for node in nodes):
            raise CommandFailed("Spegel needs network namespaces: run this as root")
        with emptied(rig, "spegel", count * (plan.image_bytes + _SPARE)) as folder:
            processes: list[Running] = []
            with ended(processes):
                # One by one, so that a failure finds those before it in the list.
                processes.extend(self._start_containerd(n, folder / n.name) for n in nodes)
                wait_for(
                    "containerd",
                    processes,
                    lambda: all((folder / node.name / "sock").exists() for node in nodes),
                )
                processes.extend(self._start_spegel(n, nodes, folder / n.name) for n in nodes)
                # One that is alone has no routing table and never says that it is ready.
                page = "/readyz" if count > 1 else "/livez"
                wait_for(
                    "Spegel",
                    processes,
                    lambda: all(answers(node, node, MIRROR_PORT, page, own=True) for node in nodes),
                )
                if plan.kind == LAZY:
                    hosts = {
                        node.name: [
                            {"address": node.own, "port": MIRROR_PORT, "ns": REGISTRY},
                            registry_host(rig),
                        ]
                        for node in nodes
                    }
                    return rig.measure(lambda: run_clients(rig, hosts, want), processes)
                for node in nodes:
                    self._write_hosts(rig, folder / node.name)
                storm = rig.measure(lambda: self._pull(nodes, folder, plan, want), processes)
        # Whatever reaches the registry was asked by a client past its mirror: Spegel never does.
        storm.clients[0]["fallbacks"] = storm.upstream_requests
        return storm

    def _start_containerd(self, node: Host, folder: Path) -> Running:
        folder.mkdir()
        config = folder / "containerd.toml"
        config.write_text(
            f"""version = 3
root = "{folder / "root"}"
state = "{folder / "state"}"
disabled_plugins = [
  "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri",
]
[debug]
  level = "error"
[grpc]
  address = "{folder / "sock"}"
[ttrpc]
  address = "{folder / "ttrpc"}"
"""
        )
        name = f"containerd-{folder.parent.name}"
        return node.start(name, self._containerd, "--config", str(config))

    def _start_spegel(self, node: Host, nodes: Sequence[Host], folder: Path) -> Running:
        others = [other for other in nodes if other is not node]
        # All learn of the cluster from the first; the first, from the second.
        guide = others[0] if others else node
        content = folder / "root" / "io.containerd.content.v1.content"
        return node.start(
            f"spegel-{folder.parent.name}",
            *(self._spegel, "registry", "--log-level", "ERROR"),
            *("--containerd-sock", str(folder / "sock"), "--containerd-namespace", NAMESPACE),
            *("--containerd-content-path", str(content)),
            *("--registry-addr", f":{MIRROR_PORT}", "--router-addr", f":{ROUTER_PORT}"),
            *("--metrics-addr", f"{node.own}:9090", "--debug-web-enabled=false"),
            *("--bootstrap-kind", "http", "--http-bootstrap-addr", f":{BOOTSTRAP_PORT}"),
            *("--http-bootstrap-peer", f"http://{guide.address}:{BOOTSTRAP_PORT}"),
        )

    def _write_hosts(self, rig: Rig, folder: Path) -> None:
        hosts = folder / "certs.d" / REGISTRY
        hosts.mkdir(parents=True)
        (hosts / "hosts.toml").write_text(
            f"""server = "{rig.registry_url}"

[host."http://127.0.0.1:{MIRROR_PORT}"]
  capabilities = ["pull", "resolve"]
  dial_timeout = "200ms"
"""
        )

    def _pull(
        self, nodes: Sequence[Host], folder: Path, plan: Plan, want: Want
    ) -> list[dict[str, Any]]:
        """Have containerd's client pull on all *nodes* at once."""
        image = f"{REGISTRY}/{plan.repository}:{plan.tag}"
        deadline = time.monotonic() + want.limit_s
        clients: list[tuple[dict[str, Any], Running]] = []
        try:
            for node in nodes:
                result: dict[str, Any] = dict.fromkeys(
                    ("requests", "body_bytes", "mismatches", "errors", "fallbacks", "retries"), 0
                )
                result |= {"name": node.name, "began": time.monotonic(), "notes": []}
                home = folder / node.name
                pulling = node.start(
                    f"ctr-{folder.name}",
                    *(self._ctr, "--address", str(home / "sock"), "--namespace", NAMESPACE),
                    *("content", "fetch", "--hosts-dir", str(home / "certs.d"), image),
                )
                clients.append((result, pulling))
            left = list(clients)
            while left:
                if time.monotonic() > deadline:
                    raise CommandFailed(f"not all pulls were done after {want.limit_s:.0f} s")
                time.sleep(_POLL_S)
                for each in [each for each in left if not each[1].is_running()]:
                    each[0]["ended"] = time.monotonic()
                    left.remove(each)
        finally:
            for _, pulling in clients:
                pulling.kill()
        for result, pulling in clients:
            self._judge(result, pulling, plan)
        return [result for result, _ in clients]

    def _judge(self, result: dict[str, Any], pulling: Running, plan: Plan) -> None:
        """A client that ends well has compared every digest."""
        if pulling.wait(1) == 0:
            result["body_bytes"] = plan.image_bytes
            return
        said = tail(pulling.log)
        kind = "mismatches" if "unexpected commit digest" in said else "errors"
        result[kind] = 1
        result["notes"].append(said[-300:])
