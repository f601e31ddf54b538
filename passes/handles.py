"""What a user's replacement computes with: operands that arithmetic and `ops` add nodes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

from ..ir.errors import UsageError
from ..ir.ops import get_op
from ..ir.program import Literal, Node, Operand, Program, Value, WeightRef
from ..ir.types import DType, TensorType
from .match import Match, NodeEmitter
from .patterns import OpPattern

_EMITTER: ContextVar[NodeEmitter | None] = ContextVar("emitter", default=None)


@dataclass(frozen=True, slots=True)
class Handle:
    """An operand of a match; arithmetic on it adds nodes while a replacement is traced.

    `node` is the one that made a value, or that reads a weight; None for inputs and literals.
    """

    operand: Operand
    kind: TensorType | Literal
    node: Node | None = None

    @property
    def type(self) -> TensorType:
        """Its tensor type; UsageError for a literal."""
        if not isinstance(self.kind, TensorType):
            raise UsageError(f"the literal {self.kind} has no tensor type")
        return self.kind

    @property
    def shape(self) -> tuple[Any, ...]:
        """Its dimensions: sizes and symbols."""
        return self.type.shape

    @property
    def dtype(self) -> DType:
        """Its element type."""
        return self.type.dtype

    @property
    def is_weight(self) -> bool:
        """Whether it is a weight of the model."""
        return isinstance(self.operand, WeightRef)

    @property
    def name(self) -> str | None:
        """The name of the weight or value in the program; None for a literal.

        Weights are called as in the checkpoint until a pass merges them.
        """
        return self.operand.name if isinstance(self.operand, (Value, WeightRef)) else None

    @property
    def layer(self) -> int | None:
        """The decoder layer of the node that made it, or that reads it if it is a weight.

        None for what is in no layer: inputs, the embedding, the last norm, the head.
        """
        return self.node.layer if self.node else None

    @property
    def module(self) -> str | None:
        """The path of the module of the same node in the model: `model.layers.0.mlp.up_proj`."""
        return self.node.source if self.node else None

    def __add__(self, other: object) -> Handle:
        return _emit("add", (self, other), {})

    def __radd__(self, other: object) -> Handle:
        return _emit("add", (other, self), {})

    def __mul__(self, other: object) -> Handle:
        return _emit("mul", (self, other), {})

    def __rmul__(self, other: object) -> Handle:
        return _emit("mul", (other, self), {})

    def __sub__(self, other: object) -> Handle:
        return _emit("sub", (self, other), {})

    def __rsub__(self, other: object) -> Handle:
        return _emit("sub", (other, self), {})

    def __truediv__(self, other: object) -> Handle:
        return _emit("div", (self, other), {})

    def __rtruediv__(self, other: object) -> Handle:
        return _emit("div", (other, self), {})

    def __pow__(self, other: object) -> Handle:
        return _emit("pow", (self, other), {})

    def __neg__(self) -> Handle:
        return _emit("neg", (self,), {})


class _Ops:
    """All ops as functions. In a pattern they match nodes, in a replacement they create nodes.

    Operands are positional and attributes are keywords: `ops.softmax(x, dim=-1)`. In a pattern,
    `...` after the operands matches any values of the attributes that are not mentioned, and
    `dim=...` any value of this attribute.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        get_op(name)  # an unknown op is named here, with the nearest one

        def call(*operands: Any, **attrs: Any) -> Any:
            if _EMITTER.get() is not None:
                return _emit(name, operands, attrs)
            any_attrs = bool(operands) and operands[-1] is ...
            return OpPattern(
                name, operands[:-1] if any_attrs else operands, attrs, any_attrs=any_attrs
            )

        return call


ops = _Ops()


@contextmanager
def emitting(emitter: NodeEmitter) -> Iterator[None]:
    """Lets ops add nodes, as long as a replacement is traced."""
    token = _EMITTER.set(emitter)
    try:
        yield
    finally:
        _EMITTER.reset(token)


def _emit(op: str, operands: tuple[Any, ...], attrs: dict[str, Any]) -> Handle:
    emitter = _EMITTER.get()
    if emitter is None:
        raise UsageError(f"{op} is called on a value outside a replacement")
    if any(isinstance(given, EllipsisType) for given in (*operands, *attrs.values())):
        raise UsageError(f"{op}: `...` stands for anything in a pattern, not in a replacement")
    plain = [o.operand if isinstance(o, Handle) else o for o in operands]
    result = emitter.compute(op, *plain, **attrs)
    made = emitter.builder.nodes[-1] if isinstance(result, Value) else emitter.root
    return Handle(result, emitter.type_of(result), made)


def handles(match: Match, names: tuple[str, ...], program: Program) -> list[Any]:
    """The captures as a user's function takes them: operands as handles, attributes plain."""
    result: list[Any] = []
    for name in names:
        found = match.captures.get(name)
        if isinstance(found, (Value, WeightRef)):
            kind = program.operand_type(found)
            result.append(Handle(found, kind, _origin(match, found)))
        else:
            result.append(found)
    return result


def _origin(match: Match, operand: Value | WeightRef) -> Node | None:
    if isinstance(operand, Value):
        return match.producers.get(operand.name)
    readers = [node for node in match.nodes if operand in node.weights()]
    return readers[0] if readers else match.root
