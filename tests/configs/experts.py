"""Mixtures of experts that infc compiles."""

from __future__ import annotations

from .base import COMMON, Config

EXPERTS: dict[str, Config] = {
    "mixtral": Config(
        "mixtral",
        {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
        "two of four experts a token",
    ),
}
