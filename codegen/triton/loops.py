"""Generated kernels: runs of pointwise ops and row reductions become one kernel over rows.

All values of a group share their leading dimensions (the rows); the last dimension is the group's
width or 1. A program has a row, or without reductions a part of one, in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...ir.errors import ProgramError
from ...ir.program import Node, Operand, Value
from ...ir.types import Dim, DType
from .buffers import Buffer, product
from .calls import Passed, extent
from .emitter import Emitter, power_of_two, typed, whole
from .expressions import POINTWISE_OPS, ROUNDED, SCALARS, expression, literal
from .lower.norms import row_tuning

REDUCTION_OPS = frozenset({"sum", "mean", "amax"})
LOOP_OPS = POINTWISE_OPS | REDUCTION_OPS
"""The ops that this module emits."""

_WIDEST = 16384
"""Elements of a row that a block holds at once."""
_PART = 1024
_LEAST = {DType.I64: "-9223372036854775808", DType.I32: "-2147483648"}


@dataclass(slots=True)
class _Text:
    """The text of a kernel over rows of shape `lead`, built statement by statement."""

    lead: tuple[Dim, ...]
    lines: list[str] = field(default_factory=list)
    passed: dict[str, Passed] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """The variables of values by the values' names."""
    loaded: dict[tuple[object, ...], str] = field(default_factory=dict)

    def size(self, dim: Dim) -> str:
        """A size or a stride: a number, or a parameter where it depends on the step."""
        if isinstance(dim, int):
            return str(dim)
        passed = extent(dim)
        for name, value in self.passed.items():
            if value == passed:
                return name
        name = f"s{len(self.passed)}"
        self.passed[name] = passed
        return name

    def address(self, buffer: Buffer, *, wide: bool) -> str:
        """The address of an element (or of a row's elements) of a buffer of shape lead + [width].

        Equal layers have equal text: pointers are numbered in the order of their use.
        """
        pointer = typed(buffer)
        name = next((n for n, value in self.passed.items() if value == pointer), None)
        if name is None:
            name = f"p{len(self.passed)}"
            self.passed[name] = pointer
        terms = [
            f"i{axis}" if stride == 1 else f"i{axis} * {self.size(stride)}"
            for axis, (dim, stride) in enumerate(zip(self.lead, buffer.strides, strict=False))
            if dim != 1 and stride != 0
        ]
        last = buffer.strides[-1]
        if wide and last != 0:
            terms.append("j" if last == 1 else f"j * {self.size(last)}")
        return " + ".join([name, *terms])

    def load(self, buffer: Buffer, *, wide: bool) -> str:
        """A variable with an element, or a row's elements, in the type they are computed in."""
        wide = wide and buffer.strides[-1] != 0
        key = (buffer.home, buffer.offset, buffer.strides, buffer.dtype, wide)
        if key not in self.loaded:
            name = f"x{len(self.loaded)}"
            mask = ", mask=live, other=0" if wide else ""
            text = f"tl.load({self.address(buffer, wide=wide)}{mask})"
            if buffer.dtype in ROUNDED:
                text += ".to(tl.float32)"
            elif buffer.dtype not in SCALARS:
                text += ".to(tl.int32)"
            self.lines.append(f"{name} = {text}")
            self.loaded[key] = name
        return self.loaded[key]

    def define(self, value: Value, text: str) -> str:
        """A variable with a result, rounded as its type is."""
        name = self.names.setdefault(value.name, f"v{len(self.names)}")
        if value.type.dtype in ROUNDED:
            text = f"({text}).to({ROUNDED[value.type.dtype]}).to(tl.float32)"
        self.lines.append(f"{name} = {text}")
        return name

    def store(self, buffer: Buffer, text: str, *, wide: bool) -> None:
        """Store an element, or a row's elements."""
        kind = f"{self._pointer_name(buffer)}.dtype.element_ty"
        mask = ", mask=live" if wide else ""
        line = f"tl.store({self.address(buffer, wide=wide)}, ({text}).to({kind}){mask})"
        self.lines.append(line)

    def _pointer_name(self, buffer: Buffer) -> str:
        first = Buffer(buffer.home, buffer.dtype, (), (0,), buffer.offset)
        return self.address(first, wide=False)

    def source(self, name: str, width: Dim) -> str:
        """The whole kernel."""
        rest = "r"
        head = ["r = tl.program_id(0).to(tl.int64)"]
        sizes = [(axis, dim) for axis, dim in enumerate(self.lead) if dim != 1]
        for place, (axis, dim) in enumerate(reversed(sizes)):
            if place == len(sizes) - 1:
                head.append(f"i{axis} = {rest}")
            else:
                head.append(f"i{axis} = {rest} % {self.size(dim)}")
                rest = f"({rest} // {self.size(dim)})"
        head.append("j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)")
        head.append(f"live = j < {self.size(width)}")
        body = "\n    ".join([*head, *self.lines])
        parameters = ", ".join([*self.passed, "BLOCK: tl.constexpr"])
        return f"@triton.jit\ndef {name}({parameters}):\n    {body}\n"


