"""Constants of a program: evaluating them, and putting new ones into the weight table."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..ir.builder import ProgramBuilder
from ..ir.errors import CheckpointError
from ..ir.ops import get_op
from ..ir.program import Node, Operand, Program, Value, WeightExpr, WeightLoader, WeightRef
from ..ir.torch_types import from_torch, to_torch
from ..ir.types import Sym, TensorType
from ..ir.weights import compute_expr, evaluate_weight

if TYPE_CHECKING:
    import torch


def is_constant_weight(program: Program, ref: WeightRef) -> bool:
    """True for a `data` entry whose value can be read now: constants of the model's code."""
    return program.weights[ref.name].expr.op == "data" and "data" in program.loaders


def read_constant(program: Program, ref: WeightRef) -> torch.Tensor:
    """The tensor of a `data` weight."""
    return evaluate_weight(program, ref.name, check_finite=False)


@dataclass(slots=True)
class ConstantTable:
    """Adds tensors to a program's weights as `data`; the key is made from the content."""

    builder: ProgramBuilder
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, hint: str, tensor: torch.Tensor) -> WeightRef:
        """A weight that holds `tensor`; equal tensors share one weight."""
        import torch

        tensor = tensor.contiguous()
        kind = TensorType(from_torch(tensor.dtype), tuple(tensor.shape))
        digest = hashlib.sha256(f"{kind}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        key = f"{hint}.{digest.hexdigest()[:16]}"
        if not self.tensors:
            known = self.builder.loaders.get("data")
            self.builder.loaders["data"] = _Chained(self.tensors, known)
        self.tensors[key] = tensor
        shape = tuple(tensor.shape)
        attrs = {"key": key, "dtype": kind.dtype.value, "shape": shape}
        return self.builder.weight(key, kind, WeightExpr("data", (), attrs))


@dataclass(frozen=True, slots=True)
class _Chained:
    """A loader that knows some tensors itself and asks another for the rest."""

    tensors: Mapping[str, torch.Tensor]
    other: WeightLoader | None

    def __call__(self, key: str) -> torch.Tensor:
        if key in self.tensors:
            return self.tensors[key]
        if self.other is None:
            raise CheckpointError("unknown constant", where=key)
        return self.other(key)


def evaluate_nodes(
    program: Program, nodes: list[Node], given: Mapping[str, torch.Tensor], tokens: int
) -> dict[str, torch.Tensor]:
    """The results of nodes that read only `given` values, constants and one another.

    Every symbol is bound to `tokens`.
    """
    import torch

    values = dict(given)
    bindings = dict.fromkeys(program.symbols, tokens)
    with torch.no_grad():
        for node in nodes:
            operands = [_operand(program, operand, values) for operand in node.inputs]
            op = get_op(node.op)
            result = op.meaning(*operands, **op.resolve(node.attrs, bindings))
            results = result if isinstance(result, tuple) else (result,)
            for value, tensor in zip(node.outputs, results, strict=True):
                assert isinstance(tensor, torch.Tensor)
                values[value.name] = tensor.to(to_torch(value.type.dtype))
    return values


def _operand(program: Program, operand: Operand, values: Mapping[str, torch.Tensor]) -> object:
    if isinstance(operand, Value):
        return values[operand.name]
    if isinstance(operand, WeightRef):
        return read_constant(program, operand)
    return operand


def computed_weight(
    builder: ProgramBuilder, op: str, inputs: Sequence[Operand], attrs: Mapping[str, Any]
) -> WeightRef | None:
    """A weight that is made when the model is compiled, by this op from these weights.

    None where an operand is a value, none is a weight, or the result has no fixed shape.
    """
    refs = [operand for operand in inputs if isinstance(operand, WeightRef)]
    known = get_op(op)
    if not refs or known.effects or any(isinstance(operand, Value) for operand in inputs):
        return None
    types = [builder.operand_type(operand) for operand in inputs]
    full = known.complete(attrs, types)
    kinds = known.infer(types, full)
    if len(kinds) != 1 or any(isinstance(dim, Sym) for dim in kinds[0].shape):
        return None
    operands = [
        builder.weights[one.name].expr if isinstance(one, WeightRef) else one
        for one in inputs
        if not isinstance(one, Value)
    ]
    expr = compute_expr(op, operands, full)
    hint = f"{refs[0].name}.{op}"
    same = builder.weights.get(hint)
    if same is not None and same.expr == expr:
        return WeightRef(hint)
    return builder.weight(builder.fresh_weight_name(hint), kinds[0], expr)


def literal_of(tensor: torch.Tensor) -> bool | int | float:
    """The one element of a 0-d tensor as a literal."""
    item = tensor.item()
    assert isinstance(item, (bool, int, float))
    return item


def reads_constants_only(program: Program, node: Node, allowed: Callable[[Value], bool]) -> bool:
    """Whether every operand is a literal, a readable constant, or an allowed value."""
    if get_op(node.op).effects:
        return False
    for operand in node.inputs:
        if isinstance(operand, Value) and not allowed(operand):
            return False
        if isinstance(operand, WeightRef) and not is_constant_weight(program, operand):
            return False
    return True
