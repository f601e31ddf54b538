"""The program: an SSA graph over typed values, a weight table, resources and a model spec."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from .resources import Resource
from .types import Sym, SymbolRange, TensorType

if TYPE_CHECKING:
    import torch

Literal = int | float | bool
Attr = None | bool | int | float | str | tuple["Attr", ...]
"""What an attribute may hold; lists are tuples, enumerations their names."""


@dataclass(frozen=True, slots=True)
class Value:
    """One SSA value; equality is by name and type, names are unique in a program."""

    name: str
    type: TensorType

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True, slots=True)
class WeightRef:
    """A weight used as an operand; the table in the program holds its definition."""

    name: str

    def __str__(self) -> str:
        return f"@{self.name}"


Operand = Value | WeightRef | Literal
"""What a node may read: a value, a weight, or a literal scalar."""


def exact_key(thing: Operand | Attr) -> Hashable:
    """A key that two operands or attributes share only where they are the same thing.

    Python holds 1, 1.0 and True for equal, and 0.0 and -0.0; programs tell them apart. NaN is
    equal to itself.
    """
    if isinstance(thing, tuple):
        return ("tuple", *map(exact_key, thing))
    if isinstance(thing, float):
        return ("float", thing.hex())
    return (type(thing).__name__, thing)


def exact_attrs(attrs: Mapping[str, Attr]) -> Hashable:
    """The same for attributes by name; their order counts for nothing."""
    return frozenset((name, exact_key(value)) for name, value in attrs.items())


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. `layer` is the decoder layer it came from, `source` where in the model.

    Nodes are equal where all but their sources are, literals and attributes by `exact_key`.
    """

    op: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Value, ...]
    attrs: Mapping[str, Attr] = field(default_factory=dict)
    layer: int | None = None
    source: str | None = field(default=None, compare=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Node):
            return NotImplemented
        return (
            (self.op, self.outputs, self.layer) == (other.op, other.outputs, other.layer)
            and tuple(map(exact_key, self.inputs)) == tuple(map(exact_key, other.inputs))
            and exact_attrs(self.attrs) == exact_attrs(other.attrs)
        )

    @property
    def output(self) -> Value:
        """The only output of a node that has one."""
        (value,) = self.outputs
        return value

    def values(self) -> tuple[Value, ...]:
        """The SSA values among the inputs, in order."""
        return tuple(v for v in self.inputs if isinstance(v, Value))

    def weights(self) -> tuple[WeightRef, ...]:
        """The weights among the inputs, in order."""
        return tuple(v for v in self.inputs if isinstance(v, WeightRef))


@dataclass(frozen=True, slots=True)
class WeightExpr:
    """How a weight comes to be: a small expression over checkpoint tensors and other weights.

    `op` is one of the entries of `ir/weights.py` (`checkpoint`, `data`, `concat`, `stack`,
    `slice`, `transpose`, `reshape`, `cast`, `mul`, `add`, `pack`, ...); `inputs` are nested
    expressions; `attrs` are its constants.
    """

    op: str
    inputs: tuple[WeightExpr, ...] = ()
    attrs: Mapping[str, Attr] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightExpr):
            return NotImplemented
        same = self.op == other.op and self.inputs == other.inputs
        return same and exact_attrs(self.attrs) == exact_attrs(other.attrs)


@dataclass(frozen=True, slots=True)
class Weight:
    """An entry of the weight table: type, definition, and (for `data`) its loader."""

    name: str
    type: TensorType
    expr: WeightExpr


