"""Fused loops: runs of pointwise ops and row reductions become one pass over the rows.

All values of a group share their leading dimensions (the rows); the last dimension is the group's
width or 1. Per row, neighbouring ops of full width share a loop; a reduction closes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...ir.errors import ProgramError
from ...ir.program import Literal, Node, Operand, Value
from ...ir.types import Dim, DType, TensorType
from .buffers import Buffer
from .calls import Code, c_dim, listed
from .emitter import Emitter, dtype_of, pointer
from .expressions import POINTWISE_OPS, SCALARS, expression, literal

REDUCTION_OPS = frozenset({"sum", "mean", "amax"})
LOOP_OPS = POINTWISE_OPS | REDUCTION_OPS
"""The ops that this module emits."""


@dataclass(slots=True)
class _RowCode:
    """The text of one row's work, built statement by statement."""

    emitter: Emitter
    lead: tuple[Dim, ...]
    stored: frozenset[str]
    pointers: list[Code] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    open_loop: list[str] = field(default_factory=list)
    loop_width: str = ""
    in_loop: set[str] = field(default_factory=set)
    scalars: set[str] = field(default_factory=set)
    reads: list[Buffer] = field(default_factory=list)
    writes: list[Buffer] = field(default_factory=list)
    known: dict[tuple[object, ...], str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def variable(self, value: Value) -> str:
        """The local that holds a value: numbered, so that equal layers have equal text."""
        return self.names.setdefault(value.name, f"v{len(self.names)}")

    def row_pointer(self, buffer: Buffer, *, write: bool) -> str:
        """A pointer to the row of `buffer` (of shape lead + [width]) that the loop is at."""
        key = (buffer.home, buffer.offset, buffer.strides, write)
        if key in self.known:
            return self.known[key]
        name = f"p{len(self.pointers)}"
        terms = [
            f"i{axis} * {stride}"
            for axis, (dim, stride) in enumerate(zip(self.lead, buffer.strides, strict=False))
            if dim != 1 and stride != 0
        ]
        const = "" if write else "const "
        offset = " + ".join(["", *terms])
        declared = f"{const}{buffer.ctype}* {name} = "
        self.pointers.append((declared, pointer(buffer), f"{offset};"))
        (self.writes if write else self.reads).append(buffer)
        self.known[key] = name
        return name

    def close(self) -> None:
        """End the open loop over the width."""
        if self.open_loop:
            body = " ".join(self.open_loop)
            # Rows of one call never overlap except element by element.
            self.lines.append('_Pragma("GCC ivdep")')
            self.lines.append(f"for (int64_t j = 0; j < {self.loop_width}; ++j) {{ {body} }}")
        self.open_loop, self.in_loop, self.loop_width = [], set(), ""


def lower_group(e: Emitter, nodes: Sequence[Node]) -> None:
    """Emit a group of nodes as one call."""
    shapes = [_row_shape(node) for node in nodes]
    lead = shapes[0][:-1]
    if any(shape[:-1] != lead for shape in shapes):
        raise ProgramError(f"loop over {', '.join(n.op for n in nodes)} has rows of two shapes")
    code = _RowCode(e, lead, _escaping(e, nodes) | _crossing(nodes, shapes))
    for node in nodes:
        e.output(node.output)
    for node, shape in zip(nodes, shapes, strict=True):
        if node.op in REDUCTION_OPS:
            _reduce(code, node)
        else:
            _pointwise(code, node, shape)
    code.close()
    _finish(e, code, nodes)


def _escaping(e: Emitter, nodes: Sequence[Node]) -> frozenset[str]:
    """The names that something outside the group reads."""
    group = {id(node) for node in nodes}
    names = {value.name for value in e.program.outputs}
    for node in e.program.nodes:
        if id(node) not in group:
            names |= {value.name for value in node.values()}
    return frozenset(names)


def _crossing(nodes: Sequence[Node], shapes: Sequence[tuple[Dim, ...]]) -> frozenset[str]:
    """The values that a later loop or a reduction of the same group reads back from memory."""
    segment = 0
    homes: dict[str, int] = {}
    names: set[str] = set()
    width: Dim | None = None
    for node, shape in zip(nodes, shapes, strict=True):
        wide = node.op not in REDUCTION_OPS and shape[-1] != 1
        if not wide or shape[-1] != width:
            segment += 1
        width = shape[-1] if wide else None
        names |= {v.name for v in node.values() if homes.get(v.name, segment) != segment}
        if node.op in REDUCTION_OPS:
            names |= {v.name for v in node.values()}
        if wide:
            homes[node.output.name] = segment
    return frozenset(names)


def _row_shape(node: Node) -> tuple[Dim, ...]:
    """The result's shape with a last dimension that is the width (1 for a reduction)."""
    if node.op in REDUCTION_OPS:
        shape = node.values()[0].type.shape
        reduced = _reduced_axes(node)
        return (*(dim for axis, dim in enumerate(shape) if axis not in reduced), 1)
    return node.output.type.shape or (1,)


def _reduced_axes(node: Node) -> list[int]:
    """The dimensions that a reduction takes away, counted from the front."""
    dims = node.attrs["dims"]
    assert isinstance(dims, tuple)
    rank = node.values()[0].type.rank
    return [axis % rank for axis in dims if isinstance(axis, int)]


def _reduce(code: _RowCode, node: Node) -> None:
    code.close()
    source = node.inputs[0]
    assert isinstance(source, Value), "a reduction reads a value"
    buffer = _reduced_last(code.emitter, code.emitter.buffer(source), node)
    width, stride = c_dim(buffer.shape[-1]), buffer.strides[-1]
    row = code.row_pointer(buffer, write=False)
    name = code.variable(node.output)
    if node.op == "amax":
        text = f"row_max({row}, {stride}, {width})"
    elif not source.type.dtype.is_float:
        text = f"row_sum_int({row}, {stride}, {width})"
    else:
        text = f"row_sum({row}, {stride}, {width})"
        text = f"{text} / static_cast<float>({width})" if node.op == "mean" else text
    code.lines.append(_declare(node.output.type, name, text))
    code.scalars.add(node.output.name)
    _store(code, node.output, (*code.lead, 1), name, "0", code.lines)


def _reduced_last(e: Emitter, buffer: Buffer, node: Node) -> Buffer:
    """The operand with its reduced dimensions moved to the end and merged into one."""
    reduced = _reduced_axes(node)
    kept = [axis for axis in range(len(buffer.shape)) if axis not in reduced]
    moved = buffer.transpose((*kept, *reduced))
    lead = tuple(buffer.shape[axis] for axis in kept)
    if len(reduced) == 1:
        return moved
    size = 1
    for axis in reduced:
        dim = buffer.shape[axis]
        if not isinstance(dim, int):
            raise ProgramError("a reduction over several symbolic dimensions is not supported")
        size *= dim
    merged = moved.reshape((*lead, size)) or e.dense(moved).reshape((*lead, size))
    assert merged is not None, "a dense buffer takes any shape"
    return merged


def _pointwise(code: _RowCode, node: Node, shape: tuple[Dim, ...]) -> None:
    wide = shape[-1] != 1
    width = c_dim(shape[-1])
    if not wide or (code.open_loop and code.loop_width != width):
        code.close()
    operands = [_operand(code, operand, node, shape, wide) for operand in node.inputs]
    name = code.variable(node.output)
    lines = code.open_loop if wide else code.lines
    lines.append(_declare(node.output.type, name, expression(node, operands)))
    if wide:
        code.loop_width = width
        code.in_loop.add(node.output.name)
    else:
        code.scalars.add(node.output.name)
    _store(code, node.output, shape, name, "j" if wide else "0", lines)


def _operand(
    code: _RowCode, operand: Operand, node: Node, shape: tuple[Dim, ...], wide: bool
) -> str:
    if isinstance(operand, (bool, int, float)):
        return literal(operand, _literal_type(node, operand))
    if isinstance(operand, Value) and (
        operand.name in code.in_loop or operand.name in code.scalars
    ):
        return code.variable(operand)
    buffer = code.emitter.buffer(operand).expand(shape)
    stride = buffer.strides[-1] if wide else 0
    row = code.row_pointer(buffer, write=False)
    element = f"{row}[{_scaled('j', stride)}]"
    return f"to_float({element})" if dtype_of(buffer.ctype).is_float else element


def _literal_type(node: Node, value: Literal) -> DType:
    """A literal computes in the type of its tensor neighbours."""
    values = [operand.type.dtype for operand in node.values()]
    if node.op == "where":
        values = values[1:] or [node.output.type.dtype]
    if not values:
        return node.output.type.dtype
    if isinstance(value, float) and not values[0].is_float:
        return DType.F32
    return values[0]


def _store(
    code: _RowCode,
    value: Value,
    shape: tuple[Dim, ...],
    name: str,
    index: str,
    lines: list[str],
) -> None:
    """Write the value to its buffer, if anything reads it there."""
    buffer = code.emitter.buffer(value).reshape(shape)
    assert buffer is not None, "results are dense"
    if value.name not in code.stored:
        return
    row = code.row_pointer(buffer, write=True)
    rounded = f"from_float<{buffer.ctype}>({name})" if value.type.dtype.is_float else name
    lines.append(f"{row}[{index}] = {rounded};")


def _declare(kind: TensorType, name: str, text: str) -> str:
    """A local that holds an element as its type would: bfloat16 rounds at every op."""
    if kind.dtype is DType.BF16:
        text = f"to_float(to_bf16({text}))"
    return f"const {SCALARS[kind.dtype]} {name} = {text};"


def _scaled(index: str, stride: int | str) -> str:
    if stride == 0:
        return "0"
    return index if stride == 1 else f"{index} * {stride}"


def _finish(e: Emitter, code: _RowCode, nodes: Sequence[Node]) -> None:
    count = " * ".join(c_dim(d) for d in code.lead if d != 1) or "1"
    index_lines, rest = [], "r"
    for axis in reversed(range(len(code.lead))):
        if code.lead[axis] == 1:
            continue
        size = c_dim(code.lead[axis])
        index_lines.append(f"const int64_t i{axis} = {rest} % {size};")
        rest = f"({rest} / {size})"
    head = (
        f"for (Share q = share_of(t, {count}); q.begin < q.end; ++q.begin) {{",
        "const int64_t r = q.begin; (void)r;",
    )
    lines: list[str | Code] = [*head, *index_lines, *code.pointers, *code.lines]
    e.statement(
        (*listed(*lines, separator="\n    "), "\n  }"),
        reads=code.reads,
        writes=code.writes,
        comment="loop: " + ", ".join(node.op for node in nodes),
    )
