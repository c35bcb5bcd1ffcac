"""containerd's content store as a source of whole blobs: what is found, believed, and let go of."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from p2pcache.content import Content, ContentBlob, Overlay
from p2pcache.content import files as content_files
from p2pcache.content import folder as content_folder
from p2pcache.content.files import FileState, Proof
from p2pcache.content.record import Record
from p2pcache.core.errors import StoreCorrupt, StoreFull, StoreLacksPiece
from p2pcache.core.layout import Layout, LayoutKind, PieceMask, PieceState
from p2pcache.core.model import Digest
from p2pcache.core.ranges import ByteRange
from p2pcache.store import Store

MIB = 1 << 20
HELD = PieceState.HELD_UPSTREAM
NEVER_S = 3600.0
"""So seldom is the folder listed, and so slowly is proven what nobody asks for, that no test waits
for it: what it sees came by another way."""


def some_bytes(seed: int, size: int = 3 * MIB + 5) -> bytes:
    return random.Random(seed).randbytes(size)


def file_of(root: Path, data: bytes) -> Path:
    return root / "blobs/sha256" / Digest.of(data).encoded


def arrive(root: Path, data: bytes, *, name: bytes | None = None) -> Path:
    """Do as containerd does: write aside, rename, set the time, take the right to write away."""
    target = file_of(root, data if name is None else name)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = root / "ingest" / f"{random.random()}" / "data"
    aside.parent.mkdir(parents=True)
    aside.write_bytes(data)
    aside.rename(target)
    os.utime(target)
    target.chmod(0o444)
    return target


def spoil(path: Path, offset: int) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A content and what it has told so far."""

    def __init__(self, content: Content) -> None:
        self.content = content
        self.told: list[tuple[Digest, int, bool]] = []
        self._news = asyncio.Event()
        content.on_change = self._note

    def _note(self, digest: Digest, size: int, is_added: bool) -> None:
        self.told.append((digest, size, is_added))
        self._news.set()

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not is_so():
                await self._news.wait()
                self._news.clear()

    async def found(self, data: bytes) -> ContentBlob:
        """Wait until a blob is found, without asking for it."""
        digest = Digest.of(data)
        known = self.content._blobs
        await self.until(lambda: digest in known)
        return known[digest]

    async def lost(self, data: bytes) -> None:
        digest = Digest.of(data)
        await self.until(lambda: digest not in self.content._blobs)
        assert self.content.find(digest) is None


@asynccontextmanager
async def opened(root: Path, **options) -> AsyncIterator[Watched]:
    options = {"rescan_s": NEVER_S, "idle_bytes_per_s": MIB / NEVER_S} | options
    content = Content(root, root.with_name("record"), **options)
    watched = Watched(content)
    async with content:
        async with asyncio.timeout(20):
            await content.until_listed()
        yield watched


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "io.containerd.content.v1.content"
    (root / "blobs/sha256").mkdir(parents=True)
    (root / "ingest").mkdir()
    return root


def events(caplog) -> list[str]:
    return [record.msg for record in caplog.records if record.levelno >= logging.WARNING]


# What a blob is


async def test_a_blob_that_arrives_is_found_whole_and_read_from_where_it_is(root):
    data = some_bytes(1)
    async with opened(root) as watched:
        assert watched.content.find(Digest.of(data)) is None
        path = arrive(root, data)
        blob = await watched.found(data)
        assert watched.told == [(blob.digest, len(data), True)]
        assert watched.content.find(blob.digest) is blob
        assert watched.content.blobs() == [blob]
        assert (watched.content.blob_count, watched.content.size) == (1, len(data))
        assert blob.is_whole
        assert blob.is_complete
        assert blob.layout == Layout.fixed(len(data))
        assert blob.toc_digest is None
        assert blob.held.is_full
        assert blob.pieces_in(PieceState.STAGED_PEER, PieceState.HELD_PEER) == PieceMask(4)
        assert blob.pieces_in(*PieceState).is_full
        assert blob.state_of(3) is HELD
        assert "whole" in repr(blob)
        assert blob.read_held_now(0, 10) is None, "not checked in this process"
        assert await blob.read(ByteRange(0, len(data))) == data
        assert blob.read_held_now(MIB - 7, MIB + 9) == data[MIB - 7 : MIB + 9]
        assert blob.read_held_now(0, 2 * MIB) is None, "too much for the event loop"
        descriptor = blob.file_held_now(5, len(data))
        assert descriptor is not None
        assert os.pread(descriptor, 100, 5) == data[5:105]
        assert os.fstat(descriptor).st_ino == path.stat().st_ino
        await blob.write(0, b"", HELD)
        assert await blob.confirm_whole()
        await blob.hash_ahead()
        await blob.drop([])
        assert watched.content.find(blob.digest) is blob
    assert path.read_bytes() == data


