"""Emits the nodes of a program into an ONNX graph; each family of ops has a file in `lower/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ...ir.errors import ProgramError
from ...ir.ops.base import int_attr
from ...ir.program import Node, Operand, Program, Value, WeightRef
from ...ir.shapes import DimLike, parse_dim
from ...ir.types import Dim, DType, Sym, TensorType
from .graph import Graph
from .layouts import Stored
from .types import STORED, computed, is_narrow

Lowering = Callable[["Emitter", Node], None]


class Emitter:
    """A program, the graph that is made of it, and the names of its values there.

    Values of 16 bits are rounded to their type and held in float32: onnxruntime has few kernels
    for such types on a CPU, and every number of theirs is one of float32. With `keeps_narrow`, they
    are held as they are and matrices of such types multiplied in them, for engines that have
    kernels; all else is computed in float32 either way.

    `used` are the tensors of the file of weights. `exact_rows` says whether a product by grouped
    codes has rows that would lose something if they were made codes of 8 bits in groups.
    """

    def __init__(self, program: Program, *, keeps_narrow: bool = False) -> None:
        self.program = program
        self.keeps_narrow = keeps_narrow
        self.graph = Graph()
        self.used: dict[str, Stored] = {}
        self.exact_rows = False
        self._names: dict[str, str] = {}
        self._sizes: dict[str, tuple[str, int]] = {}

    def declare_inputs(self) -> None:
        """The inputs of the program, under their own names."""
        for value in self.program.inputs:
            self.graph.input(value.name, computed(value.type.dtype), value.type.shape)
            for axis, dim in enumerate(value.type.shape):
                if isinstance(dim, Sym) and (dim.scale, dim.offset) == (1, 0):
                    self._sizes.setdefault(dim.name, (value.name, axis))

    def emit(self, lowerings: Mapping[str, Lowering]) -> None:
        """All nodes in order."""
        for node in self.program.nodes:
            self.graph.enter(node)
            lowerings[node.op](self, node)

    def declare_outputs(self) -> None:
        """The outputs of the program, under the names that a step returns them by."""
        self.graph.leave("outputs")
        for name, value in self.program.named_outputs().items():
            source, wide = self.operand(value), computed(value.type.dtype)
            if value in self.program.inputs or source != name:
                self.graph.op("Identity", [source], [name])
            self.graph.output(name, wide, value.type.shape)

    # Operands

    def type_of(self, operand: Operand) -> TensorType:
        """The type of a value or weight."""
        kind = self.program.operand_type(operand)
        assert isinstance(kind, TensorType)
        return kind

    def name(self, value: Value) -> str:
        """What a value is called in the graph."""
        return self._names.get(value.name, value.name)

    def operand(self, operand: Operand, like: DType = DType.F32) -> str:
        """The name of an operand, widened; a literal is a constant of the type `like`."""
        if isinstance(operand, Value):
            name, dtype = self.name(operand), operand.type.dtype
            return self.widened(name, dtype) if self.held_narrow(dtype) else name
        if not isinstance(operand, WeightRef):
            return self.graph.const(operand, computed(like))
        return self.widened(self.stored(operand), self.type_of(operand).dtype)

    def held_narrow(self, dtype: DType) -> bool:
        """Whether values of the type are held in 16 bits."""
        return self.keeps_narrow and is_narrow(dtype)

    def rows(self, operand: Operand, dtype: DType) -> str:
        """What a matrix of a type multiplies: rounded to that type, and held as its values are."""
        if not self.held_narrow(dtype):
            return self.rounded(self.operand(operand), dtype)
        if isinstance(operand, Value) and operand.type.dtype is dtype:
            return self.name(operand)
        return self.graph.op("Cast", [self.operand(operand)], to=STORED[dtype])

    def matrix(self, operand: Operand) -> str:
        """A matrix as its products take it: as it is stored, or widened."""
        if self.held_narrow(self.type_of(operand).dtype):
            return self.stored(operand)
        return self.operand(operand)

    def stored(self, operand: Operand) -> str:
        """The name of an operand; a weight as it lies in the file."""
        if not isinstance(operand, WeightRef):
            return self.operand(operand)
        return self.store(Stored.plain(self.program.weights[operand.name]))

    def store(self, tensor: Stored) -> str:
        """The name of a tensor of the file of weights."""
        self.used[tensor.weight.name] = tensor
        return tensor.name

    def widened(self, x: str, dtype: DType) -> str:
        """What is stored in a type of 16 bits, in float32."""
        if not is_narrow(dtype):
            return x
        wide = self.graph.op("Cast", [x], to=STORED[DType.F32])
        self.graph.exact[wide] = dtype
        return wide

    def rounded(self, x: str, dtype: DType) -> str:
        """x rounded to a type of 16 bits, in float32; x itself for other types."""
        if not is_narrow(dtype) or self.graph.exact.get(x) is dtype:
            return x
        return self.widened(self.graph.op("Cast", [x], to=STORED[dtype]), dtype)

    # Results

    def give(self, node: Node, *results: str, held: DType = DType.F32) -> None:
        """The results of a node are these, rounded to their types.

        `held` is the type that floats among them are held in, where it is not float32.
        """
        for value, name in zip(node.outputs, results, strict=True):
            wanted = value.type.dtype
            if not (self.held_narrow(held) or self.held_narrow(wanted)):
                name = self.rounded(name, wanted)
            elif held is not wanted:
                narrow = wanted if self.held_narrow(wanted) else DType.F32
                name = self.graph.op("Cast", [name], to=STORED[narrow])
            self._names[value.name] = name
            dims = [dim if isinstance(dim, int) else -1 for dim in value.type.shape]
            self.graph.shaped(name, dims)

    def stand_in(self, node: Node, x: str) -> None:
        """x stands for all results of a node, whose readers know that it is none of them."""
        self._names |= {value.name: x for value in node.outputs}

    # Shapes

    def size(self, dim: Dim) -> str:
        """A dimension, as a constant or from the shape of an input: `[1]`."""
        if isinstance(dim, int):
            return self.graph.const([dim])
        if dim.name not in self._sizes:
            raise ProgramError(f"no input has {dim.name} in its shape", where=self.program.name)
        source, axis = self._sizes[dim.name]
        size = self.graph.op("Shape", [source], start=axis, end=axis + 1)
        if dim.scale != 1:
            size = self.graph.op("Mul", [size, self.graph.const([dim.scale])])
        if dim.offset:
            size = self.graph.op("Add", [size, self.graph.const([dim.offset])])
        return size

    def shape(self, dims: Sequence[DimLike], *, infer: bool = True) -> str:
        """A shape as an operand; with `infer`, its only symbolic dimension may be -1."""
        sizes = [parse_dim(dim) for dim in dims]
        symbolic = [dim for dim in sizes if isinstance(dim, Sym)]
        if not symbolic or (infer and len(symbolic) == 1):
            return self.graph.const([-1 if isinstance(dim, Sym) else dim for dim in sizes])
        return self.graph.op("Concat", [self.size(dim) for dim in sizes], axis=0)

    def fixed(self, operand: Operand, axis: int) -> int:
        """A dimension that has to be a number."""
        size = self.type_of(operand).shape[axis]
        if not isinstance(size, int):
            raise ProgramError(f"{operand} has no fixed size", where=self.program.name)
        return size


def axis_of(node: Node) -> int:
    """The attribute `dim`."""
    return int_attr(node.attrs, "dim")
