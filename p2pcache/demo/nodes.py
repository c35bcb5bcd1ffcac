"""``p2pcache serve`` as child processes of the demo.

Hides flags, ports, files, readiness and counters. The rule it keeps: no node outlives the block it
was started in, and a node that fails is shown with the last lines that it wrote.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from p2pcache.core.errors import FormatError, P2PCacheError

_STORE_SIZE: Final = "512MiB"
_READY_S: Final = 20.0
_POLL_S: Final = 0.05
_STOP_S: Final = 3.0
_KILL_S: Final = 1.0
_METRICS_S: Final = 5.0
_TAIL_LINES: Final = 15
_TAIL_BYTES: Final = 8192


class NodeFailed(P2PCacheError):
    """A node did not start, ended by itself, or did not answer. *tail*: its last log lines."""

    def __init__(self, node: str, reason: str, tail: str) -> None:
        super().__init__(f"{node} {reason}")
        self.node = node
        self.reason = reason
        self.tail = tail


@dataclass(frozen=True, slots=True)
class Counters:
    """A node's own byte counters (``/metrics``)."""

    served_local: int
    served_peer: int
    served_upstream: int
    fetched_peer: int
    fetched_upstream: int


def parse_counters(page: str) -> Counters:
    """Read the counters that the demo shows off a metrics *page*. Raises `FormatError`."""
    found: dict[tuple[str, str], float] = {}
    try:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                found[sample.name, sample.labels.get("source", "")] = sample.value
        return Counters(
            served_local=int(found["p2pcache_served_bytes_total", "local"]),
            served_peer=int(found["p2pcache_served_bytes_total", "peer"]),
            served_upstream=int(found["p2pcache_served_bytes_total", "upstream"]),
            fetched_peer=int(found["p2pcache_fetched_bytes_total", "peer"]),
            fetched_upstream=int(found["p2pcache_fetched_bytes_total", "upstream"]),
        )
    except KeyError as error:
        raise FormatError(f"the metrics page lacks {error}") from error
    except (ValueError, ArithmeticError, LookupError) as error:
        raise FormatError(f"not a metrics page: {error}") from error


@dataclass(frozen=True, slots=True)
class Node:
    """One running node."""

    name: str
    mirror: str
    status: str
    """Base URLs of two of its ports."""
    log: Path
    process: asyncio.subprocess.Process

    def failed(self, reason: str) -> NodeFailed:
        """The error for *reason*, with what the node wrote last."""
        code = self.process.returncode
        if code is not None:
            reason = f"{reason} (it ended with exit code {code})"
        return NodeFailed(self.name, reason, read_tail(self.log))

    async def wait_until_ready(self, session: aiohttp.ClientSession) -> None:
        """Return once ``/readyz`` answers 200. Raises `NodeFailed`."""
        try:
            async with asyncio.timeout(_READY_S):
                while not await self._is_ready(session):
                    if self.process.returncode is not None:
                        raise self.failed("did not start")
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise self.failed(f"was not ready after {_READY_S:.0f} s") from error

    async def _is_ready(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(f"{self.status}/readyz") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    async def read_counters(self, session: aiohttp.ClientSession) -> Counters:
        """Return its counters as they are now. Raises `NodeFailed`."""
        try:
            async with (
                asyncio.timeout(_METRICS_S),
                session.get(f"{self.status}/metrics", raise_for_status=True) as response,
            ):
                return parse_counters(await response.text())
        except (aiohttp.ClientError, TimeoutError, FormatError) as error:
            reason = f"does not tell its counters: {error or type(error).__name__}"
            raise self.failed(reason) from error


def read_tail(log: Path) -> str:
    """Return the last lines of *log*, or nothing if there is none."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-_TAIL_LINES:])


def free_ports(count: int) -> list[int]:
    """Return *count* ports of 127.0.0.1 that nothing listened on just now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        # All are bound before any is given back, so that no port comes up twice.
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@asynccontextmanager
async def run_nodes(count: int, folder: Path, registry: str, url: str) -> AsyncIterator[list[Node]]:
    """Start *count* nodes that know each other, and *registry* at *url*; end them on leaving.

    Yields once all are ready. Raises `NodeFailed`.
    """
    ports = free_ports(3 * count)
    secret = folder / "cluster-secret"
    secret.touch(mode=0o600)
    secret.write_text(secrets.token_hex(32), encoding="ascii")
    nodes: list[Node] = []
    try:
        for i in range(count):
            mirror, peer, status = ports[i::count]
            name = f"node-{i + 1}"
            flags = [
                "--node-name", name,
                "--store", str(folder / name),
                "--store-size", _STORE_SIZE,
                "--mirror-listen", f"127.0.0.1:{mirror}",
                "--peer-listen", f"127.0.0.1:{peer}",
                "--status-listen", f"127.0.0.1:{status}",
                "--upstream", f"{registry}={url}",
                "--cluster-secret-file", str(secret),
                "--log-format", "json",
            ]  # fmt: skip
            for other in ports[count : 2 * count]:
                if other != peer:
                    flags += ["--peer", f"http://127.0.0.1:{other}"]
            log = folder / f"{name}.log"
            process = await _spawn(flags, log)
            base = "http://127.0.0.1"
            nodes.append(Node(name, f"{base}:{mirror}", f"{base}:{status}", log, process))
        timeout = aiohttp.ClientTimeout(total=2)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            for node in nodes:
                await node.wait_until_ready(session)
        yield nodes
    finally:
        await _stop([node.process for node in nodes])


async def _spawn(flags: Sequence[str], log: Path) -> asyncio.subprocess.Process:
    with log.open("wb") as stderr:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "p2pcache",
            "serve",
            *flags,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=stderr,
        )


async def _stop(processes: Sequence[asyncio.subprocess.Process]) -> None:
    """End all of *processes*: politely first, by force after `_STOP_S` or when cancelled."""
    try:
        for process in processes:
            with suppress(ProcessLookupError):
                process.terminate()
        await _wait(processes, _STOP_S)
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
        await _wait(processes, _KILL_S)


async def _wait(processes: Sequence[asyncio.subprocess.Process], limit_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            for process in processes:
                await process.wait()
