"""A registry mirror for every node."""

__version__ = "0.1.0"
