"""What is asked of an engine when its speed is measured."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ...ir.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of random tokens, of which at most `concurrency` are under way at once.

    Each prompt begins with the same `shared_tokens`, and has `prompt_tokens` of its own behind.
    """

    name: str
    requests: int = 1
    shared_tokens: int = 0
    prompt_tokens: int
    new_tokens: int
    concurrency: int = 1

    @property
    def context(self) -> int:
        """Tokens of one request, the answer's included."""
        return self.shared_tokens + self.prompt_tokens + self.new_tokens

    def describe(self) -> str:
        """Sizes for people: "32 × (384 shared + 16 + 16) tokens, 32 at once"."""
        shared = f"{self.shared_tokens} shared + " if self.shared_tokens else ""
        text = f"{self.requests} × ({shared}{self.prompt_tokens} + {self.new_tokens}) tokens"
        return f"{text}, {self.concurrency} at once" if self.requests > 1 else text

    def prompts(self, seed: int, vocab_size: int) -> list[list[int]]:
        """The prompts of one round; no two rounds have a prefix in common."""
        draw = random.Random(f"{self.name} {seed}")

        def some(count: int) -> list[int]:
            return [draw.randrange(vocab_size) for _ in range(count)]

        shared = some(self.shared_tokens)
        return [shared + some(self.prompt_tokens) for _ in range(self.requests)]


WORKLOADS = (
    Workload(name="decode", prompt_tokens=32, new_tokens=128),
    Workload(name="prefill", prompt_tokens=512, new_tokens=1),
    Workload(name="batch-32", requests=32, prompt_tokens=128, new_tokens=64, concurrency=32),
    Workload(name="batch-8", requests=32, prompt_tokens=128, new_tokens=64, concurrency=8),
    Workload(
        name="shared-prefix",
        requests=32,
        shared_tokens=384,
        prompt_tokens=16,
        new_tokens=16,
        concurrency=32,
    ),
)
"""What benchmarks of infc are about: each a way in which a model is used."""
START = "start"
"""Not of an engine: a fresh process, from its start to the first token of a short prompt."""


def find_workload(name: str) -> Workload:
    """The workload of that name; UsageError lists the known ones."""
    for workload in WORKLOADS:
        if workload.name == name:
            return workload
    known = ", ".join([*(workload.name for workload in WORKLOADS), START])
    raise UsageError(f"unknown workload {name!r}", hint=f"choose one of: {known}")