def lower_group(e: Emitter, nodes: Sequence[Node]) -> None:
    """Emit a group of nodes as one launch, or as several where a row is too wide for that."""
    shapes = [_row_shape(node) for node in nodes]
    width = max((shape[-1] for shape in shapes), key=e.most)
    reduced = [node for node in nodes if node.op in REDUCTION_OPS]
    widest = max([e.most(width), *(e.most(_reduced_size(e, node)) for node in reduced)])
    widths = {shape[-1] for shape in shapes} | {_reduced_size(e, node) for node in reduced}
    fits = all(shape[:-1] == shapes[0][:-1] for shape in shapes) and _reduces_last(nodes)
    fits = fits and (not reduced or len(widths - {1}) < 2)
    if reduced and len(nodes) > 1 and (widest > _WIDEST or not fits):
        for node in nodes:
            lower_group(e, [node])
        return
    if not fits:
        raise ProgramError(f"a loop over {', '.join(n.op for n in nodes)} has rows of two shapes")
    if reduced and widest > _WIDEST:
        _reduce_in_parts(e, nodes[0])
        return
    if reduced:
        width = _reduced_size(e, reduced[0]) if width == 1 else width
    text = _Text(shapes[0][:-1])
    stored = _escaping(e, nodes)
    for node in nodes:
        e.output(node.output)
    for node, shape in zip(nodes, shapes, strict=True):
        if node.op in REDUCTION_OPS:
            name = _reduce(e, text, node)
        else:
            name = _pointwise(e, text, node, shape)
        if node.output.name in stored:
            buffer = e.buffer(node.output).reshape(shape)
            assert buffer is not None, "results are dense"
            text.store(buffer, name, wide=shape[-1] != 1)
    if reduced:
        _launch(e, text, nodes, width, power_of_two(widest))
    else:
        _launch(e, text, nodes, width, min(_PART, power_of_two(widest)))


def _launch(e: Emitter, text: _Text, nodes: Sequence[Node], width: Dim, block: int) -> None:
    name = "_".join(["loop", *(node.op for node in nodes)])[:48]
    source = text.source(name, width)
    grid = [product(text.lead), extent(width, divisor=block)]
    e.launch(f"loops.{name}", grid, text.passed, {"BLOCK": block}, row_tuning(block), source=source)


def _escaping(e: Emitter, nodes: Sequence[Node]) -> frozenset[str]:
    """The names that something outside the group reads."""
    group = {id(node) for node in nodes}
    names = {value.name for value in e.program.outputs}
    for node in e.program.nodes:
        if id(node) not in group:
            names |= {value.name for value in node.values()}
    return frozenset(names)


def _row_shape(node: Node) -> tuple[Dim, ...]:
    """The result's shape with a last dimension that is the width (1 for a reduction)."""
    if node.op in REDUCTION_OPS:
        shape = node.values()[0].type.shape
        reduced = _reduced_axes(node)
        return (*(dim for axis, dim in enumerate(shape) if axis not in reduced), 1)
    return node.output.type.shape or (1,)


def _reduced_axes(node: Node) -> list[int]:
    dims = node.attrs["dims"]
    assert isinstance(dims, tuple)
    return [axis for axis in dims if isinstance(axis, int)]


def _reduces_last(nodes: Sequence[Node]) -> bool:
    """Whether what the group makes is reduced over rows only."""
    made = {value.name for node in nodes for value in node.outputs}
    return all(
        value.name not in made or _reduced_axes(node) == [value.type.rank - 1]
        for node in nodes
        if node.op in REDUCTION_OPS
        for value in node.values()
    )


def _reduced_size(e: Emitter, node: Node) -> Dim:
    shape = node.values()[0].type.shape
    return product(tuple(shape[axis] for axis in _reduced_axes(node)))