async def test_hashes_are_those_that_other_stores_keep(root, tmp_path):
    data = some_bytes(1)
    arrive(root, data)
    async with opened(root) as watched, Store(tmp_path / "store", 1 << 30) as store:
        theirs = await watched.content.settle(Digest.of(data))
        assert theirs is not None
        ours = await store.create(theirs.digest, theirs.layout)
        for piece in range(4):
            part = ours.layout.range_of(piece)
            await ours.write(piece, data[part.start : part.stop], PieceState.STAGED_PEER)
            assert theirs.hash_of(piece) == ours.hash_of(piece)


async def test_only_finished_blobs_with_proper_names_are_seen(root, tmp_path):
    data = some_bytes(1, 1000)
    folder = root / "blobs/sha256"
    (root / "ingest/1").mkdir()
    (root / "ingest/1/data").write_bytes(data)
    (folder / "notes.txt").write_bytes(data)
    (folder / Digest.of(b"folder").encoded).mkdir()
    (folder / Digest.of(b"").encoded).touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(data)
    (folder / Digest.of(data).encoded).symlink_to(elsewhere)
    os.mkfifo(folder / Digest.of(b"pipe").encoded)
    last = some_bytes(2, 1000)
    async with opened(root) as watched:
        assert watched.content.unproven_count == 0
        (folder / "more.txt").write_bytes(data)
        arrive(root, last)
        await watched.found(last)
        assert len(watched.told) == 1


@pytest.mark.parametrize("fails", ["cold", "unsupported", "broken"])
async def test_a_read_that_would_wait_is_left_to_a_thread(root, monkeypatch, fails):
    data = some_bytes(1)
    arrive(root, data)
    preadv = os.preadv

    def failing(descriptor, buffers, offset, flags=0):
        if flags and fails == "cold":
            raise BlockingIOError
        if flags:
            raise OSError(errno.EIO if fails == "broken" else errno.EOPNOTSUPP, "no")
        return preadv(descriptor, buffers, offset, flags)

    async with opened(root) as watched:
        blob = await watched.content.settle(Digest.of(data))
        assert blob is not None
        await blob.read(ByteRange(0, len(data)))
        monkeypatch.setattr(os, "preadv", failing)
        assert blob.file_held_now(0, MIB) is None
        now = blob.read_held_now(100, 200)
        assert now == (data[100:200] if fails == "unsupported" else None)
        assert await blob.read(ByteRange(100, 200)) == data[100:200]


async def test_reads_in_small_steps_come_together(root, monkeypatch):
    # A network file system may return less than was asked for.
    data = some_bytes(1)
    arrive(root, data)
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, at, flags=0: preadv(fd, [buffers[0][:65_537]], at, flags)
    )
    async with opened(root) as watched:
        blob = await watched.content.settle(Digest.of(data))
        assert blob is not None
        assert await blob.read(ByteRange(0, len(data))) == data


# What is believed


async def test_a_file_with_other_bytes_than_its_name_says_is_never_held(root, caplog):
    data = some_bytes(1)
    wrong = data[:-1] + b"!"
    arrive(root, wrong, name=data)
    async with opened(root) as watched:
        assert await watched.content.settle(Digest.of(data)) is None
        assert watched.content.unproven_count == 0
        assert watched.content.find(Digest.of(data)) is None
        assert events(caplog) == ["content.mismatch"]
        arrive(root, data)
        assert (await watched.found(data)).is_whole
    assert not [told for told in watched.told if not told[2]]


