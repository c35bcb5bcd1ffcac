"""``p2pcache demo``: flags, progress, output and the exit code.

Hides what is told, and where. The rule it keeps: success means that every node worked and every
file was the original; anything else is a non-zero exit code.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TextIO

from p2pcache.core.errors import P2PCacheError

if TYPE_CHECKING:
    from p2pcache.demo.report import Result

MAX_NODES: Final = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of ``p2pcache demo``."""
    parser.add_argument(
        "--nodes",
        type=_node_count,
        default=3,
        metavar="N",
        help=f"how many nodes start the image, 1 to {MAX_NODES} (default: %(default)s)",
    )
    parser.add_argument(
        "--registry-delay",
        type=_delay,
        default=20.0,
        metavar="MS",
        help="milliseconds that the demo's registry takes to answer (default: %(default)g)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document instead of the table"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo and return the exit code: 0 only if all nodes worked and nothing differed."""
    # Only the demo pays for what the demo needs: every p2pcache command declares these flags.
    import uvloop

    from p2pcache.demo.nodes import NodeFailed
    from p2pcache.demo.report import render_json, render_text

    progress = Progress(sys.stderr)
    try:
        result = uvloop.run(_run_until_terminated(args.nodes, args.registry_delay / 1000, progress))
    except NodeFailed as error:
        progress.clear()
        print(f"p2pcache demo: {error}", file=sys.stderr)
        if error.tail:
            print(f"The last that {error.node} wrote:\n{error.tail}", file=sys.stderr)
        return 1
    except P2PCacheError as error:
        progress.clear()
        print(f"p2pcache demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.clear()
        return 128 + signal.SIGINT
    except asyncio.CancelledError:
        progress.clear()
        return 128 + signal.SIGTERM
    progress.clear()
    if args.json:
        print(render_json(result))
    else:
        encoding = (sys.stdout.encoding or "ascii").lower()
        print(render_text(result, ascii_only=not encoding.startswith("utf")))
    return 1 if result.mismatches else 0


def _node_count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if not 1 <= count <= MAX_NODES:
        raise argparse.ArgumentTypeError(f"expected 1 to {MAX_NODES}, got {text!r}")
    return count


def _delay(text: str) -> float:
    try:
        delay_ms = float(text)
    except ValueError:
        delay_ms = -1.0
    if not 0 <= delay_ms <= 1000:
        raise argparse.ArgumentTypeError(f"expected 0 to 1000, got {text!r}")
    return delay_ms


@dataclass(slots=True)
class Progress:
    """Says what is going on: one line rewritten in place on a terminal, else a line each."""

    stream: TextIO
    _dirty: bool = False

    def show(self, text: str) -> None:
        """Replace what was shown before with *text*."""
        if self.stream.isatty():
            print(f"\r\x1b[2K  {text} ...", end="", file=self.stream, flush=True)
            self._dirty = True
        else:
            print(text, file=self.stream, flush=True)

    def clear(self) -> None:
        """Leave the terminal's line empty for what comes next."""
        if self._dirty:
            print("\r\x1b[2K", end="", file=self.stream, flush=True)
            self._dirty = False


async def _run_until_terminated(count: int, delay_s: float, progress: Progress) -> Result:
    """SIGTERM ends the demo as Ctrl-C does: the nodes go first, then the temporary files."""
    from p2pcache.demo.compare import compare

    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await compare(count, delay_s, progress.show)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
