"""The emitter: walks a planned program and turns each node into calls over buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ...ir.analyses import node_label
from ...ir.errors import ProgramError
from ...ir.plan import planned_arena
from ...ir.program import Node, Operand, Program, Value, WeightRef
from ...ir.targets import Target
from ...ir.types import Dim, DType, TensorType, handed_over
from .buffers import CTYPES, Buffer, Home
from .calls import Arg, Call, Code, Panels, Span, applied, braced, c_dim
from .further import further_name
from .layout import PanelLayout, panel_layout
from .weight_table import WeightTable

ALIGNMENT_BYTES = 64
STEP_ARRAYS = {"input_ids": "ids", "positions": "positions", "logits_index": "logits_index"}


@dataclass(frozen=True, slots=True)
class Rows:
    """A buffer seen as rows: address, elements from row to row, number of rows, row length."""

    buffer: Buffer
    pointer: Arg
    stride: str
    count: str
    length: int


@dataclass(frozen=True, slots=True)
class NestedRows:
    """Rows in two levels, such as heads of tokens: `count` times `inner_count` of `length`.

    The inner rows lie one behind the other; `stride` leads from outer row to outer row.
    """

    buffer: Buffer
    pointer: Arg
    stride: str
    count: str
    inner_count: int
    length: int


@dataclass(slots=True)
class Emitter:
    """Turns nodes into calls; the state of one emission."""

    program: Program
    target: Target
    calls: list[Call] = field(default_factory=list)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()
    """What is being lowered: calls are theirs."""
    weights: WeightTable = field(init=False)
    arena_bytes: int = field(init=False)
    _offsets: Mapping[str, int] = field(init=False)
    _bounds: dict[str, int] = field(init=False)
    _scratch: dict[int, int] = field(default_factory=dict)
    thread_scratch: dict[str, None] = field(default_factory=dict)
    """C++ expressions of the scratch bytes that calls need on each thread, in order."""
    kernels: dict[str, None] = field(default_factory=dict)
    """Kernels that are compiled apart from the step, with their template arguments."""

    def __post_init__(self) -> None:
        self.weights = WeightTable(self.program, self.target)
        arena = planned_arena(self.program)
        self._offsets, self.arena_bytes = arena.offsets, arena.num_bytes
        self._bounds = {name: bound.high for name, bound in self.program.symbols.items()}
        for value in self.program.inputs:
            self._bind_input(value)

    def _bind_input(self, value: Value) -> None:
        name = STEP_ARRAYS.get(value.name) or further_name(self.program, value)
        ctype = CTYPES[handed_over(value.type).dtype]
        self.buffers[value.name] = Buffer.dense(Home("input", name=name), ctype, value.type.shape)

    # Buffers

    def buffer(self, operand: Operand) -> Buffer:
        """Where an operand lives; weights lie in the artifact row-major unless packed."""
        if isinstance(operand, Value):
            return self.buffers[operand.name]
        if isinstance(operand, WeightRef):
            kind = self.program.weights[operand.name].type
            home = Home("weight", index=self.weights.plain(operand.name))
            return Buffer.dense(home, CTYPES[kind.dtype], kind.shape)
        raise ProgramError(f"expected a tensor, not the literal {operand!r}")

    def output(self, value: Value, order: Sequence[int] | None = None) -> Buffer:
        """The dense buffer that holds a node's result, at the offset the memory plan gave it.

        `order` is that of its dimensions in memory where it is not the written one.
        """
        size = value.type.num_bytes(self._bounds)
        offset = self._offsets.get(value.name)
        if offset is None:
            offset = self.reserve(size)
        order = range(value.type.rank) if order is None else order
        shape = tuple(value.type.shape[i] for i in order)
        buffer = Buffer.dense(Home("arena", offset, size), CTYPES[value.type.dtype], shape)
        buffer = buffer.transpose(tuple(order.index(i) for i in range(value.type.rank)))
        self.buffers[value.name] = buffer
        return buffer

    def reserve(self, num_bytes: int) -> int:
        """More arena behind what the plan knows of, for copies that only this backend needs."""
        offset = self.arena_bytes
        self.arena_bytes += -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return offset

    def temporary(self, dtype: DType, shape: tuple[Dim, ...]) -> Buffer:
        """A dense buffer of this backend's own."""
        size = TensorType(dtype, shape).num_bytes(self._bounds)
        return Buffer.dense(Home("arena", self.reserve(size), size), CTYPES[dtype], shape)

    def scratch(self, num_bytes: int) -> Buffer:
        """Memory that a call needs only while it runs; calls of one size share it."""
        if num_bytes not in self._scratch:
            self._scratch[num_bytes] = self.reserve(num_bytes)
        home = Home("arena", self._scratch[num_bytes], num_bytes)
        return Buffer.dense(home, CTYPES[DType.U8], (num_bytes,))

    def need_product_scratch(self, kind: str, depth: int) -> None:
        """Give each thread what products with weights of a C++ type need, rows `depth` long."""
        self.thread_scratch[f"product_scratch_bytes<{kind}>({depth})"] = None

    def dense(self, buffer: Buffer) -> Buffer:
        """The buffer itself if it is row-major, else a copy that is."""
        if buffer.is_dense:
            return buffer
        copy = self.temporary(dtype_of(buffer.ctype), buffer.shape)
        self.copy(buffer, copy)
        return copy

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy element by element between buffers of one shape."""
        rank = max(1, len(source.shape))
        sizes = tuple(c_dim(dim) for dim in source.shape)
        lists = [braced("", *(each or "1")) for each in (sizes, source.strides, target.strides)]
        self.call(
            f"copy_strided<{rank}>",
            (pointer(source), pointer(target), *lists),
            reads=(source,),
            writes=(target,),
            comment="copy",
        )

    def rows(self, operand: Operand | Buffer, *, inner_dims: int = 1) -> Rows:
        """The operand as rows of its last `inner_dims` dimensions, copied only if it must be."""
        buffer = operand if isinstance(operand, Buffer) else self.buffer(operand)
        flat = _as_rows(buffer, inner_dims)
        if flat is None:
            buffer = self.dense(buffer)
            flat = _as_rows(buffer, inner_dims)
        assert flat is not None, "a dense buffer is always rows"
        count, stride, length = flat
        return Rows(buffer, pointer(buffer), stride, count, length)

    def nested_rows(self, operand: Operand) -> NestedRows:
        """Rows of the last dimension, in two levels: tokens, and for example heads in each."""
        buffer = self.buffer(operand)
        if len(buffer.shape) == 3:
            _, inner, length = buffer.shape
            if isinstance(inner, int) and isinstance(length, int):
                rows = self.rows(buffer, inner_dims=2)
                return NestedRows(rows.buffer, rows.pointer, rows.stride, rows.count, inner, length)
        rows = self.rows(buffer)
        return NestedRows(rows.buffer, rows.pointer, rows.stride, rows.count, 1, rows.length)

    # Calls

    def apart(self, kernel: str, *types: str) -> str:
        """A kernel of `units.py` with all its template arguments, to be compiled apart."""
        name = f"{kernel}<{', '.join(types)}>"
        self.kernels[name] = None
        return name

    def call(
        self,
        function: str,
        args: Sequence[Arg | Code | int],
        *,
        reads: Sequence[Buffer | Span],
        writes: Sequence[Buffer | Span],
        comment: str = "",
        rows: str = "",
        panels: Panels | None = None,
    ) -> None:
        """Append a call of a function by every thread of the team `t`, its first argument.

        `rows` and `panels` as in `Call`.
        """
        code = (*applied(function, "t", *args), ";")
        self.statement(code, reads=reads, writes=writes, comment=comment, rows=rows, panels=panels)

    def statement(
        self,
        code: Code,
        *,
        reads: Sequence[Buffer | Span],
        writes: Sequence[Buffer | Span],
        comment: str = "",
        rows: str = "",
        panels: Panels | None = None,
    ) -> None:
        """Append one statement that every thread runs; `rows` and `panels` as in `Call`."""
        self.calls.append(
            Call(
                code,
                tuple(_span(b) for b in reads if not is_constant(b)),
                tuple(_span(b) for b in writes),
                comment,
                tuple(node_label(node) for node in self.nodes),
                rows,
                panels,
            )
        )

    def panels(self, dtype: DType) -> PanelLayout:
        """How this target packs matrices of a type."""
        return panel_layout(dtype, self.target)


Lowering = Callable[[Emitter, Node], None]


def pointer(buffer: Buffer) -> Arg:
    """The address of a buffer's first element."""
    return buffer.pointer(dtype_of(buffer.ctype).size_bytes)


