"""What must be on the machine: tools from Debian packages, and the snapshotter daemons built here.

Hides how the two daemons are built and where they are kept. Rule: what is missing is an error that
names the package, never a skipped test.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE / ".build"
"""Kept between runs: what is built once per checkout."""
STARGZ_VERSIONS = ("0.12", "0.18")

PACKAGE_OF = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "docker-registry": "docker-registry",
    "ctr-remote": "stargz-snapshotter",
    "skopeo": "skopeo",
    "fusermount3": "fuse3",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setpriv": "util-linux",
}
DEBIAN_GO = Path("/usr/lib/go-1.19/bin/go")
DEBIAN_GOPATH = Path("/usr/share/gocode")
STARGZ_LIBRARY = DEBIAN_GOPATH / "src/github.com/containerd/stargz-snapshotter"
CURRENT_GO = (1, 25)
KEPT_VERSIONS = 3
BUILD_LIMIT_S = 300.0


class MissingTool(Exception):
    """The machine lacks something; the message says what to install."""


def check_machine() -> None:
    """Raise `MissingTool` unless everything that the rig runs is there."""
    if os.geteuid() != 0:
        raise MissingTool("the end-to-end tests make namespaces and mounts: run them as root")
    packages = {package for tool, package in PACKAGE_OF.items() if shutil.which(tool) is None}
    if not DEBIAN_GO.exists():
        packages.add("golang-1.19-go")
    if not STARGZ_LIBRARY.exists():
        packages.add("golang-github-containerd-stargz-snapshotter-dev")
    if packages:
        raise MissingTool(f"missing tools: apt-get install -y {' '.join(sorted(packages))}")
    if not Path("/dev/fuse").exists():
        raise MissingTool("no /dev/fuse: the kernel has no FUSE, or this is a confined container")


def build_stargzd(version: str) -> Path:
    """Return the snapshotter daemon of *version* (`0.12` or `0.18`), built unless it is kept."""
    folder = HERE / "stargzd" / f"v{version.replace('.', '_')}"
    sources = sorted(path for path in folder.rglob("*") if path.is_file())
    key = hashlib.sha256(version.encode())
    for path in sources:
        key.update(path.read_bytes())
    build = _build_0_12 if version == "0.12" else _build_0_18
    with kept(f"stargzd-{version}", key.hexdigest()) as (entry, is_new):
        if is_new:
            build(folder, entry)
        return entry / "stargzd"


@contextmanager
def kept(kind: str, key: str) -> Iterator[tuple[Path, bool]]:
    """Yield the cache entry of *kind* for *key*, and whether the caller has to fill it.

    Whoever fills it is alone; an entry whose filling failed is forgotten, old ones are dropped.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entry = CACHE / f"{kind}-{key[:16]}"
        done = entry / "done"
        if done.exists():
            os.utime(entry)
            yield entry, False
            return
        shutil.rmtree(entry, ignore_errors=True)
        entry.mkdir()
        yield entry, True
        done.touch()
        entries = sorted(CACHE.glob(f"{kind}-*/"), key=lambda path: path.stat().st_mtime)
        for old in entries[:-KEPT_VERSIONS]:
            shutil.rmtree(old, ignore_errors=True)


def _build_0_12(folder: Path, entry: Path) -> None:
    gopath = entry / "gopath"
    stub = gopath / "src/k8s.io/cri-api/pkg/apis/runtime/v1alpha2"
    shutil.copytree(folder, gopath / "src/stargzd", ignore=shutil.ignore_patterns("criruntime"))
    shutil.copytree(folder / "criruntime", stub)
    environment = [f"GOPATH={gopath}:{DEBIAN_GOPATH}", "GO111MODULE=off", "GOFLAGS="]
    _go(DEBIAN_GO, [*environment, "GOTOOLCHAIN=local"], gopath / "src/stargzd", entry)
    shutil.rmtree(gopath)


def _build_0_18(folder: Path, entry: Path) -> None:
    _go(_current_go(), ["GOFLAGS=-mod=readonly -buildvcs=false"], folder, entry)


def _go(go: Path, environment: list[str], folder: Path, entry: Path) -> None:
    # Without cgo no C compiler is needed.
    command = ["env", f"--chdir={folder}", "CGO_ENABLED=0", *environment]
    command += [str(go), "build", "-o", str(entry / "stargzd"), "."]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=BUILD_LIMIT_S, check=False
    )
    if result.returncode:
        raise RuntimeError(f"stargzd did not build:\n{result.stderr[-4000:]}")


def _current_go() -> Path:
    for go in (shutil.which("go"), "/usr/local/go/bin/go"):
        if go is None or not Path(go).exists():
            continue
        said = subprocess.run([go, "version"], capture_output=True, text=True, check=True).stdout
        found = re.search(r"go(\d+)\.(\d+)", said)
        if found and (int(found[1]), int(found[2])) >= CURRENT_GO:
            return Path(go)
    wanted = ".".join(map(str, CURRENT_GO))
    raise MissingTool(f"no Go {wanted} or newer as `go`: install it (Debian 12's golang is 1.19)")
