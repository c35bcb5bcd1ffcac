"""Manifests and tags: from memory, from peers, from the upstream; and what they teach.

A manifest asked for by digest may come from anyone, because its bytes prove themselves. A tag is
the upstream's to say; what it said is remembered, and answers while the upstream fails. Every
manifest that passes teaches the size, the registry and the table-of-contents digest of its layers:
lazy snapshotters later ask for layers by digest alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from p2pcache.core.claims import Cut
from p2pcache.core.errors import (
    BlobUnavailable,
    FormatError,
    SourceError,
)
from p2pcache.core.model import Descriptor, Digest, Manifest, Repository, Tag, TagFact
from p2pcache.core.oci import parse_manifest, toc_digest_of
from p2pcache.metrics import Metrics
from p2pcache.mirror.obtaining import obtain
from p2pcache.ports import Memory, Neighbours, Upstream
from p2pcache.tasks import shared_future

logger = logging.getLogger(__name__)

_PATIENCE_S: Final = 4.0


class Manifests:
    """Answers for manifests and tags. *now* is Unix time: tags are remembered over restarts."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        memory: Memory,
        neighbours: Neighbours,
        upstream: Upstream,
        metrics: Metrics,
        *,
        tag_max_age_s: float,
        now: Callable[[], float],
    ) -> None:
        self._tasks = tasks
        self._fetching: dict[Digest, asyncio.Future[Manifest]] = {}
        self._memory = memory
        self._neighbours = neighbours
        self._upstream = upstream
        self._metrics = metrics
        self._tag_max_age_s = tag_max_age_s
        self._now = now

    async def get(
        self, digest: Digest, repository: Repository | None, accept: Sequence[str]
    ) -> Manifest:
        """Return the manifest that *digest* names. Raises `BlobUnavailable`."""
        manifest = await self._memory.manifest(digest)
        if manifest is None:
            manifest = await asyncio.shield(self._start(digest, repository, accept))
        if repository is not None:
            await self._learn(repository, manifest)
        return manifest

    def under_way(self, digest: Digest) -> asyncio.Future[Manifest] | None:
        """Return the end of a fetch of a manifest, if there is one."""
        return self._fetching.get(digest)

    def _start(
        self, digest: Digest, repository: Repository | None, accept: Sequence[str]
    ) -> asyncio.Future[Manifest]:
        """Fetch a manifest, once however many clients ask for it."""
        done = self._fetching.get(digest)
        if done is None:
            done = self._fetching[digest] = shared_future()
            self._tasks.create_task(self._fetch(digest, repository, accept, done))
        return done

    async def _fetch(
        self,
        digest: Digest,
        repository: Repository | None,
        accept: Sequence[str],
        done: asyncio.Future[Manifest],
    ) -> None:
        try:
            manifest = await obtain(
                Cut.of_manifest(digest),
                self._neighbours,
                self._metrics,
                lambda peer: peer.manifest(digest),
                lambda: self._from_upstream(digest, repository, accept),
            )
            await self._memory.put_manifest(manifest)
            done.set_result(manifest)
        except BlobUnavailable as error:
            found = await self._neighbours.manifest(digest)
            if found is None:
                done.set_exception(error)
            else:
                await self._memory.put_manifest(found)
                done.set_result(found)
        except Exception:  # a bug ends here, logged, and the clients get an error
            logger.exception("manifest.broken", extra={"digest": str(digest)})
        finally:
            del self._fetching[digest]
            if not done.done():
                done.set_exception(BlobUnavailable(str(digest), missing=False))

    async def get_tag(self, repository: Repository, tag: Tag, accept: Sequence[str]) -> Manifest:
        """Return the manifest that a tag points at. Raises `BlobUnavailable`."""
        try:
            manifest = await self._upstream.manifest(
                repository, tag, accept, deadline_s=self._patience_with(repository, tag)
            )
        except SourceError as error:
            descriptor = await self._recall(repository, tag, error)
            return await self.get(descriptor.digest, repository, accept)
        descriptor = Descriptor(manifest.media_type, manifest.digest, len(manifest.data))
        await self._remember(repository, tag, descriptor)
        await self._memory.put_manifest(manifest)
        await self._learn(repository, manifest)
        return manifest

    async def resolve(self, repository: Repository, tag: Tag, accept: Sequence[str]) -> Descriptor:
        """Return what a tag points at, without reading it. Raises `BlobUnavailable`."""
        try:
            descriptor = await self._upstream.resolve(
                repository, tag, accept, deadline_s=self._patience_with(repository, tag)
            )
        except SourceError as error:
            return await self._recall(repository, tag, error)
        await self._remember(repository, tag, descriptor)
        return descriptor

    async def _from_upstream(
        self, digest: Digest, repository: Repository | None, accept: Sequence[str]
    ) -> Manifest:
        if repository is None:
            raise BlobUnavailable(str(digest), missing=True, reason="its registry is unknown")
        try:
            return await self._upstream.manifest(repository, digest, accept)
        except SourceError as error:
            raise BlobUnavailable.because(str(digest), error) from error

    def _patience_with(self, repository: Repository, tag: Tag) -> float | None:
        """A tag that is remembered need not wait long for an upstream that hangs."""
        return _PATIENCE_S if self._memory.tag(repository, tag) else None

    async def _remember(self, repository: Repository, tag: Tag, descriptor: Descriptor) -> None:
        fact = TagFact(descriptor.digest, descriptor.media_type, descriptor.size, self._now())
        await self._memory.put_tag(repository, tag, fact)

    async def _recall(self, repository: Repository, tag: Tag, error: SourceError) -> Descriptor:
        """Return what the tag pointed at when somebody last knew, if the upstream just fails.

        An upstream that says that there is no such tag, or not for us, is believed.
        """
        if error.is_final:
            raise BlobUnavailable.because(f"{repository}:{tag}", error) from error
        memory, fact = "own", self._memory.tag(repository, tag)
        age = self._now() - fact.seen_at if fact else float("inf")
        found = Descriptor(fact.media_type, fact.digest, fact.size) if fact else None
        if age > self._tag_max_age_s:
            news = await self._neighbours.tag(repository, tag)
            if news is None or news.age_s > self._tag_max_age_s:
                raise BlobUnavailable.because(f"{repository}:{tag}", error) from error
            memory, age = "peer", news.age_s
            found = Descriptor(news.media_type, news.digest, news.size)
        assert found is not None
        self._metrics.stale_tags.labels(memory).inc()
        logger.warning(
            "tag.stale",
            extra={
                "tag": f"{repository}:{tag}",
                "digest": str(found.digest),
                "age_s": round(age),
                "memory": memory,
                "reason": error.reason,
            },
        )
        return found

    async def _learn(self, repository: Repository, manifest: Manifest) -> None:
        try:
            content = parse_manifest(manifest.data)
        except FormatError as error:
            # Not ours to refuse: an artifact of a kind that we do not know is served all the same.
            logger.info(
                "manifest.opaque", extra={"digest": str(manifest.digest), "reason": str(error)}
            )
            return
        for blob in content.blobs:
            await self._memory.put_facts(repository, blob, toc_digest_of(blob))
