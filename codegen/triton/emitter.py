"""The emitter: walks a planned program and turns each node into launches over buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ...ir.analyses import node_label
from ...ir.errors import ProgramError
from ...ir.launches import Extent, Launch, Pointer, When
from ...ir.ops.state import cache_of
from ...ir.plan import planned_arena, planned_graphs
from ...ir.program import Node, Operand, Program, Value, WeightRef
from ...ir.resources import KvGroup, element_type
from ...ir.targets import CUDA, Target
from ...ir.types import Dim, DType, TensorType, handed_over
from .buffers import Buffer, product
from .calls import TYPES, Constant, KernelCode, Passed, Tuning, Typed, aligned, bind, extent

ALIGNMENT_BYTES = 256
"""Of values in the arena."""
FEW_TOKENS = 16
"""A step of so many tokens or fewer reads weights for the most part."""
_DEPENDENT_CAPABILITY = 90
"""From which on launches can be dependent."""
_NARROWED = frozenset({"paged_attention", "take", "gelu", "silu", "relu"})
"""Ops whose results have no narrower type in a program, and kernels that store any."""
STEP_ARRAYS = {"input_ids": "token_ids"}
"""What the arrays of a step are called where inputs of a program have another name."""


@dataclass(frozen=True, slots=True)
class FormSpec:
    """A form to emit: steps of at most `max_tokens`, with one query a sequence or tiles of them."""

    name: str
    one_query: bool
    max_tokens: int
    query_tile: int = 1


@dataclass(frozen=True, slots=True)
class Rows:
    """A buffer seen as `count` rows of `length` elements, `stride` apart."""

    buffer: Buffer
    stride: int
    count: Dim
    length: int

    @property
    def typed(self) -> Typed:
        """The address of the first row."""
        return typed(self.buffer)


@dataclass(frozen=True, slots=True)
class NestedRows:
    """Rows in two levels, such as heads of tokens: `count` times `inner` rows of `length`."""

    buffer: Buffer
    outer_stride: int
    inner_stride: int
    count: Dim
    inner: int
    length: int


@dataclass(slots=True)
class Held:
    """A place beside the plan, in use until the node `until` has run."""

    offset: int
    num_bytes: int
    until: int


@dataclass(slots=True)
class Emitter:
    """Turns nodes into launches; the state of the emission of one form."""

    program: Program
    target: Target
    form: FormSpec
    launches: list[Launch] = field(default_factory=list)
    kernels: dict[str, KernelCode] = field(default_factory=dict)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()
    """What is being lowered: launches are theirs."""
    when: When = "always"
    held: list[Held] = field(default_factory=list)
    counters: dict[int, int] = field(default_factory=dict)
    """Numbers that are 0 when a step begins, and after each use: how many, by offset."""
    arena_bytes: int = field(init=False)
    bounds: dict[str, int] = field(init=False)
    consumers: Mapping[str, list[Node]] = field(init=False)
    _cuts: frozenset[str] = field(init=False)
    _narrowed: frozenset[str] = field(init=False)
    _offsets: Mapping[str, int] = field(init=False)
    _scratch: dict[tuple[str, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arena = planned_arena(self.program)
        self._offsets, self.arena_bytes = arena.offsets, arena.num_bytes
        self.consumers = self.program.consumers()
        self._narrowed = frozenset(
            value.name
            for node in self.program.nodes
            for value in node.outputs
            if node.op in _NARROWED and value.type.dtype is DType.F32
        )
        # With one query a sequence, no launch depends on more than sizes: steps are captured whole.
        cuts = () if self.form.one_query else planned_graphs(self.program).cuts
        self._cuts = frozenset(cuts)
        self.bounds = {name: bound.high for name, bound in self.program.symbols.items()}
        for value in self.program.inputs:
            name = STEP_ARRAYS.get(value.name)
            if name is None:
                known = value.name in ("positions", "logits_index")
                name = value.name if known else f"input:{value.name}"
            kind = handed_over(value.type)
            home = Pointer("step", name)
            self.buffers[value.name] = Buffer.dense(home, kind.dtype, kind.shape)

    # Buffers

    def buffer(self, operand: Operand) -> Buffer:
        """Where an operand lies; weights are row-major, as the program has them."""
        if isinstance(operand, Value):
            return self.buffers[operand.name]
        if isinstance(operand, WeightRef):
            kind = self.program.weights[operand.name].type
            return Buffer.dense(Pointer("weight", operand.name), kind.dtype, kind.shape)
        raise ProgramError(f"expected a tensor, not the literal {operand!r}")

    def output(self, value: Value, order: Sequence[int] | None = None) -> Buffer:
        """The dense buffer that holds a node's result, at the offset the memory plan gave it.

        `order` is that of its dimensions in memory where it is not the written one.
        """
        offset = self.planned_offset(value)
        if offset is None:
            offset = self.reserve(value.type.num_bytes(self.bounds))
        return self.output_at(value, offset, order)

    def planned_offset(self, value: Value) -> int | None:
        """Where the memory plan has a value; None for what it does not know."""
        return self._offsets.get(value.name)

    def output_at(self, value: Value, offset: int, order: Sequence[int] | None = None) -> Buffer:
        """`output` elsewhere in the arena."""
        order = range(value.type.rank) if order is None else order
        shape = tuple(value.type.shape[axis] for axis in order)
        buffer = Buffer.dense(Pointer("arena", "", offset), self.kept_type(value), shape)
        buffer = buffer.transpose(tuple(order.index(axis) for axis in range(value.type.rank)))
        self.buffers[value.name] = buffer
        return buffer

    def kept_type(self, value: Value) -> DType:
        """The type that a result has in memory: float32 that only products by matrices of 16 bits
        read is rounded to the type of these at once, as products would."""
        if value.name not in self._narrowed:
            return value.type.dtype
        kinds = self._multiplied_by(value)
        (kind,) = kinds if len(kinds) == 1 else (None,)
        return kind if kind in (DType.BF16, DType.F16) else value.type.dtype

    def _multiplied_by(self, value: Value) -> set[DType | None]:
        """The types of matrices that multiply rows of a value, None for all other uses."""
        kinds: set[DType | None] = {None} if value in self.program.outputs else set()
        for node in self.consumers.get(value.name, []):
            if node.inputs[0] != value or node.values().count(value) != 1:
                kinds.add(None)
            elif node.op in ("reshape", "take"):
                kinds |= self._multiplied_by(node.output)
            elif node.op == "linear":
                matrix = self.program.operand_type(node.inputs[1])
                kinds.add(matrix.dtype if isinstance(matrix, TensorType) else None)
            else:
                kinds.add(None)
        return kinds

    def reserve(self, num_bytes: int) -> int:
        """More arena behind what the plan knows of."""
        offset = -(-self.arena_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.arena_bytes = offset + num_bytes
        return offset

    def temporary(self, dtype: DType, shape: tuple[Dim, ...]) -> Buffer:
        """A dense buffer of this backend's own."""
        size = TensorType(dtype, shape).num_bytes(self.bounds)
        return Buffer.dense(Pointer("arena", "", self.reserve(size)), dtype, shape)

    def scratch(self, name: str, num_bytes: int) -> Pointer:
        """Memory that launches need only for each other; those of one name and size share it."""
        key = (name, num_bytes)
        if key not in self._scratch:
            self._scratch[key] = self.reserve(num_bytes)
        return Pointer("arena", "", self._scratch[key])

    def counter(self, name: str, count: int) -> Pointer:
        """Numbers of 32 bits that are 0 when a step begins; launches set them to 0 after use."""
        pointer = self.scratch(name, 4 * count)
        self.counters[pointer.offset] = count
        return pointer

    def dense(self, buffer: Buffer) -> Buffer:
        """The buffer itself if it is row-major, else a copy that is."""
        if buffer.is_dense:
            return buffer
        copy = self.temporary(buffer.dtype, buffer.shape)
        self.copy(buffer, copy)
        return copy

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy element by element between buffers of one shape, of at most four dimensions."""
        missing = 4 - len(source.shape)
        if missing < 0:
            raise ProgramError(f"a copy of {len(source.shape)} dimensions is not supported")
        shape = (1,) * missing + source.shape
        passed: dict[str, Passed | Buffer] = {"x": source, "out": target}
        passed |= {f"size{axis}": extent(shape[axis]) for axis in (1, 2, 3)}
        for name, buffer in (("x_stride", source), ("out_stride", target)):
            strides = (0,) * missing + buffer.strides
            passed |= {f"{name}{axis}": extent(strides[axis]) for axis in range(4)}
        block = min(1024, power_of_two(self.most(shape[3])))
        grid = [product(shape[:3]), extent(shape[3], divisor=block)]
        self.launch("rows.copy_elements", grid, passed, {"BLOCK": block})

    def rows(self, operand: Operand | Buffer, *, inner_dims: int = 1) -> Rows:
        """The operand as rows of its last `inner_dims` dimensions, copied only if it must be."""
        buffer = operand if isinstance(operand, Buffer) else self.buffer(operand)
        found = _as_rows(buffer, inner_dims)
        if found is None:
            found = _as_rows(self.dense(buffer), inner_dims)
        assert found is not None, "a dense buffer is always rows"
        return found

    def nested_rows(self, operand: Operand) -> NestedRows:
        """Rows of the last dimension, in two levels: tokens, and for example heads in each."""
        buffer = self.buffer(operand)
        if len(buffer.shape) == 3 and all(isinstance(dim, int) for dim in buffer.shape[1:]):
            outer, inner, last = buffer.strides
            _, count, length = buffer.shape
            assert isinstance(count, int) and isinstance(length, int)
            if isinstance(outer, int) and isinstance(inner, int) and (last == 1 or length == 1):
                return NestedRows(buffer, outer, inner, buffer.shape[0], count, length)
        rows = self.rows(buffer)
        return NestedRows(rows.buffer, rows.stride, 0, rows.count, 1, rows.length)

    def most(self, dim: Dim) -> int:
        """The greatest a size becomes in steps of this form."""
        bounds = dict(self.bounds)
        for name in ("T", "R"):
            if name in bounds:
                bounds[name] = min(bounds[name], self.form.max_tokens)
        return dim if isinstance(dim, int) else dim.evaluate(bounds)

    def most_bytes(self, kind: TensorType) -> int:
        """The greatest a dense tensor becomes in steps of this form."""
        return math.prod(map(self.most, kind.shape)) * kind.dtype.size_bytes

    def cache(self, node: Node) -> tuple[KvGroup, Typed, Typed]:
        """The KV group that a node names, and the node's layer of it: pages, and their scales."""
        name, cache = node.attrs["group"], cache_of(node.attrs)
        for group in self.program.resources:
            if group.name == name and isinstance(group, KvGroup) and cache in group.layers:
                layer = group.bytes_per_block() // len(group.layers) * group.layers.index(cache)
                codes = group.num_kv_heads * group.block_size
                codes *= group.key_head_dim + group.value_head_dim
                pages = Pointer("state", group.name, layer)
                beside = layer + codes if group.has_scales else layer
                scales = Pointer("state", group.name, beside)
                return group, Typed(pages, TYPES[element_type(group.dtype)]), Typed(scales, "fp32")
        raise ProgramError(f"no KV group {name!r} has a cache of layer {cache}", where=node.source)

    # Launches

    def launch(
        self,
        function: str,
        grid: Sequence[Dim | Extent],
        passed: Mapping[str, Passed | Buffer],
        constants: Mapping[str, Constant],
        tuning: Tuning = Tuning(),  # noqa: B008 - a frozen value
        *,
        source: str | None = None,
        persistent: bool = False,
    ) -> None:
        """Append a launch of `module.function`; `passed` is in the order of its parameters."""
        given = {name: typed(v) if isinstance(v, Buffer) else v for name, v in passed.items()}
        arguments, types = bind(given)
        module, _, name = function.partition(".")
        dependent = self._follows()
        kept = tuple(constants.items())
        code = KernelCode(
            module, name, tuple(types), aligned(given), kept, tuning, source, dependent
        )
        self.kernels[code.key] = code
        extents = tuple(one if isinstance(one, Extent) else extent(one) for one in grid)
        labels = tuple(node_label(node) for node in self.nodes)
        made = {value.name for node in self.nodes for value in node.outputs}
        eager = bool(made & self._cuts)
        launch = Launch(
            code.key, extents, arguments, labels, self.when, eager, dependent, persistent
        )
        self.launches.append(launch)

    def _follows(self) -> bool:
        """Whether a launch may begin before the one before it has ended, and wait for it itself.

        Steps with one query a sequence have launches so short that this counts. Those at their
        start follow copies, or nothing.
        """
        able = self.form.one_query and CUDA.capability(self.target.name) >= _DEPENDENT_CAPABILITY
        return able and bool(self.launches) and self.launches[-1].when != "copies"


