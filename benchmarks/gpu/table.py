"""What a run found, as a short table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .setting import Results

_KERNELS = 6
"""Of each shape, so many kernels are shown."""


def is_wrong(found: Results) -> bool:
    """Whether a stage failed, or found something wrong."""
    return "error" in found or bool(found.get("wrong"))


def table(found: Mapping[str, Results]) -> Iterator[str]:
    """A line for each figure that matters."""
    yield ""
    for name, one in found.items():
        if "error" in one:
            yield f"{name}: FAILED: {one['error']}"
        elif "skipped" in one:
            yield f"{name}: left out: {one['skipped']}"
        elif name == "ceilings":
            rates = f"{one['read'] / 1e12:.2f} TB/s, {one['bf16'] / 1e12:.0f} Tflop/s"
            yield f"{one['device']}: {rates}"
        elif "cases" in one:
            wrong = ", ".join(one["wrong"]) or "none"
            rest = (
                f", not finished: {', '.join(one['unfinished'])}" if one.get("unfinished") else ""
            )
            yield f"{name}: {len(one['cases'])} cases, wrong: {wrong}{rest}"
        elif "decode" in one:
            yield from _times(name, one)
        else:
            yield from _lines(name, one)
    yield from ratios(found)


def ratios(found: Mapping[str, Results]) -> Iterator[str]:
    """What codes of 4 bits gain in the first decode step, and what batch invariance costs."""
    for name, one in found.items():
        shape, _, scheme = name.partition("-")
        plain = found.get(f"{shape}-none", {})
        if scheme == "int4" and "decode" in one and "decode" in plain:
            for what in [*(what for what in one["decode"] if what in plain["decode"])][:1]:
                ratio = plain["decode"][what]["ms"] / one["decode"][what]["ms"]
                yield f"{shape} decode {what}: int4 is {ratio:.2f} times as fast as bf16"
        if scheme == "none-invariant" and "decode" in one and "decode" in plain:
            for kind in ("decode", "prefill"):
                for what, timed in one[kind].items():
                    if what in plain[kind]:
                        price = 100 * (timed["ms"] / plain[kind][what]["ms"] - 1)
                        yield f"{shape} {kind} {what}: batch_invariant takes {price:+.0f} %"


def _times(name: str, one: Results) -> Iterator[str]:
    for kind in ("decode", "prefill"):
        for what, timed in one[kind].items():
            numbers: dict[str, Any] = dict(timed)
            share = f"{100 * numbers.pop('share'):.0f} % of {numbers.pop('roofline ms')} ms"
            if "of the matrix peak" in numbers:
                share += f", {100 * numbers.pop('of the matrix peak'):.0f} % of the matrix peak"
            yield f"{name} {kind} {what}: {share}; {_told(numbers)}"
    lines = one.get("launches of a decode step", {})
    for kernel, line in list(lines.items())[:_KERNELS]:
        bound = f" (roofline {line['roofline µs']})" if "roofline µs" in line else ""
        yield f"{name} {kernel}: {line['µs']} µs{bound} in {line['launches']} launches"


def _lines(name: str, one: Results) -> Iterator[str]:
    """Of a stage whose results are figures, by what they are of."""
    for kind, figures in one.items():
        if isinstance(figures, dict):
            rows = (
                figures if all(isinstance(row, dict) for row in figures.values()) else {"": figures}
            )
            for what, row in rows.items():
                row = {key: value for key, value in row.items() if key not in ("ms", "row")}
                told = _told(row) or "nothing faster"
                yield f"{' '.join(filter(None, (kind, what)))}: {told}"


def _told(numbers: Mapping[str, Any]) -> str:
    return ", ".join(f"{value} {key}" for key, value in numbers.items())
