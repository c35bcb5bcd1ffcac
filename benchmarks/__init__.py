"""Measurements against the goals of the design, one question per file. Run with ``python -m``."""
