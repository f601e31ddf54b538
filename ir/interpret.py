"""Running a program on the ops' meanings: the slow oracle that everything is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import ProgramError
from .ops import Kind, get_op
from .paged_state import PagedState
from .program import Node, Operand, Program, Value, WeightRef
from .shapes import bind_shape
from .torch_types import to_torch
from .types import DType, TensorType

if TYPE_CHECKING:
    import torch

WeightSource = Callable[[str], "torch.Tensor"]
"""Gives the tensor of a weight of the program's table, by name."""

NodeHook = Callable[[Node, "tuple[torch.Tensor, ...]"], None]
"""Called after each node with its results."""


@dataclass(slots=True)
class Interpreter:
    """Runs `program` with torch, one node after the other.

    `weights` gives a weight's tensor by name; `state` is what paged ops work on. With
    `dtype_override` (say `"f32"`) every floating-point input, weight, constant and cast takes that
    element type, so that a 16-bit program can be compared without its rounding. `hook` sees every
    node's results; `keep` names values that are not freed after their last use.
    """

    program: Program
    weights: WeightSource
    state: PagedState | None = None
    dtype_override: str | None = None
    hook: NodeHook | None = None
    keep: frozenset[str] = frozenset()
    values: dict[str, torch.Tensor] = field(default_factory=dict, init=False)
    bindings: dict[str, int] = field(default_factory=dict, init=False)

    @property
    def _override(self) -> DType | None:
        return DType(self.dtype_override) if self.dtype_override else None

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        *,
        upto: str | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> list[torch.Tensor]:
        """The program's outputs, or the value `upto` alone, for the given inputs by name.

        `sizes` are those of symbols, for those that no input has. ProgramError names the node
        whose result is not of its declared type, or whose meaning failed; also for inputs that do
        not fit the declared ones.
        """
        import torch

        self.values, self.bindings = {}, dict(sizes or {})
        self._bind(inputs)
        wanted = [upto] if upto is not None else [v.name for v in self.program.outputs]
        done = {value.name for value in self.program.inputs}
        with torch.no_grad():
            for node, dead in self._schedule(set(wanted)):
                if done.issuperset(wanted) and upto is not None:
                    break
                self._run_node(node)
                done.update(value.name for value in node.outputs)
                for name in dead:
                    self.values.pop(name, None)
        missing = [name for name in wanted if name not in self.values]
        if missing:
            raise ProgramError(f"no value %{missing[0]}", where=self.program.name)
        return [self.values[name] for name in wanted]

    def _bind(self, inputs: Mapping[str, torch.Tensor]) -> None:
        known = {value.name for value in self.program.inputs}
        for name in inputs:
            if name not in known:
                raise ProgramError(f"no input %{name}", where=self.program.name)
        for value in self.program.inputs:
            if value.name not in inputs:
                raise ProgramError(f"input {value} is missing", where=self.program.name)
            given = self._cast(inputs[value.name])
            self._check(value, given, "input")
            self.values[value.name] = given

    def _schedule(self, wanted: set[str]) -> Iterator[tuple[Node, list[str]]]:
        """The nodes in order, each with the values nothing reads after it."""
        last: dict[str, int] = {}
        nodes = self.program.nodes
        for i, node in enumerate(nodes):
            for value in (*node.values(), *node.outputs):
                last[value.name] = i
        dying: dict[int, list[str]] = {}
        for name, i in last.items():
            if name not in wanted and name not in self.keep:
                dying.setdefault(i, []).append(name)
        for i, node in enumerate(nodes):
            yield node, dying.get(i, [])

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._override is None or not tensor.is_floating_point():
            return tensor
        return tensor.to(to_torch(self._override))

    def _expected(self, kind: TensorType) -> DType:
        return self._override if self._override and kind.dtype.is_float else kind.dtype

    def _check(self, value: Value, tensor: torch.Tensor, what: str) -> None:
        problem = bind_shape(value.type, tensor.shape, self.bindings)
        wanted = self._expected(value.type)
        if problem is None and tensor.dtype != to_torch(wanted):
            problem = f"has element type {tensor.dtype}, declared {value.type}"
        if problem is not None:
            raise ProgramError(f"{what} {value} {problem}", where=self.program.name)

    def _operand(self, operand: Operand) -> Any:
        if isinstance(operand, Value):
            if operand.name not in self.values:
                raise ProgramError(f"{operand} is used before it is defined")
            return self.values[operand.name]
        if isinstance(operand, WeightRef):
            return self._cast(self.weights(operand.name))
        return operand

    def _run_node(self, node: Node) -> None:
        results = self._results(node)
        if len(results) != len(node.outputs):
            raise ProgramError(
                f"gives {len(results)} results, {len(node.outputs)} are declared",
                where=describe(node),
            )
        for value, tensor in zip(node.outputs, results, strict=True):
            self._check(value, tensor, f"result of {node.op}")
            self.values[value.name] = tensor
        if self.hook is not None:
            self.hook(node, results)

    def _results(self, node: Node) -> tuple[torch.Tensor, ...]:
        op = get_op(node.op)
        if op.effects and self.state is None:
            raise ProgramError("needs paged state, but none was given", where=describe(node))
        try:
            # Only the rows that are looked up are widened: a whole table may take gigabytes.
            looks_up = _looks_up_weight(node)
            operands = [
                self.weights(operand.name)
                if looks_up and isinstance(operand, WeightRef)
                else self._operand(operand)
                for operand in node.inputs
            ]
            attrs = op.resolve(node.attrs, self.bindings, self._override)
            if op.effects:
                attrs["state"] = self.state
            result = op.meaning(*operands, **attrs)
            if looks_up and not isinstance(result, tuple) and result is not None:
                result = self._cast(result)
        except (ProgramError, RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            raise ProgramError(
                f"its definition failed: {type(error).__name__}: {error}", where=describe(node)
            ) from error
        if result is None:
            return ()
        return result if isinstance(result, tuple) else (result,)


def _looks_up_weight(node: Node) -> bool:
    """Whether a node only gathers elements of a weight, by indices."""
    if get_op(node.op).kind is not Kind.GATHER or not isinstance(node.inputs[0], WeightRef):
        return False
    rest = node.inputs[1:]
    return all(isinstance(v, Value) and not v.type.dtype.is_float for v in rest)


def describe(node: Node) -> str:
    """A node in a few words for messages: its results, op, layer and source."""
    text = ", ".join(str(value) for value in node.outputs)
    text = f"{text} = {node.op}" if text else node.op
    if node.layer is not None:
        text += f" of layer {node.layer}"
    return f"{text} ({node.source})" if node.source else text


def interpret(
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    weights: WeightSource,
    state: PagedState | None = None,
    dtype_override: str | None = None,
) -> list[torch.Tensor]:
    """The program's outputs on the ops' meanings; see `Interpreter`."""
    return Interpreter(program, weights, state, dtype_override).run(inputs)