async def test_a_file_that_changes_while_it_is_proven_is_not_held(root, monkeypatch):
    data = some_bytes(1)
    path = arrive(root, data)
    prove = content_files.prove
    provings: list[FileState] = []

    def meddling(where, digest, state, pause):
        def pause_and_meddle(count):
            if not provings:
                provings.append(state)
                spoil(path, 10)
            return pause(count)

        return prove(where, digest, state, pause_and_meddle)

    monkeypatch.setattr("p2pcache.content.content.prove", meddling)
    async with opened(root) as watched:
        digest = Digest.of(data)
        async with asyncio.timeout(20):
            while watched.content.unproven_count:
                assert await watched.content.settle(digest) is None
        assert watched.content.find(digest) is None
    assert not watched.told


async def test_a_file_written_to_in_place_stops_being_held_at_once(root):
    data, clock = some_bytes(1), Clock()
    path = arrive(root, data)
    async with opened(root, clock=clock) as watched:
        blob = await watched.content.settle(Digest.of(data))
        assert blob is not None
        await blob.read(ByteRange(0, len(data)))
        spoil(path, 100)
        # Before any news can have come, but a second later: it is looked at.
        clock.now += 1.1
        assert blob.read_held_now(0, 1000) is None
        assert blob.is_gone
        assert blob.file_held_now(0, 1000) is None
        assert watched.content.find(blob.digest) is None
        assert watched.told[-1] == (blob.digest, len(data), False)
        assert not blob.held
        assert blob.state_of(0) is PieceState.ABSENT
        with pytest.raises(StoreLacksPiece):
            await blob.read(ByteRange(0, 10))
        with pytest.raises(StoreLacksPiece):
            await blob.confirm_whole()
        with pytest.raises(StoreFull):
            await blob.write(0, data[:MIB], HELD)


async def test_news_of_a_write_in_place_take_the_blob_out_of_use(root):
    data = some_bytes(1)
    path = arrive(root, data)
    async with opened(root) as watched:
        blob = await watched.content.settle(Digest.of(data))
        assert blob is not None
        spoil(path, 100)
        await watched.lost(data)
        assert blob.is_gone


async def test_a_read_notices_that_the_file_was_written_to(root):
    data = some_bytes(1)
    path = arrive(root, data)
    async with opened(root) as watched:
        blob = await watched.content.settle(Digest.of(data))
        assert blob is not None
        spoil(path, len(data) - 1)
        with pytest.raises(StoreLacksPiece):
            await blob.read(ByteRange(0, 10))
        assert blob.is_gone


async def forge_rot(root: Path, data: bytes, offset: int) -> None:
    """Spoil a byte as a disk does: no time in the file's state tells."""
    path = file_of(root, data)
    async with opened(root) as watched:
        blob = await watched.content.settle(Digest.of(data))
        assert blob is not None
        hashes = blob.proof.hashes
    spoil(path, offset)
    record = Record(root.with_name("record"))
    record.put(Digest.of(data), Proof(FileState.of(path.stat()), hashes))
    await asyncio.to_thread(record.save, record.snapshot())


async def test_rot_takes_the_file_out_of_use_until_it_changes(root, caplog):
    data = some_bytes(1)
    arrive(root, data)
    await forge_rot(root, data, MIB + 5)
    async with opened(root) as watched:
        blob = watched.content.find(Digest.of(data))
        assert blob is not None
        assert await blob.read(ByteRange(0, 10)) == data[:10], "another piece"
        with pytest.raises(StoreCorrupt) as caught:
            await blob.read(ByteRange(MIB - 5, MIB + 4))
        assert caught.value.piece == 1
        assert events(caplog) == ["content.rot"]
        assert watched.content.find(blob.digest) is None
        assert blob.is_gone
        assert watched.content.unproven_count == 0
        arrive(root, data)
        again = await watched.found(data)
        assert await again.read(ByteRange(0, len(data))) == data
    async with opened(root) as watched:
        assert watched.content.find(Digest.of(data)) is not None


