"""kill -9 at random instants: what was acknowledged is there, and nothing else counts as held.

The child process writes, proves, drops and replaces pieces of several blobs at once, and says on a
pipe before it begins each change and after each has returned. The parent kills it, opens what is
left, and compares: each blob is as after the last acknowledged change, or as after the one that was
under way.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import select
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from p2pcache.core.errors import StoreCorrupt
from p2pcache.core.layout import Layout, LayoutKind, PieceState
from p2pcache.core.model import Digest, Manifest
from p2pcache.store import Store

BLOBS = 5
PIECES = 12
PIECE = 8192
ROUNDS = int(os.environ.get("P2PCACHE_CRASH_ROUNDS", "60"))  # noqa: TID251 - a knob of this test


def content(name: int) -> bytes:
    return b"".join(
        hashlib.shake_128(b"%d/%d" % (name, piece)).digest(PIECE) for piece in range(PIECES)
    )


CONTENT = {name: content(name) for name in range(BLOBS)}
DIGESTS = {name: Digest.of(CONTENT[name]) for name in range(BLOBS)}
LAYOUTS = {
    cut: Layout(LayoutKind.TOC, PIECES * PIECE, array("Q", range(0, PIECES * PIECE, cut * PIECE)))
    for cut in (1, 2)
}


def garbage(size: int) -> bytes:
    return b"\xee" * size


@dataclass
class Model:
    """One blob: its layout, and per piece the state and whether the bytes are right."""

    cut: int = 0
    is_whole: bool = False
    pieces: dict[int, tuple[PieceState, bool]] = field(default_factory=dict)

    def stages(self, piece: int) -> bool:
        return piece in self.pieces and self.pieces[piece][0] < PieceState.HELD_UPSTREAM

    def apply(self, words: list[str]) -> None:
        match words:
            case ["create", cut]:
                if self.cut != int(cut):
                    self.cut, self.is_whole, self.pieces = int(cut), False, {}
            case ["write", piece, state, right]:
                rank = (0, 2, 1, 3, 3)
                old = self.pieces.get(int(piece), (PieceState.ABSENT, False))[0]
                if rank[int(state)] > rank[old]:
                    self.pieces[int(piece)] = PieceState(int(state)), right == "1"
            case ["drop", piece]:
                if self.pieces.pop(int(piece), None):
                    self.is_whole = False
            case ["confirm"]:
                sound = all(right for _, right in self.pieces.values())
                if len(self.pieces) == LAYOUTS[self.cut].count and sound:
                    self.is_whole = True
                    self.pieces = {
                        i: (PieceState(s if s >= 3 else s + 2), r)
                        for i, (s, r) in self.pieces.items()
                    }
            case ["forget"]:
                self.cut, self.is_whole, self.pieces = 0, False, {}


# The child


def serve_crashes() -> None:
    """Fork one child per line of input: importing everything again each time would be slow."""
    for line in sys.stdin:
        root, seed = line.split()
        if (child := os.fork()) == 0:
            asyncio.run(change_for_ever(Path(root), int(seed)))
        os.write(1, b"%d\n" % child)
        os.waitpid(child, 0)
        os.write(1, b"reaped\n")


async def change_for_ever(root: Path, seed: int) -> None:
    async with Store(root, 1 << 30) as store, asyncio.TaskGroup() as tasks:
        for name in range(BLOBS):
            tasks.create_task(change_one(store, name, random.Random(seed * 100 + name)))


async def change_one(store: Store, name: int, dice: random.Random) -> None:
    model = Model()
    if (blob := store.find(DIGESTS[name])) is not None:
        model.cut = 1 if blob.layout.count == PIECES else 2
    while True:
        words = choose(model, dice)
        os.write(1, f"begin {name} {' '.join(words)}\n".encode())
        if words[0] == "create":
            model.cut = int(words[1])
            await store.create(DIGESTS[name], LAYOUTS[model.cut], toc_digest=DIGESTS[name])
        elif words[0] == "forget":
            model.cut = 0
            await store.forget(DIGESTS[name])
        else:
            blob = store.find(DIGESTS[name])
            assert blob is not None
            if words[0] == "write":
                part = blob.layout.range_of(int(words[1]))
                right = words[3] == "1"
                data = CONTENT[name][part.start : part.stop] if right else garbage(len(part))
                await blob.write(int(words[1]), data, PieceState(int(words[2])))
            elif words[0] == "drop":
                await blob.drop([int(words[1])])
            elif blob.is_complete:
                await blob.confirm_whole()
        if dice.random() < 0.02:
            data = f"{name} {dice.random()}".encode()
            await store.memory.put_manifest(Manifest(Digest.of(data), "text/plain", data))
            os.write(1, b"manifest %s\n" % data)
        os.write(1, f"end {name}\n".encode())


def choose(model: Model, dice: random.Random) -> list[str]:
    if not model.cut:
        return ["create", dice.choice("12")]
    piece = str(dice.randrange(LAYOUTS[model.cut].count))
    roll = dice.random()
    if roll < 0.01:
        return ["forget"]
    if roll < 0.02:
        return ["create", dice.choice("12")]
    if roll < 0.10:
        return ["drop", piece]
    if roll < 0.15:
        return ["confirm"]
    state = dice.choice([state for state in PieceState if state])
    right = state >= PieceState.HELD_UPSTREAM or dice.random() < 0.9
    return ["write", piece, str(int(state)), str(int(right))]


# The parent


@pytest.fixture
def crasher() -> Iterator[subprocess.Popen[bytes]]:
    path = os.pathsep.join(sys.path)
    with subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": path},
        bufsize=0,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def run_and_kill(process: subprocess.Popen[bytes], root: Path, seed: int, life_s: float) -> str:
    """Return what the child said within *life_s* seconds, after which it was killed."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{root} {seed}\n".encode())
    said = b""
    child: int | None = None
    kill_at = deadline = time.monotonic() + 20
    while b"reaped\n" not in said:
        assert time.monotonic() < deadline, "the child does not die"
        if select.select([process.stdout], [], [], max(0.0, kill_at - time.monotonic()))[0]:
            said += os.read(process.stdout.fileno(), 1 << 16)
        if child is None:
            complete = said[: said.rfind(b"\n") + 1].splitlines()
            child = next((int(line) for line in complete if line.isdigit()), None)
            if child is not None:
                kill_at = time.monotonic() + life_s
        elif time.monotonic() >= kill_at:
            os.kill(child, signal.SIGKILL)
            kill_at = deadline
    return said.decode()


