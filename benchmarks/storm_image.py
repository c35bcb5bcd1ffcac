"""The images of the storm, kept between runs, and exactly what a client asks of them.

Hides how an image is made and how a snapshotter's requests follow from it. The rule: a client needs
no parser of any image format. It is given the requests, and the bytes to compare the answers with.

*lazy*: three eStargz layers of this machine's own files, some 300 MB, of which a start touches some
20 MB: the footer and the table of contents of each layer, all up to the landmark, then files in
blocks of 50,000 bytes, one after the other. *plain*: layers of random bytes, read whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Final

from p2pcache.core.estargz_writer import BuiltLayer, Entry, EntryType, build_layer
from p2pcache.core.model import Digest
from p2pcache.core.ranges import ByteRange
from p2pcache.demo.replay import FOOTER_SIZE, MAX_PEEK, Blocks, Toc, find_toc, parse_toc
from tests.e2e.tools import kept

LAZY, PLAIN = "lazy", "plain"
REPOSITORY: Final = "storm/app"
TAG: Final = "v1"
MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
PLAN_FILE: Final = "plan.json"

_FOLDERS: Final = ("/usr/lib", "/usr/share", "/usr/local")
# Bytes of files before compression: they come to some 300 MB in all.
_LAYER_BYTES: Final = (160 << 20, 520 << 20, 320 << 20)
_LAYER_FILES: Final = 16_000
_LARGEST_FILE: Final = 24 << 20
_LEVEL: Final = 4
# What an image builder has put before the landmark, and what is then read beyond it, per layer.
_PREFETCHED_BYTES: Final = (6 << 20, 16 << 20, 10 << 20)
_READ_BYTES: Final = (1_500_000, 4_500_000, 2_500_000)
_RUN: Final = 6
_JOINED_ONE_IN: Final = 8
_RANDOM_BLOCK: Final = 1 << 20

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer. *mount*: the ranges that are read when it is mounted, one request each."""

    digest: str
    size: int
    mount: list[list[Span]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a client asks for. Kept as JSON beside the blobs."""

    kind: str
    repository: str
    tag: str
    manifest: str
    manifest_type: str
    manifest_size: int
    config: str
    config_size: int
    layers: list[Layer]
    reads: list[tuple[int, list[Span]]]
    """Layer number and ranges of each request after the mount, in order."""
    image_bytes: int
    asked_bytes: int
    """Body bytes of all answers to GET, without the framing of multipart ones."""


def lazy_image() -> Path:
    """The folder of the lazy image, made unless it is kept from an earlier run."""
    with kept("storm-lazy", _key("lazy")) as (folder, is_new):
        if is_new:
            _build_lazy(folder, _LAYER_BYTES, _PREFETCHED_BYTES, _READ_BYTES)
        return folder


def small_lazy_image(folder: Path) -> None:
    """Make an image of a hundredth of the size in *folder*: to try the harness with."""
    small = tuple(size // 100 for size in _LAYER_BYTES)
    _build_lazy(folder, small, tuple(s // 10 for s in small), tuple(s // 10 for s in small))


def plain_image(layers: int, layer_bytes: int) -> Path:
    """The folder of a plain image of this many layers, made unless it is kept."""
    with kept("storm-plain", _key(f"plain {layers} {layer_bytes}")) as (folder, is_new):
        if is_new:
            build_plain(folder, layers, layer_bytes)
        return folder


def read_plan(folder: Path) -> Plan:
    """The plan of the image in *folder*."""
    document = json.loads((folder / PLAN_FILE).read_text())
    return Plan(**document | {"layers": [Layer(**layer) for layer in document["layers"]]})


def build_plain(folder: Path, count: int, layer_bytes: int) -> None:
    """Make a plain image in *folder*."""
    (folder / "blobs").mkdir()
    layers: list[tuple[Layer, dict[str, str]]] = []
    for number in range(count):
        chooser = random.Random(f"layer {number} of {count}")
        whole = hashlib.sha256()
        draft = folder / "blobs" / "draft"
        with draft.open("wb") as file:
            for start in range(0, layer_bytes, _RANDOM_BLOCK):
                block = chooser.randbytes(min(_RANDOM_BLOCK, layer_bytes - start))
                whole.update(block)
                file.write(block)
        draft.rename(folder / "blobs" / whole.hexdigest())
        layers.append((Layer(f"sha256:{whole.hexdigest()}", layer_bytes, []), {}))
    _finish(folder, PLAIN, layers, [f"sha256:{'0' * 64}"] * count, [])


def _key(kind: str) -> str:
    return hashlib.sha256(Path(__file__).read_bytes() + kind.encode()).hexdigest()


# -- the lazy image ------------------------------------------------------------------------------


def _build_lazy(
    folder: Path, sizes: tuple[int, ...], prefetched: tuple[int, ...], read: tuple[int, ...]
) -> None:
    (folder / "blobs").mkdir()
    files = _find_files()
    groups = [_take(files, size) for size in sizes]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        built = list(pool.map(_build_layer, groups, prefetched))
    layers: list[tuple[Layer, dict[str, str]]] = []
    reads: list[tuple[int, list[Span]]] = []
    for number, layer in enumerate(built):
        (folder / "blobs" / layer.digest.encoded).write_bytes(layer.blob)
        blocks = Blocks(len(layer.blob))
        toc, mount = _mount(layer, blocks)
        layers.append((Layer(str(layer.digest), len(layer.blob), mount), layer.annotations))
        spans = list(_read(layer, toc, blocks, read[number]))
        reads += [(number, each) for each in _join_some(spans)]
    # A program that starts goes to and fro between the layers, but not at every read.
    runs = [reads[start : start + _RUN] for start in range(0, len(reads), _RUN)]
    random.Random("order").shuffle(runs)
    shuffled = [each for run in runs for each in run]
    _finish(folder, LAZY, layers, [str(layer.diff_id) for layer in built], shuffled)


def _find_files() -> Iterator[Path]:
    paths = sysconfig.get_paths()
    roots = dict.fromkeys((*_FOLDERS, paths["stdlib"], paths["purelib"]))
    seen: set[tuple[int, int]] = set()
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                facts = path.lstat()
                key = (facts.st_dev, facts.st_ino)
                is_small = 0 < facts.st_size <= _LARGEST_FILE
                if stat.S_ISREG(facts.st_mode) and is_small and key not in seen:
                    seen.add(key)
                    if os.access(path, os.R_OK):
                        yield path


def _take(files: Iterator[Path], budget: int) -> list[Path]:
    """The next files, up to *budget* bytes. A machine with too few files gives smaller layers."""
    taken = []
    for path in islice(files, _LAYER_FILES):
        taken.append(path)
        budget -= path.stat().st_size
        if budget <= 0:
            break
    return taken


def _build_layer(paths: list[Path], prefetched: int) -> BuiltLayer:
    names = [str(path).lstrip("/") for path in paths]
    folders = sorted(
        {str(parent) for name in names for parent in Path(name).parents if str(parent) != "."}
    )
    entries = [Entry(name, type=EntryType.DIRECTORY, mode=0o755) for name in folders]
    entries += [Entry(n, path.read_bytes()) for n, path in zip(names, paths, strict=True)]
    order = random.Random("prefetched").sample(range(len(names)), len(names))
    first = []
    for number in order:
        prefetched -= paths[number].stat().st_size
        if prefetched < 0:
            break
        first.append(names[number])
    return build_layer(entries, prioritized=first or names[:1], level=_LEVEL)


def _mount(layer: BuiltLayer, blocks: Blocks) -> tuple[Toc, list[list[Span]]]:
    """What is read to mount a layer: the footer, the table of contents, all up to the landmark."""
    size = len(layer.blob)
    start = find_toc(layer.blob[-FOOTER_SIZE:])
    requests = _ask(layer, blocks, ByteRange(size - FOOTER_SIZE, size))
    requests += _ask(layer, blocks, ByteRange(start, size - FOOTER_SIZE))
    toc = parse_toc(layer.blob[start : size - FOOTER_SIZE], size, str(layer.toc_digest))
    if toc.landmark:
        requests += _ask(layer, blocks, ByteRange(0, toc.landmark))
    return toc, requests


def _read(layer: BuiltLayer, toc: Toc, blocks: Blocks, budget: int) -> Iterator[list[Span]]:
    """What a program then reads: runs of files that lie together, in no order foreseen."""
    chooser = random.Random(str(layer.digest))
    names = list(toc.files)
    while budget > 0:
        first = chooser.randrange(len(names))
        for name in names[first : first + chooser.randint(1, _RUN)]:
            for chunk in toc.files[name]:
                for start in range(chunk.start, chunk.stop, MAX_PEEK):
                    part = ByteRange(start, min(start + MAX_PEEK, chunk.stop))
                    for request in _ask(layer, blocks, part):
                        budget -= sum(stop - at for at, stop in request)
                        yield request
            if budget <= 0:
                return


def _join_some(requests: list[list[Span]]) -> Iterator[list[Span]]:
    """Ask for two stretches at once now and then, as the snapshotter does for holes in what it has.

    The programs played here make few such holes; the code paths must be in the mix nonetheless.
    """
    numbers = iter(range(len(requests)))
    for number in numbers:
        both = sorted(requests[number] + requests[(number + 1) % len(requests)])
        apart = all(stop < start for (_, stop), (start, _) in pairwise(both))
        if number % _JOINED_ONE_IN == 0 and number + 1 < len(requests) and apart:
            next(numbers)
            yield both
        else:
            yield requests[number]


def _ask(layer: BuiltLayer, blocks: Blocks, wanted: ByteRange) -> list[list[Span]]:
    missing = blocks.missing(wanted)
    for part in missing:
        blocks.write(part, layer.blob[part.start : part.stop])
    return [[(part.start, part.stop) for part in missing]] if missing else []


# -- config and manifest -------------------------------------------------------------------------


def _finish(
    folder: Path,
    kind: str,
    layers: list[tuple[Layer, dict[str, str]]],
    diff_ids: list[str],
    reads: list[tuple[int, list[Span]]],
) -> None:
    """Write config, manifest and plan, as image-spec words the first two."""
    config = _encode(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["true"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }
    )
    media = "application/vnd.oci.image"
    manifest = _encode(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {
                "mediaType": f"{media}.config.v1+json",
                "digest": str(Digest.of(config)),
                "size": len(config),
            },
            "layers": [
                {
                    "mediaType": f"{media}.layer.v1.tar+gzip",
                    "digest": layer.digest,
                    "size": layer.size,
                    "annotations": annotations,
                }
                for layer, annotations in layers
            ],
        }
    )
    for data in (config, manifest):
        (folder / "blobs" / Digest.of(data).encoded).write_bytes(data)
    documents = len(config) + len(manifest)
    whole = sum(layer.size for layer, _ in layers)
    asked = documents + whole
    if kind == LAZY:
        requests = [spans for layer, _ in layers for spans in layer.mount]
        requests += [spans for _, spans in reads]
        # And the two bytes that each mount begins with.
        asked = documents + 2 * len(layers)
        asked += sum(stop - start for spans in requests for start, stop in spans)
    plan = Plan(
        kind=kind,
        repository=REPOSITORY,
        tag=TAG,
        manifest=str(Digest.of(manifest)),
        manifest_type=MANIFEST_TYPE,
        manifest_size=len(manifest),
        config=str(Digest.of(config)),
        config_size=len(config),
        layers=[layer for layer, _ in layers],
        reads=reads,
        image_bytes=documents + whole,
        asked_bytes=asked,
    )
    (folder / PLAN_FILE).write_text(json.dumps(asdict(plan)))


def _encode(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
