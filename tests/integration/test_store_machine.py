"""The store against an obvious model: dicts of what was written, with reopening in between."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from array import array
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from p2pcache.core.errors import StoreFull, StoreLacksPiece
from p2pcache.core.layout import Layout, LayoutKind, PieceState
from p2pcache.core.model import Descriptor, Digest, Manifest, Repository, Tag, TagFact
from p2pcache.core.ranges import ByteRange
from p2pcache.store import Store, StoredBlob

BUDGET = 24_000
NAMES = st.integers(0, 4)
STATES = st.sampled_from([state for state in PieceState if state])
RANK = {
    PieceState.ABSENT: 0,
    PieceState.STAGED_PEER: 1,
    PieceState.STAGED_UPSTREAM: 2,
    PieceState.HELD_UPSTREAM: 3,
    PieceState.HELD_PEER: 3,
}


def content(name: int) -> bytes:
    return bytes((name * 37 + i * i) % 251 for i in range(5000 + 700 * name))


def layout(name: int, cut: int) -> Layout:
    return Layout(LayoutKind.TOC, len(content(name)), array("Q", range(0, 5000, 500 * cut)))


@dataclass
class Model:
    """What one blob should hold: the state and the bytes of each piece that is there."""

    layout: Layout
    used: float
    pieces: dict[int, tuple[PieceState, bytes]] = field(default_factory=dict)
    is_whole: bool = False
    pins: int = 0

    @property
    def room(self) -> int:
        return sum(len(data) for _, data in self.pieces.values())


class StoreMachine(RuleBasedStateMachine):
    """Reads, writes, drops, proofs, evictions and restarts in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.root = Path(tempfile.mkdtemp())
        self.now = 0.0
        self.models: dict[int, Model] = {}
        self.tags: dict[Tag, TagFact] = {}
        self.manifests: dict[Digest, Manifest] = {}
        self.facts: dict[Digest, tuple[Repository, ...]] = {}
        self.open()

    def open(self) -> None:
        self.store = Store(self.root, BUDGET, clock=self.tick)
        self.runner.run(self.store.__aenter__())

    def close(self) -> None:
        self.runner.run(self.store.__aexit__(None, None, None))

    def tick(self) -> float:
        self.now += 1e-3
        return self.now

    def teardown(self) -> None:
        self.close()
        self.runner.close()
        shutil.rmtree(self.root)

    def blob(self, name: int) -> StoredBlob:
        blob = self.store.find(Digest.of(content(name)))
        assert blob is not None
        return blob

    def evict(self, excess: int) -> bool:
        """Take the least recently used out of the model until *excess* bytes are free."""
        idle = {n: m for n, m in self.models.items() if not m.pins}
        if sum(m.room for m in idle.values()) < excess:
            return False
        for name in sorted(idle, key=lambda n: idle[n].used):
            if excess <= 0:
                break
            excess -= self.models.pop(name).room
        return True

    @property
    def room(self) -> int:
        manifests = sum(len(m.data) for m in self.manifests.values())
        return manifests + sum(m.room for m in self.models.values())

    @rule(name=NAMES, cut=st.integers(1, 2))
    def create(self, name, cut):
        wanted = layout(name, cut)
        digest = Digest.of(content(name))
        blob = self.runner.run(self.store.create(digest, wanted, toc_digest=digest))
        assert list(blob.layout.starts) == list(wanted.starts)
        if name not in self.models or self.models[name].layout != wanted:
            self.models[name] = Model(wanted, self.now)

    @precondition(lambda self: self.models)
    @rule(data=st.data(), state=STATES, right=st.booleans())
    def write(self, data, state, right):
        name = data.draw(st.sampled_from(sorted(self.models)))
        model = self.models[name]
        piece = data.draw(st.integers(0, model.layout.count - 1))
        part = model.layout.range_of(piece)
        proven = state in (PieceState.HELD_UPSTREAM, PieceState.HELD_PEER)
        body = content(name)[part.start : part.stop] if right or proven else b"?" * len(part)
        old = model.pieces.get(piece, (PieceState.ABSENT, b""))[0]
        fits = True
        if RANK[state] > RANK[old]:
            if not old:
                model.pins += 1
                fits = self.evict(self.room + len(part) - BUDGET)
                model.pins -= 1
            if fits:
                model.pieces[piece] = (state, body)
        try:
            self.runner.run(self.blob(name).write(piece, body, state))
        except StoreFull:
            assert not fits
        else:
            assert fits
            if RANK[state] > RANK[old]:
                model.used = self.now

    @precondition(lambda self: self.models)
    @rule(data=st.data(), staged=st.booleans())
    def read(self, data, staged):
        name = data.draw(st.sampled_from(sorted(self.models)))
        model = self.models[name]
        size = model.layout.size
        start = data.draw(st.integers(0, size - 1))
        part = ByteRange(start, data.draw(st.integers(start + 1, size)))
        lowest = 1 if staged else 3
        there = {i: body for i, (state, body) in model.pieces.items() if state >= lowest}
        wanted = model.layout.covering(part)
        blob = self.blob(name)
        if all(piece in there for piece in wanted):
            body = b"".join(there[piece] for piece in wanted)
            first = model.layout.starts[wanted.start]
            expected = body[part.start - first : part.stop - first]
            assert self.runner.run(blob.read(part, staged=staged)) == expected
            if not staged:
                assert blob.read_held_now(part.start, part.stop) == expected
            model.used = self.now
        else:
            if not staged:
                assert blob.read_held_now(part.start, part.stop) is None
            with suppress(StoreLacksPiece):
                self.runner.run(blob.read(part, staged=staged))
                raise AssertionError("read what is not there")

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def drop(self, data):
        name = data.draw(st.sampled_from(sorted(self.models)))
        model = self.models[name]
        pieces = data.draw(st.sets(st.integers(0, model.layout.count - 1)))
        self.runner.run(self.blob(name).drop(pieces))
        for piece in pieces:
            if model.pieces.pop(piece, None):
                model.is_whole = False

    @precondition(lambda self: self.models)
    @rule(data=st.data(), fill=st.booleans())
    def confirm(self, data, fill):
        name = data.draw(st.sampled_from(sorted(self.models)))
        blob, model = self.blob(name), self.models[name]
        if fill:
            with blob.reading():
                model.pins += 1
                for piece in range(model.layout.count):
                    part = model.layout.range_of(piece)
                    if piece in model.pieces:
                        continue
                    if not self.evict(self.room + len(part) - BUDGET):
                        break
                    body = content(name)[part.start : part.stop]
                    self.runner.run(blob.write(piece, body, PieceState.STAGED_PEER))
                    model.used = self.now
                    model.pieces[piece] = (PieceState.STAGED_PEER, body)
                model.pins -= 1
        assert blob.is_complete == (len(model.pieces) == model.layout.count)
        if not blob.is_complete:
            with suppress(StoreLacksPiece):
                self.runner.run(blob.confirm_whole())
                raise AssertionError("proved what is not there")
            return
        right = b"".join(body for _, (_, body) in sorted(model.pieces.items())) == content(name)
        assert self.runner.run(blob.confirm_whole()) is right
        if right:
            model.is_whole = True
            held = {PieceState.STAGED_PEER: PieceState.HELD_PEER}
            held[PieceState.STAGED_UPSTREAM] = PieceState.HELD_UPSTREAM
            model.pieces = {i: (held.get(s, s), body) for i, (s, body) in model.pieces.items()}

    @rule(name=NAMES)
    def forget(self, name):
        self.runner.run(self.store.forget(Digest.of(content(name))))
        self.models.pop(name, None)

    @rule(name=NAMES, tag=st.sampled_from(["latest", "v1"]), size=st.integers(0, 2**40))
    def remember(self, name, tag, size):
        manifest = Manifest(Digest.of(b"m%d" % name), "application/json", b"m%d" % name)
        repository = Repository("docker.io", f"library/app{name}")
        fact = TagFact(manifest.digest, "application/json", size, self.now)
        self.runner.run(self.store.memory.put_manifest(manifest))
        self.runner.run(self.store.memory.put_tag(repository, Tag(tag), fact))
        layer = Descriptor("application/gzip", Digest.of(b"layer"), size)
        self.runner.run(self.store.memory.put_facts(repository, layer, None))
        self.manifests[manifest.digest] = manifest
        self.tags[Tag(f"{tag}-{name}")] = fact
        known = self.facts.get(layer.digest, ())
        self.facts[layer.digest] = (repository, *(r for r in known if r != repository))

    @rule()
    def reopen(self):
        self.close()
        self.open()

    @invariant()
    def agrees_with_the_model(self):
        if self.room <= BUDGET:
            assert self.store.used == self.room
        assert self.store.blob_count == len(self.models)
        for name, model in self.models.items():
            blob = self.blob(name)
            assert blob.is_whole == model.is_whole
            states = {i: state for i, (state, _) in model.pieces.items()}
            for state in PieceState:
                if state:
                    assert set(blob.pieces_in(state)) == {i for i in states if states[i] is state}
            assert set(blob.held) == {i for i in states if states[i] >= PieceState.HELD_UPSTREAM}
        memory = self.store.memory
        for digest, manifest in self.manifests.items():
            assert self.runner.run(memory.manifest(digest)) == manifest
        for tag, fact in self.tags.items():
            text, _, name_ = tag.name.partition("-")
            assert memory.tag(Repository("docker.io", f"library/app{name_}"), Tag(text)) == fact
        for digest, repositories in self.facts.items():
            facts = memory.facts(digest)
            assert facts is not None
            assert facts.repositories == repositories


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
