"""Runs a rewrite on random inputs, as it was and as it is: what its author tests it with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..ir.errors import UsageError

if TYPE_CHECKING:
    from ..ir.builder import ProgramBuilder
    from ..ir.program import Operand, Program
    from ..passes.base import Pass

_SYMBOL = re.compile(r"(?<![\w.])[A-Z]\w*")


def check_rewrite(
    kind: type[Pass] | Pass,
    program: str | Program | None = None,
    *,
    matches: int | None = None,
    **operands: str | float,
) -> Program:
    """Applies a pass, checks the result, and returns the rewritten program.

    Every region that the pass changed is run before and after on random inputs and weights, and
    the results are compared within the contract of the pass. `program` is IR text. For a
    `rewrite`, it can be omitted: the program is then built from the pattern, with operands that
    are passed by name. A type (`x="bf16[T, 64]"`) is an input, a type with `@`
    (`w="@bf16[64, 64]"`) is a weight, and a number is an attribute or a literal. `matches` is the
    expected number of matches (by default, at least one).

    Raises AssertionError if the number of matches differs, and PassError if the results do.
    """
    from ..ir.text import parse_program
    from ..ir.verify import verify
    from ..passes.base import Pass, PassContext
    from ..passes.samples import with_random_weights
    from ..passes.user_code import run_guarded
    from ..passes.verification import Verifier

    one = kind if isinstance(kind, Pass) else kind()
    if program is None:
        program = _of_pattern(one, operands)
    elif operands:
        raise UsageError("pass either operands or a program, not both", where="check_rewrite")
    before = parse_program(program) if isinstance(program, str) else program
    before = with_random_weights(before)
    verify(before)
    result = run_guarded(one, before, PassContext())
    wanted = "at least once" if matches is None else f"{matches} times"
    fits = result.matches > 0 if matches is None else result.matches == matches
    misses = "; ".join(map(str, result.near_misses)) or "none"
    assert fits, f"{one.name} matched {result.matches} times, not {wanted} (near misses: {misses})"
    if result.matches:
        verify(result.program)
        Verifier().check_pass(one, before, result.program)
    return result.program


def _of_pattern(one: Pass, given: Mapping[str, str | float]) -> Program:
    """A program of the nodes that a rewrite's pattern describes."""
    from ..ir.builder import ProgramBuilder
    from ..ir.text import parse_program
    from ..passes.rewrite import RewritePass

    if not isinstance(one, RewritePass):
        raise UsageError(f"{one.name} is not a rewrite rule", hint="pass the program to run it on")
    missing = [name for name in one.parameters if name not in given]
    unknown = [name for name in given if name not in one.parameters]
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has no parameter {unknown[0]}"
        wanted = ", ".join(one.parameters)
        raise UsageError(f"the pattern {what}", where=one.name, hint=f"it takes ({wanted})")
    types = {name: kind for name, kind in given.items() if isinstance(kind, str)}
    symbols = sorted({symbol for kind in types.values() for symbol in _SYMBOL.findall(kind)})
    lines = [f"symbol {symbol}: 1..128" for symbol in symbols]
    for name, kind in types.items():
        is_weight = kind.startswith("@")
        lines.append(f"weight @{name}: {kind[1:]}" if is_weight else f"input %{name}: {kind}")
    text = "\n".join([f'program "{one.name}" phase canonical {{', *lines, "}"])
    builder = ProgramBuilder.from_program(parse_program(text, source="check_rewrite"))
    result = _emit(builder, one.pattern, _captures(builder, given))
    builder.outputs, builder.output_names = [result], []
    return builder.build()


def _captures(builder: ProgramBuilder, given: Mapping[str, str | float]) -> dict[str, Any]:
    from ..ir.program import WeightRef

    inputs = {value.name: value for value in builder.inputs}
    return {
        name: inputs.get(name) or WeightRef(name) if isinstance(kind, str) else kind
        for name, kind in given.items()
    }


def _emit(builder: ProgramBuilder, pattern: Any, captures: Mapping[str, Any]) -> Any:
    """The operand that a pattern describes; an operand that occurs twice is one value."""
    from ..passes.patterns import OpPattern, Var

    made: dict[int, Operand] = {}

    def build(part: Any) -> Any:
        if isinstance(part, Var):
            return captures[part.name]
        if not isinstance(part, OpPattern):
            return part
        if id(part) not in made:
            inputs = [build(inner) for inner in part.inputs or ()]
            attrs = {name: build(value) for name, value in part.attrs.items() if value is not ...}
            made[id(part)] = builder.emit(part.op, *inputs, **attrs)
        return made[id(part)]

    return build(pattern)
