"""The store on a real directory: what it keeps, what it refuses, and what it survives."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from blockbuster import blockbuster_ctx

import p2pcache.store
from p2pcache.core.errors import StoreCorrupt, StoreError, StoreFull, StoreLacksPiece
from p2pcache.core.layout import Layout, LayoutKind, PieceState
from p2pcache.core.model import Descriptor, Digest, Manifest, Repository, Tag, TagFact
from p2pcache.core.ranges import ByteRange
from p2pcache.store import Store, StoredBlob

PIECE = 10_000
UNPROVEN = (PieceState.STAGED_UPSTREAM, PieceState.STAGED_PEER)
HELD, STAGED = PieceState.HELD_UPSTREAM, PieceState.STAGED_PEER
REPOSITORY = Repository("docker.io", "library/alpine")


def content(name: int, pieces: int = 4) -> bytes:
    return bytes([name]) * (PIECE * pieces)


def toc(data: bytes) -> Layout:
    return Layout(LayoutKind.TOC, len(data), array("Q", range(0, len(data), PIECE)))


async def put(
    store: Store, data: bytes, state: PieceState = HELD, *, pieces: range | None = None
) -> StoredBlob:
    digest = Digest.of(data)
    blob = await store.create(digest, toc(data), toc_digest=digest)
    with blob.reading():
        for piece in range(blob.layout.count) if pieces is None else pieces:
            part = blob.layout.range_of(piece)
            await blob.write(piece, data[part.start : part.stop], state)
    return blob


def found(store: Store, data: bytes) -> StoredBlob:
    blob = store.find(Digest.of(data))
    assert blob is not None
    return blob


def file_of(root: Path, data: bytes) -> Path:
    name = Digest.of(data).encoded
    return root / "data" / name[:2] / name


def spoil(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


# Reading and writing


async def test_what_was_written_is_there_after_reopening(tmp_path):
    data = content(1)
    async with Store(tmp_path, 1 << 20) as store:
        await put(store, data, pieces=range(1, 3))
    async with Store(tmp_path, 1 << 20) as store:
        blob = found(store, data)
        assert list(blob.held) == [1, 2]
        assert blob.toc_digest == Digest.of(data)
        assert blob.layout == toc(data)
        assert store.used == 2 * PIECE
        assert await blob.read(ByteRange(15_000, 29_000)) == data[15_000:29_000]


async def test_staged_bytes_are_read_only_on_demand(tmp_path):
    data = content(1)
    async with Store(tmp_path, 1 << 20) as store:
        blob = await put(store, data, STAGED)
        assert not blob.held
        assert list(blob.pieces_in(*UNPROVEN)) == [0, 1, 2, 3]
        with pytest.raises(StoreLacksPiece):
            await blob.read(ByteRange(0, 10))
        assert blob.read_held_now(0, 10) is None
        assert await blob.read(ByteRange(0, 10), staged=True) == data[:10]


async def test_better_bytes_replace_worse_ones_and_never_the_reverse(tmp_path):
    data = content(1, 1)
    async with Store(tmp_path, 1 << 20) as store:
        blob = await put(store, data, pieces=range(0))
        for state, fill in (
            (PieceState.STAGED_PEER, b"a"),
            (PieceState.STAGED_UPSTREAM, b"b"),
            (PieceState.STAGED_PEER, b"c"),
            (PieceState.HELD_PEER, b"d"),
            (PieceState.HELD_UPSTREAM, b"e"),
            (PieceState.STAGED_UPSTREAM, b"f"),
        ):
            await blob.write(0, fill * PIECE, state)
        assert blob.state_of(0) is PieceState.HELD_PEER
        assert await blob.read(ByteRange(0, PIECE)) == b"d" * PIECE
        assert store.used == PIECE


async def test_a_piece_of_the_wrong_length_is_a_bug(tmp_path):
    async with Store(tmp_path, 1 << 20) as store:
        blob = await put(store, content(1), pieces=range(0))
        with pytest.raises(ValueError, match="5 bytes"):
            await blob.write(0, b"short", HELD)


async def test_held_bytes_are_read_at_once_only_after_a_check(tmp_path):
    data, clock = content(1), Clock()
    async with Store(tmp_path, 1 << 20) as store:
        await put(store, data)
    async with Store(tmp_path, 1 << 20, clock=clock) as store:
        blob = found(store, data)
        assert blob.read_held_now(5, 15_000) is None
        await blob.read(ByteRange(0, 20_000))
        assert blob.read_held_now(5, 15_000) == data[5:15_000]
        assert blob.read_held_now(5, 20_001) is None
        clock.now += 61
        assert blob.read_held_now(5, 15_000) is None


@pytest.mark.parametrize("fails", ["cold", "unsupported", "broken"])
async def test_a_read_that_would_wait_is_left_to_a_thread(tmp_path, monkeypatch, fails):
    data = content(1)
    preadv = os.preadv

    def failing(fd, buffers, offset, flags=0):
        if fails == "cold":
            raise BlockingIOError
        if fails == "broken":
            raise OSError(errno.EIO, "dead")
        if flags:
            raise OSError(errno.EOPNOTSUPP, "no")
        return preadv(fd, buffers, offset, flags)

    async with Store(tmp_path, 1 << 20) as store:
        blob = await put(store, data)
        await blob.read(ByteRange(0, 4 * PIECE))
        monkeypatch.setattr(os, "preadv", failing)
        now = blob.read_held_now(100, 30_000)
        assert now == (data[100:30_000] if fails == "unsupported" else None)
        assert await blob.read(ByteRange(100, 30_000)) == data[100:30_000]


async def test_one_layout_gives_one_blob_and_another_replaces_it(tmp_path):
    data = content(1)
    digest = Digest.of(data)
    async with Store(tmp_path, 1 << 20) as store:
        blob = await put(store, data)
        assert await store.create(digest, toc(data), toc_digest=digest) is blob
        fixed = await store.create(digest, Layout.fixed(len(data)))
        assert fixed is not blob
        assert store.used == 0
        assert not fixed.held
        assert not blob.held
        with pytest.raises(StoreLacksPiece):
            await blob.read(ByteRange(0, 1))
        with pytest.raises(StoreFull):
            await blob.write(0, data[:PIECE], HELD)
        await fixed.write(0, data, HELD)
    async with Store(tmp_path, 1 << 20) as store:
        assert found(store, data).layout == Layout.fixed(len(data))
        assert found(store, data).held.is_full


async def test_many_create_and_write_the_same_at_once(tmp_path):
    data = content(1)
    async with Store(tmp_path, 1 << 20) as store:
        async with asyncio.TaskGroup() as tasks:
            jobs = [tasks.create_task(put(store, data)) for _ in range(20)]
        assert len({job.result() for job in jobs}) == 1
        assert store.used == len(data)


async def test_a_cancelled_write_leaves_a_sound_blob(tmp_path):
    data = content(1)
    async with Store(tmp_path, 1 << 20) as store:
        blob = await put(store, data, pieces=range(0))
        async with asyncio.TaskGroup() as tasks:
            jobs = [
                tasks.create_task(blob.write(i, data[:PIECE], state))
                for i in range(4)
                for state in (STAGED, HELD)
            ]
            await asyncio.sleep(0)
            for job in jobs[::2]:
                job.cancel()
        assert blob.held.is_full
        assert blob.pins == 0
        assert store.used == len(data)
        await blob.read(ByteRange(0, len(data)))


async def test_forgetting_frees_the_room_and_the_file(tmp_path):
    data = content(1)
    async with Store(tmp_path, 1 << 20) as store:
        await put(store, data)
        await store.forget(Digest.of(data))
        await store.forget(Digest.of(data))
        assert store.find(Digest.of(data)) is None
        assert store.used == 0
        assert not file_of(tmp_path, data).exists()


async def test_the_event_loop_never_waits_for_the_disk(tmp_path):
    data = content(1)
    with blockbuster_ctx(p2pcache.store):
        async with Store(tmp_path, 100_000) as store:
            for name in range(6):
                blob = await put(store, content(name), STAGED)
                await blob.read(ByteRange(0, 10), staged=True)
            await put(store, data)
            await found(store, data).confirm_whole()
            assert found(store, data).read_held_now(0, 10) is not None
            await found(store, data).drop([0])
            await store.memory.put_manifest(Manifest(Digest.of(b"x"), "text/plain", b"x"))
            store.release_writer()


async def test_descriptors_stay_bounded(tmp_path):
    async with Store(tmp_path, 1 << 20, max_open_files=4) as store:
        for name in range(20):
            blob = await put(store, content(name, 1))
            assert await blob.read(ByteRange(0, 5)) == bytes([name]) * 5
        readable = [name for name in range(20) if found(store, content(name, 1)).has_file]
        assert len(readable) <= 4
        assert readable[-1] == 19
        assert await found(store, content(0, 1)).read(ByteRange(0, 5)) == bytes(5)


# Rot


async def test_a_flipped_bit_is_found_dropped_and_stays_dropped(tmp_path):
    data = content(1)
    async with Store(tmp_path, 1 << 20) as store:
        blob = await put(store, data)
        assert await blob.confirm_whole()
    spoil(file_of(tmp_path, data), 2 * PIECE + 17)
    async with Store(tmp_path, 1 << 20) as store:
        blob = found(store, data)
        assert blob.is_whole
        with pytest.raises(StoreCorrupt) as caught:
            await blob.read(ByteRange(0, len(data)))
        assert caught.value.piece == 2
        assert list(blob.held) == [0, 1, 3]
        assert not blob.is_whole
        assert store.used == 3 * PIECE
        assert store.stats().rotten_pieces == 1
    async with Store(tmp_path, 1 << 20) as store:
        blob = found(store, data)
        assert list(blob.held) == [0, 1, 3]
        assert not blob.is_whole
        await blob.write(2, data[:PIECE], HELD)
        assert await blob.read(ByteRange(0, len(data))) == data


async def test_a_bit_that_flips_while_open_is_found_when_it_is_time_to_check(tmp_path):
    data, clock = content(1), Clock()
    async with Store(tmp_path, 1 << 20, clock=clock) as store:
        blob = await put(store, data)
        spoil(file_of(tmp_path, data), 0)
        clock.now += 61
        assert blob.read_held_now(0, 10) is None
        with pytest.raises(StoreCorrupt):
            await blob.read(ByteRange(0, 10))


async def test_many_readers_of_a_rotten_piece_drop_it_once(tmp_path):
    data = content(1)
    async with Store(tmp_path, 1 << 20) as store:
        await put(store, data)
    spoil(file_of(tmp_path, data), 5)
    async with Store(tmp_path, 1 << 20) as store:
        blob = found(store, data)
        results = []

        async def read() -> None:
            try:
                await blob.read(ByteRange(0, 5))
            except StoreLacksPiece as error:
                results.append(error)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(read())
        assert len(results) == 8
        assert store.used == 3 * PIECE
        assert store.stats().rotten_pieces == 1


async def test_a_file_that_ends_early_loses_only_what_is_missing(tmp_path):
    data = content(1)
    async with Store(tmp_path, 1 << 20) as store:
        await put(store, data)
        os.truncate(file_of(tmp_path, data), 25_000)
        with pytest.raises(StoreCorrupt):
            await found(store, data).read(ByteRange(0, len(data)))
        assert list(found(store, data).held) == [0, 1]


async def test_a_file_that_is_gone_takes_its_blob_along(tmp_path):
    data = content(1)
    async with Store(tmp_path, 1 << 20) as store:
        blob = await put(store, data)
        file_of(tmp_path, data).unlink()
        with pytest.raises(StoreLacksPiece):
            await blob.read(ByteRange(0, 5))
        assert store.find(Digest.of(data)) is None
        assert store.used == 0
        await put(store, data)
        assert await found(store, data).read(ByteRange(0, 5)) == data[:5]


async def test_a_dead_block_is_rot_but_a_lack_of_descriptors_is_not(tmp_path, monkeypatch):
    data = content(1)
    pread, open_ = os.pread, os.open

    def dead(fd, size, offset):
        if offset <= 2 * PIECE < offset + size:
            raise OSError(errno.EIO, "Input/output error")
        return pread(fd, size, offset)

    def exhausted(path, *args):
        if str(path).endswith(Digest.of(data).encoded):
            raise OSError(errno.EMFILE, "Too many open files")
        return open_(path, *args)

    async with Store(tmp_path, 1 << 20) as store:
        blob = await put(store, data)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", exhausted)
            with pytest.raises(StoreError, match="Too many"):
                await blob.read(ByteRange(0, 5))
        assert blob.held.is_full
        monkeypatch.setattr(os, "pread", dead)
        with pytest.raises(StoreCorrupt):
            await blob.read(ByteRange(0, len(data)))
        assert list(blob.held) == [0, 1, 3]


# Proof of the whole


async def test_the_right_bytes_become_whole_and_keep_their_origin(tmp_path):
    data = content(1)
    async with Store(tmp_path, 1 << 20) as store:
        blob = await put(store, data, PieceState.STAGED_UPSTREAM, pieces=range(2))
        await put(store, data, PieceState.STAGED_PEER, pieces=range(2, 4))
        assert blob.is_complete
        assert await blob.confirm_whole()
    async with Store(tmp_path, 1 << 20) as store:
        blob = found(store, data)
        assert blob.is_whole
        assert blob.held.is_full
        assert list(blob.pieces_in(PieceState.HELD_PEER)) == [2, 3]
        assert await blob.confirm_whole()


async def test_wrong_bytes_change_nothing(tmp_path):
    data = content(1)
    async with Store(tmp_path, 1 << 20) as store:
        blob = await put(store, data, STAGED, pieces=range(1, 4))
        with pytest.raises(StoreLacksPiece):
            await blob.confirm_whole()
        await blob.write(0, b"?" * PIECE, STAGED)
        assert not await blob.confirm_whole()
        assert list(blob.pieces_in(*UNPROVEN)) == [0, 1, 2, 3]
        assert not blob.is_whole


async def test_the_disk_is_blamed_for_its_own_faults(tmp_path):
    data = content(1)
    async with Store(tmp_path, 1 << 20) as store:
        blob = await put(store, data, STAGED)
        spoil(file_of(tmp_path, data), PIECE)
        with pytest.raises(StoreCorrupt) as caught:
            await blob.confirm_whole()
        assert caught.value.piece == 1
        assert list(blob.pieces_in(*UNPROVEN)) == [0, 2, 3]


async def test_an_empty_blob_can_be_whole(tmp_path):
    async with Store(tmp_path, 1 << 20) as store:
        blob = await store.create(Digest.of(b""), Layout.fixed(0))
        assert await blob.confirm_whole()
    async with Store(tmp_path, 1 << 20) as store:
        assert found(store, b"").is_whole


async def test_a_write_waits_for_a_proof_and_does_not_disturb_it(tmp_path):
    data = content(1, 50)
    async with Store(tmp_path, 1 << 20) as store:
        blob = await put(store, data, STAGED)
        async with asyncio.TaskGroup() as tasks:
            proof = tasks.create_task(blob.confirm_whole())
            tasks.create_task(blob.write(8, b"?" * PIECE, HELD))
        assert proof.result()
        assert await blob.read(ByteRange(0, len(data))) == data


async def test_changes_during_a_proof_are_not_proven(tmp_path):
    data = content(1, 50)
    async with Store(tmp_path, 1 << 20) as store:
        for _ in range(10):
            blob = await put(store, data, STAGED)
            async with asyncio.TaskGroup() as tasks:
                proof = tasks.create_task(_outcome(blob.confirm_whole()))
                tasks.create_task(blob.drop([7]))
                tasks.create_task(blob.write(8, data[:PIECE], HELD))
            assert proof.result() in (True, "StoreLacksPiece")
            assert 7 not in blob.held
            assert not blob.is_whole
            await store.forget(blob.digest)


async def _outcome(attempt) -> object:
    try:
        return await attempt
    except StoreError as error:
        return type(error).__name__


# Budget


async def test_the_least_recently_used_blob_goes_first_even_over_restarts(tmp_path):
    clock = Clock()
    async with Store(tmp_path, 12 * PIECE, clock=clock) as store:
        for name in (1, 2, 3):
            await put(store, content(name))
        await found(store, content(1)).read(ByteRange(0, 5))
    clock.now = 5.0
    async with Store(tmp_path, 12 * PIECE, clock=clock) as store:
        await found(store, content(2)).read(ByteRange(0, 5))
        await put(store, content(4))
        assert [n for n in range(1, 5) if store.find(Digest.of(content(n)))] == [1, 2, 4]
        assert not file_of(tmp_path, content(3)).exists()
        assert store.used == 12 * PIECE
        assert store.stats().evicted_bytes == 4 * PIECE


async def test_what_is_read_is_never_evicted(tmp_path):
    async with Store(tmp_path, 8 * PIECE) as store:
        oldest = await put(store, content(1))
        await put(store, content(2))
        with oldest.reading():
            await put(store, content(3))
            assert await oldest.read(ByteRange(0, 5)) == content(1)[:5]
            assert store.find(Digest.of(content(2))) is None
            with found(store, content(3)).reading(), pytest.raises(StoreFull):
                await put(store, content(4))
        await put(store, content(4), pieces=range(1))
        assert store.find(Digest.of(content(3))) is None


async def test_what_was_pinned_since_the_last_eviction_is_passed_over(tmp_path):
    async with Store(tmp_path, 12 * PIECE) as store:
        for name in range(1, 5):
            await put(store, content(name))
        with found(store, content(2)).reading():
            await put(store, content(5))
        assert [n for n in range(1, 6) if store.find(Digest.of(content(n)))] == [2, 4, 5]


async def test_a_blob_larger_than_the_budget_evicts_nothing_in_vain(tmp_path):
    async with Store(tmp_path, 6 * PIECE) as store:
        await put(store, content(1, 2))
        big = await put(store, content(2, 8), pieces=range(4))
        with big.reading(), found(store, content(1, 2)).reading(), pytest.raises(StoreFull):
            await big.write(4, content(2, 1), HELD)
        with found(store, content(1, 2)).reading():
            assert store.used == 6 * PIECE
        assert len(big.held) == 4


async def test_a_smaller_budget_is_kept_at_opening(tmp_path):
    async with Store(tmp_path, 1 << 20) as store:
        for name in range(5):
            await put(store, content(name))
    async with Store(tmp_path, 9 * PIECE) as store:
        assert store.used == 8 * PIECE
        assert [n for n in range(5) if store.find(Digest.of(content(n)))] == [3, 4]


async def test_the_number_of_blobs_is_bounded(tmp_path):
    async with Store(tmp_path, 1 << 20, max_blobs=3) as store:
        for name in range(5):
            await put(store, content(name, 1))
        assert [n for n in range(5) if store.find(Digest.of(content(n, 1)))] == [2, 3, 4]


async def test_eviction_and_reading_never_meet(tmp_path):
    """Readers and writers of more than fits: every read gets the right bytes or none."""
    names = range(12)
    async with Store(tmp_path, 20 * PIECE) as store:
        served = 0

        async def use(worker: int) -> None:
            nonlocal served
            for step in range(60):
                data = content(names[(worker * 7 + step * 5) % len(names)])
                blob = await store.create(Digest.of(data), toc(data), toc_digest=Digest.of(data))
                try:
                    with blob.reading():
                        for piece in range(4):
                            await blob.write(piece, data[:PIECE], HELD)
                        assert await blob.read(ByteRange(0, len(data))) == data
                        assert blob.read_held_now(5, 35_000) == data[5:35_000]
                        served += 1
                except (StoreFull, StoreLacksPiece):
                    continue

        async with asyncio.TaskGroup() as tasks:
            for worker in range(8):
                tasks.create_task(use(worker))
        assert served > 100
        assert store.used <= 20 * PIECE
        assert store.stats().evicted_blobs > 10
        stored = sum(PIECE * len(blob.held) for blob in store.blobs())
        assert store.used == stored
        assert all(blob.pins == 0 for blob in store.blobs())


# Two processes


async def test_a_second_process_reads_and_takes_over(tmp_path):
    data, more = content(1), content(2)
    async with Store(tmp_path, 1 << 20) as first:
        await put(first, data, pieces=range(3))
        async with Store(tmp_path, 1 << 20) as second:
            assert not second.is_writer
            blob = found(second, data)
            assert await blob.read(ByteRange(0, 9)) == data[:9]
            assert blob.read_held_now(0, 9) is None, "what another process may change is checked"
            with pytest.raises(StoreFull, match="another process writes this store"):
                await blob.write(3, data[:PIECE], HELD)
            with pytest.raises(StoreFull, match="another process"):
                await put(second, more)
            await second.memory.put_tag(
                REPOSITORY, Tag("v1"), TagFact(Digest.of(b"v1"), "text/plain", 2, 3.0)
            )
            await put(first, more)
            first.release_writer()
            async with asyncio.timeout(10):
                await second.until_writer()
            assert found(second, data) is blob
            assert found(second, more).held.is_full
            await put(second, content(3))
            assert await found(first, data).read(ByteRange(0, 9)) == data[:9]
            with pytest.raises(StoreFull, match="handed over"):
                await found(first, data).write(3, data[:PIECE], HELD)
    async with Store(tmp_path, 1 << 20) as store:
        assert found(store, content(3)).held.is_full
        fact = store.memory.tag(REPOSITORY, Tag("v1"))
        assert fact is not None
        assert fact.seen_at == 3.0


async def test_a_reader_never_serves_bytes_that_the_writer_replaced(tmp_path):
    data = content(1)
    async with Store(tmp_path, 1 << 20) as first, Store(tmp_path, 1 << 20) as early:
        blob = await put(first, data)
        assert early.find(Digest.of(data)) is None
        async with Store(tmp_path, 1 << 20) as second:
            stale = found(second, data)
            await stale.read(ByteRange(0, 5))
            await blob.drop([0])
            await blob.write(0, b"?" * PIECE, STAGED)
            with pytest.raises(StoreCorrupt):
                await stale.read(ByteRange(0, 5))
            assert blob.state_of(0) is STAGED
            await first.forget(Digest.of(data))
            assert await stale.read(ByteRange(PIECE, PIECE + 5)) == data[:5], "still open"
            stale.close_file()
            with pytest.raises(StoreLacksPiece):
                await stale.read(ByteRange(PIECE, PIECE + 5))
            assert second.find(Digest.of(data)) is None


async def test_a_killed_writer_is_succeeded(tmp_path):
    process = await asyncio.create_subprocess_exec(
        *_child("hold", tmp_path), env=_CHILD_ENVIRONMENT, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"holding\n"
    async with Store(tmp_path, 1 << 20) as store:
        assert not store.is_writer
        assert await found(store, content(9)).read(ByteRange(0, 5)) == content(9)[:5]
        process.kill()
        await process.wait()
        async with asyncio.timeout(10):
            await store.until_writer()
        await put(store, content(1))
        assert found(store, content(9)).held.is_full


# A full disk


async def test_a_disk_that_is_full_or_broken_keeps_the_store_sound(tmp_path, monkeypatch):
    data = content(1)
    pwrite = os.pwrite
    async with Store(tmp_path, 1 << 20) as store:
        blob = await put(store, data, pieces=range(2))
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO):

            def failing(fd, body, offset, number=number):
                if len(body) > 4000:
                    return pwrite(fd, body[:4000], offset)
                raise OSError(number, os.strerror(number))

            with monkeypatch.context() as patch:
                patch.setattr(os, "pwrite", failing)
                with pytest.raises(StoreFull, match=os.strerror(number)):
                    await blob.write(2, data[:PIECE], HELD)
            assert store.used == 2 * PIECE
            assert list(blob.held) == [0, 1]
        await blob.write(2, data[:PIECE], HELD)
        assert len(blob.held) == 3


async def test_a_replacement_that_fails_halfway_leaves_nothing_to_read(tmp_path, monkeypatch):
    data = content(1)
    pwrite = os.pwrite

    def failing(fd, body, offset):
        if len(body) > 4000:
            return pwrite(fd, body[:4000], offset)
        raise OSError(errno.EIO, "dead")

    async with Store(tmp_path, 1 << 20) as store:
        blob = await put(store, data, STAGED)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", failing)
            with pytest.raises(StoreFull):
                await blob.write(1, b"?" * PIECE, HELD)
        assert list(blob.pieces_in(*UNPROVEN)) == [0, 2, 3]
        assert store.used == 3 * PIECE
    async with Store(tmp_path, 1 << 20) as store:
        blob = found(store, data)
        assert not blob.held
        with pytest.raises(StoreCorrupt):
            await blob.read(ByteRange(PIECE, PIECE + 5), staged=True)


def _refuse_deletions(root: Path, table: str) -> None:
    """Have the catalogue fail as it does on a full disk, from one moment on."""
    db = sqlite3.connect(root / "catalog.sqlite")
    db.execute(
        f"CREATE TRIGGER refuse BEFORE DELETE ON {table} BEGIN SELECT RAISE(ABORT, 'full'); END"
    )
    db.close()


def _allow_deletions(root: Path) -> None:
    db = sqlite3.connect(root / "catalog.sqlite")
    db.execute("DROP TRIGGER refuse")
    db.close()


@pytest.mark.parametrize("again", [False, True])
async def test_a_blob_that_the_catalogue_cannot_forget_is_gone_all_the_same(
    tmp_path, caplog, again
):
    data = content(1)
    async with Store(tmp_path, 1 << 20) as store:
        await put(store, data)
        _refuse_deletions(tmp_path, "blobs")
        await store.forget(Digest.of(data))
        assert not file_of(tmp_path, data).exists()
        _allow_deletions(tmp_path)
        if again:
            await put(store, data, STAGED, pieces=range(1))
    assert [r.getMessage() for r in caplog.records] == ["store.commit.failed"]
    async with Store(tmp_path, 1 << 20) as store:
        assert store.used == (PIECE if again else 0)
        assert store.blob_count == int(again)
        if again:
            assert not found(store, data).held


async def test_no_bytes_take_the_place_of_a_piece_whose_row_could_not_be_removed(tmp_path):
    data = content(1)
    async with Store(tmp_path, 1 << 20) as store:
        blob = await put(store, data)
        _refuse_deletions(tmp_path, "pieces")
        await blob.drop([2])
        assert list(blob.held) == [0, 1, 3]
        _allow_deletions(tmp_path)
        with pytest.raises(StoreFull):
            await blob.write(2, b"?" * PIECE, STAGED)
        assert store.used == 3 * PIECE
    async with Store(tmp_path, 1 << 20) as store:
        assert await found(store, data).read(ByteRange(0, len(data))) == data


def test_a_file_size_limit_is_a_full_disk(tmp_path):
    told = _run_child("limited", tmp_path)
    assert told == {"error": "StoreFull", "held": [0, 1], "right": True}


def test_a_small_disk_that_fills_up(tmp_path):
    """A real one, 1 MiB of tmpfs in a mount namespace of its own."""
    command = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    told = _run_child("small", tmp_path, prefix=command)
    assert told["filled"] == "StoreFull"
    assert told["right_while_full"]
    assert told["evicted"]
    assert told["written_after"]
    assert told["opened_full"]
    assert told["right_reopened"]


# The catalogue


def _garbage(path: Path) -> None:
    path.write_bytes(b"not a database at all" * 500)


def _torn(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))


def _short(path: Path) -> None:
    os.truncate(path, 5000)


def _foreign(path: Path) -> None:
    path.unlink()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE other (x)")
    db.close()


def _newer(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()


def _senseless(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("UPDATE pieces SET piece = 77 WHERE piece = 1")
    db.commit()
    db.close()


@pytest.mark.parametrize("spoiled", [_garbage, _torn, _short, _foreign, _newer, _senseless])
async def test_a_catalogue_that_makes_no_sense_is_set_aside(
    tmp_path, caplog, spoiled: Callable[[Path], None]
):
    data = content(1)
    async with Store(tmp_path, 1 << 20) as store:
        await put(store, data)
    spoiled(tmp_path / "catalog.sqlite")
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            async with Store(tmp_path, 1 << 20) as store:
                assert store.is_writer
                assert store.blob_count == 0 or _ == 1
                assert not file_of(tmp_path, data).exists() or _ == 1
                await put(store, data)
    assert [r.getMessage() for r in caplog.records] == ["store.catalog.set_aside"]
    assert (tmp_path / "catalog.sqlite.aside").exists()
    if spoiled is _newer:
        assert "schema version 99" in caplog.records[0].__dict__["reason"]


async def test_rows_without_files_and_files_without_rows_are_repaired(tmp_path):
    kept, lost = content(1), content(2)
    async with Store(tmp_path, 1 << 20) as store:
        await put(store, kept)
        await put(store, lost)
    file_of(tmp_path, lost).unlink()
    orphan = file_of(tmp_path, content(3))
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"orphan")
    async with Store(tmp_path, 1 << 20) as store:
        assert store.find(Digest.of(lost)) is None
        assert found(store, kept).held.is_full
        assert not orphan.exists()
    with sqlite3.connect(tmp_path / "catalog.sqlite") as db:
        assert db.execute("SELECT count(*) FROM pieces").fetchone() == (4,)
    db.close()


async def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot use"):
        async with Store(tmp_path / "file" / "store", 1 << 20):
            pass


async def test_an_error_of_the_caller_passes_unchanged(tmp_path):
    with pytest.raises(KeyError):
        async with Store(tmp_path, 1 << 20):
            raise KeyError
    async with Store(tmp_path, 1 << 20) as store:
        assert store.is_writer


@pytest.mark.parametrize(("blobs", "pieces"), [(40, 2500), (5000, 1)])
async def test_a_large_store_opens_fast(tmp_path, blobs, pieces):
    async with Store(tmp_path, 1 << 40) as store:
        pass
    db = sqlite3.connect(tmp_path / "catalog.sqlite")
    starts = array("Q", range(0, pieces * 100, 100)).tobytes()
    for number in range(1, blobs + 1):
        digest = Digest.of(b"%d" % number)
        db.execute(
            "INSERT INTO blobs (id, digest, size, layout, starts, used) VALUES (?,?,?,?,?,?)",
            (number, str(digest), pieces * 100, "toc", starts, float(number)),
        )
        db.executemany(
            "INSERT INTO pieces VALUES (?,?,?,?)", ((number, i, i - 50, 3) for i in range(pieces))
        )
        path = tmp_path / "data" / digest.encoded[:2] / digest.encoded
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    db.commit()
    db.close()
    began = time.perf_counter()
    async with Store(tmp_path, 1 << 40) as store:
        took_s = time.perf_counter() - began
        assert store.stats().held_pieces == blobs * pieces
    assert took_s < 1


# Manifests, tags and facts


async def test_manifests_tags_and_facts_survive_a_restart(tmp_path):
    manifest = Manifest(Digest.of(b"{}"), "application/json", b"{}")
    fact = TagFact(manifest.digest, manifest.media_type, 2, 17.5)
    layer = Descriptor("application/gzip", Digest.of(b"layer"), 5)
    async with Store(tmp_path, 1 << 20) as store:
        await store.memory.put_manifest(manifest)
        await store.memory.put_tag(REPOSITORY, Tag("v1"), fact)
        await store.memory.put_facts(REPOSITORY, layer, Digest.of(b"toc"))
        assert store.used == 2
    async with Store(tmp_path, 1 << 20) as store:
        assert await store.memory.manifest(manifest.digest) == manifest
        assert store.memory.tag(REPOSITORY, Tag("v1")) == fact
        assert list(store.memory.tags()) == [(REPOSITORY, Tag("v1"), fact)]
        facts = store.memory.facts(layer.digest)
        assert facts is not None
        assert (facts.size, facts.toc_digest) == (5, Digest.of(b"toc"))
        assert facts.repositories == (REPOSITORY,)
        assert store.memory.tag(REPOSITORY, Tag("v2")) is None
        assert await store.memory.manifest(layer.digest) is None


async def test_facts_keep_the_newest_few_repositories_and_the_toc(tmp_path):
    layer = Descriptor("application/gzip", Digest.of(b"layer"), 5)
    many = [Repository("docker.io", f"library/{i}") for i in range(12)]
    async with Store(tmp_path, 1 << 20) as store:
        await store.memory.put_facts(many[0], layer, Digest.of(b"toc"))
        for repository in [*many, many[9]]:
            await store.memory.put_facts(repository, layer, None)
        facts = store.memory.facts(layer.digest)
        assert facts is not None
        assert facts.toc_digest == Digest.of(b"toc")
        assert facts.repositories == (many[9], many[11], many[10], *many[8:3:-1])


async def test_manifests_take_a_part_of_the_budget_at_most(tmp_path):
    manifests = [
        Manifest(Digest.of(data), "text/plain", data)
        for data in (bytes([i]) * 1000 for i in range(20))
    ]
    async with Store(tmp_path, 80_000) as store:
        for manifest in manifests:
            await store.memory.put_manifest(manifest)
            await store.memory.manifest(manifests[0].digest)
        assert store.used == 10_000
    async with Store(tmp_path, 80_000) as store:
        kept = [m for m in manifests if await store.memory.manifest(m.digest)]
        assert len(kept) == 10
        assert kept[-1] is manifests[-1]


async def test_a_manifest_that_rotted_is_left_out(tmp_path):
    manifest = Manifest(Digest.of(b"{}"), "application/json", b"{}")
    async with Store(tmp_path, 1 << 20) as store:
        await store.memory.put_manifest(manifest)
    db = sqlite3.connect(tmp_path / "catalog.sqlite")
    db.execute("UPDATE manifests SET data = x'7b7c'")
    db.commit()
    db.close()
    async with Store(tmp_path, 1 << 20) as store:
        assert await store.memory.manifest(manifest.digest) is None


# Children: this file is also the program that they run

_CHILD_ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath}


def _child(role: str, root: Path) -> list[str]:
    return [sys.executable, __file__, role, str(root)]


def _run_child(role: str, root: Path, prefix: list[str] | None = None) -> dict[str, object]:
    done = subprocess.run(
        [*(prefix or []), *_child(role, root)],
        env=_CHILD_ENVIRONMENT,
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    told: dict[str, object] = json.loads(done.stdout)
    return told


async def _hold(root: Path) -> None:
    async with Store(root, 1 << 20) as store:
        await put(store, content(9))
        os.write(1, b"holding\n")
        await asyncio.Event().wait()


async def _limited(root: Path) -> dict[str, object]:
    data = content(1, 40)
    async with Store(root, 1 << 20) as store:
        blob = await put(store, data, pieces=range(2))
        # The catalogue's log stays below this.
        resource.setrlimit(resource.RLIMIT_FSIZE, (30 * PIECE, 30 * PIECE))
        error = await _outcome(blob.write(35, data[:PIECE], HELD))
        right = await blob.read(ByteRange(0, 2 * PIECE)) == data[: 2 * PIECE]
        return {"error": error, "held": list(blob.held), "right": right}


async def _small(root: Path) -> dict[str, object]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(root)]
    await asyncio.to_thread(subprocess.run, mount, check=True)
    told: dict[str, object] = {}
    async with Store(root, 1 << 30) as store:
        last = b""
        for name in range(200):
            data = content(name)
            outcome = await _outcome(put(store, data))
            if outcome == "StoreFull":
                told["filled"] = outcome
                break
            last = data
        told["right_while_full"] = await found(store, last).read(ByteRange(0, len(last))) == last
        # Whether or not the catalogue takes it: the room is there again.
        await store.forget(Digest.of(content(0)))
        await store.forget(Digest.of(content(1)))
        told["evicted"] = not file_of(root, content(0)).exists()
        again = await put(store, content(210, 1))
        told["written_after"] = again.held.is_full
    filler = os.open(root / "filler", os.O_CREAT | os.O_WRONLY)
    try:
        while True:
            os.write(filler, bytes(4096))
    except OSError:
        os.close(filler)
    async with Store(root, 1 << 30) as store:
        told["opened_full"] = True
        data = await found(store, last).read(ByteRange(0, len(last)))
        told["right_reopened"] = data == last
    return told


if __name__ == "__main__":
    role = {"hold": _hold, "limited": _limited, "small": _small}[sys.argv[1]]
    os.write(1, json.dumps(asyncio.run(role(Path(sys.argv[2])))).encode())


async def test_taking_over_with_a_smaller_budget_waits_for_who_is_reading(tmp_path):
    data = content(1)
    first = Store(tmp_path, 1 << 20)
    await first.__aenter__()
    await put(first, data)
    async with Store(tmp_path, len(data) // 2) as second:
        with found(second, data).reading():
            await first.__aexit__(None, None, None)
            async with asyncio.timeout(5):
                await second.until_writer()
            assert found(second, data).held


async def test_a_process_told_to_release_while_it_takes_over_does_not_keep_the_lock(
    tmp_path, monkeypatch
):
    first = Store(tmp_path, 1 << 20)
    await first.__aenter__()
    async with Store(tmp_path, 1 << 20) as second:
        opening, go_on = threading.Event(), threading.Event()
        open_really = second.disk._open_and_repair

        def open_slowly():
            opening.set()
            assert go_on.wait(5)
            return open_really()

        monkeypatch.setattr(second.disk, "_open_and_repair", open_slowly)
        await first.__aexit__(None, None, None)
        assert await asyncio.to_thread(opening.wait, 5)
        second.release_writer()
        go_on.set()
        async with Store(tmp_path, 1 << 20) as third:
            async with asyncio.timeout(5):
                await third.until_writer()
            assert not second.is_writer
