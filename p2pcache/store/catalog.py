"""The catalogue: which blobs, which pieces in which state, and what manifests and tags said.

Hides SQLite. The rules: one connection writes, and only whoever has the directory's lock opens it;
a catalogue that makes no sense (torn, foreign, written by a newer p2pcache) is set aside and an
empty one started, because a cache that cannot start is worse than one that forgot.
"""

from __future__ import annotations

import logging
import sqlite3
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from operator import lt
from pathlib import Path
from typing import Final

from p2pcache.core.errors import P2PCacheError
from p2pcache.core.layout import Layout, LayoutKind, PieceState
from p2pcache.core.model import BlobFacts, Digest, Manifest, Repository, Tag, TagFact

logger = logging.getLogger(__name__)

# PRAGMA application_id tells our files from other people's; user_version is the schema's number.
_APPLICATION_ID: Final = int.from_bytes(b"p2pc")
SCHEMA_VERSION: Final = 1

_SCHEMA: Final = """
CREATE TABLE blobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice: a reader may remember an old one
    digest TEXT NOT NULL UNIQUE,
    size INTEGER NOT NULL,
    layout TEXT NOT NULL,
    starts BLOB NOT NULL,                  -- little-endian 64-bit piece starts
    toc_digest TEXT,
    whole INTEGER NOT NULL DEFAULT 0,
    used REAL NOT NULL                     -- orders blobs by last use; not a time of day
);
CREATE TABLE pieces (
    blob INTEGER NOT NULL,
    piece INTEGER NOT NULL,
    hash INTEGER NOT NULL,                 -- xxh3_64, as SQLite's signed 64 bits
    state INTEGER NOT NULL,
    PRIMARY KEY (blob, piece)
) WITHOUT ROWID;
CREATE TABLE manifests (digest TEXT PRIMARY KEY, media_type TEXT NOT NULL, data BLOB NOT NULL);
CREATE TABLE tags (
    registry TEXT NOT NULL,
    repository TEXT NOT NULL,
    tag TEXT NOT NULL,
    digest TEXT NOT NULL,
    media_type TEXT NOT NULL,
    size INTEGER NOT NULL,
    seen_at REAL NOT NULL,
    PRIMARY KEY (registry, repository, tag)
);
CREATE TABLE facts (
    digest TEXT PRIMARY KEY,
    size INTEGER NOT NULL,
    media_type TEXT NOT NULL,
    toc_digest TEXT,
    repositories TEXT NOT NULL             -- one registry/name a line, newest first
);
"""


class CatalogUnusable(P2PCacheError):
    """The file is not a catalogue that this version understands."""


@dataclass(slots=True)
class BlobRecord:
    """One blob as the catalogue has it: *hashes* and *states* have one entry per piece."""

    row: int
    digest: Digest
    layout: Layout
    toc_digest: Digest | None
    is_whole: bool
    used: float
    hashes: array[int]
    states: bytearray

    def stored(self) -> int:
        """How many bytes the pieces have that are there."""
        if 0 not in self.states:
            return self.layout.size
        stops = chain(islice(self.layout.starts, 1, None), (self.layout.size,))
        return sum(
            stop - start
            for start, stop, state in zip(self.layout.starts, stops, self.states, strict=True)
            if state
        )


@dataclass(slots=True)
class Contents:
    """All that a catalogue says; facts stand in the order in which they were written."""

    blobs: list[BlobRecord] = field(default_factory=list)
    manifests: list[Manifest] = field(default_factory=list)
    tags: list[tuple[Repository, Tag, TagFact]] = field(default_factory=list)
    facts: list[tuple[Digest, BlobFacts]] = field(default_factory=list)


