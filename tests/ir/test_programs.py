"""What holds of every random program: it verifies, runs, prints, parses and converts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.ir.builder import remove_dead_code
from infc.ir.errors import ParseError
from infc.ir.interpret import Interpreter, interpret
from infc.ir.program import Program
from infc.ir.text import parse_program, print_program
from infc.ir.torch_types import to_torch
from infc.ir.types import DType, evaluate_dim
from infc.ir.verify import verify

from .strategies import programs, sample_inputs, sample_weights

ALL = (DType.F32, DType.BF16, DType.F16)


def run(program: Program) -> list[torch.Tensor]:
    return interpret(program, sample_inputs(program), sample_weights(program))


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in pairs)


@given(programs(dtypes=ALL))
def test_it_verifies_and_every_result_has_its_inferred_type(program: Program) -> None:
    verify(program)
    # The interpreter compares each result with its declared type, which the builder inferred.
    results = run(program)
    bindings = dict.fromkeys(program.symbols, 7)
    assert [(tuple(one.shape), one.dtype) for one in results] == [
        (tuple(evaluate_dim(dim, bindings) for dim in v.type.shape), to_torch(v.type.dtype))
        for v in program.outputs
    ]


@given(programs(dtypes=ALL))
def test_its_text_parses_back_to_an_equal_program(program: Program) -> None:
    text = print_program(program)
    again = parse_program(text)
    assert again == program
    assert print_program(again) == text


@given(programs())
def test_dead_code_is_not_missed(program: Program) -> None:
    clean = remove_dead_code(program)
    verify(clean)
    assert same(run(program), run(clean))
    assert remove_dead_code(clean) is clean


@given(programs(dtypes=(DType.BF16,)))
def test_an_override_runs_it_without_16_bit_rounding(program: Program) -> None:
    interpreter = Interpreter(program, sample_weights(program), dtype_override="f64")
    for result in interpreter.run(sample_inputs(program)):
        assert result.dtype == torch.float64


@given(programs(max_nodes=4), st.data())
def test_damaged_text_gives_a_parse_error_or_a_program(
    program: Program, data: st.DataObject
) -> None:
    text = print_program(program)
    at = data.draw(st.integers(0, len(text) - 1))
    length = data.draw(st.integers(0, 6))
    new = data.draw(st.text('%@{}[](),=:."\\ 0123456789aTxé\n', max_size=4))
    try:
        parse_program(text[:at] + new + text[at + length :])
    except ParseError as error:
        place = (error.line, error.column)
    else:
        place = (1, 1)
    assert min(place) >= 1


@given(programs(), st.integers(1, 9))
def test_rows_before_a_cut_do_not_see_the_rows_behind_it(program: Program, cut: int) -> None:
    """Causality of `attention`, and that every other op treats a row by itself."""
    inputs = sample_inputs(program, tokens=10)
    weights = sample_weights(program)
    whole = interpret(program, inputs, weights, dtype_override="f64")
    part = interpret(program, {n: x[:cut] for n, x in inputs.items()}, weights, None, "f64")
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[:cut], b, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("tokens", [1, 64])
@given(program=programs(max_nodes=6))
@settings(max_examples=20)
def test_it_runs_at_the_bounds_of_its_symbols(tokens: int, program: Program) -> None:
    results = interpret(program, sample_inputs(program, tokens), sample_weights(program))
    expected = [value.type.num_elements({"T": tokens}) for value in program.outputs]
    assert [result.numel() for result in results] == expected
