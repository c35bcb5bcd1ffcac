"""One real image in three forms: plain layers, lazy gzip (eStargz) and lazy zstd (zstd:chunked).

Hides how it is made. Its large layer is this machine's Python and Debian's Go library: real files,
some 7,000 of them, many small and a few large. Conversion is the real tool's, with a recorded
workload. Rule: the same packages give the same plain image, so that a kept one stays good.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import py_compile
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.e2e.machines import Machine
from tests.e2e.services import Containerd, Registry
from tests.e2e.tools import kept

WORKLOAD = Path(__file__).parent / "workload.py"
REPOSITORY = "app/python"
PLAIN, GZIP, ZSTD = "plain", "gzip", "zstdchunked"
"""Tags."""

START = ("python3", "/srv/workload.py", "start")
"""The workload that the lazy forms are profiled with."""
UNFORESEEN = ("src/net/http", "src/crypto/tls", "pkg/tool/linux_amd64/vet")
LONG = ("src/crypto", "src/encoding")
"""Below GO_ROOT; read one by one, about 600 files."""

GO_ROOT = Path("/usr/lib/go-1.19")
GO_PATHS = ("VERSION", "src", "pkg/tool/linux_amd64/compile", "pkg/tool/linux_amd64/vet")
GZIP_LEVEL = 4
RECORDING_S = 3
OCI = "application/vnd.oci.image"
EPOCH = 1_577_836_800


@dataclass(frozen=True, slots=True)
class Images:
    """The built image: *storage* is a registry's folder that has it under `REPOSITORY`."""

    storage: Path
    layer_sizes: dict[str, list[int]]
    """Compressed size of each layer, by tag."""
    manifests: dict[str, str]
    """Digest of each manifest, by tag."""
    unforeseen_output: str
    long_output: str

    def size(self, tag: str) -> int:
        return sum(self.layer_sizes[tag])


def unforeseen() -> tuple[str, ...]:
    """A command that imports and reads what nobody profiled."""
    return ("python3", "/srv/workload.py", "read", "/srv/go", *UNFORESEEN)


def long_reading(pause_s: float) -> tuple[str, ...]:
    """A command that keeps reading new files, with a pause after each."""
    return ("python3", "/srv/workload.py", "read", "--pause", str(pause_s), "/srv/go", *LONG)


def build_images() -> Images:
    """Return the images, built unless they are kept from an earlier run."""
    key = hashlib.sha256(sys.version.encode())
    key.update((GO_ROOT / "VERSION").read_bytes())
    for source in (Path(__file__), WORKLOAD):
        key.update(source.read_bytes())
    with kept("images", key.hexdigest()) as (entry, is_new):
        if is_new:
            with TemporaryDirectory(prefix="p2pcache-e2e-images-") as work:
                _build(entry, Path(work))
        return Images(entry / "registry", **json.loads((entry / "images.json").read_text()))


def _build(entry: Path, work: Path) -> None:
    logs = work / "logs"
    logs.mkdir()
    layout = work / "oci"
    _write_layout(layout, work)
    with Machine("builder", logs) as machine:
        registry = Registry(machine, entry / "registry", work, read_only=False)
        registry.start()
        containerd = Containerd(machine, work)
        containerd.start()
        plain = f"{registry.host}/{REPOSITORY}:{PLAIN}"
        copy = ("skopeo", "copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false")
        machine.run(*copy, f"oci:{layout}:{PLAIN}", f"docker://{plain}", timeout_s=120)
        containerd.ctr("image", "pull", "--plain-http", plain)
        converted = {GZIP: ("--estargz-compression-level", "5"), ZSTD: ("--zstdchunked",)}
        for tag, flags in converted.items():
            lazy = f"{registry.host}/{REPOSITORY}:{tag}"
            how = ("--oci", "--period", str(RECORDING_S), "--args", json.dumps(START), *flags)
            containerd.ctr("image", "optimize", *how, plain, lazy, timeout_s=240)
            containerd.ctr("image", "push", "--plain-http", lazy)
        sizes, manifests = {}, {}
        for tag in (PLAIN, GZIP, ZSTD):
            source = f"docker://{registry.host}/{REPOSITORY}:{tag}"
            raw = machine.run("skopeo", "inspect", "--tls-verify=false", "--raw", source)
            manifest = json.loads(raw)
            sizes[tag] = [layer["size"] for layer in manifest["layers"]]
            manifests[tag] = "sha256:" + hashlib.sha256(raw.encode()).hexdigest()
    facts = {
        "layer_sizes": sizes,
        "manifests": manifests,
        "unforeseen_output": _answer(*UNFORESEEN),
        "long_output": _answer(*LONG),
    }
    (entry / "images.json").write_text(json.dumps(facts))


