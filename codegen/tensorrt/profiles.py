"""The sizes of steps that an engine is built for: decode buckets, and chunks of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ...ir.errors import UsageError
from ...ir.program import Program
from ...ir.tensorrt_engine import StepProfile
from .options import TensorrtOptions

_USUAL_CHUNK_ROWS: Final = 1
"""Prompts in a step that a profile of chunks is tuned for."""

Extents = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""The least, usual and greatest shape of an input."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The most of a step of a program."""

    tokens: int
    logit_rows: int
    sequences: int
    context: int

    @classmethod
    def of(cls, program: Program) -> StepLimits:
        """Those of a program. No step has more sequences than tokens, or than rows of logits."""
        tokens, rows = (program.symbols[name].high for name in ("T", "R"))
        return cls(tokens, rows, min(tokens, rows), program.spec.max_context or tokens)


def step_profiles(limits: StepLimits, options: TensorrtOptions) -> tuple[StepProfile, ...]:
    """One for each decode bucket, then one for each size of chunks, in ascending order.

    UsageError for an option beyond the limits.
    """
    buckets = options.decode_buckets or _powers(limits.sequences)
    chunks = options.chunk_profiles or [limits.tokens]
    _check("decode_buckets", buckets, limits.sequences, "sequences in a step")
    _check("chunk_profiles", chunks, limits.tokens, "tokens in a step (runtime.step_tokens)")
    # Whatever is not in the options, the largest step must have a profile.
    decode = sorted({*buckets, limits.sequences})
    chunked = sorted({*chunks, limits.tokens})
    return (
        *(StepProfile(True, n, 1, n, min(n, limits.logit_rows)) for n in decode),
        *(
            StepProfile(
                False,
                min(n, limits.sequences),
                min(n, limits.context),
                n,
                min(n, limits.logit_rows),
            )
            for n in chunked
        ),
    )


def input_extents(
    profile: StepProfile, kind: str, shape: Sequence[int], longest: int
) -> Extents | None:
    """What a profile says of an input of a kind (its name without that of a group).

    None for an input of the same shape in every step.
    """
    if all(size >= 0 for size in shape):
        return None
    rows = _extent(profile, profile.rows, _USUAL_CHUNK_ROWS)
    tokens = _extent(profile, profile.tokens, profile.tokens)
    logits = _extent(profile, profile.logit_rows, _USUAL_CHUNK_ROWS)
    queries = _extent(profile, profile.queries, profile.queries)
    keys = (1, max(1, longest // 2), longest)
    sizes = {
        "row_of_padded": (rows, queries),
        "write_at": (rows,),
        "key_places": (keys,),
        "logits_index": (logits,),
        "kv": (rows, *(((size,) * 3) for size in shape[1:])),
    }.get(kind, (tokens,))
    least, usual, most = (tuple(size[i] for size in sizes) for i in range(3))
    return least, usual, most


def _extent(profile: StepProfile, most: int, usual: int) -> tuple[int, int, int]:
    return (most, most, most) if profile.decode else (1, min(usual, most), most)


def _powers(most: int) -> list[int]:
    return [*_powers_below(most), most]


def _powers_below(most: int) -> Iterator[int]:
    size = 1
    while size < most:
        yield size
        size *= 4


def _check(option: str, sizes: Sequence[int], most: int, what: str) -> None:
    for size in sizes:
        if not 1 <= size <= most:
            raise UsageError(
                f"{size} is no number of {what}: expected 1 to {most}", where=f"tensorrt.{option}"
            )