async def test_rot_is_not_believed_again_after_a_restart(root):
    data = some_bytes(1)
    arrive(root, data)
    await forge_rot(root, data, 5)
    async with opened(root) as watched:
        blob = watched.content.find(Digest.of(data))
        assert blob is not None
        await blob.drop([0])
    async with opened(root) as watched:
        assert await watched.content.settle(Digest.of(data)) is None


async def test_a_dead_block_is_as_good_as_rot(root, monkeypatch):
    data = some_bytes(1)
    arrive(root, data)
    async with opened(root) as watched:
        blob = await watched.content.settle(Digest.of(data))
        assert blob is not None

        def dead(*arguments):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", dead)
        with pytest.raises(StoreCorrupt):
            await blob.read(ByteRange(0, 10))
        assert watched.content.find(blob.digest) is None


# What comes and goes


async def test_a_blob_that_is_removed_is_read_on_by_those_who_have_begun(root):
    data = some_bytes(1)
    path = arrive(root, data)
    async with opened(root) as watched:
        blob = await watched.content.settle(Digest.of(data))
        assert blob is not None
        with blob.reading():
            await blob.read(ByteRange(0, MIB))
            path.unlink()
            await watched.lost(data)
            assert blob.is_whole
            assert await blob.read(ByteRange(MIB, len(data))) == data[MIB:]
            assert blob.read_held_now(10, 20) == data[10:20]
        assert blob.is_gone
        await at_most_open(0, root)  # a removed file takes room as long as it is open
    assert watched.content.size == 0


async def test_a_blob_that_is_removed_before_it_was_read_is_gone(root):
    data = some_bytes(1)
    path = arrive(root, data)
    async with opened(root) as watched:
        blob = await watched.content.settle(Digest.of(data))
        assert blob is not None
        path.unlink()
        with pytest.raises(StoreLacksPiece):
            await blob.read(ByteRange(0, 10))
        assert watched.content.find(blob.digest) is None
        arrive(root, data)
        again = await watched.found(data)
        assert again is not blob


async def test_another_file_of_the_same_name_must_be_proven_anew(root):
    data = some_bytes(1)
    arrive(root, data)
    async with opened(root) as watched:
        blob = await watched.content.settle(Digest.of(data))
        assert blob is not None
        arrive(root, data[:-1] + b"?", name=data)
        await watched.lost(data)
        arrive(root, data)
        again = await watched.found(data)
        assert again is not blob
        assert await again.read(ByteRange(0, len(data))) == data


async def test_the_folder_may_appear_late_vanish_and_be_replaced(tmp_path):
    data, other = some_bytes(1), some_bytes(2)
    root = tmp_path / "var/lib/content"
    async with opened(root, idle_bytes_per_s=1e12) as watched:
        arrive(root, data)
        first = await watched.found(data)
        (tmp_path / "var").rename(tmp_path / "away")
        # No news come of a folder far above; but what is found there no more is noticed.
        with pytest.raises(StoreLacksPiece):
            await first.read(ByteRange(0, 10))
        (tmp_path / "away").rename(tmp_path / "var")
        root.rename(root.with_name("old"))
        arrive(root, other)
        assert (await watched.found(other)).is_whole
        await watched.lost(data)


async def test_a_listing_finds_what_no_news_told_of(root, monkeypatch, caplog):
    data = some_bytes(1, 1000)

    def none_left(*arguments, **options):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(content_folder, "Inotify", none_left)
    async with opened(root, rescan_s=0.01, idle_bytes_per_s=1e12) as watched:
        path = arrive(root, data)
        await watched.found(data)
        path.unlink()
        await watched.lost(data)
    assert events(caplog) == ["content.unwatched"]


async def test_a_listing_comes_even_while_news_are_heard(root, monkeypatch):
    data = some_bytes(1, 1000)
    monkeypatch.setattr(content_folder.News, "_note", lambda news, event: None)
    async with opened(root, rescan_s=0.01, idle_bytes_per_s=1e12) as watched:
        arrive(root, data)
        await watched.found(data)