Lowering = Callable[[Emitter, Node], None]


def typed(buffer: Buffer) -> Typed:
    """The address of a buffer's first element."""
    return Typed(buffer.pointer, TYPES[buffer.dtype])


def step_array(name: str, kind: str = "i32") -> Typed:
    """An array of the step."""
    return Typed(Pointer("step", name), kind)


def power_of_two(size: int, least: int = 1) -> int:
    """The least power of two that is at least `size`, and `least`."""
    return max(least, 1 << max(0, size - 1).bit_length())


def whole(dim: Dim, what: str) -> int:
    """A size that does not depend on the step; ProgramError otherwise."""
    if not isinstance(dim, int):
        raise ProgramError(f"{what} has {dim} elements, which depends on the step")
    return dim


def _as_rows(buffer: Buffer, inner_dims: int) -> Rows | None:
    """Rows of a buffer; None where strides forbid it."""
    split = len(buffer.shape) - inner_dims
    lead, inner = buffer.shape[:split], buffer.shape[split:]
    length = 1
    for dim, stride in zip(reversed(inner), reversed(buffer.strides[split:]), strict=True):
        if not isinstance(dim, int) or (dim != 1 and stride != length):
            return None
        length *= dim
    moving = [(d, s) for d, s in zip(lead, buffer.strides[:split], strict=True) if d != 1]
    count = product(lead)
    if not moving or buffer.is_dense:
        return Rows(buffer, length, count, length)
    for (_, outer), (dim, stride) in pairwise(moving):
        if not isinstance(dim, int) or not isinstance(stride, int) or outer != dim * stride:
            return None
    last = moving[-1][1]
    return Rows(buffer, last, count, length) if isinstance(last, int) else None
