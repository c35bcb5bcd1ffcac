"""p2pcache's reader and writer of lazy layers against the library that the snapshotter uses.

Needs Go. The program beside this file is built once, into the build directory of the end-to-end
tests; Go's own cache makes later runs quick.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2pcache.core.estargz_writer import Entry, EntryType, build_layer
from p2pcache.core.model import Digest
from p2pcache.core.proof import find_flaw
from p2pcache.core.ranges import ByteRange
from p2pcache.core.toc import FOOTER_PROBE_SIZE, Compression, Toc, find_footer, open_tail

SOURCE = Path(__file__).parent / "goreader"
BUILD = Path(__file__).parents[1] / "e2e" / ".build"
PARTS = 4
"""Into how many parts Go cuts a layer that it builds: as many as it thinks there are cores."""

pytestmark = pytest.mark.timeout(400)

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def goreader() -> Run:
    """Run the Go program with the given arguments and return what it printed."""
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is None:
        pytest.fail("Go is not installed")
    version = subprocess.run(
        [go, "env", "GOVERSION"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    found = re.match(r"go(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < (1, 24):
        pytest.fail(f"the library needs Go 1.24, this is {version.strip() or 'older than 1.18'}")
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / "goreader"
    built = subprocess.run(
        [go, "build", "-mod=readonly", "-trimpath", "-o", str(program), "."],
        cwd=SOURCE, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr

    def run(*arguments: str | Path) -> Any:
        command = ["env", f"GOMAXPROCS={PARTS}", str(program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


noise = random.Random(1)
ENTRIES = [
    Entry("etc", type=EntryType.DIRECTORY, mode=0o755, mtime=1_700_000_000),
    Entry("etc/hosts", b"127.0.0.1 localhost\n", uid=1, gid=2),
    Entry("etc/empty"),
    Entry("etc/link", type=EntryType.SYMLINK, link_name="hosts"),
    *(Entry(f"small/{i}", noise.randbytes(i * 7)) for i in range(200)),
    Entry("large", noise.randbytes(250_000) + bytes(150_000)),
    Entry("exact", noise.randbytes(3 * 40_000)),
    Entry("hard", type=EntryType.HARDLINK, link_name="large"),
    Entry("usr/share/" + "long" * 40 + "/ä", b"a name that needs a PAX header"),
]
FILES = {e.name: hashlib.sha256(e.data).hexdigest() for e in ENTRIES if e.type is EntryType.FILE}
FILES["hard"] = FILES["large"]

compressions = pytest.mark.parametrize("compression", list(Compression), ids=lambda c: c.value)
min_chunk_sizes = pytest.mark.parametrize("min_chunk_size", [0, 10_000])


def open_blob(blob: bytes, toc_digest: str) -> Toc:
    """Find and open the TOC as the mirror will: footer, then tail."""
    footer = find_footer(blob[-FOOTER_PROBE_SIZE:], len(blob))
    tail = blob[footer.tail.start :]
    return open_tail(tail, size=len(blob), expected=Digest.parse(toc_digest))


def chunks_of_go(reading: Any, toc: Toc) -> set[tuple[int, int, int, int, str]]:
    """Go lets the last member run on over the tail, to the end of the blob."""
    found = [c for file in reading["files"] for c in file["chunks"]]
    return {
        (
            c["offset"],
            min(c["nextOffset"], toc.toc_offset),
            c["innerOffset"],
            c["size"],
            c["digest"],
        )
        for c in found
    }


def chunks_of(toc: Toc) -> set[tuple[int, int, int, int, str]]:
    return {
        (m.range.start, m.range.stop, c.inner_offset, c.size, str(c.digest))
        for m in toc.members
        for c in m.chunks
    }


def assert_proven(toc: Toc, blob: bytes) -> None:
    layout = toc.layout()
    for i in range(layout.count):
        part = layout.range_of(i)
        assert find_flaw(toc, part, blob[part.start : part.stop]) is None


@compressions
@min_chunk_sizes
@pytest.mark.parametrize("prioritized", [(), ("etc/hosts", "hard")], ids=["plain", "prioritized"])
def test_go_reads_what_we_write(goreader, tmp_path, compression, min_chunk_size, prioritized):
    layer = build_layer(
        ENTRIES,
        compression=compression,
        chunk_size=40_000,
        min_chunk_size=min_chunk_size,
        prioritized=prioritized,
    )
    (tmp_path / "blob").write_bytes(layer.blob)
    reading = goreader("read", "-blob", tmp_path / "blob", "-toc", str(layer.toc_digest))
    # The library's own verifier knows one chunk per member; the snapshotter does not use it.
    assert ("found twice" in reading["verifyTOC"]) == (min_chunk_size > 0)
    landmark = ".prefetch.landmark" if prioritized else ".no.prefetch.landmark"
    expected = FILES | {landmark: hashlib.sha256(b"\x0f").hexdigest()}
    assert {file["name"]: file["sha256"] for file in reading["files"]} == expected
    assert {"etc", "etc/link", "hard"} <= set(reading["names"])
    toc = open_blob(layer.blob, str(layer.toc_digest))
    assert chunks_of(toc) == chunks_of_go(reading, toc)


@pytest.fixture(scope="session")
def plain_tar(tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("tar") / "layer.tar"
    types = {
        EntryType.FILE: tarfile.REGTYPE,
        EntryType.DIRECTORY: tarfile.DIRTYPE,
        EntryType.SYMLINK: tarfile.SYMTYPE,
        EntryType.HARDLINK: tarfile.LNKTYPE,
    }
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for entry in ENTRIES:
            info = tarfile.TarInfo(entry.name)
            info.type, info.linkname, info.size = (
                types[entry.type],
                entry.link_name,
                len(entry.data),
            )
            tar.addfile(info, io.BytesIO(entry.data))
    return path


@compressions
@min_chunk_sizes
@pytest.mark.parametrize("chunk_size", [0, 5_000], ids=["default", "small-chunks"])
@pytest.mark.parametrize("prioritized", ["", "etc/hosts,hard"], ids=["plain", "prioritized"])
def test_we_prove_what_go_writes(
    goreader, tmp_path, plain_tar, compression, min_chunk_size, chunk_size, prioritized
):
    written = goreader(
        "write",
        *("-tar", plain_tar, "-blob", tmp_path / "blob", "-prioritized", prioritized),
        *("-chunk-size", str(chunk_size), "-min-chunk-size", str(min_chunk_size)),
        *(["-zstd"] if compression is Compression.ZSTD else []),
    )
    blob = (tmp_path / "blob").read_bytes()
    toc = open_blob(blob, written["tocDigest"])
    assert toc.compression is compression
    assert_proven(toc, blob)
    reading = goreader("read", "-blob", tmp_path / "blob", "-toc", written["tocDigest"])
    assert chunks_of(toc) == chunks_of_go(reading, toc)


def test_go_leaves_members_out_of_the_toc_when_it_builds_in_parallel(goreader, tmp_path, plain_tar):
    """What the proof has to put up with is really there: more than one member in a range."""
    written = goreader("write", "-tar", plain_tar, "-blob", tmp_path / "blob")
    blob = (tmp_path / "blob").read_bytes()
    toc = open_blob(blob, written["tocDigest"])
    streams = [_count_gzip_members(blob[m.range.start : m.range.stop]) for m in toc.members]
    assert max(streams) > 1
    assert_proven(toc, blob)


def _count_gzip_members(data: bytes) -> int:
    count = 0
    while data:
        inflater = zlib.decompressobj(31)
        inflater.decompress(data)
        data = inflater.unused_data
        count += 1
    return count


@compressions
def test_go_reads_whatever_the_proof_lets_pass(goreader, tmp_path, compression):
    """Decoders differ, and a lazy client keeps what it could not read: ours must be the stricter.

    Damages what no digest covers: headers of streams, checksums, padding, the tail.
    """
    layer = build_layer(
        [Entry("a", b"hello " * 50), Entry("b", noise.randbytes(700)), Entry("c", b"x" * 3000)],
        compression=compression,
        chunk_size=900,
    )
    toc = open_blob(layer.blob, str(layer.toc_digest))
    layout = toc.layout()
    chance = random.Random(2)
    let_pass = 0
    for _ in range(600):
        start = chance.choice([*toc.members]).range.start
        at = chance.choice([start + chance.randrange(14), chance.randrange(toc.size)])
        damaged = bytearray(layer.blob)
        damaged[at] ^= 1 << chance.randrange(8)
        part = layout.range_of(layout.covering(ByteRange(at, at + 1))[0])
        if find_flaw(toc, part, damaged[part.start : part.stop]) is None:
            let_pass += 1
            (tmp_path / "blob").write_bytes(damaged)
            goreader("read", "-blob", tmp_path / "blob", "-toc", str(layer.toc_digest))
    assert let_pass > 10
