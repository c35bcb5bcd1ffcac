"""Credentials from docker's config.json and its helper programs, as they are now.

Hides the file, which Kubernetes swaps under us when a secret changes, and the programs. The rule
it keeps: a broken file or helper is logged and done without; what was read before, or no
credentials at all, is better than no reads at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import aiofiles
import aiofiles.os

from p2pcache.core.dockerconfig import (
    MAX_CONFIG_BYTES,
    MAX_HELPER_BYTES,
    Credentials,
    DockerConfig,
    parse_docker_config,
    parse_helper_answer,
    server_address,
)
from p2pcache.core.errors import FormatError
from p2pcache.core.model import Repository
from p2pcache.upstream.bounded import BoundedMap

logger = logging.getLogger(__name__)

# A helper is a process: too dear for each request, and its answers live for hours at most.
_HELPER_KEPT_S: Final = 60.0
_HELPER_FAILURE_KEPT_S: Final = 10.0
_HELPER_TIMEOUT_S: Final = 10.0
_REGISTRIES: Final = 256


@dataclass(slots=True)
class _HelperAnswer:
    """What a helper said of one registry; the lock makes all who ask at once share one answer."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    credentials: Credentials | None = None
    asked_at: float = 0.0
    until: float = 0.0


class CredentialStore:
    """Finds the credentials of a repository. Without a *path* there are none."""

    def __init__(
        self,
        path: Path | None,
        *,
        recheck_s: float = 1.0,
        helper_rest_s: float = 5.0,
        helper_timeout_s: float = _HELPER_TIMEOUT_S,
    ) -> None:
        self._path = path
        self._recheck_s = recheck_s
        self._helper_rest_s = helper_rest_s
        self._helper_timeout_s = helper_timeout_s
        self._config = DockerConfig()
        self._seen: tuple[int, ...] | None = None
        self._checked_at = float("-inf")
        self._lock = asyncio.Lock()
        self._answers: BoundedMap[tuple[str, str], _HelperAnswer] = BoundedMap(_REGISTRIES)

    async def find(self, repository: Repository) -> Credentials | None:
        """Return the credentials for *repository*, or None for none. Never raises."""
        if self._path is None:
            return None
        await self._refresh(self._path)
        helper = self._config.helper(repository.registry)
        if helper is not None:
            found = await self._ask_helper(helper, repository.registry)
            if found is not None:
                return found
        return self._config.credentials(repository)

    def forget(self, registry: str) -> None:
        """The registry refused what a helper had said: ask the helper again, unless it just was."""
        helper = self._config.helper(registry)
        if helper is None or (answer := self._answers.get((helper, registry))) is None:
            return
        # Many requests are refused at once when a password lapses; each would start a process.
        if time.monotonic() - answer.asked_at >= self._helper_rest_s:
            answer.until = 0.0

    async def _refresh(self, path: Path) -> None:
        """Read the file again if it has changed since the last look."""
        async with self._lock:
            if time.monotonic() - self._checked_at < self._recheck_s:
                return
            try:
                stat = await aiofiles.os.stat(path)
                seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
                if seen == self._seen:
                    return
                # Not a retry each time: a file that was bad stays bad until it changes.
                self._seen = seen
                async with aiofiles.open(path, "rb") as file:
                    data = await file.read(MAX_CONFIG_BYTES + 1)
                self._config = parse_docker_config(data)
                self._answers = BoundedMap(_REGISTRIES)
                logger.info("credentials.read", extra={"path": str(path)})
            except (OSError, FormatError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                if isinstance(error, FormatError) or self._seen != ():
                    logger.error("credentials.bad", extra={"path": str(path), "error": reason})
                if isinstance(error, OSError):
                    self._seen = ()
            finally:
                self._checked_at = time.monotonic()

    async def _ask_helper(self, helper: str, registry: str) -> Credentials | None:
        answer = self._answers.get_or_make((helper, registry), _HelperAnswer)
        async with answer.lock:
            if time.monotonic() >= answer.until:
                answer.asked_at = time.monotonic()
                try:
                    answer.credentials = await self._run_helper(helper, registry)
                    kept = _HELPER_KEPT_S
                except (OSError, FormatError) as error:
                    logger.error(
                        "credentials.helper_failed",
                        extra={"helper": helper, "registry": registry, "error": str(error)},
                    )
                    answer.credentials = None
                    kept = _HELPER_FAILURE_KEPT_S
                answer.until = time.monotonic() + kept
            return answer.credentials

    async def _run_helper(self, helper: str, registry: str) -> Credentials | None:
        """Run ``docker-credential-X get``, as docker-credential-helpers' README describes it.

        Raises `OSError` (a timeout is one) or `FormatError`. The program does not outlive this.
        """
        process = await asyncio.create_subprocess_exec(
            f"docker-credential-{helper}",
            "get",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=MAX_HELPER_BYTES,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(self._helper_timeout_s):
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(server_address(registry).encode() + b"\n")
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    await process.stdin.drain()  # it need not read what it does not want
                process.stdin.close()
                data = bytearray()
                while block := await process.stdout.read(64 * 1024):
                    data += block
                    if len(data) > MAX_HELPER_BYTES:
                        raise FormatError("credential helper's answer is too long")
                status = await process.wait()
        finally:
            await _end(process)
        if status != 0:
            # A helper that knows nothing of a registry exits with 1: no error, no credentials.
            logger.info("credentials.none", extra={"helper": helper, "registry": registry})
            return None
        return parse_helper_answer(bytes(data))


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill the program and what it started, if it still runs, and reap it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        await process.wait()
