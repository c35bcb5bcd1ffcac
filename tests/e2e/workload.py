"""What the test containers run; the image carries this file, and the host runs it for the answer.

`start` is what the images are profiled with. `read ROOT PATH...` imports other modules and hashes
every file below the paths: reads that no profile foresaw. `--pause` spreads them over time.
Standard library only.
"""

import argparse
import hashlib
import os
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=["start", "read"])
    parser.add_argument("root", nargs="?", default="/")
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two files")
    args = parser.parse_intermixed_args()
    if args.job == "start":
        import asyncio
        import http.client
        import json
        import ssl

        sys.stdout.write(f"started {json.dumps([asyncio.Lock is not None, ssl.HAS_SNI])}\n")
        sys.stdout.write(f"{http.client.HTTP_PORT}\n")
        return
    import csv
    import ctypes
    import decimal
    import email.mime.text
    import logging.config
    import multiprocessing
    import sqlite3
    import tarfile
    import unittest
    import xml.dom.minidom

    modules = [csv, ctypes, decimal, email, logging, multiprocessing, sqlite3, tarfile, unittest]
    modules.append(xml.dom.minidom)
    seen = hashlib.sha256()
    files = 0
    for path in args.paths:
        for name in sorted(_files(os.path.join(args.root, path))):
            seen.update(os.path.relpath(name, args.root).encode())
            with open(name, "rb") as file:
                seen.update(file.read())
            files += 1
            time.sleep(args.pause)
    sys.stdout.write(f"read {files} files {len(modules)} modules {seen.hexdigest()}\n")


def _files(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    return [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]


if __name__ == "__main__":
    main()