WeightLoader = Callable[[str], "torch.Tensor"]
"""Reads one checkpoint tensor (`checkpoint`) or constant (`data`) by name, lazily."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What everyone downstream may know of the model; no architecture-specific field.

    `dtype` is the element type that its matrices are to be held in, and by default its keys and
    values; what is computed is float32. None: no other than the program's values have.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    windows: tuple[int | None, ...] = ()
    num_parameters: int = 0
    dtype: str | None = None


EMPTY_SPEC = ModelSpec("none", 0, 0, 0, 0, 0, 0, 0)
"""The spec of a program that stands for no model, as tests write them."""


STEP_INPUTS: Final = {"input_ids": "T", "positions": "T", "logits_index": "R"}
"""The names of the inputs that every step has arrays for, each with its only dimension."""

LOGITS: Final = "logits"
"""The name of the output from which tokens are drawn, `[R, V]`."""

HIDDEN: Final = "hidden"
"""The name of the output with the hidden states that enter the head, `[R, H]`."""


@dataclass(frozen=True, slots=True)
class Program:
    """A whole model step. Immutable: a pass builds another one (see `ir/builder.py`).

    The names of inputs are those of their values. `output_names` has a name for each output, or is
    empty: the outputs are then LOGITS and HIDDEN by their places, as in text of before there were
    names. `loaders` reads the leaves of weight expressions, and is no part of equality or text.
    """

    name: str
    symbols: Mapping[str, SymbolRange]
    inputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]
    weights: Mapping[str, Weight]
    spec: ModelSpec
    phase: str = "captured"
    resources: tuple[Resource, ...] = ()
    attrs: Mapping[str, Attr] = field(default_factory=dict)
    loaders: Mapping[str, WeightLoader] = field(default_factory=dict, compare=False, repr=False)
    output_names: tuple[str, ...] = ()

    def output(self, name: str) -> Value | None:
        """The output of that name; None where there is none."""
        return self.named_outputs().get(name)

    def names_of_outputs(self) -> tuple[str, ...]:
        """A name for each output; those beyond the names go by the names of their values.

        A pass may make one value of two outputs: the second then has its place added to the name.
        """
        if self.output_names:
            return self.output_names
        names = [LOGITS, HIDDEN][: len(self.outputs)]
        for place, value in enumerate(self.outputs[2:], start=2):
            name = value.name
            while name in names:
                name = f"{name}_{place}"
            names.append(name)
        return tuple(names)

    def named_outputs(self) -> dict[str, Value]:
        """The outputs by name, in order. A program in which two have the same is not valid."""
        return dict(zip(self.names_of_outputs(), self.outputs, strict=True))

    def with_nodes(self, nodes: tuple[Node, ...], **changes: Any) -> Program:
        """The same program with other nodes (and other fields, where given)."""
        return replace(self, nodes=nodes, **changes)

    def producers(self) -> dict[str, Node]:
        """Value name -> the node that makes it."""
        return {value.name: node for node in self.nodes for value in node.outputs}

    def consumers(self) -> dict[str, list[Node]]:
        """Value name -> the nodes that read it, in order, once each."""
        users: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(value.name for value in node.values()):
                users.setdefault(name, []).append(node)
        return users

    def operand_type(self, operand: Operand) -> TensorType | Literal:
        """The type of a value or weight; a literal is its own."""
        if isinstance(operand, Value):
            return operand.type
        if isinstance(operand, WeightRef):
            return self.weights[operand.name].type
        return operand


def further_inputs(program: Program) -> dict[str, Value]:
    """The inputs beside those that every step has, by name, sorted."""
    named = {value.name: value for value in program.inputs}
    return {name: named[name] for name in sorted(named) if name not in STEP_INPUTS}


def further_outputs(program: Program) -> dict[str, Value]:
    """The outputs beside logits and hidden states, by name, sorted."""
    named = program.named_outputs()
    return {name: named[name] for name in sorted(named) if name not in (LOGITS, HIDDEN)}


def further_symbols(program: Program) -> tuple[str, ...]:
    """The symbols but T and R that inputs have in their shapes, sorted: their sizes are known."""
    dims = (dim for value in program.inputs for dim in value.type.shape)
    names = {dim.name for dim in dims if isinstance(dim, Sym)}
    return tuple(sorted(names - {"T", "R"}))


def hidden_width(program: Program) -> int | None:
    """Elements of a row of hidden states; None where no output has them."""
    return _row_width(program.output(HIDDEN))


def vocabulary_size(program: Program) -> int | None:
    """Elements of a row of logits; None where no output has them."""
    return _row_width(program.output(LOGITS))


def _row_width(value: Value | None) -> int | None:
    width = value.type.shape[-1] if value is not None and value.type.shape else None
    return width if isinstance(width, int) else None
