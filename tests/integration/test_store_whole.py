"""Proof of the whole when some of it was hashed while pieces were still coming."""

from __future__ import annotations

import asyncio
import tempfile
from array import array
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcache.core.errors import StoreCorrupt, StoreError, StoreLacksPiece
from p2pcache.core.layout import Layout, LayoutKind, PieceState
from p2pcache.core.model import Digest
from p2pcache.core.ranges import ByteRange
from p2pcache.store import Store, StoredBlob
from p2pcache.store.rot import CheckedFile

PIECE, COUNT = 1000, 6
DATA = b"".join(bytes([65 + piece]) * PIECE for piece in range(COUNT))
DIGEST = Digest.of(DATA)
LAYOUT = Layout(LayoutKind.FIXED, len(DATA), array("Q", range(0, len(DATA), PIECE)))
FROM_PEER, FROM_UPSTREAM = PieceState.STAGED_PEER, PieceState.STAGED_UPSTREAM

_pieces = st.integers(0, COUNT - 1)
_steps = st.one_of(
    st.tuples(
        st.just("write"), _pieces, st.booleans(), st.sampled_from([FROM_PEER, FROM_UPSTREAM])
    ),
    st.tuples(st.just("fill"), _pieces, st.booleans(), st.just(FROM_PEER)),
    st.tuples(st.just("drop"), _pieces, st.booleans(), st.none()),
    st.tuples(st.just("ahead"), _pieces, st.booleans(), st.none()),
    st.tuples(st.just("confirm"), _pieces, st.booleans(), st.none()),
)


def right(piece: int) -> bytes:
    return DATA[PIECE * piece : PIECE * (piece + 1)]


async def create(store: Store) -> StoredBlob:
    return await store.create(DIGEST, LAYOUT)


async def put(blob: StoredBlob, pieces: range, state: PieceState = FROM_PEER) -> None:
    for piece in pieces:
        await blob.write(piece, right(piece), state)


def on_disk(root: Path) -> bytes:
    (path,) = root.glob(f"**/*{DIGEST.encoded}*")
    return path.read_bytes()


async def _step(
    blob: StoredBlob, root: Path, step: tuple[str, int, bool, PieceState | None]
) -> None:
    kind, piece, flag, state = step
    if kind == "write":
        assert state is not None
        await blob.write(piece, right(piece) if flag else b"?" * PIECE, state)
    elif kind == "fill":
        await put(blob, range(piece + 1))
    elif kind == "drop":
        await blob.drop(range(piece) if flag else [piece])
    elif kind == "ahead":
        await blob.hash_ahead()


async def _confirm(blob: StoredBlob) -> bool | None:
    try:
        return await blob.confirm_whole()
    except StoreLacksPiece:
        return None


@given(st.lists(st.tuples(_steps, st.booleans()), max_size=25))
def test_what_was_hashed_ahead_never_decides_otherwise(steps):
    """Some steps are waited for, others run beside those that follow."""

    async def main(root: Path) -> None:
        async with Store(root, 1 << 20) as store:
            blob = await create(store)
            with blob.reading():
                pending: set[asyncio.Task[None]] = set()
                async with asyncio.TaskGroup() as tasks:
                    for step, is_waited_for in steps:
                        if step[0] != "confirm":
                            task = tasks.create_task(_step(blob, root, step))
                            if is_waited_for:
                                await task
                            else:
                                pending.add(task)
                                await asyncio.sleep(0)
                            continue
                        if pending:
                            await asyncio.wait(pending)
                            pending.clear()
                        await _check(blob, root)
                await _check(blob, root)
                if not blob.is_complete:
                    await put(blob, range(COUNT), FROM_UPSTREAM)
                    await blob.hash_ahead()
                    await _check(blob, root)

    with tempfile.TemporaryDirectory() as root:
        asyncio.run(main(Path(root)))


async def _check(blob: StoredBlob, root: Path) -> None:
    is_complete = blob.is_complete
    said = await _confirm(blob)
    if not is_complete:
        assert said is None
    else:
        assert said is (on_disk(root) == DATA)
        assert blob.is_whole is said


