"""Clients that start at one moment: many in one process, a thread each, raw sockets.

Hides HTTP and what containerd and the stargz snapshotter do when an answer is not what they want.
The rule: every byte that comes is compared with the image, or hashed whole, and what the client
itself costs is as little as Python can: nothing but the standard library is imported.

The task comes as one JSON line on standard input. "ready" is written when every client stands in
its network; the line that follows on standard input sets them all off. One JSON line is the result.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

from benchmarks.storm_http import (
    Answer,
    Connection,
    Host,
    Refused,
    Span,
    content_ranges,
    split_parts,
)

CLONE_NEWNET = 0x40000000
# go-retryablehttp as the snapshotter sets it up: 5 more tries, 30 ms that double.
LAZY_TRIES = 6
LAZY_WAIT_S = 0.030
# The probe of a layer: a mirror that sends the whole layer must have done so by then.
PROBE_S = 30.0
# containerd, core/remotes/docker/httpreadseeker.go: reopenings without a byte in between.
PLAIN_REOPENINGS = 3
_NOTED = 5
_RETRIED = frozenset({429, 500, 502, 503, 504})


@dataclass(slots=True)
class Outcome:
    """What came of one client."""

    name: str
    began: float = 0.0
    ended: float = 0.0
    requests: int = 0
    body_bytes: int = 0
    mismatches: int = 0
    errors: int = 0
    fallbacks: int = 0
    """Requests that the last host had to answer, where there is a mirror before it."""
    retries: int = 0
    notes: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, note: str = "", **counts: int) -> None:
        """Add to the counts; the layers of one client do so at once."""
        with self.lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)
            if note and len(self.notes) < _NOTED:
                self.notes.append(note)

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.repr}


class Image:
    """The image on disk: the plan, and the bytes to compare with."""

    def __init__(self, folder: str) -> None:
        with open(f"{folder}/plan.json") as file:
            self.plan: dict[str, Any] = json.load(file)
        self._folder = folder
        self._views: dict[str, memoryview] = {}

    def view(self, digest: str) -> memoryview:
        """The bytes of a blob."""
        if digest not in self._views:
            with open(f"{self._folder}/blobs/{digest.partition(':')[2]}", "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._views[digest] = memoryview(mapped)
        return self._views[digest]


class Client:
    """One node's containerd, or its snapshotter."""

    def __init__(self, task: dict[str, Any], image: Image, think_s: float, parallel: int) -> None:
        self.outcome = Outcome(task["name"])
        self.hosts = [Host(**host) for host in task["hosts"]]
        self.netns: str | None = task["netns"]
        self.image = image
        self.plan = image.plan
        self.think_s = think_s
        self.parallel = parallel
        self._base = f"/v2/{self.plan['repository']}"

    def run(self) -> None:
        """Pull or start the image."""
        try:
            self._read_documents()
            if self.plan["kind"] == "lazy":
                LazyStart(self).run()
            else:
                numbers = iter(range(len(self.plan["layers"])))
                count = min(self.parallel, len(self.plan["layers"]))
                self.at_once([lambda: self._pull_layers(numbers)] * count)
        except (OSError, Refused) as error:
            self.outcome.add(f"{type(error).__name__}: {error}", errors=1)

    def at_once(self, jobs: list[Callable[[], None]]) -> None:
        """Do *jobs* at once, here and in threads of this network."""
        threads = [threading.Thread(target=self._enter_and_do, args=(job,)) for job in jobs[1:]]
        for thread in threads:
            thread.start()
        if jobs:
            jobs[0]()
        for thread in threads:
            thread.join()

    def _enter_and_do(self, job: Callable[[], None]) -> None:
        try:
            enter(self.netns)
            job()
        except (OSError, Refused) as error:
            self.outcome.add(f"{type(error).__name__}: {error}", errors=1)

    def blob_path(self, digest: str) -> str:
        """Where a blob is."""
        return f"{self._base}/blobs/{digest}"

    def asked(self, host: Host) -> None:
        """Count a request that *host* has answered well."""
        past = len(self.hosts) > 1 and host is self.hosts[-1]
        self.outcome.add(requests=1, fallbacks=int(past))

    def _read_documents(self) -> None:
        """The tag, the manifest, the config, as containerd asks for them: host by host."""
        plan, base = self.plan, self._base
        accept = f"Accept: {plan['manifest_type']}, */*"
        connections = [Connection(host, "containerd/2.1.9") for host in self.hosts]
        try:
            self._first(connections, "HEAD", f"{base}/manifests/{plan['tag']}", accept)
            for kind, digest in (("manifests", plan["manifest"]), ("blobs", plan["config"])):
                body = self._first(connections, "GET", f"{base}/{kind}/{digest}", accept)
                self.outcome.add(body_bytes=len(body))
                if f"sha256:{hashlib.sha256(body).hexdigest()}" != digest:
                    self.outcome.add(f"wrong {kind} {digest}", mismatches=1)
        finally:
            for connection in connections:
                connection.close()

    def _first(self, connections: list[Connection], method: str, path: str, accept: str) -> bytes:
        """What the first host answers that has it."""
        problem: Exception = Refused(0, path)
        for connection in connections:
            target = path if connection.host.ns is None else f"{path}?ns={connection.host.ns}"
            try:
                answer = connection.ask(method, target, accept)
                body = bytes(connection.body(answer))
                if answer.status != 200:
                    raise Refused(answer.status, target)
            except (OSError, Refused) as error:
                problem = error
                connection.close()
                continue
            self.asked(connection.host)
            return body
        raise problem

    # -- containerd ------------------------------------------------------------------------------

    def _pull_layers(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            layer = self.plan["layers"][number]
            try:
                self._pull(layer["digest"], layer["size"])
            except (OSError, Refused) as error:
                self.outcome.add(f"{layer['digest'][:19]}: {error}", errors=1)

    def _pull(self, digest: str, size: int) -> None:
        """Read a layer whole; after a cut go on where it was, at the first host again."""
        whole = hashlib.sha256()
        at, reopened = 0, 0
        while at < size:
            before = at
            try:
                connection, answer = self._open(digest, at)
                try:
                    for block in connection.blocks(answer):
                        whole.update(block)
                        at += len(block)
                finally:
                    self.outcome.add(body_bytes=at - before)
                    connection.close()
            except OSError as error:
                reopened = 0 if at > before else reopened + 1
                self.outcome.add(f"at {at}: {error}", retries=1)
                if reopened > PLAIN_REOPENINGS:
                    raise
        if at != size or f"sha256:{whole.hexdigest()}" != digest:
            self.outcome.add(f"{digest[:19]} is not what came", mismatches=1)

    def _open(self, digest: str, at: int) -> tuple[Connection, Answer]:
        problem: Exception = Refused(0, digest)
        wanted = [f"Range: bytes={at}-"] if at else []
        for host in self.hosts:
            path = self.blob_path(digest)
            target = path if host.ns is None else f"{path}?ns={host.ns}"
            connection = Connection(host, "containerd/2.1.9")
            for _ in range(LAZY_TRIES):
                try:
                    answer = connection.ask("GET", target, *wanted)
                except OSError as error:
                    problem = error
                    break
                if answer.status == (206 if at else 200):
                    self.asked(host)
                    return connection, answer
                problem = Refused(answer.status, target)
                connection.close()
                if answer.status != 429:
                    break
                self.outcome.add(retries=1)
            connection.close()
        raise problem


class LazyStart:
    """What the stargz snapshotter reads, and when: mounts at once, then reads one by one."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._outcome = client.outcome
        layers = client.plan["layers"]
        self._bound: list[Connection | None] = [None] * len(layers)
        # A host that sent a layer whole for a range has given everything (it is all kept).
        self._whole = [False] * len(layers)
        self._single = [False] * len(layers)

    def run(self) -> None:
        """Mount all layers, then read what the program reads."""
        client = self._client
        numbers = range(len(self._bound))
        client.at_once([lambda number=n: self._mount(number) for n in numbers])  # type: ignore[misc]
        thinking = random.Random("thinking")
        for number, spans in client.plan["reads"]:
            if client.think_s:
                time.sleep(thinking.expovariate(1 / client.think_s))
            self._try_read(number, spans)
        for connection in self._bound:
            if connection is not None:
                connection.close()

    def _mount(self, number: int) -> None:
        layer = self._client.plan["layers"][number]
        for host in self._client.hosts:
            connection = Connection(host, "Go-http-client/1.1")
            if self._probe(connection, layer["digest"], layer["size"]):
                self._bound[number] = connection
                break
            connection.close()
        else:
            self._outcome.add(f"no host for {layer['digest'][:19]}", errors=1)
            return
        for spans in layer["mount"]:
            self._try_read(number, spans)

    def _probe(self, connection: Connection, digest: str, size: int) -> bool:
        """Ask for two bytes, then for the size; the first host that has both is kept."""
        for attempt in range(LAZY_TRIES):
            try:
                deadline = time.monotonic() + PROBE_S
                answer = self._ask(connection, "GET", digest, "Range: bytes=0-1")
                for block in connection.blocks(answer):
                    self._outcome.add(body_bytes=len(block))
                    if time.monotonic() > deadline:
                        raise TimeoutError("the probe took too long")
                if answer.status in {200, 206}:
                    self._client.asked(connection.host)
                    answer = self._ask(connection, "HEAD", digest)
                    if answer.status == 200:
                        self._client.asked(connection.host)
                        return int(answer.fields[b"content-length"]) == size
                if answer.status not in _RETRIED:
                    return False
            except OSError:
                connection.close()
            self._wait(attempt)
        return False

    def _try_read(self, number: int, spans: list[Span]) -> None:
        connection = self._bound[number]
        if connection is None or self._whole[number]:
            return
        digest = self._client.plan["layers"][number]["digest"]
        problem: Exception | None = None
        for attempt in range(LAZY_TRIES):
            asked = [(spans[0][0], spans[-1][1])] if self._single[number] else spans
            try:
                self._whole[number] = self._read(connection, digest, asked)
                return
            except Refused as error:
                problem = error
                if error.status == 400 and len(asked) > 1:
                    self._single[number] = True
                    continue
                if error.status not in _RETRIED:
                    break
            except OSError as error:
                problem = error
                connection.close()
            self._wait(attempt)
        # A program gets EIO here. Go on, so that the rest is counted too.
        self._outcome.add(f"{digest[:19]} {spans}: {problem}", errors=1)

    def _read(self, connection: Connection, digest: str, spans: list[Span]) -> bool:
        """Read and compare *spans*; tell whether the whole layer came instead."""
        spec = ",".join(f"{start}-{stop - 1}" for start, stop in spans)
        answer = self._ask(
            connection, "GET", digest, f"Range: bytes={spec}", "Accept-Encoding: identity"
        )
        if answer.status not in {200, 206}:
            connection.body(answer)
            raise Refused(answer.status, spec)
        original = self._client.image.view(digest)
        if answer.status == 200:
            self._compare_whole(connection, answer, original, digest)
            self._client.asked(connection.host)
            return True
        body = connection.body(answer)
        self._client.asked(connection.host)
        if answer.fields.get(b"content-type", b"").startswith(b"multipart/"):
            parts = split_parts(body)
        else:
            parts = [(found, body) for found in content_ranges(answer.fields[b"content-range"])]
        self._outcome.add(body_bytes=sum(len(data) for _, data in parts))
        if [span for span, _ in parts] != [tuple(span) for span in spans]:
            self._outcome.add(f"asked {spec}, got {[p for p, _ in parts]}", mismatches=1)
        for (start, stop), data in parts:
            if data != original[start:stop]:
                self._outcome.add(f"{digest[:19]} {start}-{stop} is wrong", mismatches=1)
        return False

    def _compare_whole(
        self, connection: Connection, answer: Answer, original: memoryview, digest: str
    ) -> None:
        at = 0
        for block in connection.blocks(answer):
            if bytearray(block) != original[at : at + len(block)]:
                self._outcome.add(f"{digest[:19]} is wrong near {at}", mismatches=1)
            at += len(block)
            self._outcome.add(body_bytes=len(block))

    def _ask(self, connection: Connection, method: str, digest: str, *lines: str) -> Answer:
        ns = connection.host.ns
        more = (f"OCI-Namespace: {ns}",) if ns else ()
        return connection.ask(method, self._client.blob_path(digest), *more, *lines)

    def _wait(self, attempt: int) -> None:
        self._outcome.add(retries=1)
        if attempt + 1 < LAZY_TRIES:
            time.sleep(LAZY_WAIT_S * 2**attempt * random.uniform(1, 2))


def enter(netns: str | None) -> None:
    """From now on this thread's sockets belong to the network namespace at that path."""
    if netns is None:
        return
    descriptor = os.open(netns, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(descriptor)


def main() -> None:
    """Be some clients."""
    task = json.loads(sys.stdin.readline())
    image = Image(task["image"])
    sys.setswitchinterval(0.001)
    clients = [Client(each, image, task["think_s"], task["parallel"]) for each in task["clients"]]
    # All clients and this thread; then all are let go at once.
    standing = threading.Barrier(len(clients) + 1)
    go = threading.Barrier(len(clients) + 1)

    def be(client: Client) -> None:
        enter(client.netns)
        standing.wait()
        go.wait()
        client.outcome.began = time.monotonic()
        try:
            client.run()
        except Exception as error:
            client.outcome.add(f"BUG {error!r}", errors=1)
            raise
        finally:
            client.outcome.ended = time.monotonic()

    threads = [threading.Thread(target=be, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    standing.wait()
    print("ready", flush=True)
    if not sys.stdin.readline():
        os._exit(1)
    go.wait()
    for thread in threads:
        thread.join()
    with suppress(BrokenPipeError):
        print(json.dumps([client.outcome.document() for client in clients]), flush=True)


if __name__ == "__main__":
    main()
