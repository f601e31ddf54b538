"""Benchmarks stand beside the package: the root of the repository is where they are found."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