async def test_a_folder_that_may_not_be_read_is_told_once(root, monkeypatch, caplog):
    data = some_bytes(1, 1000)
    arrive(root, data)
    scandir = os.scandir
    denied = [True] * 5

    def deny(path):
        if denied and denied.pop():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    async with opened(root, rescan_s=0.01, idle_bytes_per_s=1e12) as watched:
        await watched.found(data)
    assert events(caplog) == ["content.unreadable"]
    assert "read-only" in caplog.records[-1].hint


async def test_a_file_that_may_not_be_read_is_told_once_and_tried_again_when_it_changes(
    root, monkeypatch, caplog
):
    data = some_bytes(1, 1000)
    path = arrive(root, data)
    denied = [True]
    open_file = os.open

    def deny(where, flags, *mode):
        if denied[0] and str(where) == str(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_file(where, flags, *mode)

    monkeypatch.setattr(os, "open", deny)
    async with opened(root) as watched:
        assert await watched.content.settle(Digest.of(data)) is None
        assert watched.content.unproven_count == 0
        assert events(caplog) == ["content.file.unreadable"]
        denied[0] = False
        path.chmod(0o644)
        await watched.found(data)


# In what order, and how much


async def test_what_is_asked_for_is_proven_before_all_else(root):
    blobs = [some_bytes(seed, 5 * MIB) for seed in range(4)]
    for data in blobs:
        arrive(root, data)
    async with opened(root) as watched:
        digest = Digest.of(blobs[0])
        assert watched.content.find(digest) is None
        assert await watched.content.settle(digest) is None, "too large to wait for"
        await watched.found(blobs[0])
        assert watched.content.find(digest) is not None
        assert watched.content.unproven_count == 3
        # Also the one whose slow proof has begun.
        for data in blobs[1:]:
            watched.content.find(Digest.of(data))
        await watched.until(lambda: watched.content.blob_count == 4)


async def test_what_nobody_asks_for_is_proven_too_the_newest_first(root):
    blobs = [some_bytes(seed, 1000) for seed in range(6)]
    for age, data in enumerate(blobs):
        path = arrive(root, data)
        os.utime(path, (1e9 - age, 1e9 - age))
    async with opened(root, idle_bytes_per_s=1e12) as watched:
        await watched.until(lambda: watched.content.blob_count == 6)
    assert [told[0] for told in watched.told] == [Digest.of(data) for data in blobs]


async def test_a_missing_blob_is_not_waited_for(root):
    async with opened(root) as watched:
        assert await watched.content.settle(Digest.of(b"nowhere")) is None


async def test_thousands_of_blobs_are_found_without_holding_up_the_loop(root):
    folder = root / "blobs/sha256"
    blobs = [b"%d" % number for number in range(5000)]
    for data in blobs:
        (folder / Digest.of(data).encoded).write_bytes(data)
    late = [b"late %d" % number for number in range(1000)]
    async with opened(root, idle_bytes_per_s=1e12) as watched:
        content = watched.content
        await watched.until(lambda: content.blob_count == len(blobs))
        for data in late:
            arrive(root, data)
        await watched.until(lambda: content.blob_count == len(blobs) + len(late))
        digest = Digest.of(blobs[7])
        began = time.perf_counter()
        for _ in range(10_000):
            content.find(digest)
        assert time.perf_counter() - began < 1.0
    async with opened(root) as watched:
        assert watched.content.blob_count == len(blobs) + len(late)


async def test_more_news_than_can_be_kept_lead_to_a_new_listing(root, monkeypatch):
    monkeypatch.setattr(content_folder, "_MAX_NEWS", 10)
    blobs = [b"%d" % number for number in range(50)]
    async with opened(root, idle_bytes_per_s=1e12) as watched:
        for data in blobs:
            arrive(root, data)
        await watched.until(lambda: watched.content.blob_count == 50)


async def test_no_more_files_are_listed_than_memory_can_bear(root, monkeypatch, caplog):
    monkeypatch.setattr(content_folder, "_MAX_LISTED", 3)
    for number in range(5):
        arrive(root, b"%d" % number)
    async with opened(root) as watched:
        assert watched.content.unproven_count == 3
    assert events(caplog) == ["content.too_many"]


def open_files(root: Path) -> list[str]:
    links = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if link.is_symlink()]
    return [target for target in targets if target.startswith(str(root / "blobs/sha256/"))]


