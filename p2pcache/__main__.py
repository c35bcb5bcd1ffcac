"""The command line: flags and environment to a configuration, then off to the command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from p2pcache import __version__
from p2pcache.config import add_serve_arguments, process_environment, read_config
from p2pcache.core.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that *arguments* name; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="p2pcache",
        description="A registry mirror for every node: containers start lazily from their "
        "neighbours' chunks.",
    )
    parser.add_argument("--version", action="version", version=f"p2pcache {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="run the mirror of this node",
        description="Run the mirror of this node. Every flag has a variable; flags win.",
    )
    add_serve_arguments(serve)
    demo = commands.add_parser(
        "demo",
        help="see it work on this machine: nothing else needed",
        description="Start a registry and several nodes on this machine, and have a client on "
        "each node in turn start the same image lazily.",
    )
    # The demo's parts are of no use to a node: load them only for it.
    from p2pcache.demo import run as demonstration

    demonstration.add_arguments(demo)
    given = parser.parse_args(arguments)
    if given.command == "demo":
        return demonstration.run(given)
    try:
        config = read_config(given, process_environment())
    except ConfigError as error:
        for problem in error.problems:
            print(f"p2pcache serve: {problem}", file=sys.stderr)  # noqa: T201 - a command's answer
        return 2
    from p2pcache.app import serve as run_node

    return run_node(config)


if __name__ == "__main__":
    sys.exit(main())
