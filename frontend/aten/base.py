"""What a converter is given: the exported node, its operands, and the pen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...ir.builder import ProgramBuilder
from ...ir.errors import UnsupportedModelError
from ...ir.program import Literal, Operand, Value, WeightRef
from ...ir.torch_types import from_torch, to_torch
from ...ir.types import Dim, DType, Sym, TensorType
from ..parameters import ParameterTable

Result = Operand | tuple[Operand | None, ...]
Converter = Callable[["Context", fx.Node], Result]


@dataclass(slots=True)
class Context:
    """The state of one conversion: what each exported node became, and the pen."""

    builder: ProgramBuilder
    parameters: ParameterTable
    symbols: Mapping[Any, str]
    results: dict[fx.Node, Result] = field(default_factory=dict)

    def operand(self, arg: Any) -> Operand:
        """What an argument became: a value, a weight or a literal."""
        if isinstance(arg, fx.Node):
            result = self.results.get(arg)
            if result is None or isinstance(result, tuple):
                raise UnsupportedModelError(
                    f"this use of a result of {arg.target} is not supported"
                )
            return result
        if isinstance(arg, (bool, int, float)):
            return arg
        raise UnsupportedModelError(f"argument {arg!r} is not supported")

    def tensor(self, arg: Any) -> Value | WeightRef:
        """An operand that is a tensor; a literal becomes one of no dimensions."""
        operand = self.operand(arg)
        if isinstance(operand, (Value, WeightRef)):
            return operand
        kind = self.out_type(arg) if isinstance(arg, fx.Node) else self.type_of(operand)
        return self.emit("full", shape=(), value=operand, dtype=kind.dtype)

    def weight(self, arg: Any) -> Value | WeightRef:
        """As `tensor`; a weight that is cast, as a router may do, is a weight of that type."""
        operand = self.tensor(arg)
        if isinstance(operand, WeightRef):
            return operand
        made = next((n for n in reversed(self.builder.nodes) if operand in n.outputs), None)
        if made is None or made.op != "cast" or not isinstance(made.inputs[0], WeightRef):
            return operand
        return self.parameters.cast(made.inputs[0], operand.type.dtype)

    def emit(self, op: str, *operands: Operand, **attrs: Any) -> Value:
        """One node with one result."""
        return self.builder.emit(op, *operands, **attrs)

    def type_of(self, operand: Operand) -> TensorType:
        """The type of an operand; a literal counts as 0-d."""
        kind = self.builder.operand_type(operand)
        if isinstance(kind, TensorType):
            return kind
        if isinstance(kind, bool):
            return TensorType(DType.BOOL)
        return TensorType(DType.I64 if isinstance(kind, int) else DType.F32)

    def dim(self, size: Any) -> Dim:
        """A size of the export as a dimension; UnsupportedModelError where it is not linear."""
        if isinstance(size, fx.Node):
            size = size.meta["val"]
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression.is_Integer:
            return int(expression)
        free = list(expression.free_symbols)
        if len(free) == 1 and free[0] in self.symbols:
            scale, offset = expression.coeff(free[0], 1), expression.subs(free[0], 0)
            linear = (scale * free[0] + offset - expression).expand() == 0
            if linear and scale.is_Integer and offset.is_Integer and scale >= 1:
                return Sym(self.symbols[free[0]], int(scale), int(offset))
        raise UnsupportedModelError(f"a dimension of size {expression} cannot be written")

    def type_of_fake(self, fake: torch.Tensor) -> TensorType:
        """The type of an exported tensor."""
        return TensorType(from_torch(fake.dtype), tuple(self.dim(size) for size in fake.shape))

    def out_type(self, node: fx.Node) -> TensorType:
        """The type that the export gives to a node's one result."""
        return self.type_of_fake(node.meta["val"])

    def cast(self, operand: Operand, dtype: DType) -> Operand:
        """An operand in another element type.

        A literal changes its kind alone: torch computes with the exact scalar, unrounded.
        """
        if isinstance(operand, (Value, WeightRef)):
            if self.type_of(operand).dtype is dtype:
                return operand
            return self.emit("cast", operand, dtype=dtype)
        if dtype is DType.BOOL:
            return bool(operand)
        return float(operand) if dtype.is_float else int(operand)

    def reshape(self, operand: Value | WeightRef, shape: Sequence[Dim]) -> Value | WeightRef:
        """An operand in another shape of as many elements."""
        if self.type_of(operand).shape == tuple(shape):
            return operand
        return self.emit("reshape", operand, shape=tuple(shape))


def literal_as(value: Literal, dtype: DType) -> Literal:
    """A literal as an element of a tensor of `dtype`, rounded to it."""
    if dtype is DType.BOOL:
        return bool(value)
    if not dtype.is_float:
        return int(value)
    return float(torch.tensor(float(value), dtype=to_torch(dtype)).item())


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by place or name, or its default."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def plain_argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """As `argument`, for arguments that must be known at compile time."""
    value = argument(node, index, name, default)
    if isinstance(value, fx.Node):
        raise UnsupportedModelError(f"argument {name} of {node.target} is computed")
    return value


def axis_of(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim % rank if rank else 0
