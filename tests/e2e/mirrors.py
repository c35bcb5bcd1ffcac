"""p2pcache itself, as its own process on a machine, started through its command line.

Hides the flags. Everything a test may ask of it goes over its status port: no test looks inside.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.machines import CommandFailed, Machine, Process, wait_until

CHECKOUT = Path(__file__).parents[2]
MIRROR_PORT = 29900
PEER_PORT = 29901
STATUS_PORT = 29902
NAMELESS_PORT = 29903
"""The listener for clients that cannot say which registry they mean."""
PORTS = (MIRROR_PORT, PEER_PORT, STATUS_PORT, NAMELESS_PORT)
START_LIMIT_S = 30.0
STORE_SIZE = "4GiB"


@dataclass(frozen=True, slots=True)
class Setup:
    """What p2pcache is told on its command line, besides what every node is told."""

    peers: Sequence[str] = ()
    """URLs of other nodes' peer ports."""
    flags: Sequence[str] = ()
    """Appended as they are."""


class Mirror:
    """One node's p2pcache. `start` may be called again while it runs: that is a hand-over."""

    def __init__(self, machine: Machine, work: Path, registry: str, secret: Path) -> None:
        self._machine = machine
        self._work = work
        self._registry = registry
        self._secret = secret
        self.processes: list[Process] = []

    def start(self, setup: Setup) -> Process:
        """Start a process and return when that very process listens and says it is ready."""
        process = self._machine.start(
            f"p2pcache-{len(self.processes)}",
            *self._command(setup),
            ready=lambda: self._machine.answers("127.0.0.1", STATUS_PORT, "/readyz"),
            timeout_s=START_LIMIT_S,
        )
        # While one is handed over to the next, either may have answered.
        wait_until(
            f"{process.name} to listen",
            lambda: all(map(process.listens_on, PORTS)) or not process.is_running(),
            timeout_s=START_LIMIT_S,
        )
        if not process.is_running():
            raise CommandFailed(f"{process.name} ended at its start; see {process.log.name}")
        self.processes.append(process)
        return process

    @property
    def url(self) -> str:
        """The peer port, as other nodes are told it."""
        return f"http://{self._machine.address}:{PEER_PORT}"

    def hosts_toml(self, *, names_registry: bool) -> str:
        """containerd's configuration of the registry: this mirror first, then the registry.

        *names_registry*: for a snapshotter that reads this file too, but sends no `ns`.
        """
        host = f'[host."http://127.0.0.1:{MIRROR_PORT}"'
        text = f'server = "http://{self._registry}"\n\n{host}]\n'
        text += '  capabilities = ["pull", "resolve"]\n  dial_timeout = "200ms"\n'
        if names_registry:
            text += f'  {host}.header]\n    OCI-Namespace = ["{self._registry}"]\n'
        return text

    def metrics(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Every sample: name, then label values (ordered by label), then the value."""
        status, text = self._machine.get("127.0.0.1", STATUS_PORT, "/metrics")
        assert status == 200, text
        samples: dict[str, dict[tuple[str, ...], float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = tuple(value for _, value in sorted(sample.labels.items()))
                samples.setdefault(sample.name, {})[labels] = sample.value
        return samples

    def total(self, metric: str) -> float:
        """The sum of a metric over all its labels; 0 when it has no sample yet."""
        return sum(self.metrics().get(metric, {}).values())

    def served_bytes(self) -> dict[str, float]:
        """What clients of the mirror got, by where it came from: `local`, `peer` or `upstream`."""
        status, text = self._machine.get("127.0.0.1", STATUS_PORT, "/metrics")
        assert status == 200, text
        served: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "p2pcache_served_bytes_total":
                    source = sample.labels["source"]
                    served[source] = served.get(source, 0.0) + sample.value
        return served

    def logs(self) -> str:
        return "".join(process.log.read_text(errors="replace") for process in self.processes)

    def _command(self, setup: Setup) -> list[str]:
        command = ["env", f"--chdir={CHECKOUT}", sys.executable, "-m", "p2pcache", "serve"]
        command += ["--store", str(self._work / "store"), "--store-size", STORE_SIZE]
        command += ["--mirror-listen", f"127.0.0.1:{MIRROR_PORT}"]
        command += ["--mirror-for", f"{self._registry}=127.0.0.1:{NAMELESS_PORT}"]
        command += ["--peer-listen", f"0.0.0.0:{PEER_PORT}"]
        command += ["--advertise", f"{self._machine.address}:{PEER_PORT}"]
        command += ["--node-name", self._machine.name]
        command += ["--status-listen", f"127.0.0.1:{STATUS_PORT}"]
        command += ["--upstream", f"{self._registry}=http://{self._registry}"]
        command += ["--cluster-secret-file", str(self._secret)]
        command += ["--log-format", "json", "--log-level", "debug"]
        for peer in setup.peers:
            command += ["--peer", peer]
        return [*command, *setup.flags]
