"""An image made of real files: this machine's Python and the packages that p2pcache runs on.

Hides which files are taken, and how they become layers, a config and a manifest. The rule it
keeps: the same machine gives the same image, byte by byte, and never more than `LAYER_BUDGET`
bytes of files in a layer.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Final

import aiohttp

from p2pcache.core.errors import P2PCacheError
from p2pcache.core.estargz_writer import BuiltLayer, Entry, EntryType, build_layer
from p2pcache.core.model import Digest, Tag
from p2pcache.demo.registry import Contents
from p2pcache.demo.replay import StartUp

REPOSITORY: Final = "demo/python-app"
TAG: Final = "v1"
LAYER_BUDGET: Final = 28 << 20
MAX_FILE: Final = 2 << 20
"""A larger file is a library for linking or a bundle, nothing that a start-up reads."""

MAX_FILES: Final = 6000
MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"

# An image builder that has watched the program start puts these first, up to the landmark.
OPTIMISED_FOR: Final = ("asyncio", "http.client", "json", "aiohttp")
# What the start-up then reads beyond them, file by file.
ALSO_IMPORTS: Final = ("ssl", "sqlite3", "unittest", "email.mime.text", "xml.etree.ElementTree")
# And one in so many of the other files: templates, plug-ins, data.
ALSO_OPENS_ONE_IN: Final = 64

_SKIPPED: Final = frozenset({"__pycache__", "site-packages", "dist-packages"})
_SKIPPED_PREFIX: Final = "config-"  # config-3.11-x86_64-linux-gnu: static libraries
_LATER: Final = frozenset({"test", "tests", "idle_test"})
_LIST_IMPORTS: Final = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception:
        pass
for module in list(sys.modules.values()):
    path = getattr(module, "__file__", None)
    if path:
        print(path)
"""
# config.md: the names that Go gives to architectures.
_GO_NAMES: Final = MappingProxyType({"x86_64": "amd64", "aarch64": "arm64"})
_IMPORT_S: Final = 20.0


class ImageError(P2PCacheError):
    """There is nothing to make an image of."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file of this machine and the name it has in the image."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class Image:
    """A built image, and what a start-up reads of it."""

    contents: Contents = field(repr=False)
    start_up: StartUp = field(repr=False)
    layers: int
    files: int
    size: int
    """Bytes of the manifest and all blobs, as a full pull would read them."""
    file_bytes: int
    """Bytes of the files before compression."""


@dataclass(frozen=True, slots=True)
class Root:
    """A folder of this machine, and where it lies in the image."""

    path: Path
    prefix: str

    def name_of(self, path: Path) -> str | None:
        """The name in the image of the file at *path*, or None if it lies elsewhere."""
        if not path.is_relative_to(self.path):
            return None
        inside = path.relative_to(self.path)
        # Where packages lie below the standard library they belong to another layer.
        if not _SKIPPED.isdisjoint(inside.parts):
            return None
        return f"{self.prefix}/{inside.as_posix()}"


def find_files(root: Root) -> Iterator[Source]:
    """Yield the regular files below *root*, in the same order on every run."""
    for folder, folders, names in os.walk(root.path):
        folders[:] = sorted(
            name
            for name in folders
            if name not in _SKIPPED and not name.startswith(_SKIPPED_PREFIX)
        )
        inside = Path(folder).relative_to(root.path).as_posix()
        base = root.prefix if inside == "." else f"{root.prefix}/{inside}"
        for name in sorted(names):
            path = Path(folder, name)
            if _is_readable(path) and not path.is_symlink():
                yield Source(f"{base}/{name}", path)


def _is_readable(path: Path) -> bool:
    return path.is_file() and os.access(path, os.R_OK)


def choose(first: Sequence[Source], others: Iterable[Source], budget: int) -> list[Source]:
    """Return what fits the *budget* of bytes: the *first*, then the *others*, of those tests last.

    Sorted by name, which is the order in which a layer's builder would meet them.
    """
    names = {source.name for source in first}
    rest = [source for source in others if source.name not in names]
    rest.sort(key=lambda source: not _LATER.isdisjoint(source.name.split("/")))
    chosen = []
    for source in (*first, *rest):
        size = source.path.stat().st_size
        if size <= min(budget, MAX_FILE):
            chosen.append(source)
            budget -= size
    return sorted(chosen, key=lambda source: source.name)


def list_imports(modules: Sequence[str]) -> list[Path]:
    """Return the files that a fresh interpreter loads when it imports *modules*, in order."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", _LIST_IMPORTS, *modules],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=_IMPORT_S,
    )
    return [Path(line) for line in dict.fromkeys(done.stdout.splitlines())]


