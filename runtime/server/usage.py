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
        self.completion_tokens = 0
        """Tokens of answers. May be set back, where what was added is not told after all."""

    def add(self, index: int, output: RequestOutput) -> None:
        """Take in what some steps gave for prompt `index`: where that fails, nothing of it."""
        num_tokens = sum(len(part.token_ids) for part in output.outputs)
        if index not in self._prompts:  # both are known at its first output
            cached = output.metrics.num_cached_tokens
            self._prompts[index] = (len(output.prompt_token_ids), cached)
        self.completion_tokens += num_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of prompts and answers."""
        return self.completion_tokens + sum(count for count, _ in self._prompts.values())

    def as_json(self) -> dict[str, Any]:
        """The field `usage`."""
        prompt = sum(count for count, _ in self._prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(c for _, c in self._prompts.values())},
        }
