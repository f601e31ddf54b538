"""A comparison of two executors as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ...ir.sizes import format_count
from ..explain.amounts import format_bytes, format_share
from ..explain.text import Page
from .report import Parity, Side, Speed

_NAMES = ("A", "B")


def render_parity(parity: Parity, *, width: int, color: bool) -> str:
    """The whole report."""
    page = Page(width, color)
    page.pairs("", _summary(parity))
    page.pairs("logits of B against those of A", _errors(parity))
    head = ("positions", ">rows", ">error, median", ">max", ">same top token")
    page.table("by position", head, [*_stretch_rows(parity)])
    page.table("speed and memory", ("", ">A", ">B", ">B / A"), [*_side_rows(parity)])
    return page.text()


def _summary(parity: Parity) -> Iterator[tuple[str, str]]:
    for name, side in zip(_NAMES, parity.sides, strict=True):
        yield name, f"{side.path} ({side.identity[:12]}): {_form(side)}"
    yield "model", f"{parity.model}, {parity.vocab_size} tokens"
    steps = f"{format_count(parity.steps, 'step')}, {parity.mixed_steps} with prompts and decoding"
    cached = f"{format_count(parity.cached_tokens, 'token')} found in the cache"
    yield (
        "steps",
        f"{steps}; {format_count(parity.sequences, 'sequence')} of {parity.text}; {cached}",
    )
    yield "threads", f"{parity.threads}, one executor after the other"


def _form(side: Side) -> str:
    cache = f"cache in {side.kv_type}, blocks of {side.block_size}"
    return f"{side.backend} for {side.target}, matrices in {side.matrices}, {cache}"


def _errors(parity: Parity) -> Iterator[tuple[str, str]]:
    yield "rows", f"{parity.rows}"
    if parity.not_finite:
        yield "not finite", format_count(parity.not_finite, "row")
    yield "error", f"{number(parity.error_median)} median, {number(parity.error_max)} at most"
    worst = parity.worst
    if worst.error:
        tokens = f"most likely: {worst.tokens[0]} and {worst.tokens[1]}"
        yield "largest error", f"{number(worst.error)} at position {worst.position}, {tokens}"
    yield "same top token", f"{100 * parity.top1:.1f} % of rows"


def number(error: float) -> str:
    """An error, which is hardly ever as large as one."""
    return f"{error:.1e}" if error and math.isfinite(error) else f"{error:g}"


def _stretch_rows(parity: Parity) -> Iterator[Sequence[str]]:
    for one in parity.stretches:
        yield (
            f"{one.first}" if one.first == one.last else f"{one.first}-{one.last}",
            str(one.rows),
            number(one.error_median),
            number(one.error_max),
            format_share(one.same_top, one.rows),
        )


def _side_rows(parity: Parity) -> Iterator[Sequence[str]]:
    a, b = parity.sides
    yield _speed_row("prefill, tokens/s", a.prefill, b.prefill, parity.prefill_ratio)
    yield _speed_row("decode, tokens/s", a.decode, b.decode, parity.decode_ratio)
    for name, first, second in (
        ("weights", a.weights_bytes, b.weights_bytes),
        ("a step", a.step_bytes, b.step_bytes),
        ("cache of a token", a.kv_token_bytes, b.kv_token_bytes),
        ("cache of a whole context", a.kv_sequence_bytes, b.kv_sequence_bytes),
    ):
        yield name, format_bytes(first), format_bytes(second), _ratio(first, second)


def _speed_row(name: str, first: Speed, second: Speed, ratio: float) -> Sequence[str]:
    rates = first.tokens_per_second, second.tokens_per_second
    return (name, *(f"{rate:.1f}" if rate else "-" for rate in rates), _ratio(1.0, ratio))


def _ratio(first: float, second: float) -> str:
    return f"{second / first:.2f} x" if first and second else "-"