def _answer(*paths: str) -> str:
    """What the workload says of the same files here, outside of any image."""
    command = [sys.executable, str(WORKLOAD), "read", str(GO_ROOT), *paths]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _write_layout(layout: Path, work: Path) -> None:
    """Write the plain image as an OCI layout with two layers."""
    (layout / "blobs/sha256").mkdir(parents=True)
    base = _put_layer(layout, _libraries(), folders=("dev", "etc", "proc", "run", "sys", "tmp"))
    large = _put_layer(layout, [*_python(work / "pyc"), *_go(), (WORKLOAD, "srv/workload.py")])
    layers = [base, large]
    config = {
        "architecture": "amd64" if os.uname().machine == "x86_64" else "arm64",
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/bin", "LD_LIBRARY_PATH=/usr/local/lib:/usr/lib"],
            "Cmd": list(START),
        },
        "rootfs": {"type": "layers", "diff_ids": [diff_id for diff_id, _ in layers]},
        "history": [{"created_by": "tests"} for _ in layers],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{OCI}.manifest.v1+json",
        "config": _put(layout, json.dumps(config).encode(), "config.v1+json"),
        "layers": [descriptor for _, descriptor in layers],
    }
    entry = _put(layout, json.dumps(manifest).encode(), "manifest.v1+json")
    named = {**entry, "annotations": {"org.opencontainers.image.ref.name": PLAIN}}
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))


def _put(layout: Path, data: bytes, kind: str) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs/sha256" / digest).write_bytes(data)
    return {"mediaType": f"{OCI}.{kind}", "digest": f"sha256:{digest}", "size": len(data)}


def _put_layer(
    layout: Path, files: Iterable[tuple[Path, str]], folders: Iterable[str] = ()
) -> tuple[str, dict[str, object]]:
    """Store a gzip layer; return its diff id and its descriptor."""
    out = io.BytesIO()
    made: set[str] = set()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for folder in folders:
            _add_folder(tar, folder, made)
        for source, name in sorted(files, key=lambda file: file[1]):
            _add_folder(tar, os.path.dirname(name), made)
            _add_file(tar, source, name)
    raw = out.getvalue()
    descriptor = _put(layout, gzip.compress(raw, GZIP_LEVEL, mtime=0), "layer.v1.tar+gzip")
    return f"sha256:{hashlib.sha256(raw).hexdigest()}", descriptor


def _add_folder(tar: tarfile.TarFile, name: str, made: set[str]) -> None:
    # The converter refuses a layer whose entries lack their parents.
    if not name or name in made:
        return
    _add_folder(tar, os.path.dirname(name), made)
    made.add(name)
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime = tarfile.DIRTYPE, 0o755, EPOCH
    tar.addfile(info)


def _add_file(tar: tarfile.TarFile, source: Path, name: str) -> None:
    data = source.read_bytes()
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(data), EPOCH
    info.mode = 0o755 if os.access(source, os.X_OK) and source.stat().st_mode & 0o111 else 0o644
    tar.addfile(info, io.BytesIO(data))


def _libraries() -> Iterator[tuple[Path, str]]:
    """The shared libraries that the interpreter and its modules are linked with."""
    home = Path(sys.base_prefix)
    modules = sorted(_standard_library().glob("lib-dynload/*.so"))
    found: dict[str, Path] = {}
    for program in (_interpreter(), *modules):
        linked = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False)
        for line in linked.stdout.splitlines():
            name, _, target = (part.strip() for part in line.partition("=>"))
            path = Path((target or name).partition(" (")[0])
            if path.is_file() and home not in path.parents:
                # The loader is named by its path, libraries by their name.
                where = f"usr/lib/{name}" if target else str(path).lstrip("/")
                found[where] = path
    for where, path in found.items():
        yield path, where


def _python(compiled: Path) -> Iterator[tuple[Path, str]]:
    """The interpreter and its standard library, with bytecode that no clock went into."""
    interpreter = _interpreter()
    yield interpreter, "usr/local/bin/python3"
    for library in Path(sys.base_prefix, "lib").glob("libpython3*.so.*"):
        yield library, f"usr/local/lib/{library.name}"
    home = _standard_library()
    left_out = {"site-packages", "dist-packages", "__pycache__", "idlelib", "tkinter"}
    for folder, folders, names in os.walk(home):
        inside = Path(folder).relative_to(home)
        folders[:] = [
            name for name in folders if name not in left_out and not name.startswith("config-")
        ]
        for name in names:
            source = Path(folder, name)
            if name.endswith(".pyc") or not source.is_file():
                continue
            target = f"usr/local/lib/{home.name}" / inside / name
            yield source, str(target)
            if name.endswith(".py") and inside.parts[:1] not in {("test",), ("lib2to3",)}:
                cached = target.parent / "__pycache__" / f"{target.stem}.cpython-{_tag()}.pyc"
                made = compiled / cached
                py_compile.compile(
                    str(source),
                    cfile=str(made),
                    dfile=f"/{target}",
                    doraise=True,
                    invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
                )
                yield made, str(cached)


def _go() -> Iterator[tuple[Path, str]]:
    for path in GO_PATHS:
        top = (GO_ROOT / path).resolve()
        if top.is_file():
            yield top, f"srv/go/{path}"
            continue
        for folder, folders, names in os.walk(top):
            # The compiler's sources are nearly half of it: that time is better spent on tests.
            folders[:] = [name for name in folders if Path(folder, name) != top / "cmd"]
            for name in names:
                source = Path(folder, name)
                if source.is_file():
                    yield source, f"srv/go/{path}/{source.relative_to(top)}"


def _interpreter() -> Path:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Path(sys.base_prefix, "bin", f"python{version}").resolve()


def _standard_library() -> Path:
    return Path(os.__file__).parent


def _tag() -> str:
    return f"{sys.version_info.major}{sys.version_info.minor}"