def build_image() -> Image:
    """Build the image: a layer of the standard library, and one of the installed packages.

    Takes a second or two of two cores. Raises `ImageError` if this Python has no files.
    """
    try:
        with ThreadPoolExecutor(2) as pool:
            optimised, everything = pool.map(
                list_imports, (OPTIMISED_FOR, (*OPTIMISED_FOR, *ALSO_IMPORTS))
            )
            layers = list(
                pool.map(lambda root: _build_layer(root, optimised, everything), _find_roots())
            )
    except (OSError, subprocess.SubprocessError) as error:
        raise ImageError(f"cannot read this Python's files: {error}") from error
    if not layers or not layers[0].opened:
        raise ImageError("this Python has no standard library in files to make an image of")
    return _assemble(layers)


def _find_roots() -> list[Root]:
    """Where the standard library and the packages that p2pcache runs on lie, each once."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = Path(sysconfig.get_path("stdlib"))
    packages = Path(aiohttp.__file__).parents[1]
    roots = [Root(library, f"usr/lib/{version}")]
    if packages != library:
        roots.append(Root(packages, "app/packages"))
    return roots


@dataclass(frozen=True, slots=True)
class _Layer:
    built: BuiltLayer
    files: int
    file_bytes: int
    opened: tuple[tuple[str, str], ...]
    """What the start-up reads of it, in order, each with its sha256."""


def _build_layer(root: Root, optimised: Sequence[Path], everything: Sequence[Path]) -> _Layer:
    def sources(paths: Sequence[Path]) -> list[Source]:
        named = ((root.name_of(path), path) for path in paths)
        return [Source(name, path) for name, path in named if name and _is_readable(path)]

    others = islice(find_files(root), MAX_FILES)
    chosen = choose(sources(everything), others, LAYER_BUDGET)
    data = {source.name: source.path.read_bytes() for source in chosen}
    first = [source.name for source in sources(optimised) if data.get(source.name)]
    then = [source.name for source in sources(everything) if data.get(source.name)]
    rest = sorted(
        (name for name in data if data[name] and _shuffle(name) % ALSO_OPENS_ONE_IN == 0),
        key=_shuffle,
    )
    opened = dict.fromkeys((*first, *then, *rest))
    files = [Entry(name, content) for name, content in data.items()]
    return _Layer(
        built=build_layer([*_folders(data), *files], prioritized=first),
        files=len(data),
        file_bytes=sum(map(len, data.values())),
        opened=tuple((name, hashlib.sha256(data[name]).hexdigest()) for name in opened),
    )


def _folders(names: Iterable[str]) -> list[Entry]:
    """The parents of all *names*, parents before children. Image tools insist on them."""
    folders = {
        "/".join(parts[:depth])
        for parts in {tuple(name.split("/")[:-1]) for name in names}
        for depth in range(1, len(parts) + 1)
    }
    return [Entry(name, type=EntryType.DIRECTORY, mode=0o755) for name in sorted(folders)]


def _shuffle(name: str) -> int:
    """A number by which to draw and to order names at random, alike on every run."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _assemble(layers: Sequence[_Layer]) -> Image:
    """Config and manifest as the image specification words them (config.md, manifest.md)."""
    machine = platform.machine()
    config = _encode(
        {
            "architecture": _GO_NAMES.get(machine, machine),
            "os": "linux",
            "config": {"Cmd": ["python3"]},
            "rootfs": {
                "type": "layers",
                "diff_ids": [str(layer.built.diff_id) for layer in layers],
            },
        }
    )
    manifest = _encode(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": str(Digest.of(config)),
                "size": len(config),
            },
            "layers": [
                {
                    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                    "digest": str(layer.built.digest),
                    "size": len(layer.built.blob),
                    "annotations": layer.built.annotations,
                }
                for layer in layers
            ],
        }
    )
    blobs = {layer.built.digest: layer.built.blob for layer in layers}
    blobs[Digest.of(config)] = config
    contents = Contents(
        manifests={Digest.of(manifest): (MANIFEST_TYPE, manifest)},
        tags={Tag(TAG): Digest.of(manifest)},
        blobs=blobs,
    )
    return Image(
        contents=contents,
        start_up=StartUp(
            REPOSITORY, TAG, tuple(opened for layer in layers for opened in layer.opened)
        ),
        layers=len(layers),
        files=sum(layer.files for layer in layers),
        size=len(manifest) + sum(map(len, blobs.values())),
        file_bytes=sum(layer.file_bytes for layer in layers),
    )


def _encode(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
