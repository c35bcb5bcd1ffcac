"""What was proven, kept over restarts: one small file, replaced as a whole.

Its body is MessagePack behind the xxh3_64 of itself: a record that is torn, rotten, or of another
version is no error, it only means proving again. The rule: a proof leaves here only for a file in
the very state that was proven.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import xxhash

from p2pcache.content.files import FileState, Proof
from p2pcache.core.errors import BadDigest
from p2pcache.core.layout import FIXED_PIECE_SIZE
from p2pcache.core.model import MAX_BLOB_SIZE, Digest

logger = logging.getLogger(__name__)

_VERSION: Final = 1
_MAX_PROOFS: Final = 1 << 15
# All blobs together: 2 TiB of them.
_MAX_HASHES: Final = 1 << 21
_MAX_BYTES: Final = 64 << 20


class _Entry(msgspec.Struct, array_like=True):
    digest: str
    inode: int
    size: int
    modified_ns: int
    changed_ns: int
    hashes: bytes


class _Body(msgspec.Struct, array_like=True):
    version: int
    entries: list[_Entry]


_BODY: Final = msgspec.msgpack.Decoder(_Body)


class Record:
    """Proofs by digest, the oldest first; those beyond its bounds are forgotten.

    `load` and `save` block; everything else belongs to one event loop.
    """

    def __init__(
        self, path: Path, *, max_proofs: int = _MAX_PROOFS, max_hashes: int = _MAX_HASHES
    ) -> None:
        self._path = path
        self._max_proofs = max_proofs
        self._max_hashes = max_hashes
        self._proofs: OrderedDict[Digest, Proof] = OrderedDict()
        self._hashes = 0
        self.is_changed = False
        """There is something to save."""

    def __len__(self) -> int:
        return len(self._proofs)

    def proof_of(self, digest: Digest, state: FileState) -> Proof | None:
        """Return the proof of a file in *state*."""
        proof = self._proofs.get(digest)
        return proof if proof is not None and proof.state == state else None

    def put(self, digest: Digest, proof: Proof) -> None:
        """Remember *proof* instead of an earlier one."""
        self.forget(digest)
        self._proofs[digest] = proof
        self._hashes += len(proof.hashes)
        self.is_changed = True
        while len(self._proofs) > self._max_proofs or self._hashes > self._max_hashes:
            _, oldest = self._proofs.popitem(last=False)
            self._hashes -= len(oldest.hashes)

    def forget(self, digest: Digest) -> None:
        """The proof does not hold any more. An absent one is no error."""
        proof = self._proofs.pop(digest, None)
        if proof is not None:
            self._hashes -= len(proof.hashes)
            self.is_changed = True

    def snapshot(self) -> list[tuple[Digest, Proof]]:
        """All proofs, for `save`: what changes from now on is left to the next one."""
        self.is_changed = False
        return list(self._proofs.items())

    def load(self) -> list[tuple[Digest, Proof]]:
        """Return what the file remembers; nothing if it is missing or of no use."""
        try:
            with self._path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
            return _decode(data)
        except FileNotFoundError:
            return []
        except (OSError, msgspec.MsgspecError, ValueError, RecursionError, BadDigest) as error:
            logger.warning("content.record.unusable", extra={"reason": str(error)})
            return []

    def save(self, proofs: list[tuple[Digest, Proof]]) -> None:
        """Replace the file. What cannot be written is proven again after a restart."""
        entries = [
            _Entry(
                str(digest),
                proof.state.inode,
                proof.state.size,
                proof.state.modified_ns,
                proof.state.changed_ns,
                proof.hashes.tobytes(),
            )
            for digest, proof in proofs
        ]
        body = msgspec.msgpack.encode(_Body(_VERSION, entries))
        # Two processes may write it at once, while one takes over from the other: `load` finds out.
        draft = self._path.with_name(f"{self._path.name}.new")
        try:
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(xxhash.xxh3_64_digest(body) + body)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path)
        except OSError as error:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            logger.warning("content.record.unsaved", extra={"reason": error.strerror})


def _decode(data: bytes) -> list[tuple[Digest, Proof]]:
    """Raises `ValueError`, `msgspec.MsgspecError` or `BadDigest`."""
    if len(data) > _MAX_BYTES or xxhash.xxh3_64_digest(data[8:]) != data[:8]:
        raise ValueError("not as it was written")
    body = _BODY.decode(data[8:])
    if body.version != _VERSION:
        raise ValueError(f"version {body.version}")
    return [(Digest.parse(entry.digest), _proof(entry)) for entry in body.entries]


def _proof(entry: _Entry) -> Proof:
    count = -(-entry.size // FIXED_PIECE_SIZE)
    if not 0 < entry.size <= MAX_BLOB_SIZE or len(entry.hashes) != 8 * count:
        raise ValueError(f"{len(entry.hashes)} bytes of hashes for {entry.size} bytes")
    hashes = array("Q")
    hashes.frombytes(entry.hashes)
    state = FileState(entry.inode, entry.size, entry.modified_ns, entry.changed_ns)
    return Proof(state, hashes)
