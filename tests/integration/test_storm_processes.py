"""Real processes that are killed and stopped while all nodes start one image."""

import signal
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest

from p2pcache.core.placement import Member, Placement
from tests.e2e.node_process import NodeProcess, Ports, start_node, until
from tests.fakes import FakeRegistry
from tests.integration.nodes import REGISTRY, RunningNode
from tests.integration.storm_lines import Net
from tests.integration.storms import AGAIN_WHEN_SLOW, BYTES_PER_S, Layer, Storm

pytestmark = [pytest.mark.timeout(120), AGAIN_WHEN_SLOW]

NODES = 4


class Client(RunningNode):
    """A client of a process."""

    def __init__(self, process: NodeProcess, session: aiohttp.ClientSession) -> None:
        self.process = process
        self.session = session
        self.mirror_url = f"http://127.0.0.1:{process.ports.mirror}"


class ProcessStorm(Storm):
    """A storm whose nodes are processes."""

    def __init__(self, registry: FakeRegistry) -> None:
        super().__init__(Net(0), registry)
        self.processes: list[NodeProcess] = []

    def coordinator(self, layer: Layer) -> int:
        addresses = [f"127.0.0.1:{process.ports.peers}" for process in self.processes]
        placement = Placement(map(Member, addresses))
        return addresses.index(placement.coordinators(layer.key)[0].address)


@asynccontextmanager
async def process_storm(folder):
    async with AsyncExitStack() as stack:
        s = ProcessStorm(await stack.enter_async_context(FakeRegistry(bytes_per_s=BYTES_PER_S)))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        ports = [Ports.free() for _ in range(NODES)]
        flags = [flag for p in ports for flag in ("--peer", f"http://127.0.0.1:{p.peers}")]
        for i in range(NODES):
            process = await start_node(
                folder / f"node{i}", REGISTRY, s.registry.url, ports[i], flags
            )
            stack.push_async_callback(end, process)
            s.processes.append(process)
            s.nodes.append(Client(process, session))
        for process in s.processes:
            await process.until_ready()
        yield s


async def end(process: NodeProcess) -> None:
    if process.process.returncode is None:
        await process.kill()


@pytest.mark.parametrize("kind", ["lazy", "plain"])
async def test_a_coordinator_gets_a_sigkill(tmp_path, kind):
    async with process_storm(tmp_path) as s:
        victim = s.coordinator(getattr(s, kind))
        async with s.starts() as starts:
            await until(s.has_sent(0.3))
            starts.stop(victim)
            await s.processes[victim].kill()
        s.judge()
        assert s.refusals == s.cuts == 0
        assert [process.errors() for process in s.processes] == [[]] * NODES


async def test_a_node_is_stopped_and_goes_on_later(tmp_path):
    async with process_storm(tmp_path) as s:
        async with s.starts() as starts:
            await until(s.has_sent(0.3))
            s.processes[0].process.send_signal(signal.SIGSTOP)
            await starts.over_but(0)
            s.processes[0].process.send_signal(signal.SIGCONT)
        s.judge()
        assert s.refusals == s.cuts == 0
        assert [process.errors() for process in s.processes] == [[]] * NODES
