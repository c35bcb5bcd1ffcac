"""Decisions, without I/O: parsers, layouts, proofs, plans.

Nothing here opens a socket or a file, starts a task, reads a clock or logs. What depends on time
takes it as an argument; what needs the CPU for long is called from a thread by the shell. Beside
the standard library only packages that compute are used here (msgspec, zlib-ng, zstandard).
"""
