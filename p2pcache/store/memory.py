"""What manifests and tags said, kept over restarts.

Hides the bounds: everything is in memory and written through, and in each of the three collections
the entry that was put or read longest ago goes first. Nothing here is an error: a full disk only
means that a restart forgets.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from p2pcache.core.model import (
    BlobFacts,
    Descriptor,
    Digest,
    Manifest,
    Repository,
    Tag,
    TagFact,
)
from p2pcache.store.catalog import Catalog, Contents

# Manifests are a few kB each. They stay in memory, so that no hit waits for SQLite.
_MANIFEST_BYTES: Final = 32 << 20
_MANIFESTS: Final = 16_384
_TAGS: Final = 16_384
_FACTS: Final = 65_536
# A layer that very many repositories share is served by any of them.
_REPOSITORIES_PER_BLOB: Final = 8

Persist = Callable[[Callable[[Catalog], None]], Awaitable[None]]


class ImageMemory:
    """Manifests, tags and facts about blobs. *persist* commits a change, or copes."""

    def __init__(self, persist: Persist, *, manifest_bytes: int = _MANIFEST_BYTES) -> None:
        self._persist = persist
        self._limit = min(manifest_bytes, _MANIFEST_BYTES)
        self._manifests: OrderedDict[Digest, Manifest] = OrderedDict()
        self._tags: OrderedDict[tuple[Repository, Tag], TagFact] = OrderedDict()
        self._facts: OrderedDict[Digest, BlobFacts] = OrderedDict()
        self.manifest_bytes = 0

    def absorb(self, contents: Contents) -> None:
        """Add what a catalogue says; what is known already is newer."""
        for manifest in contents.manifests:
            if manifest.digest not in self._manifests:
                self._manifests[manifest.digest] = manifest
                self.manifest_bytes += len(manifest.data)
        for repository, tag, fact in contents.tags:
            self._tags.setdefault((repository, tag), fact)
        for digest, facts in contents.facts:
            self._facts.setdefault(digest, facts)

    def manifest_now(self, digest: Digest) -> Manifest | None:
        """Return a manifest's bytes."""
        found = self._manifests.get(digest)
        if found is not None:
            self._manifests.move_to_end(digest)
        return found

    async def manifest(self, digest: Digest) -> Manifest | None:
        """Return a manifest's bytes."""
        return self.manifest_now(digest)

    async def put_manifest(self, manifest: Manifest) -> None:
        """Keep a manifest whose bytes matched its digest."""
        if self.manifest_now(manifest.digest) is not None or len(manifest.data) > self._limit:
            return
        self._manifests[manifest.digest] = manifest
        self.manifest_bytes += len(manifest.data)
        gone = []
        while self.manifest_bytes > self._limit or len(self._manifests) > _MANIFESTS:
            digest, oldest = self._manifests.popitem(last=False)
            self.manifest_bytes -= len(oldest.data)
            gone.append(digest)

        def run(catalog: Catalog) -> None:
            catalog.put_manifest(manifest)
            for digest in gone:
                catalog.remove_manifest(digest)

        await self._persist(run)

    def tag(self, repository: Repository, tag: Tag) -> TagFact | None:
        """Return where the tag was last seen to point."""
        found = self._tags.get((repository, tag))
        if found is not None:
            self._tags.move_to_end((repository, tag))
        return found

    def tags(self) -> Iterator[tuple[Repository, Tag, TagFact]]:
        """All tags: a copy, so that it may be walked at leisure."""
        return iter([(repository, tag, fact) for (repository, tag), fact in self._tags.items()])

    async def put_tag(self, repository: Repository, tag: Tag, fact: TagFact) -> None:
        """Keep where the tag points now."""
        self._tags[repository, tag] = fact
        self._tags.move_to_end((repository, tag))
        gone = self._tags.popitem(last=False)[0] if len(self._tags) > _TAGS else None

        def run(catalog: Catalog) -> None:
            catalog.put_tag(repository, tag, fact)
            if gone is not None:
                catalog.remove_tag(*gone)

        await self._persist(run)

    def facts(self, digest: Digest) -> BlobFacts | None:
        """Return what manifests said of a blob."""
        found = self._facts.get(digest)
        if found is not None:
            self._facts.move_to_end(digest)
        return found

    async def put_facts(
        self, repository: Repository, descriptor: Descriptor, toc_digest: Digest | None
    ) -> None:
        """Add what a manifest in *repository* says of a blob.

        The newest word counts, but silence about the TOC does not make it forgotten.
        """
        digest = descriptor.digest
        old = self.facts(digest)
        others = () if old is None else tuple(r for r in old.repositories if r != repository)
        facts = BlobFacts(
            descriptor.size,
            descriptor.media_type,
            toc_digest or (None if old is None else old.toc_digest),
            (repository, *others)[:_REPOSITORIES_PER_BLOB],
        )
        if facts == old:
            return
        self._facts[digest] = facts
        gone = self._facts.popitem(last=False)[0] if len(self._facts) > _FACTS else None

        def run(catalog: Catalog) -> None:
            catalog.put_facts(digest, facts)
            if gone is not None:
                catalog.remove_facts(gone)

        await self._persist(run)
