"""One answer of a peer, as it comes in.

Hides HTTP's grammar, which is llhttp's, and waiting. The rules: whatever a peer sends is an answer
or a `ConnectionError`, and takes bounded memory either way; what is strange is an error, for peers
are nodes of ours. A reader that does not keep up holds the sender back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from httptools import (
    HttpParserCallbackError,
    HttpParserError,
    HttpParserUpgrade,
    HttpResponseParser,
)

# Our own heads have a few hundred bytes. Between two bytes of a body no more may stand, either: the
# frames of chunks, or what follows the last one.
_MAX_OVERHEAD: Final = 16 << 10
_MAX_HEADERS: Final = 64
# A socket is read no further while its reader has so much left to take. Then one more read of the
# event loop's may come, 256 KiB.
_MAX_BUFFERED: Final = 512 << 10
# What a block takes besides its bytes, so that a body in chunks of one byte is bounded, too.
_BLOCK_COST: Final = 64


class Line(Protocol):
    """The connection that an answer comes in by."""

    loop: asyncio.AbstractEventLoop
    is_paused: bool

    def pause(self) -> None:
        """Read no further for now."""

    def resume(self) -> None:
        """Read on."""


class Answer:
    """One answer. To be closed by whoever asked, read to its end or not.

    Its methods raise an `OSError` when the connection fails, or the peer sends what is no answer.
    """

    __slots__ = (
        "_blocks",
        "_buffered",
        "_close",
        "_failure",
        "_fields",
        "_fields_size",
        "_has_head",
        "_line",
        "_messages",
        "_overhead",
        "_parser",
        "_stays",
        "_waiter",
        "headers",
        "is_complete",
        "status",
    )

    def __init__(self, line: Line, close: Callable[[], None]) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        """By their names in small letters; repeated ones are joined (RFC 9110, section 5.3)."""
        self.is_complete = False
        """The whole of it came, though maybe not all of it was taken yet."""
        self._line = line
        self._close: Callable[[], None] | None = close
        self._parser: HttpResponseParser | None = HttpResponseParser(self)
        self._messages = 0
        self._fields = 0
        self._fields_size = 0
        self._stays = False
        self._has_head = False
        self._overhead = 0
        self._blocks: deque[bytes] = deque()
        self._buffered = 0
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def content_length(self) -> int | None:
        """What it says that its body has; None if that comes out in the end."""
        length = self.headers.get("content-length")
        return None if length is None else int(length)

    async def block(self) -> bytes:
        """Return the next bytes of the body, b"" at its end."""
        while not self._blocks:
            if self._failure is not None:
                raise self._failure
            if self.is_complete:
                return b""
            await self._news()
        block = self._blocks.popleft()
        self._buffered -= len(block) + _BLOCK_COST
        if self._line.is_paused and not self._blocks:
            self._line.resume()
        return block

    def close(self) -> None:
        """Let go of the connection. It is closed unless all of the answer came."""
        close, self._close = self._close, None
        self._parser = None  # Which refers to this: else only the garbage collector ends both.
        if close is not None:
            close()

    # What the connection calls.

    async def head(self) -> None:
        """Return once the status and the headers are there."""
        while not self._has_head:
            if self._failure is not None:
                raise self._failure
            await self._news()

    async def _news(self) -> None:
        waiter = self._waiter = self._line.loop.create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def feed(self, data: bytes) -> bool:
        """Take what came; say whether it makes sense so far."""
        if self._parser is None:
            return False
        self._overhead += len(data)
        try:
            self._parser.feed_data(data)
        except HttpParserCallbackError as error:
            if not isinstance(error.__context__, _Nonsense):
                raise
            self.fail(ConnectionAbortedError(f"sent {error.__context__}"))
            return False
        except (HttpParserError, HttpParserUpgrade) as error:
            self.fail(ConnectionAbortedError(f"sent what is no answer: {error}"[:200]))
            return False
        if self._overhead > _MAX_OVERHEAD and not self.is_complete:
            self.fail(ConnectionAbortedError("sent a head without an end"))
            return False
        if self._buffered > _MAX_BUFFERED:
            self._line.pause()
        if self._has_head:
            self._wake()
        return True

    def fail(self, error: Exception) -> None:
        """Nothing more will come, because of *error*."""
        if not self.is_complete and self._failure is None:
            self._failure = error
        self._wake()

    @property
    def is_reusable(self) -> bool:
        """Its connection may carry another one."""
        return self._stays and self._messages == 1

    @property
    def is_unanswered(self) -> bool:
        """Not a byte of it came."""
        return not self._messages and not self._overhead

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # What the parser calls.

    def on_message_begin(self) -> None:
        """Another one than the first answers nothing that was asked."""
        self._messages += 1

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header, if it stands in the head and not behind the body."""
        self._fields += 1
        self._fields_size += len(name) + len(value)
        if self._fields > _MAX_HEADERS or self._fields_size > _MAX_OVERHEAD:
            raise _Nonsense("too many headers")
        if self._has_head:
            return
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        before = self.headers.get(key)
        self.headers[key] = text if before is None else f"{before}, {text}"

    def on_headers_complete(self) -> None:
        """The body follows. Where it ends must be said: a peer's answers never just break off."""
        if self._has_head:
            raise _Nonsense("an answer to nothing")
        assert self._parser is not None
        self.status = self._parser.get_status_code()
        if self.status < 200:
            raise _Nonsense(f"status {self.status}")
        headers = self.headers
        if "content-length" not in headers and "transfer-encoding" not in headers:
            raise _Nonsense("an answer of unknown length")
        self._has_head = True

    def on_body(self, body: bytes) -> None:
        """Keep some of the body for the reader."""
        self._overhead = 0
        self._blocks.append(body)
        self._buffered += len(body) + _BLOCK_COST

    def on_message_complete(self) -> None:
        """That was all. Only now does the parser know whether the connection may stay."""
        self.is_complete = True
        assert self._parser is not None
        self._stays = self._parser.should_keep_alive()


class _Nonsense(Exception):
    """What the parser lets pass, but no peer of ours says."""
