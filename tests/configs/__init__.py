"""Small models of every architecture: those that infc compiles, and those that it refuses."""

from __future__ import annotations

from .base import Config
from .dense import DENSE
from .experts import EXPERTS

CONFIGS: dict[str, Config] = {**DENSE, **EXPERTS}
"""What infc compiles, by the name of the checkpoint: a model type, perhaps with a variant."""
