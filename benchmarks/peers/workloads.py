"""The workloads, as token ids: the same for every contestant, other prompts in every round."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# What a contestant may have compiled or planned for: the longest prompt with its answer, and
# the most requests at once.
MAX_CONTEXT = 1024
MAX_REQUESTS = 32


@dataclass(frozen=True, slots=True)
class Request:
    """Prompts to be answered greedily with `new` tokens each, `concurrency` of them at a time."""

    prompts: tuple[tuple[int, ...], ...]
    new: int
    concurrency: int = 1

    @property
    def new_tokens(self) -> int:
        """Tokens of all answers together."""
        return self.new * len(self.prompts)

    @property
    def shared_prefix(self) -> int:
        """Tokens that all prompts begin with; 0 for a single prompt."""
        if len(self.prompts) < 2:
            return 0
        columns = zip(*self.prompts, strict=False)
        return next((i for i, c in enumerate(columns) if len(set(c)) > 1), len(self.prompts[0]))

    def to_json(self) -> dict[str, Any]:
        """As a message to a worker carries it."""
        return {"prompts": self.prompts, "new": self.new, "concurrency": self.concurrency}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Request:
        """The inverse of `to_json`."""
        prompts = tuple(tuple(prompt) for prompt in data["prompts"])
        return Request(prompts, data["new"], data["concurrency"])


@dataclass(frozen=True, slots=True)
class Workload:
    """One column of the table. `draw` makes the request of a round, from 0 on."""

    key: str
    title: str
    draw: Callable[[int], Request]
    warm_up: Request
    batch: bool = False


def tokens(count: int, seed: int) -> tuple[int, ...]:
    """Random token ids of the shapes' vocabulary; special ones are left out."""
    draw = random.Random(seed)
    return tuple(draw.randrange(300, 30_000) for _ in range(count))


def _separate(round_: int, concurrency: int) -> Request:
    seed = 1000 * (round_ + 2) + concurrency
    return Request(tuple(tokens(128, seed + 7 * i) for i in range(32)), 64, concurrency)


def _shared(round_: int) -> Request:
    seed = 1000 * (round_ + 2) + 32
    # Its own seed: the ids of `seed` itself begin a prompt of c32, and would be found cached.
    prefix = tokens(384, seed + 500)
    prompts = tuple(prefix + tokens(16, seed + 7 * i + 1) for i in range(32))
    return Request(prompts, 16, 32)


def _shortened(request: Request) -> Request:
    return Request(request.prompts[:4], 4, request.concurrency)


FIRST_TOKEN = Request((tokens(32, 999),), 1)
"""What a fresh process is asked for."""

WAKE_UP = Request((tokens(32, 5),), 8)
"""Asked before each turn: the process was stopped, and others had the caches."""

WORKLOADS: Mapping[str, Workload] = {
    w.key: w
    for w in (
        Workload("a", "decode", lambda r: Request((tokens(32, 100 + r),), 128), WAKE_UP),
        Workload(
            "b",
            "prefill",
            lambda r: Request((tokens(512, 200 + r),), 1),
            Request((tokens(512, 6),), 1),
        ),
        Workload(
            "c8",
            "32 requests, 8 at once",
            lambda r: _separate(r, 8),
            _shortened(_separate(-1, 8)),
            batch=True,
        ),
        Workload(
            "c32",
            "32 requests at once",
            lambda r: _separate(r, 32),
            _shortened(_separate(-1, 32)),
            batch=True,
        ),
        Workload("d", "32 requests, shared prefix", _shared, _shortened(_shared(-1)), batch=True),
    )
}


def choose(names: str) -> list[Workload]:
    """The workloads of letters such as `abcd`, or of keys such as `a,c32`; in their own order.

    The letter c stands for c8 and c32. ValueError names what is none.
    """
    asked = names.split(",") if "," in names else [*names]
    if unknown := sorted(set(asked) - set("abcd") - set(WORKLOADS)):
        raise ValueError(f"no workload {unknown[0]!r}: choose from a, b, c (c8 and c32) and d")
    return [workload for key, workload in WORKLOADS.items() if key in asked or key[0] in asked]
