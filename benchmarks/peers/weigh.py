"""Prints how many bytes of weights a model's matrix products read for one token.

    ENVIRONMENT/bin/python -m benchmarks.peers.weigh ENGINE MODEL

A process of its own: what it imports must not count as the contestant's memory.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main() -> None:
    """Ask the engine's module."""
    name, model = sys.argv[1:]
    print(importlib.import_module(f".engines.{name}", __package__).weigh(Path(model)))


if __name__ == "__main__":
    main()
