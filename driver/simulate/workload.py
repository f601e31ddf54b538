"""What is asked: requests at random times, or those of a trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from ...ir.errors import UsageError

_MOST_MILLISECONDS = 1e15  # of a trace: beyond, parts of a second would be lost


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: when it comes, its prompt as digests of its full blocks, and its answer."""

    at: float
    prompt_tokens: int
    output_tokens: int
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests in order of their arrival; digests are of blocks of so many tokens."""

    asked: Sequence[Asked]
    block_size: int

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.asked) / max(self.asked[-1].at, 1e-9)

    @property
    def mean_output(self) -> float:
        """Tokens of an answer."""
        return sum(each.output_tokens for each in self.asked) / len(self.asked)

    @property
    def mean_prompt(self) -> float:
        """Tokens of a prompt."""
        return sum(each.prompt_tokens for each in self.asked) / len(self.asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What requests look like: lengths are means, and vary by half of it either way.

    Of the tokens of a prompt, `prefix_tokens` are one of `num_prefixes`, all as likely.
    """

    prompt_tokens: int = 128
    output_tokens: int = 64
    num_prefixes: int = 0
    prefix_tokens: int = 0


def random_workload(rate: float, count: int, mix: Mix, *, block_size: int, seed: int) -> Workload:
    """`count` requests that come independently of each other, `rate` of them a second."""
    # So that no time is infinite: the longest that is drawn is some 40 times the mean.
    if not 1e-9 <= rate <= 1e9 or count < 1:
        raise UsageError(f"{count} requests, {rate:g} a second", hint="use 1e-9 to 1e9 a second")
    if mix.prefix_tokens >= mix.prompt_tokens and mix.num_prefixes:
        raise UsageError(
            f"prefixes of {mix.prefix_tokens} tokens leave nothing of prompts of"
            f" {mix.prompt_tokens}",
            where="--prefix-tokens",
        )
    draw, at, asked = Random(seed), 0.0, []
    own = mix.prompt_tokens - (mix.prefix_tokens if mix.num_prefixes else 0)
    for number in range(count):
        at += draw.expovariate(rate)
        length = _about(own, draw)
        shared: list[bytes] = []
        if mix.num_prefixes:
            length += mix.prefix_tokens
            name = draw.randrange(mix.num_prefixes)
            whole = mix.prefix_tokens // block_size
            shared = [b"p%d:%d" % (name, index) for index in range(whole)]
        rest = range(len(shared), length // block_size)
        digests = (*shared, *(b"r%d:%d" % (number, index) for index in rest))
        asked.append(Asked(at, length, _about(mix.output_tokens, draw), digests))
    return Workload(asked=asked, block_size=block_size)


def _about(mean: int, draw: Random) -> int:
    return max(1, round(mean * draw.uniform(0.5, 1.5)))


def read_trace(path: Path, *, block_size: int = 512) -> Workload:
    """A file of JSON lines, as Mooncake's published traces are.

    Each has `timestamp` in milliseconds, `input_length`, `output_length` and `hash_ids`, one for
    each block of the prompt. Times count from the first. UsageError for anything else.
    """
    asked = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                asked.append(_asked(line, f"{path}:{number}", block_size))
    if not asked:
        raise UsageError("there is no request in it", where=str(path))
    asked.sort(key=lambda each: each.at)
    begin = asked[0].at
    asked = [replace(each, at=each.at - begin) for each in asked]
    return Workload(asked=asked, block_size=block_size)


def _asked(line: str, where: str, block_size: int) -> Asked:
    try:
        data: Any = json.loads(line)
        at, prompt, output = (data[name] for name in ("timestamp", "input_length", "output_length"))
        ids = data["hash_ids"]
        if not all(type(each) is int for each in (prompt, output, *ids)) or min(prompt, output) < 1:
            raise ValueError
        if not abs(at) < _MOST_MILLISECONDS:  # nor is it NaN
            raise ValueError
        digests = tuple(b"%d" % each for each in ids[: prompt // block_size])
        return Asked(at / 1000, prompt, output, digests)
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            "not a request",
            where=where,
            hint='write {"timestamp": 0, "input_length": 9, "output_length": 5, "hash_ids": [1]}',
        ) from None