def _reduce(e: Emitter, text: _Text, node: Node) -> str:
    source = node.inputs[0]
    assert isinstance(source, Value), "a reduction reads a value"
    width = _reduced_size(e, node)
    if source.name in text.names:
        name = text.names[source.name]
    else:
        buffer = _reduced_last(e, e.buffer(source), node)
        name = text.load(buffer, wide=True)
    live = f"j < {text.size(width)}"
    dtype = source.type.dtype
    return text.define(node.output, _reduction(node.op, name, live, dtype, text.size(width)))


def _reduction(op: str, name: str, live: str, dtype: DType, width: str) -> str:
    """The text of a reduction of a block of which some elements are live."""
    if op == "amax":
        least = _LEAST.get(dtype, 'float("-inf")')
        top = f"tl.max(tl.where({live}, {name}, {least}), 0)"
        if not dtype.is_float:
            return top
        broken = f"tl.max((({live}) & ({name} != {name})).to(tl.int32), 0)"
        return f'tl.where({broken} > 0, float("nan"), {top})'
    total = f"tl.sum(tl.where({live}, {name}, 0), 0)"
    return f"{total} / {width}" if op == "mean" else total


def _reduce_in_parts(e: Emitter, node: Node) -> None:
    """One reduction over rows that no block holds: parts from left to right."""
    source = node.values()[0]
    buffer = _reduced_last(e, e.buffer(source), node)
    out = e.output(node.output).reshape(_row_shape(node))
    assert out is not None, "results are dense"
    text = _Text(_row_shape(node)[:-1])
    width = text.size(buffer.shape[-1])
    dtype = source.type.dtype
    start = _LEAST.get(dtype, 'float("-inf")') if node.op == "amax" else "0"
    text.lines.append(f"v0 = tl.zeros((BLOCK,), {SCALARS[dtype]}) + {start}")
    text.lines.append(f"for first in range(0, {width}, BLOCK):")
    address = text.address(buffer, wide=True).replace("+ j", "+ (first + j)")
    part = f"tl.load({address}, mask=first + j < {width}, other={start}).to({SCALARS[dtype]})"
    text.lines.append(f"    part = {part}")
    if node.op == "amax":
        text.lines.append("    v0 = tl.where((part > v0) | (part != part), part, v0)")
    else:
        text.lines.append("    v0 += part")
    name = text.define(node.output, _reduction(node.op, "v0", "j >= 0", dtype, width))
    text.store(out, name, wide=False)
    _launch(e, text, [node], 1, _PART)


def _reduced_last(e: Emitter, buffer: Buffer, node: Node) -> Buffer:
    """The operand with its reduced dimensions moved to the end and merged into one."""
    reduced = _reduced_axes(node)
    kept = [axis for axis in range(len(buffer.shape)) if axis not in reduced]
    moved = buffer.transpose((*kept, *reduced))
    lead = tuple(buffer.shape[axis] for axis in kept)
    if len(reduced) == 1:
        return moved
    size = product(tuple(buffer.shape[axis] for axis in reduced))
    shape = (*lead, whole(size, "a reduction over several dimensions"))
    merged = moved.reshape(shape) or e.dense(moved).reshape(shape)
    assert merged is not None, "a dense buffer takes any shape"
    return merged


def _pointwise(e: Emitter, text: _Text, node: Node, shape: tuple[Dim, ...]) -> str:
    wide = shape[-1] != 1
    operands = [_operand(e, text, operand, node, shape, wide) for operand in node.inputs]
    return text.define(node.output, expression(node, operands))


def _operand(
    e: Emitter, text: _Text, operand: Operand, node: Node, shape: tuple[Dim, ...], wide: bool
) -> str:
    if isinstance(operand, (bool, int, float)):
        return literal(operand, _literal_type(node, operand))
    if isinstance(operand, Value) and operand.name in text.names:
        return text.names[operand.name]
    return text.load(e.buffer(operand).expand(shape), wide=wide)


def _literal_type(node: Node, value: float) -> DType:
    """A literal computes in the type of its tensor neighbours."""
    values = [operand.type.dtype for operand in node.values()]
    if node.op == "where":
        values = values[1:] or [node.output.type.dtype]
    if not values:
        return node.output.type.dtype
    if isinstance(value, float) and not values[0].is_float:
        return DType.F32
    return values[0]
