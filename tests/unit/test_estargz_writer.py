"""The writer: its layers are tars, are read back whole, and are the same every time."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcache.core.estargz_writer import BuiltLayer, Entry, EntryType, build_layer
from p2pcache.core.model import Digest
from p2pcache.core.proof import find_flaw
from p2pcache.core.toc import Compression, Toc, find_footer, open_tail, read_tail

fast = settings(max_examples=30, deadline=None)

names = st.text("abcdefgäß", min_size=1, max_size=120)
options = st.fixed_dictionaries(
    {
        "compression": st.sampled_from(Compression),
        "chunk_size": st.sampled_from([1, 700, 4 << 20]),
        "min_chunk_size": st.sampled_from([0, 1, 300, 50_000]),
    }
)


def unpack(layer: BuiltLayer) -> bytes:
    if layer.compression is Compression.GZIP:
        return gzip.decompress(layer.blob)
    reader = zstandard.ZstdDecompressor().stream_reader(layer.blob, read_across_frames=True)
    return reader.read()


def members(layer: BuiltLayer) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(unpack(layer))) as tar:
        return {info.name: (info, _content(tar, info)) for info in tar}


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info) if info.isreg() else None
    return file.read() if file else b""


def toc_of(layer: BuiltLayer) -> Toc:
    footer = find_footer(layer.blob, len(layer.blob))
    tail = layer.blob[footer.tail.start :]
    return open_tail(tail, size=len(layer.blob), expected=layer.toc_digest)


@fast
@given(st.dictionaries(names, st.binary(max_size=60), max_size=6), options, st.data())
def test_what_is_written_is_read_back_and_proven(files, options, data):
    prioritized = data.draw(
        st.lists(st.sampled_from(sorted(files)), max_size=2) if files else st.just([])
    )
    entries = [Entry(name, content) for name, content in files.items()]
    layer = build_layer(entries, prioritized=prioritized, **options)
    assert layer == build_layer(entries, prioritized=prioritized, **options)
    found = members(layer)
    for name, content in files.items():
        assert found[name][1] == content
    toc = toc_of(layer)
    layout = toc.layout()
    for i in range(layout.count):
        part = layout.range_of(i)
        assert find_flaw(toc, part, layer.blob[part.start : part.stop]) is None
    digests = {c.digest for m in toc.members for c in m.chunks}
    size = options["chunk_size"]
    for content in files.values():
        for i in range(0, len(content), size):
            assert Digest.of(content[i : i + size]) in digests


@pytest.mark.parametrize("compression", Compression)
def test_digests_are_those_of_the_bytes(compression):
    layer = build_layer([Entry("a", b"hello" * 100)], compression=compression)
    tar = unpack(layer)
    assert layer.digest == Digest.of(layer.blob)
    assert layer.diff_id == Digest.of(tar)
    assert layer.uncompressed_size == len(tar)
    footer = find_footer(layer.blob, len(layer.blob))
    assert layer.toc_digest == Digest.of(
        read_tail(layer.blob[footer.tail.start :], len(layer.blob))[1]
    )
    assert layer.annotations == {
        "containerd.io/snapshot/stargz/toc.digest": str(layer.toc_digest),
        "io.containers.estargz.uncompressed-size": str(len(tar)),
    }


def test_every_kind_of_entry_is_in_the_tar_with_its_attributes():
    layer = build_layer(
        [
            Entry("etc", type=EntryType.DIRECTORY, mode=0o755, mtime=1_700_000_000),
            Entry("etc/hosts", b"127.0.0.1", uid=7, gid=8, mode=0o4600),
            Entry("etc/link", type=EntryType.SYMLINK, link_name="hosts"),
            Entry("etc/hard", type=EntryType.HARDLINK, link_name="etc/hosts"),
        ]
    )
    found = {name: info for name, (info, _) in members(layer).items()}
    assert found["etc"].isdir()
    assert found["etc"].mtime == 1_700_000_000
    hosts = found["etc/hosts"]
    assert (hosts.uid, hosts.gid, hosts.mode) == (7, 8, 0o4600)
    assert found["etc/link"].issym()
    assert found["etc/link"].linkname == "hosts"
    assert found["etc/hard"].islnk()
    footer = find_footer(layer.blob, len(layer.blob))
    document = read_tail(layer.blob[footer.tail.start :], len(layer.blob))[1]
    assert b'"modtime": "2023-11-14T22:13:20Z"' in document


def test_prioritized_files_come_first_with_what_they_need_and_then_the_landmark():
    entries = [
        Entry("a", b"a"),
        Entry("lib", type=EntryType.DIRECTORY),
        Entry("lib/target", b"t"),
        Entry("bin", type=EntryType.DIRECTORY),
        Entry("bin/tool", type=EntryType.HARDLINK, link_name="lib/target"),
    ]
    layer = build_layer(entries, prioritized=["/bin/tool", "bin/tool"])
    assert list(members(layer))[:6] == [
        "bin", "lib", "lib/target", "bin/tool", ".prefetch.landmark", "a",
    ]  # fmt: skip


def test_the_landmark_starts_a_member_even_when_members_are_shared():
    layer = build_layer(
        [Entry("a", b"a"), Entry("b", b"b")], min_chunk_size=10_000, prioritized=["a"]
    )
    found = toc_of(layer).members
    assert [len(m.chunks) for m in found] == [1, 2]
    assert found[1].chunks[0].digest == Digest.of(b"\x0f")


def test_members_are_shared_until_they_are_large_enough():
    data = hashlib.shake_128(b"").digest(40_000)
    layer = build_layer([Entry("a", data)], chunk_size=1000, min_chunk_size=5000)
    sizes = [len(m.range) for m in toc_of(layer).members]
    assert all(5000 <= size < 7000 for size in sizes[:-1])


@pytest.mark.parametrize(
    ("entries", "more", "why"),
    [
        ([Entry("a"), Entry("/a")], {}, "twice"),
        ([Entry("a", b"x", EntryType.SYMLINK)], {}, "no file, but has data"),
        ([Entry("a", type=EntryType.HARDLINK, link_name="a")], {}, "a hard link to no file"),
        ([Entry("a", type=EntryType.HARDLINK, link_name="b")], {}, "a hard link to no file"),
        ([], {"prioritized": ["a"]}, "to prioritize"),
        ([], {"chunk_size": 0}, "not a chunk size"),
        ([], {"min_chunk_size": -1}, "not a chunk size"),
    ],
)
def test_what_makes_no_layer_is_refused(entries, more, why):
    with pytest.raises(ValueError, match=why):
        build_layer(entries, **more)
