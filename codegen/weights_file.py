"""Writes an artifact's weights: one at a time, in the order that the code indexes them."""

from __future__ import annotations

WEIGHTS_FILE = "weights.safetensors"