class Catalog:
    """The writing connection. Every method is called within `transaction`, on one thread at a time.

    Methods raise `sqlite3.Error`; the transaction then leaves nothing behind.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is done within is kept, or none of it."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def last_row(self) -> int:
        """The highest blob row number that was ever given."""
        found = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'blobs'").fetchone()
        return int(found[0]) if found else 0

    def add_blob(
        self, row: int, digest: Digest, layout: Layout, toc_digest: Digest | None, used: float
    ) -> None:
        """Enter a blob without pieces, in place of any other of that digest."""
        self._db.execute(
            "DELETE FROM pieces WHERE blob = (SELECT id FROM blobs WHERE digest = ?)",
            (str(digest),),
        )
        self._db.execute(
            "INSERT OR REPLACE INTO blobs (id, digest, size, layout, starts, toc_digest, used)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                row,
                str(digest),
                layout.size,
                layout.kind.value,
                _pack(layout.starts),
                None if toc_digest is None else str(toc_digest),
                used,
            ),
        )

    def remove_blobs(self, rows: Sequence[int]) -> None:
        """Take blobs and their pieces out."""
        keys = [(row,) for row in rows]
        self._db.executemany("DELETE FROM pieces WHERE blob = ?", keys)
        self._db.executemany("DELETE FROM blobs WHERE id = ?", keys)

    def put_piece(self, row: int, piece: int, hash_: int, state: PieceState) -> None:
        """Enter a piece whose bytes are on disk."""
        signed = hash_ - (1 << 64) if hash_ >> 63 else hash_
        self._db.execute(
            "INSERT OR REPLACE INTO pieces VALUES (?, ?, ?, ?)", (row, piece, signed, int(state))
        )

    def remove_pieces(self, row: int, pieces: Iterable[int]) -> None:
        """Take pieces out; the blob is whole no more."""
        self._db.execute("UPDATE blobs SET whole = 0 WHERE id = ?", (row,))
        self._db.executemany(
            "DELETE FROM pieces WHERE blob = ? AND piece = ?", ((row, piece) for piece in pieces)
        )

    def mark_whole(self, row: int) -> None:
        """All pieces are proven: staged ones become held."""
        self._db.execute(
            "UPDATE pieces SET state = state + 2 WHERE blob = ? AND state IN (?, ?)",
            (row, int(PieceState.STAGED_UPSTREAM), int(PieceState.STAGED_PEER)),
        )
        self._db.execute("UPDATE blobs SET whole = 1 WHERE id = ?", (row,))

    def put_uses(self, uses: Iterable[tuple[float, int]]) -> None:
        """Enter when blobs were used last: pairs of use and row."""
        self._db.executemany("UPDATE blobs SET used = ? WHERE id = ?", uses)

    def put_manifest(self, manifest: Manifest) -> None:
        """Enter a manifest."""
        self._db.execute(
            "INSERT OR REPLACE INTO manifests VALUES (?, ?, ?)",
            (str(manifest.digest), manifest.media_type, manifest.data),
        )

    def remove_manifest(self, digest: Digest) -> None:
        """Take a manifest out."""
        self._db.execute("DELETE FROM manifests WHERE digest = ?", (str(digest),))

    def put_tag(self, repository: Repository, tag: Tag, fact: TagFact) -> None:
        """Enter where a tag points."""
        self._db.execute(
            "INSERT OR REPLACE INTO tags VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                repository.registry,
                repository.name,
                tag.name,
                str(fact.digest),
                fact.media_type,
                fact.size,
                fact.seen_at,
            ),
        )

    def remove_tag(self, repository: Repository, tag: Tag) -> None:
        """Take a tag out."""
        self._db.execute(
            "DELETE FROM tags WHERE registry = ? AND repository = ? AND tag = ?",
            (repository.registry, repository.name, tag.name),
        )

    def put_facts(self, digest: Digest, facts: BlobFacts) -> None:
        """Enter what manifests say of a blob."""
        self._db.execute(
            "INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?, ?)",
            (
                str(digest),
                facts.size,
                facts.media_type,
                None if facts.toc_digest is None else str(facts.toc_digest),
                "\n".join(map(str, facts.repositories)),
            ),
        )

    def remove_facts(self, digest: Digest) -> None:
        """Take the facts of a blob out."""
        self._db.execute("DELETE FROM facts WHERE digest = ?", (str(digest),))

    def close(self) -> None:
        """Fold the log into the file and close it."""
        self._db.close()


def open_catalog(root: Path) -> tuple[Catalog, Contents]:
    """Open the catalogue for writing, made if needed, and read all of it.

    One that makes no sense is set aside. Raises `sqlite3.Error` or `OSError` if the disk fails.
    """
    path = root / "catalog.sqlite"
    try:
        return _open_and_load(path)
    except CatalogUnusable as error:
        aside = root / "catalog.sqlite.aside"
        logger.warning(
            "store.catalog.set_aside", extra={"reason": str(error), "moved_to": str(aside)}
        )
        path.replace(aside)  # The one before goes: a disk must not fill with broken files.
        for suffix in ("-wal", "-shm", "-journal"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        return _open_and_load(path)


def peek(root: Path) -> Contents:
    """Read another process's catalogue and change nothing. Raises `CatalogUnusable`."""
    path = (root / "catalog.sqlite").absolute()
    try:
        db = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)
    except sqlite3.Error as error:
        raise CatalogUnusable(str(error)) from error
    try:
        _check_version(db)
        return _load(db)
    except sqlite3.Error as error:
        raise CatalogUnusable(str(error)) from error
    finally:
        db.close()


def _open_and_load(path: Path) -> tuple[Catalog, Contents]:
    db = _open(path)
    try:
        return Catalog(db), _load(db)
    except BaseException:
        db.close()
        raise


