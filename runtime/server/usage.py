"""The head of every answer, and its count of tokens."""

from __future__ import annotations

import secrets
import time
from typing import Any

from ..requests.outputs import RequestOutput


def answer_head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """What an answer and each of its chunks begin with."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


class Usage:
    """Counts the tokens of all prompts and answers of one request."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self._completion = 0

    def add(self, index: int, output: RequestOutput) -> None:
        """Take in what some steps gave for prompt `index`."""
        if index not in self._prompts:  # both are known at its first output
            cached = output.metrics.num_cached_tokens
            self._prompts[index] = (len(output.prompt_token_ids), cached)
        for part in output.outputs:
            self._completion += len(part.token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompts and answers."""
        return self._completion + sum(count for count, _ in self._prompts.values())

    def as_json(self) -> dict[str, Any]:
        """The field `usage`."""
        prompt = sum(count for count, _ in self._prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._completion,
            "total_tokens": prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": sum(c for _, c in self._prompts.values())},
        }
