"""Symbolic shape arithmetic agrees with arithmetic on numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.ir import shapes
from infc.ir.errors import ProgramError
from infc.ir.types import Dim, DType, Sym, TensorType, evaluate_dim

SYMS = st.builds(Sym, st.sampled_from("TR"), st.integers(1, 9), st.integers(-5, 9))
DIMS: st.SearchStrategy[Dim] = st.integers(0, 9) | SYMS
BINDINGS = {"T": 17, "R": 23}


@given(DIMS)
def test_a_dimension_survives_its_spelling(dim: Dim) -> None:
    assert shapes.parse_dim(shapes.spell_dim(dim)) == dim


@given(st.builds(TensorType, st.sampled_from(DType), st.lists(DIMS, max_size=3).map(tuple)))
def test_a_type_survives_its_text(kind: TensorType) -> None:
    assert shapes.parse_type(str(kind)) == kind


@pytest.mark.parametrize(
    "text", ["", "f32", "f32[", "f33[T]", "f32[T,2]", "f32[T, ]", "f32[-1]", "f32[²]", "f32[T]]"]
)
def test_text_that_is_no_type_is_refused(text: str) -> None:
    with pytest.raises(ProgramError):
        shapes.parse_type(text)


@pytest.mark.parametrize("text", ["", "0*T", "T*2", "T+", "2T", "T+R", "-T", "T*R", "2**T"])
def test_text_that_is_no_dimension_is_refused(text: str) -> None:
    with pytest.raises(ProgramError):
        shapes.parse_dim(text)


@given(st.lists(DIMS, max_size=4))
def test_the_product_evaluates_to_the_number_of_elements(dims: list[Dim]) -> None:
    total = 0
    for names, scale in shapes.product(dims).items():
        total += scale * int(np.prod([BINDINGS[name] for name in names], dtype=int))
    assert total == int(np.prod([evaluate_dim(d, BINDINGS) for d in dims], dtype=int))


@given(DIMS, DIMS, st.sampled_from([1, -1]))
def test_sums_evaluate_to_sums(a: Dim, b: Dim, sign: int) -> None:
    result = shapes.add_dims(a, b, sign)
    if result is not None:
        wanted = evaluate_dim(a, BINDINGS) + sign * evaluate_dim(b, BINDINGS)
        assert evaluate_dim(result, BINDINGS) == wanted


def test_a_symbol_can_be_doubled_but_two_symbols_not_added() -> None:
    assert shapes.sum_dims([Sym("T"), Sym("T"), 1]) == Sym("T", 2, 1)
    with pytest.raises(ProgramError, match="T and R"):
        shapes.sum_dims([Sym("T"), Sym("R")])


@given(st.lists(st.lists(st.integers(1, 3), max_size=4), min_size=1, max_size=3))
def test_broadcasting_is_that_of_numpy(sizes: list[list[int]]) -> None:
    try:
        wanted = np.broadcast_shapes(*map(tuple, sizes))
    except ValueError:
        with pytest.raises(ProgramError):
            shapes.broadcast(sizes)
    else:
        assert shapes.broadcast(sizes) == wanted


@given(SYMS, st.integers(1, 30))
def test_binding_solves_for_the_symbol(dim: Sym, value: int) -> None:
    size = dim.evaluate({dim.name: value})
    bindings: dict[str, int] = {}
    kind = TensorType(DType.F32, (dim, 4))
    if size >= 0:
        assert shapes.bind_shape(kind, (size, 4), bindings) is None
        assert bindings == {dim.name: value}
        assert shapes.bind_shape(kind, (size + dim.scale, 4), bindings) is not None
    assert shapes.bind_shape(kind, (size, 5), {}) is not None