def dtype_of(ctype: str) -> DType:
    """The element type with that C++ spelling."""
    return next(dtype for dtype, name in CTYPES.items() if name == ctype)


def _span(touched: Buffer | Span) -> Span:
    return touched if isinstance(touched, Span) else touched.home.span()


def is_constant(touched: Buffer | Span) -> bool:
    """Whether no call of a step writes there."""
    return isinstance(touched, Buffer) and touched.home.kind in ("weight", "input")


def _as_rows(buffer: Buffer, inner_dims: int) -> tuple[str, str, int] | None:
    """Number of rows, stride between them and their length; None where strides forbid it."""
    split = len(buffer.shape) - inner_dims
    lead, inner = buffer.shape[:split], buffer.shape[split:]
    length = 1
    for dim, stride in zip(reversed(inner), reversed(buffer.strides[split:]), strict=True):
        if not isinstance(dim, int) or (dim != 1 and stride != length):
            return None
        length *= dim
    count = " * ".join(c_dim(d) for d in lead if d != 1) or "1"
    moving = [(d, s) for d, s in zip(lead, buffer.strides[:split], strict=True) if d != 1]
    # Dense rows follow each other whatever their number, be it symbolic.
    if not moving or buffer.is_dense:
        return count, str(length), length
    for (_, outer), (dim, stride) in pairwise(moving):
        if not isinstance(dim, int) or not isinstance(stride, int) or outer != dim * stride:
            return None
    return count, str(moving[-1][1]), length