def test_nothing_acknowledged_is_lost_and_nothing_unproven_is_held(tmp_path, crasher):
    dice = random.Random(7)
    models = {name: Model() for name in range(BLOBS)}
    manifests: set[Digest] = set()
    changes = 0
    for seed in range(ROUNDS):
        said = run_and_kill(crasher, tmp_path, seed, dice.random() ** 2 * 0.15)
        pending: dict[int, list[str]] = {}
        for line in said.splitlines():
            match line.split():
                case ["begin", name, *words]:
                    pending[int(name)] = words
                case ["end", name]:
                    models[int(name)].apply(pending.pop(int(name)))
                    changes += 1
                case ["manifest", *words]:
                    manifests.add(Digest.of(" ".join(words).encode()))
        models = asyncio.run(compare(tmp_path, models, pending, manifests))
    assert changes > ROUNDS


async def compare(
    root: Path, models: dict[int, Model], pending: dict[int, list[str]], manifests: set[Digest]
) -> dict[int, Model]:
    """Check what is stored against the two possibilities; return what it turned out to be."""
    found = {}
    async with Store(root, 1 << 30) as store:
        for digest in manifests:
            assert await store.memory.manifest(digest) is not None
        for name, before in models.items():
            after = deepcopy(before)
            possible = [before]
            for words in [pending[name]] if name in pending else []:
                after.apply(words)
                possible.append(after)
                if words[0] == "write" and before.stages(int(words[1])):
                    possible.append(deepcopy(before))  # Staged bytes that were being replaced.
                    del possible[-1].pieces[int(words[1])]
                if words[0] == "create" and before.cut != after.cut:
                    possible.append(Model())  # Between taking the old one out and the new one in.
            seen = await look(store, name, overwriting=pending.get(name, []))
            assert seen in possible, f"blob {name}: {seen}\nbut {possible}\nafter {pending}"
            found[name] = seen
    return found


async def look(store: Store, name: int, *, overwriting: list[str]) -> Model:
    blob = store.find(DIGESTS[name])
    if blob is None:
        return Model()
    seen = Model(1 if blob.layout.count == PIECES else 2, blob.is_whole)
    for piece in range(blob.layout.count):
        if (state := blob.state_of(piece)) is PieceState.ABSENT:
            continue
        part = blob.layout.range_of(piece)
        right = CONTENT[name][part.start : part.stop]
        try:
            data = await blob.read(part, staged=True)
        except StoreCorrupt:
            # Staged bytes that were being replaced by better ones: found out, and gone.
            assert state < PieceState.HELD_UPSTREAM
            assert overwriting[:2] == ["write", str(piece)]
            continue
        assert data in (right, garbage(len(part)))
        if state >= PieceState.HELD_UPSTREAM:
            assert data == right
        seen.pieces[piece] = state, data == right
    return seen


if __name__ == "__main__":
    serve_crashes()
