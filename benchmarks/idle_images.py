"""Lazy images made up for the benchmark of idle nodes: many files, none of them anybody's.

Hides names, sizes and layers. The rule: an image is the same on every run, and no two images share
a layer, so that a node which has read some of them remembers as much as it ever would.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Final

from p2pcache.core.estargz_writer import BuiltLayer, Entry, EntryType, build_layer
from p2pcache.core.model import Digest, Tag
from p2pcache.demo.registry import Contents
from p2pcache.demo.replay import StartUp

LAYERS: Final = 5
TAG: Final = "v1"
MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"

# File sizes of root file systems: half are below 3 kB, and the few large ones make the mean 10 kB.
_MEDIAN_SIZE: Final = 3000
_SIZE_SPREAD: Final = 1.6
_LARGEST_FILE: Final = 1 << 20
_FILES_PER_FOLDER: Final = 12
# What an image's optimiser has put before the landmark, and what a start-up reads beyond it.
_PREFETCHED_ONE_IN: Final = 25
_READ_ONE_IN: Final = 40
_TEXT_BYTES: Final = 2 << 20
_LEVEL: Final = 1
_WORDS: Final = (
    "cache", "client", "common", "config", "core", "data", "encoding", "errors", "events", "filter",
    "format", "handler", "index", "layout", "loader", "locale", "messages", "models", "network",
    "options", "parser", "plugins", "query", "registry", "runtime", "schema", "session", "storage",
    "templates", "utils", "vendor", "views",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Image:
    """One image, and what a start-up reads of it."""

    contents: Contents = field(repr=False)
    start_up: StartUp = field(repr=False)
    entries: int
    """Of all tables of contents together, the landmarks' not counted."""
    size: int
    """Bytes of all layers."""


def make_images(count: int, entries: int) -> list[Image]:
    """Make *count* images with some *entries* each, in all layers together."""
    _text()  # before threads ask for it
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda number: _make_image(number, entries), range(count)))


@dataclass(frozen=True, slots=True)
class _Layer:
    built: BuiltLayer
    entries: int
    opened: list[tuple[str, str]]


def _make_image(number: int, entries: int) -> Image:
    repository = f"idle/app-{number + 1}"
    layers = [_make_layer(f"{repository} {layer}", entries // LAYERS) for layer in range(LAYERS)]
    config = _encode(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["true"]},
            "rootfs": {"type": "layers", "diff_ids": [str(each.built.diff_id) for each in layers]},
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
                    "digest": str(each.built.digest),
                    "size": len(each.built.blob),
                    "annotations": each.built.annotations,
                }
                for each in layers
            ],
        }
    )
    blobs = {each.built.digest: each.built.blob for each in layers}
    return Image(
        contents=Contents(
            manifests={Digest.of(manifest): (MANIFEST_TYPE, manifest)},
            tags={Tag(TAG): Digest.of(manifest)},
            blobs={**blobs, Digest.of(config): config},
        ),
        start_up=StartUp(
            repository, TAG, tuple(opened for each in layers for opened in each.opened)
        ),
        entries=sum(each.entries for each in layers),
        size=sum(map(len, blobs.values())),
    )


def _make_layer(seed: str, count: int) -> _Layer:
    rng = random.Random(seed)
    entries = list(_entries(rng, count))
    files = [entry for entry in entries if entry.type is EntryType.FILE]
    first = rng.sample(files, max(1, len(files) // _PREFETCHED_ONE_IN))
    then = rng.sample(files, max(1, len(files) // _READ_ONE_IN))
    opened = {entry.name: entry.data for entry in (*first, *then)}
    return _Layer(
        built=build_layer(entries, prioritized=[entry.name for entry in first], level=_LEVEL),
        entries=len(entries),
        opened=[(name, hashlib.sha256(data).hexdigest()) for name, data in opened.items()],
    )


def _entries(rng: random.Random, count: int) -> Iterator[Entry]:
    """Folders below ``usr/lib``, each followed by its files: *count* in all."""
    text = _text()
    folder = "usr/lib/app"
    for number in range(count):
        if number % (_FILES_PER_FOLDER + 1) == 0:
            folder = f"usr/lib/app/{'/'.join(rng.choices(_WORDS, k=3))}-{number}"
            yield Entry(folder, type=EntryType.DIRECTORY, mode=0o755)
        else:
            size = round(rng.lognormvariate(math.log(_MEDIAN_SIZE), _SIZE_SPREAD))
            size = max(1, min(size, _LARGEST_FILE))
            start = rng.randrange(len(text) - size)
            name = f"{folder}/{'_'.join(rng.choices(_WORDS, k=2))}_{number}.py"
            yield Entry(name, text[start : start + size], mtime=1_700_000_000 + number)


@cache
def _text() -> bytes:
    """Something that compresses about as well as programs do."""
    rng = random.Random("text")
    words = [f"{word}{rng.randrange(1000)}" for word in _WORDS for _ in range(60)]
    return " ".join(rng.choices(words, k=_TEXT_BYTES // 6)).encode()


def _encode(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
