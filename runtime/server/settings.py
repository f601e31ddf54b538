"""What the server may be told: names, limits, times, and what a request gets by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..sampling_params import RECOMMENDED, recommended_sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Limits of the HTTP side. Times are in seconds, sizes in bytes.

    `default_*` stand for what a request leaves out. `stall_seconds` is how long a client may
    refuse to read its stream before the request ends. `api_key` is what clients must send as
    `Authorization: Bearer KEY`; None lets everybody in. `log_requests` writes a
    line to stderr as each request ends.
    """

    model_name: str
    api_key: str | None = field(default=None, repr=False)
    max_body_bytes: int = 8 << 20
    max_prompts: int = 64
    body_seconds: float = 60.0
    stall_seconds: float = 60.0
    drain_seconds: float = 30.0
    log_requests: bool = False
    default_temperature: float = 1.0
    default_top_p: float = 1.0
    default_top_k: int = 0
    default_min_p: float = 0.0
    default_repetition_penalty: float = 1.0

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """The defaults by the names of `SamplingParams`."""
        return {name: getattr(self, f"default_{name}") for name in RECOMMENDED}


def recommended_defaults(generation: Mapping[str, Any] | None) -> dict[str, Any]:
    """The `default_*` settings that a checkpoint recommends for sampling, if it does."""
    recommended = recommended_sampling(generation)
    return {f"default_{name}": value for name, value in recommended.items()}
