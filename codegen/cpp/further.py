"""Arrays that a program takes beside those that every step has, and sizes that come with them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from ...ir.errors import ProgramError
from ...ir.program import Program, Value, further_inputs, further_outputs, further_symbols
from ...ir.types import DType, handed_over
from .buffers import CTYPES

_SYMBOL: Final = re.compile(r"[A-Z][0-9]*")
"""What a symbol may be called: in a step, variables begin with small letters, and longer names may
be those of types and macros."""


def further_name(program: Program, value: Value) -> str:
    """What the array of an input is called in the generated function."""
    return f"in{list(further_inputs(program)).index(value.name)}"


def further_lines(program: Program) -> Iterator[str]:
    """The statements that make variables of further inputs and symbols."""
    for place, value in enumerate(further_inputs(program).values()):
        ctype = CTYPES[handed_over(value.type).dtype]
        name = further_name(program, value)
        array = f"static_cast<const {ctype}*>(s.inputs[{place}])"
        yield f"  const {ctype}* const {name} = {array};\n  (void){name};\n"
    for place, symbol in enumerate(further_symbols(program)):
        yield f"  const int64_t {symbol} = s.sizes[{place}];\n  (void){symbol};\n"


def check_further(program: Program) -> None:
    """ProgramError for an array or a symbol that generated code could not have."""
    for name, value in further_inputs(program).items():
        if value.type.dtype not in (DType.F32, DType.I32, DType.I64):
            raise ProgramError(
                f"the input {name} is {value.type}, and cpp takes f32, i32 and i64",
                where=program.name,
                hint="cast it in the program",
            )
    for name, value in further_outputs(program).items():
        if not value.type.dtype.is_float:
            raise ProgramError(
                f"the output {name} is {value.type}, and cpp gives floating-point values only",
                where=program.name,
                hint="cast it in the program",
            )
    for symbol in further_symbols(program):
        if not _SYMBOL.fullmatch(symbol):
            raise ProgramError(
                f"cpp cannot have a symbol {symbol!r}",
                where=program.name,
                hint="use a capital letter, and digits behind it",
            )
