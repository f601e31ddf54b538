"""What a backend cannot do it refuses by name, before anything is compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from infc.codegen.registry import get_backend
from infc.ir.builder import ProgramBuilder
from infc.ir.errors import ProgramError, TargetError, UsageError
from infc.ir.program import Value
from infc.ir.resources import LatentGroup, Resource, StateGroup
from infc.ir.targets import resolve_target
from infc.ir.types import DType, Sym, TensorType

T = Sym("T")


def take_ids(b: ProgramBuilder, ids: Value, x: Value) -> None:
    b.emit("take", ids, ids, dim=0)


def join_ids(b: ProgramBuilder, ids: Value, x: Value) -> None:
    b.emit("concat", ids, ids, dim=0)


def take_columns(b: ProgramBuilder, ids: Value, x: Value) -> None:
    b.emit("take", x, ids, dim=1)


def add_up(b: ProgramBuilder, ids: Value, x: Value) -> None:
    b.emit("cumsum", x, dim=0)


def soften_columns(b: ProgramBuilder, ids: Value, x: Value) -> None:
    b.emit("softmax", x, dim=0)


def double(b: ProgramBuilder, ids: Value, x: Value) -> None:
    b.emit("cast", x, dtype="f64")


def multiply_values(b: ProgramBuilder, ids: Value, x: Value) -> None:
    square = b.emit(
        "slice", b.emit("neg", b.weight("w", TensorType(DType.F32, (8, 8)))), dim=0, start=0, stop=8
    )
    b.emit("linear", x, square)


REFUSED: dict[Callable[[ProgramBuilder, Value, Value], None], str] = {
    take_ids: "step's own arrays",
    join_ids: "step's own arrays",
    take_columns: "first dimension",
    add_up: "no kernel",
    soften_columns: "last dimension",
    double: "element type f64",
    multiply_values: "must be a weight",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_cpp_refuses_with_the_reason(
    make: Callable[[ProgramBuilder, Value, Value], None],
) -> None:
    builder = ProgramBuilder("p", phase="planned")
    builder.symbol("T", 1, 64)
    ids = builder.input("input_ids", TensorType(DType.I64, (T,)))
    table = builder.weight("table", TensorType(DType.F32, (50, 8)))
    make(builder, ids, builder.emit("embedding", table, ids))
    with pytest.raises(ProgramError, match=REFUSED[make]) as caught:
        get_backend("cpp").check(builder.build(), resolve_target("native"))
    assert "cpp" in str(caught.value) and "reference" in str(caught.value)


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="openvino") as caught:
        get_backend("openvino")
    assert "cpp" in str(caught.value) and "reference" in str(caught.value)


@pytest.mark.parametrize("name", ["cpp", "reference"])
@pytest.mark.parametrize(
    "resource",
    [LatentGroup("mla", (0,), 8, 4, "f32", 16), StateGroup("scan", (0,), 64, "f32", 16)],
    ids=lambda resource: resource.kind,
)
def test_state_without_kernels_is_refused_by_its_name(name: str, resource: Resource) -> None:
    builder = ProgramBuilder("p", phase="lowered")
    builder.resources = (resource,)
    backend = get_backend(name)
    message = f"backend '{name}' cannot store the {resource.kind} group '{resource.name}'"
    with pytest.raises(ProgramError, match=message):
        backend.check(builder.build(), resolve_target("x86-64-v2"))


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_a_target_of_another_device_is_refused(name: str) -> None:
    with pytest.raises(
        TargetError, match=rf"backend {name} does not compile for sm_90 .*x86-64-v2"
    ):
        get_backend(name).find_target("sm_90")
    assert get_backend(name).find_target("native") == resolve_target("native")
