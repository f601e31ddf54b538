"""An exported ATen graph -> nodes of our IR; repeated layers are cloned from their template."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind

from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.errors import ProgramError, UnsupportedModelError
from ..ir.program import HIDDEN, LOGITS, Literal, Node, Operand, Program, Value, WeightRef
from ..ir.types import DType, Sym, TensorType
from .aten import CONVERTERS
from .aten.base import Context, Result
from .capture import Capture
from .complex_numbers import replace_complex_numbers
from .functional import join_filled_parts, live_nodes, replace_in_place_ops
from .layers import NotRepeatableError
from .parameters import DefineParameter, ParameterTable

_WRAPPER_PREFIX = "model."
_INPUT_NAMES = ("input_ids", "positions", "logits_index")


@dataclass(slots=True)
class _LayerTrace:
    """The nodes of one traced layer: its arguments by slot, a slice of the nodes, its result."""

    start: int
    arguments: dict[int, Operand] = field(default_factory=dict)
    end: int = 0
    result: Operand | None = None


def convert_capture(capture: Capture, name: str, define: DefineParameter) -> Program:
    """The program of a captured model, without spec; its loaders hold `data` alone.

    Inputs `input_ids [T]`, `positions [T]`, `logits_index [R]`; outputs `logits [R, V]` and
    `hidden [R, H]`, the states that enter the head, where they were found. Raises
    UnsupportedModelError for what the IR cannot say, NotRepeatableError where layers that
    looked equal are not.
    """
    return _Conversion(capture, name, define).run()


class _Conversion:
    """The state of one conversion, node after node."""

    def __init__(self, capture: Capture, name: str, define: DefineParameter) -> None:
        self.capture = capture
        self.builder = ProgramBuilder(name)
        skeleton = capture.skeleton
        self.parameters = ParameterTable(
            self.builder, skeleton.parameters, skeleton.buffers, define
        )
        self.graph = capture.exported.graph
        self.context = Context(self.builder, self.parameters, self._symbols())
        self.traces: dict[int, _LayerTrace] = {}
        self.kinds = {spec.arg.name: spec for spec in capture.exported.graph_signature.input_specs}

    def run(self) -> Program:
        join_filled_parts(self.graph)
        replace_in_place_ops(self.graph)
        replace_complex_numbers(self.graph)
        live = live_nodes(self.graph)
        for node in self.graph.nodes:
            if node not in live:
                continue
            if node.op == "output":
                self._output(node)
            else:
                self.context.results[node] = self._convert(node)
        self._check_templates()
        data = self.parameters.data
        self.builder.loaders["data"] = data.__getitem__
        return remove_dead_code(self.builder.build())

    def _symbols(self) -> dict[Any, str]:
        """Which symbols of the export count tokens and rows."""
        users = self.capture.exported.graph_signature.user_inputs
        nodes = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}
        ids, positions, index = (nodes[str(name)].meta["val"] for name in users)
        symbols = {}
        for size, name in ((ids.shape[1], "T"), (positions.shape[1], "T"), (index.shape[0], "R")):
            if isinstance(size, int):
                raise UnsupportedModelError("the model requires a fixed number of tokens")
            symbols[size.node.expr] = name
        return symbols

    def _convert(self, node: fx.Node) -> Result:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.target is operator.getitem:
            return self._getitem(node)
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, int, torch.SymFloat)):
            # Read through `Context.dim` where a shape needs it.
            return 0
        self.builder.source = _module_path(node)
        try:
            return self._call(node)
        except (UnsupportedModelError, ProgramError) as error:
            message = f"{_target_name(node)}: {error.message}"
            raise UnsupportedModelError(message, where=self._where()) from error

    def _where(self) -> str:
        layer = "" if self.builder.layer is None else f"layer {self.builder.layer}, "
        return f"{layer}{self.builder.source or 'the model'}"

    def _call(self, node: fx.Node) -> Result:
        name = _target_name(node)
        if name == "layer_begin.default":
            return self._layer_begin(node)
        if name == "layer_end.default":
            return self._layer_end(node)
        if name == "repeat_layer.default":
            return self._repeat_layer(node)
        folded = self._fold(node)
        if folded is not None:
            return folded
        converter = CONVERTERS.get(name)
        if converter is None:
            raise UnsupportedModelError("this operation is not supported")
        return converter(self.context, node)

    def _fold(self, node: fx.Node) -> Literal | None:
        """An operation on literals alone, computed now with torch."""
        inputs = node.all_input_nodes
        known = [self.context.results.get(arg) for arg in inputs]
        value = node.meta.get("val")
        if not inputs or not all(isinstance(one, (bool, int, float)) for one in known):
            return None
        if not isinstance(value, torch.Tensor) or value.dim() != 0:
            return None
        if any(not isinstance(arg.meta.get("val"), torch.Tensor) for arg in inputs):
            return None
        real = {
            arg: torch.tensor(literal, dtype=arg.meta["val"].dtype)
            for arg, literal in zip(inputs, known, strict=True)
        }
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: real[arg])
        result: Literal = node.target(*args, **kwargs).item()  # type: ignore[operator]
        return result

    def _getitem(self, node: fx.Node) -> Result:
        source, index = node.args
        results = self.context.results[source]  # type: ignore[index]
        assert isinstance(results, tuple)
        assert isinstance(index, int)
        picked = results[index]
        if picked is None:
            raise UnsupportedModelError(f"result {index} of {source} is not supported")
        return picked

    def _placeholder(self, node: fx.Node) -> Result:
        spec = self.kinds[node.name]
        fake = node.meta["val"]
        if spec.kind is InputKind.USER_INPUT:
            return self._user_input(node)
        target = str(spec.target)
        if spec.kind is InputKind.CONSTANT_TENSOR:
            constant = self.capture.exported.constants[target]
            return self._constant(target, constant, fake)
        name = target.removeprefix(_WRAPPER_PREFIX)
        buffer = self.capture.skeleton.buffers.get(name)
        if buffer is not None:
            return self._constant(name, buffer, fake)
        return self.parameters.ref(name, self.context.type_of_fake(fake))

    def _constant(self, name: str, value: Any, fake: torch.Tensor) -> Result:
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            raise UnsupportedModelError(f"constant {name} has no value")
        if value.dim() == 0:
            literal: Literal = value.item()
            return literal
        return self.parameters.hold(name, value, self.context.type_of_fake(fake))

    def _user_input(self, node: fx.Node) -> Result:
        users = [str(name) for name in self.capture.exported.graph_signature.user_inputs]
        index = users.index(node.name)
        self._declare_inputs()
        value = self.builder.inputs[index]
        shape = self.context.type_of_fake(node.meta["val"]).shape
        return self.context.reshape(value, shape)

    def _declare_inputs(self) -> None:
        """All three inputs, in order, whichever are read."""
        if self.builder.inputs:
            return
        for name, symbol in zip(_INPUT_NAMES, ("T", "T", "R"), strict=True):
            self.builder.input(name, TensorType(DType.I64, (Sym(symbol),)))

    def _output(self, node: fx.Node) -> None:
        outputs: Any = node.args[0]
        self.builder.source = None
        for name, result in zip((LOGITS, HIDDEN), outputs, strict=False):
            rows = self.context.tensor(result)
            kind = self.context.type_of(rows)
            if kind.rank != 3 or kind.shape[:2] != (1, Sym("R")):
                raise UnsupportedModelError(f"{name}: the rows are {kind}, expected [1, R, ..]")
            flat = self.context.reshape(rows, kind.shape[1:])
            if not isinstance(flat, Value):
                raise UnsupportedModelError(f"{name}: the rows do not depend on the prompt")
            self.builder.output(**{name: flat})

    def _layer_begin(self, node: fx.Node) -> Result:
        source, layer, slot = node.args
        assert isinstance(layer, int)
        assert isinstance(slot, int)
        operand = self.context.operand(source)
        trace = self.traces.setdefault(layer, _LayerTrace(len(self.builder.nodes)))
        trace.arguments[slot] = operand
        self.builder.layer = layer
        return operand

    def _layer_end(self, node: fx.Node) -> Result:
        source, layer = node.args
        assert isinstance(layer, int)
        trace = self.traces[layer]
        trace.end, trace.result = len(self.builder.nodes), self.context.operand(source)
        self.builder.layer = None
        return trace.result

    def _repeat_layer(self, node: fx.Node) -> Result:
        sources, layer = node.args
        assert isinstance(layer, int)
        stack = self.capture.stack
        assert stack is not None
        template = stack.templates[layer]
        trace = self.traces[template]
        arguments = [self.context.operand(arg) for arg in sources]  # type: ignore[union-attr]
        mapping: dict[Value, Operand] = {}
        for slot, argument in enumerate(arguments):
            old = trace.arguments.get(slot, argument)
            if not isinstance(old, Value) or mapping.setdefault(old, argument) != argument:
                raise NotRepeatableError("a layer's arguments are not those of its template")
        prefixes = f"{stack.prefix}{template}.", f"{stack.prefix}{layer}."
        # What an earlier layer handed on is the same for all of them, see `LayerStack`.
        is_handed = bool(stack.calls[template].handed)
        for original in self.builder.nodes[trace.start : trace.end]:
            operands = tuple(
                self._moved(operand, mapping, prefixes, is_handed) for operand in original.inputs
            )
            self._clone(original, operands, layer, mapping, prefixes)
        assert isinstance(trace.result, Value)
        return mapping[trace.result]

    def _clone(
        self,
        node: Node,
        operands: tuple[Operand, ...],
        layer: int,
        mapping: dict[Value, Operand],
        prefixes: tuple[str, str],
    ) -> None:
        attrs = {**node.attrs, "layer": layer} if "layer" in node.attrs else node.attrs
        source = node.source
        if source is not None and source.startswith(prefixes[0][:-1]):
            source = prefixes[1][:-1] + source[len(prefixes[0]) - 1 :]
        made = self.builder.add(node.op, operands, attrs, layer=layer, source=source)
        mapping.update(zip(node.outputs, made.outputs, strict=True))

    def _moved(
        self,
        operand: Operand,
        mapping: dict[Value, Operand],
        prefixes: tuple[str, str],
        can_read_others: bool,
    ) -> Operand:
        if isinstance(operand, Value):
            if operand not in mapping and not can_read_others:
                raise NotRepeatableError("a layer reads a value that is not its argument")
            return mapping.get(operand, operand)
        if isinstance(operand, WeightRef):
            return self.parameters.moved(operand, *prefixes) or operand
        return operand

    def _check_templates(self) -> None:
        """The first and the last layer of each signature must be the same but for names."""
        stack = self.capture.stack
        if stack is None:
            return
        for first, last in stack.checks.items():
            if list(self._shape(first)) != list(self._shape(last)):
                raise NotRepeatableError(f"layers {first} and {last} look equal and are not")

    def _shape(self, layer: int) -> Iterator[tuple[object, ...]]:
        """A traced layer with its values numbered and its own names taken away."""
        trace, stack = self.traces[layer], self.capture.stack
        assert stack is not None
        prefix = f"{stack.prefix}{layer}."
        numbers: dict[Operand, int] = {}
        for slot, argument in sorted(trace.arguments.items()):
            numbers.setdefault(argument, slot)
        yield tuple(numbers.get(argument) for _, argument in sorted(trace.arguments.items()))

        def operand_key(operand: Operand) -> object:
            if isinstance(operand, WeightRef):
                return self.parameters.relative_name(operand, prefix)
            if isinstance(operand, Value):
                return numbers.get(operand, str(operand))
            return (type(operand).__name__, operand)

        for node in self.builder.nodes[trace.start : trace.end]:
            attrs = tuple((k, v) for k, v in node.attrs.items() if k != "layer")
            yield node.op, attrs, tuple(operand_key(operand) for operand in node.inputs)
            for value in node.outputs:
                numbers[value] = -1 - len(numbers)
        assert trace.result is not None
        yield (operand_key(trace.result),)


def _target_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.__name__
    return getattr(target, "__name__", str(target))


def _module_path(node: fx.Node) -> str | None:
    """Where in the model a node stands, as `model.layers.0.mlp`."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = str(next(reversed(stack.values()))[0])
    return path.removeprefix(_WRAPPER_PREFIX) or None