def _open(path: Path) -> sqlite3.Connection:
    # Its use moves from the opening thread to the writer's, never back: no check needed.
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        # A power loss may take the last commits, not the file's sanity: the bytes that those rows
        # spoke of are cache. kill -9 takes nothing.
        db.execute("PRAGMA synchronous = NORMAL")
        if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            db.executescript(
                f"BEGIN IMMEDIATE; {_SCHEMA}"
                f"PRAGMA application_id = {_APPLICATION_ID};"
                f"PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
            )
        _check_version(db)
        if (verdict := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise CatalogUnusable(str(verdict))
    except sqlite3.DatabaseError as error:
        db.close()
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise CatalogUnusable(str(error)) from error
        raise
    except BaseException:
        db.close()
        raise
    return db


def _check_version(db: sqlite3.Connection) -> None:
    owner = db.execute("PRAGMA application_id").fetchone()[0]
    if owner != _APPLICATION_ID:
        raise CatalogUnusable("not a file of p2pcache")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version != SCHEMA_VERSION:
        raise CatalogUnusable(f"schema version {version}: this p2pcache knows {SCHEMA_VERSION}")


def _load(db: sqlite3.Connection) -> Contents:
    try:
        db.execute("BEGIN")  # One view of all tables, whatever another process writes meanwhile.
        contents = Contents(
            _load_blobs(db), _load_manifests(db), list(_load_tags(db)), list(_load_facts(db))
        )
        db.execute("COMMIT")
    except (sqlite3.DatabaseError, P2PCacheError, ValueError, TypeError, KeyError) as error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise CatalogUnusable(f"{type(error).__name__}: {error}") from error
    return contents


def _load_blobs(db: sqlite3.Connection) -> list[BlobRecord]:
    records: dict[int, BlobRecord] = {}
    for row, digest, size, kind, starts, toc_digest, whole, used in db.execute(
        "SELECT id, digest, size, layout, starts, toc_digest, whole, used FROM blobs"
    ):
        layout = Layout(LayoutKind(kind), size, _unpack(starts))
        records[row] = BlobRecord(
            row,
            Digest.parse(digest),
            layout,
            None if toc_digest is None else Digest.parse(toc_digest),
            bool(whole),
            used,
            array("Q", bytes(8 * layout.count)),
            bytearray(layout.count),
        )
    last = -1
    record: BlobRecord | None = None
    for row, piece, hash_, state in db.execute(
        "SELECT blob, piece, hash, state FROM pieces ORDER BY blob, piece"
    ):
        if row != last:
            last, record = row, records.get(row)
        if record is None or not (0 <= piece < record.layout.count and 1 <= state <= 4):
            raise ValueError(f"piece {piece} of blob row {row} makes no sense")
        record.hashes[piece] = hash_ & 0xFFFF_FFFF_FFFF_FFFF
        record.states[piece] = state
    for record in records.values():
        held = all(state >= PieceState.HELD_UPSTREAM for state in set(record.states))
        record.is_whole = record.is_whole and held
    return list(records.values())


def _load_manifests(db: sqlite3.Connection) -> list[Manifest]:
    """Manifests prove themselves: one that rotted on disk is left out."""
    found = [
        Manifest(Digest.parse(digest), media_type, bytes(data))
        for digest, media_type, data in db.execute("SELECT * FROM manifests ORDER BY rowid")
    ]
    return [manifest for manifest in found if manifest.digest.matches(manifest.data)]


def _load_tags(db: sqlite3.Connection) -> Iterator[tuple[Repository, Tag, TagFact]]:
    for registry, name, tag, digest, media_type, size, seen_at in db.execute(
        "SELECT * FROM tags ORDER BY rowid"
    ):
        fact = TagFact(Digest.parse(digest), media_type, size, seen_at)
        yield Repository.parse(registry, name), Tag.parse(tag), fact


def _load_facts(db: sqlite3.Connection) -> Iterator[tuple[Digest, BlobFacts]]:
    for digest, size, media_type, toc_digest, repositories in db.execute(
        "SELECT * FROM facts ORDER BY rowid"
    ):
        pairs = (line.partition("/") for line in repositories.splitlines())
        yield (
            Digest.parse(digest),
            BlobFacts(
                size,
                media_type,
                None if toc_digest is None else Digest.parse(toc_digest),
                tuple(Repository.parse(registry, name) for registry, _, name in pairs),
            ),
        )


def _pack(starts: Sequence[int]) -> bytes:
    packed = array("Q", starts)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _unpack(packed: bytes) -> array[int]:
    starts = array("Q")
    starts.frombytes(packed)
    if sys.byteorder == "big":
        starts.byteswap()
    if not all(map(lt, starts, islice(starts, 1, None))):
        raise ValueError("piece starts must ascend")
    return starts