async def at_most_open(count: int, root: Path) -> None:
    """A thread lets go of what it read from just after those who wait hear of it."""
    async with asyncio.timeout(20):
        while len(open_files(root)) > count:
            await asyncio.to_thread(os.sched_yield)


async def test_descriptors_are_few_and_all_closed_at_the_end(root):
    blobs = [some_bytes(seed, 1000) for seed in range(20)]
    for data in blobs:
        arrive(root, data)
    async with opened(root, max_open_files=4, idle_bytes_per_s=1e12) as watched:
        await watched.until(lambda: watched.content.blob_count == 20)
        for data in blobs * 2:
            blob = await watched.content.settle(Digest.of(data))
            assert blob is not None
            assert await blob.read(ByteRange(0, 1000)) == data
            await at_most_open(4, root)
        assert open_files(root)
    await at_most_open(0, root)


async def test_a_file_opened_again_is_looked_at_before_it_is_used(root):
    data = some_bytes(1, 1000)
    path = arrive(root, data)
    async with opened(root, clock=Clock()) as watched:
        blob = await watched.content.settle(Digest.of(data))
        assert blob is not None
        await blob.read(ByteRange(0, 1000))
        blob.close_file()
        spoil(path, 5)
        assert blob.read_held_now(0, 10) is None
        with pytest.raises(StoreLacksPiece):
            await blob.read(ByteRange(0, 1000))


# Over restarts


async def test_what_was_proven_is_found_after_a_restart_without_hashing(root, monkeypatch):
    blobs = [some_bytes(seed, 1000) for seed in range(3)]
    for data in blobs:
        arrive(root, data)
    async with opened(root, idle_bytes_per_s=1e12) as watched:
        await watched.until(lambda: watched.content.blob_count == 3)
    spoil(file_of(root, blobs[2]), 5)
    monkeypatch.setattr("p2pcache.content.content.prove", None)
    async with opened(root) as watched:
        assert watched.content.find(Digest.of(blobs[2])) is None
        for data in blobs[:2]:
            blob = watched.content.find(Digest.of(data))
            assert blob is not None
            assert blob.read_held_now(0, 10) is None, "not checked in this process"
            assert await blob.read(ByteRange(0, 1000)) == data


@pytest.mark.parametrize("damage", ["flip", "cut", "garbage", "folder"])
async def test_a_record_of_no_use_means_proving_again(root, caplog, damage):
    data = some_bytes(1, 1000)
    arrive(root, data)
    async with opened(root) as watched:
        assert await watched.content.settle(Digest.of(data))
    record = root.with_name("record")
    assert record.stat().st_mode & 0o777 == 0o600
    kept = record.read_bytes()
    if damage == "flip":
        record.write_bytes(kept[:20] + bytes([kept[20] ^ 1]) + kept[21:])
    elif damage == "cut":
        record.write_bytes(kept[:-1])
    elif damage == "garbage":
        record.write_bytes(b"\0" * 100)
    else:
        record.unlink()
        record.mkdir()
    async with opened(root) as watched:
        assert watched.content.find(Digest.of(data)) is None
        assert await watched.content.settle(Digest.of(data))
    unsaved = ["content.record.unsaved"] if damage == "folder" else []
    assert events(caplog) == ["content.record.unusable", *unsaved]