async def test_pieces_hashed_ahead_are_not_read_again(tmp_path, monkeypatch):
    read: list[range] = []
    hash_on = CheckedFile.hash_on

    def spy(self, prefix, stop):
        read.append(range(prefix.pieces, stop))
        return hash_on(self, prefix, stop)

    monkeypatch.setattr(CheckedFile, "hash_on", spy)
    async with Store(tmp_path, 1 << 20) as store:
        blob = await create(store)
        await put(blob, range(2))
        await blob.hash_ahead()
        await blob.hash_ahead()
        await put(blob, range(3, 5))
        await blob.hash_ahead()
        await put(blob, range(2, 3))
        await blob.hash_ahead()
        await put(blob, range(5, 6))
        await blob.hash_ahead()
        assert await blob.confirm_whole()
    assert read == [range(2), range(2, 5), range(5, 6)]


async def test_a_piece_replaced_after_it_was_hashed_counts_anew(tmp_path):
    async with Store(tmp_path, 1 << 20) as store:
        blob = await create(store)
        await blob.write(0, b"?" * PIECE, FROM_PEER)
        await put(blob, range(1, 5))
        await blob.hash_ahead()
        await blob.write(0, right(0), FROM_UPSTREAM)
        await put(blob, range(5, 6))
        assert await blob.confirm_whole()


async def test_a_piece_dropped_while_it_is_hashed_counts_anew(tmp_path):
    async with Store(tmp_path, 1 << 20) as store:
        blob = await create(store)
        await blob.write(0, b"?" * PIECE, FROM_PEER)
        await put(blob, range(1, 5))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(blob.hash_ahead())
            await asyncio.sleep(0)
            await blob.drop([0])
            await blob.write(0, right(0), FROM_PEER)
        await put(blob, range(5, 6))
        assert await blob.confirm_whole()


async def test_a_rotten_piece_is_found_whether_it_is_hashed_ahead_or_not(tmp_path):
    async with Store(tmp_path, 1 << 20) as store:
        blob = await create(store)
        await put(blob, range(5))
        (path,) = tmp_path.glob(f"**/*{DIGEST.encoded}*")
        with path.open("r+b") as file:
            file.seek(PIECE)
            file.write(b"rot")
        await blob.hash_ahead()
        await put(blob, range(5, 6))
        with pytest.raises(StoreCorrupt) as caught:
            await blob.confirm_whole()
        assert caught.value.piece == 1
        await put(blob, range(1, 2))
        assert await blob.confirm_whole()


async def test_rot_after_hashing_ahead_is_found_when_it_is_read(tmp_path):
    """The digest covers the bytes as they were hashed; the piece's own hash covers each read."""
    moment = 0.0
    async with Store(tmp_path, 1 << 20, clock=lambda: moment) as store:
        blob = await create(store)
        await put(blob, range(5))
        await blob.hash_ahead()
        (path,) = tmp_path.glob(f"**/*{DIGEST.encoded}*")
        with path.open("r+b") as file:
            file.seek(PIECE)
            file.write(b"rot")
        await put(blob, range(5, 6))
        assert await blob.confirm_whole()
        moment = 24 * 3600.0
        with pytest.raises(StoreCorrupt):
            await blob.read(ByteRange(0, len(DATA)))
        assert not blob.is_whole


async def test_hashing_ahead_of_a_blob_that_goes_away(tmp_path):
    async with Store(tmp_path, 1 << 20) as store:
        blob = await create(store)
        await put(blob, range(5))
        async with asyncio.TaskGroup() as tasks:
            ahead = tasks.create_task(_quietly(blob))
            await asyncio.sleep(0)
            await store.forget(DIGEST)
            await ahead
        again = await create(store)
        await put(again, range(6))
        assert await again.confirm_whole()


async def _quietly(blob: StoredBlob) -> None:
    with suppress(StoreError):
        await blob.hash_ahead()