def test_a_record_forgets_the_oldest_beyond_its_bounds(tmp_path):
    blob = some_bytes(1, 10)
    path = tmp_path / "blob"
    path.write_bytes(blob)
    state = FileState.of(path.stat())
    proof = content_files.prove(str(path), Digest.of(blob), state, lambda count: True)
    assert proof is not None
    for limits in ({"max_proofs": 2}, {"max_hashes": 2}):
        record = Record(tmp_path / "record", **limits)
        for name in (b"a", b"b", b"c"):
            record.put(Digest.of(name), proof)
        record.put(Digest.of(b"c"), proof)
        assert len(record) == 2
        assert record.proof_of(Digest.of(b"a"), state) is None
        assert record.proof_of(Digest.of(b"c"), state) == proof
        record.save(record.snapshot())
        assert [digest for digest, _ in record.load()] == [Digest.of(b"b"), Digest.of(b"c")]


# Laid over the store


async def keep(store: Store, data: bytes) -> None:
    digest = Digest.of(data)
    blob = await store.create(digest, Layout.fixed(len(data)))
    for piece in range(blob.layout.count):
        part = blob.layout.range_of(piece)
        await blob.write(piece, data[part.start : part.stop], PieceState.STAGED_UPSTREAM)
    assert await blob.confirm_whole()


async def test_the_overlay_finds_in_both_and_makes_in_the_store(root, tmp_path):
    theirs, ours, fresh = (some_bytes(seed) for seed in range(3))
    arrive(root, theirs)
    async with opened(root) as watched, Store(tmp_path / "store", 1 << 30) as store:
        overlay = Overlay(store, watched.content)
        await keep(store, ours)
        fixed = Layout.fixed(len(theirs))
        # Asked for, not proven yet, and small: worth a moment.
        there = await overlay.create(Digest.of(theirs), fixed)
        assert isinstance(there, ContentBlob)
        assert overlay.find(Digest.of(theirs)) is there
        assert store.find(Digest.of(theirs)) is None
        assert overlay.find(Digest.of(ours)) is store.find(Digest.of(ours))
        assert overlay.find(Digest.of(fresh)) is None
        made = await overlay.create(Digest.of(fresh), Layout.fixed(len(fresh)))
        assert made is store.find(Digest.of(fresh))
        await overlay.forget(Digest.of(fresh))
        await overlay.forget(Digest.of(theirs))
        assert overlay.find(Digest.of(fresh)) is None
        assert overlay.find(Digest.of(theirs)) is there
        assert store.used == len(ours)


async def test_who_expects_another_layout_gets_a_blob_of_that_layout(root, tmp_path):
    data = some_bytes(1)
    arrive(root, data)
    toc = Layout(LayoutKind.TOC, len(data), [0, 500, 2 * MIB])
    async with opened(root) as watched, Store(tmp_path / "store", 1 << 30) as store:
        overlay = Overlay(store, watched.content)
        there = await watched.content.settle(Digest.of(data))
        made = await overlay.create(Digest.of(data), toc, toc_digest=Digest.of(b"toc"))
        assert made.layout.kind is LayoutKind.TOC
        found = overlay.find(Digest.of(data))
        assert isinstance(found, ContentBlob)
        assert found is there
        wrong_size = await overlay.create(Digest.of(data), Layout.fixed(17))
        assert wrong_size.layout.size == 17


async def test_a_copy_of_our_own_goes_when_containerd_has_kept_the_blob_for_long(root, tmp_path):
    data, clock = some_bytes(1), Clock()
    arrive(root, data)
    async with (
        opened(root, clock=clock) as watched,
        Store(tmp_path / "store", 1 << 30) as store,
        Overlay(store, watched.content) as overlay,
    ):
        await keep(store, data)
        assert await watched.content.settle(Digest.of(data))
        assert await overlay.tidy() == 0, "containerd may throw it away when it is unpacked"
        clock.now += 601
        copy = store.find(Digest.of(data))
        assert copy is not None
        with copy.reading():
            assert await overlay.tidy() == 0
        assert await overlay.tidy() == 1
        assert store.find(Digest.of(data)) is None
        assert store.used == 0
        assert await overlay.tidy() == 0
        await keep(store, data)
        store.release_writer()
        assert await overlay.tidy() == 0, "another process writes the store now"
