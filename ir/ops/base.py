"""What an op is: operands, attributes, type rule, meaning, cost and legality, in one value."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ..cost import Cost, OperationKind, PagedLoad
from ..errors import ProgramError
from ..nearest import did_you_mean
from ..plugins import load_plugins
from ..program import Attr, Literal
from ..schemes import get_scheme
from ..shapes import parse_dim, spell_dim
from ..types import Dim, DType, Sym, TensorType

if TYPE_CHECKING:
    import torch

OperandType = TensorType | Literal
"""What the type rule sees of an operand: a literal is its own type."""

Attrs = Mapping[str, Attr]

PHASES: Final = ("captured", "canonical", "quantized", "fused", "lowered", "planned")
"""The stages of a program, in order; `Program.phase` names the last one it has passed."""

BEFORE_LOWERING: Final = frozenset(PHASES[:4])
AFTER_LOWERING: Final = frozenset(PHASES[4:])


class Kind(enum.Enum):
    """The family of an op: what a backend that never saw its name may conclude."""

    POINTWISE = "pointwise"
    VIEW = "view"
    REDUCTION = "reduction"
    GATHER = "gather"
    CREATION = "creation"
    MATRIX = "matrix"
    NORM = "norm"
    POSITION = "position"
    ATTENTION = "attention"
    STATE = "state"
    FUSED = "fused"
    EXPERTS = "experts"


_PRODUCTS: Final = frozenset({Kind.MATRIX, Kind.EXPERTS, Kind.ATTENTION, Kind.STATE})


class AttrKind(enum.Enum):
    """What an attribute holds."""

    INT = "an integer"
    FLOAT = "a number"
    NUMBER = "a literal"
    BOOL = "true or false"
    STR = "text"
    AXIS = "a dimension's index"
    AXES = "a tuple of dimensions' indices"
    OFFSET = "a place in a dimension: a number, negative from its end, or a symbol"
    DIM = "a size or a symbol"
    DIMS = "a tuple of sizes or symbols"
    DTYPE = "an element type"


class _Required(enum.Enum):
    REQUIRED = enum.auto()


REQUIRED: Final = _Required.REQUIRED


@dataclass(frozen=True, slots=True)
class AttrSpec:
    """One attribute: name, what it holds, default (REQUIRED: none), allowed texts."""

    name: str
    kind: AttrKind
    default: Attr | _Required = REQUIRED
    choices: tuple[str, ...] = ()
    optional: bool = False

    def convert(self, value: Any, rank: int | None) -> Attr:
        """The stored form of `value`; ProgramError where it is of another kind.

        `rank` is that of the first tensor operand: negative axes count from it.
        """
        if value is None and self.optional:
            return None
        converted = _CONVERT[self.kind](value, rank)
        if converted is None or (self.choices and converted not in self.choices):
            wanted = " or ".join(self.choices) if self.choices else self.kind.value
            raise ProgramError(f"attribute {self.name} is {value!r}, expected {wanted}")
        return converted


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _axis(value: Any, rank: int | None) -> Attr:
    if not _is_int(value):
        return None
    axis = int(value)
    if rank is not None:
        if not -rank <= axis < rank:
            raise ProgramError(f"dimension {axis} is out of range for {rank} dimensions")
        axis %= rank
    return axis


def _axes(value: Any, rank: int | None) -> Attr:
    if not isinstance(value, (tuple, list)):
        return None
    axes = tuple(_axis(v, rank) for v in value)
    if None in axes:
        return None
    if len(set(axes)) != len(axes):
        raise ProgramError(f"a dimension is named twice in {tuple(value)}")
    return axes


def _dim(value: Any, rank: int | None) -> Attr:
    return spell_dim(parse_dim(value)) if isinstance(value, (int, str, Sym)) else None


def _offset(value: Any, rank: int | None) -> Attr:
    return int(value) if _is_int(value) else _dim(value, rank)


def _dims(value: Any, rank: int | None) -> Attr:
    if not isinstance(value, (tuple, list)):
        return None
    dims = tuple(_dim(v, rank) for v in value)
    return None if None in dims else dims


def _dtype(value: Any, rank: int | None) -> Attr:
    try:
        return DType(value).value
    except ValueError:
        return None


_CONVERT: dict[AttrKind, Callable[[Any, int | None], Attr]] = {
    AttrKind.INT: lambda v, _: v if _is_int(v) else None,
    AttrKind.FLOAT: lambda v, _: float(v) if _is_int(v) or isinstance(v, float) else None,
    AttrKind.NUMBER: lambda v, _: v if isinstance(v, (bool, int, float)) else None,
    AttrKind.BOOL: lambda v, _: v if isinstance(v, bool) else None,
    AttrKind.STR: lambda v, _: v if isinstance(v, str) else None,
    AttrKind.AXIS: _axis,
    AttrKind.AXES: _axes,
    AttrKind.OFFSET: _offset,
    AttrKind.DIM: _dim,
    AttrKind.DIMS: _dims,
    AttrKind.DTYPE: _dtype,
}


Types = Sequence[OperandType]
Outputs = tuple[TensorType, ...]
InferRule = Callable[[Types, Attrs], Outputs]
Meaning = Callable[..., "torch.Tensor | tuple[torch.Tensor, ...] | None"]
CostRule = Callable[[Types, Outputs, Attrs, Mapping[str, int]], Cost]
PagedCostRule = Callable[[Types, Outputs, Attrs, Mapping[str, int], PagedLoad], Cost]
MixRule = Callable[[Types, Outputs, Attrs, str], "str | None"]
CodeDepthRule = Callable[[Types, Attrs], Mapping[int, Dim]]
CanonicalRule = Callable[[Types, dict[str, Attr]], dict[str, Attr]]


def tensors(types: Types) -> tuple[TensorType, ...]:
    """The tensor types among operand types."""
    return tuple(t for t in types if isinstance(t, TensorType))


def default_cost(types: Types, outs: Outputs, attrs: Attrs, bindings: Mapping[str, int]) -> Cost:
    """Every operand read once, every result written once, one operation an element."""
    return Cost(
        sum(t.num_bytes(bindings) for t in tensors(types)),
        sum(t.num_bytes(bindings) for t in outs),
        sum(t.num_elements(bindings) for t in outs),
    )


def never_mixes(types: Types, outs: Outputs, attrs: Attrs, token: str) -> str | None:
    """The rule of ops that treat each token's row by itself."""
    return None


def _keep(types: Types, attrs: dict[str, Attr]) -> dict[str, Attr]:
    return attrs


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of the dialect; everything that is known of it stands here.

    `operands` names the operands; a trailing `?` marks an optional one (only at the end), a
    trailing `*` on the last any number from one. `mixes` says how the op would mix rows of the
    token dimension (None: it does not). `effects` ops touch paged state and keep their order;
    `paged_cost` says what they move and compute there, beside their operands and results. By its
    `mixer` a layer lets tokens see earlier ones; one that `stores` writes to the cache it names.
    `code_depths` gives the K of operands that are codes of a matrix `[.., N, K]`, by place.
    """

    name: str
    kind: Kind
    doc: str
    operands: tuple[str, ...]
    rule: InferRule
    meaning: Meaning
    attrs: tuple[AttrSpec, ...] = ()
    cost_rule: CostRule = default_cost
    mixes: MixRule = never_mixes
    canonical: CanonicalRule = _keep
    effects: bool = False
    mixer: bool = False
    stores: bool = False
    paged_cost: PagedCostRule | None = None
    code_depths: CodeDepthRule | None = None
    phases: frozenset[str] = frozenset(PHASES)
    attr_specs: Mapping[str, AttrSpec] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "attr_specs", {spec.name: spec for spec in self.attrs})

    @property
    def variadic(self) -> bool:
        """True where the last operand may be repeated."""
        return bool(self.operands) and self.operands[-1].endswith("*")

    @property
    def min_operands(self) -> int:
        """The least number of operands."""
        return sum(not name.endswith("?") for name in self.operands)

    def accepts_count(self, count: int) -> bool:
        """True where the op may have `count` operands."""
        return self.min_operands <= count and (self.variadic or count <= len(self.operands))

    def complete(self, attrs: Mapping[str, Any], types: Types) -> dict[str, Attr]:
        """All attributes in stored form, defaults filled in, in the op's order.

        ProgramError for an unknown, missing or ill-typed attribute.
        """
        for name in attrs:
            if name not in self.attr_specs:
                known = ", ".join(self.attr_specs) or "none"
                raise ProgramError(f"{self.name} has no attribute {name}", hint=f"it has: {known}")
        first = next(iter(tensors(types)), None)
        rank = first.rank if first is not None else None
        result: dict[str, Attr] = {}
        try:
            for spec in self.attrs:
                if spec.name in attrs:
                    result[spec.name] = spec.convert(attrs[spec.name], rank)
                elif isinstance(spec.default, _Required):
                    raise ProgramError(f"attribute {spec.name} is missing")
                elif spec.default is None:
                    result[spec.name] = None
                else:
                    result[spec.name] = spec.convert(spec.default, rank)
            return self.canonical(types, result)
        except ProgramError as error:
            raise ProgramError(f"{self.name}: {error}") from None

    def infer(self, types: Types, attrs: Attrs) -> Outputs:
        """The result types of operands of these types; ProgramError where they do not fit."""
        if not self.accepts_count(len(types)):
            raise ProgramError(
                f"{self.name} takes ({', '.join(self.operands)}), given {len(types)} operands"
            )
        try:
            return self.rule(types, self.complete(attrs, types))
        except ProgramError as error:
            if error.message.startswith(f"{self.name}: "):
                raise
            raise ProgramError(f"{self.name}: {error}") from None

    def cost(
        self,
        types: Types,
        attrs: Attrs,
        bindings: Mapping[str, int],
        load: PagedLoad | None = None,
    ) -> Cost:
        """Bytes and operations of one execution where each symbol has the bound value.

        Without `load`, what an op does in paged state is left out.
        """
        outs = self.infer(types, attrs)
        cost = self.cost_rule(types, outs, attrs, bindings).of_kind(
            self.operation_kind(types, attrs)
        )
        if load is None or self.paged_cost is None:
            return cost
        return cost + self.cost_in_pages(types, attrs, bindings, load)

    def cost_in_pages(
        self, types: Types, attrs: Attrs, bindings: Mapping[str, int], load: PagedLoad
    ) -> Cost:
        """What one execution moves and computes in paged state alone; only for ops that do."""
        assert self.paged_cost is not None, f"{self.name} touches no paged state"
        cost = self.paged_cost(types, self.infer(types, attrs), attrs, bindings, load)
        return cost.of_kind(self.operation_kind(types, attrs))

    def operation_kind(self, types: Types, attrs: Attrs) -> OperationKind:
        """What it multiplies: codes or bfloat16 where its matrices or rows are, else float32.

        Where a scheme does not quantize rows, codes are multiplied as floats. Codes of e4m3 count
        as int8: processors that multiply both do so at the same rate.
        """
        if self.kind not in _PRODUCTS:
            return "fp32"
        dtypes = {kind.dtype for kind in tensors(types)}
        if dtypes & {DType.I8, DType.U8}:
            scheme = attrs.get("scheme")
            is_decoded = isinstance(scheme, str) and get_scheme(scheme).activations is None
            return "fp32" if is_decoded else "int8"
        return "bf16" if DType.BF16 in dtypes else "fp32"

    def resolve(
        self, attrs: Attrs, bindings: Mapping[str, int], override: DType | None = None
    ) -> dict[str, Any]:
        """Attributes as the meaning takes them: symbols as sizes, floats in `override`."""
        result: dict[str, Any] = dict(attrs)
        for spec in self.attrs:
            value = attrs.get(spec.name)
            if value is None:
                continue
            if spec.kind in (AttrKind.DIM, AttrKind.OFFSET):
                result[spec.name] = _size(value, bindings)
            elif spec.kind is AttrKind.DIMS and isinstance(value, tuple):
                result[spec.name] = tuple(_size(v, bindings) for v in value)
            elif spec.kind is AttrKind.DTYPE and override and DType(value).is_float:
                result[spec.name] = override.value
        return result


def _size(value: Attr, bindings: Mapping[str, int]) -> int:
    if not isinstance(value, (int, str)):
        raise ProgramError(f"not a dimension: {value!r}")
    dim = parse_dim(value)
    return dim if isinstance(dim, int) else dim.evaluate(bindings)


_REGISTRY: dict[str, Op] = {}
_OURS: set[str] = set()


def register_op(op: Op) -> Op:
    """Add an op to the dialect.

    Another of the same name takes its place, as in a notebook whose cell runs again; ProgramError
    for the name of one of infc's own.
    """
    if op.name in _OURS:
        raise ProgramError(f"{op.name} is a built-in op", hint="give it another name")
    _REGISTRY[op.name] = op
    return op


def register_family(ops: Sequence[Op]) -> None:
    """Add ops of infc's own; each name can be taken once."""
    for op in ops:
        register_op(op)
        _OURS.add(op.name)


def get_op(name: str) -> Op:
    """The op of that name, of a plug-in if need be; ProgramError with the nearest name."""
    op = _REGISTRY.get(name)
    if op is None:
        load_plugins()
        op = _REGISTRY.get(name)
    if op is None:
        hint = did_you_mean(name, _REGISTRY, "the plug-in that brings it is not installed")
        raise ProgramError(f"unknown op {name}", hint=hint)
    return op


def all_ops() -> tuple[Op, ...]:
    """Every op of the dialect, in the order of registration."""
    return tuple(_REGISTRY.values())


def tensor(types: Types, index: int, rank: int | None = None, name: str = "") -> TensorType:
    """Operand `index` as a tensor type, of `rank` where given; ProgramError otherwise."""
    kind = types[index]
    label = name or f"operand {index}"
    if not isinstance(kind, TensorType):
        raise ProgramError(f"{label} is the literal {kind!r}, expected a tensor")
    if rank is not None and kind.rank != rank:
        raise ProgramError(f"{label} is {kind}, expected {rank} dimensions")
    return kind


def same_dtype(*kinds: TensorType) -> DType:
    """The one element type of all; ProgramError where they differ."""
    if len({kind.dtype for kind in kinds}) != 1:
        raise ProgramError("mixed element types: " + ", ".join(str(kind) for kind in kinds))
    return kinds[0].dtype


def need_float(kind: TensorType, what: str = "operand") -> TensorType:
    """`kind`, which must have a floating-point element type."""
    if not kind.dtype.is_float:
        raise ProgramError(f"{what} is {kind}, expected floating point")
    return kind


def need_int(kind: TensorType, what: str) -> TensorType:
    """`kind`, which must hold indices (i32 or i64)."""
    if kind.dtype not in (DType.I32, DType.I64):
        raise ProgramError(f"{what} is {kind}, expected i32 or i64")
    return kind


def need_shape(kind: TensorType, shape: Sequence[object], what: str) -> None:
    """ProgramError unless `kind` has exactly that shape."""
    if kind.shape != tuple(shape):
        wanted = ", ".join(str(dim) for dim in shape)
        raise ProgramError(f"{what} is {kind}, expected shape [{wanted}]")


def axes_attr(attrs: Attrs, name: str) -> tuple[int, ...]:
    """A tuple-of-integers attribute, typed."""
    value = attrs[name]
    assert isinstance(value, tuple)
    return tuple(v for v in value if isinstance(v, int))


def int_attr(attrs: Attrs, name: str) -> int:
    """An integer attribute, typed."""
    value = attrs[name]
    assert isinstance(value, int)
    return value


def dims_attr(attrs: Attrs, name: str) -> tuple[int | Sym, ...]:
    """A shape attribute, parsed."""
    value = attrs[name]
    assert isinstance(value, tuple)
    return tuple(parse_dim(v) for v in value if isinstance(v, (int, str)))


def is_token_dim(dim: int | Sym, token: str) -> bool:
    """True where a dimension counts tokens."""
    return isinstance(dim, Sym) and dim.name == token


def matrix_dtype(x: TensorType, *matrices: TensorType) -> DType:
    """The one element type of matrices that rows of x are multiplied by: that of x, or of 16 bits
    where x is float32. ProgramError for any other.
    """
    dtype = same_dtype(*matrices)
    if x.dtype is DType.F32 and dtype in (DType.BF16, DType.F16):
        return dtype
    return same_dtype(x, *matrices)


def rounded(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Rows as a product by `matrix` takes them: in at least float32, rounded to the type of the
    matrix, if that is narrower, before."""
    narrow = matrix.dtype.itemsize < x.dtype.itemsize
    return wide(x.to(matrix.dtype) if narrow else x).to(wide(x).dtype)


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in the precision that an op computes in: at least float32."""
    import torch

    return x if x.dtype == torch.float64 else x.float()


RESULT_DTYPE: Final = AttrSpec("dtype", AttrKind.DTYPE, None, optional=True)
"""The element type of a result that need not be that of the operand it follows."""


def result_dtype(x: TensorType, attrs: Attrs) -> DType:
    """The type in `RESULT_DTYPE`, or that of x; ProgramError where it is no floating point."""
    name = attrs["dtype"]
    dtype = x.dtype if name is None else DType(name)
    if not dtype.is_float:
        raise ProgramError(f"dtype is {dtype.value}, expected floating point")
    return dtype


def as_result(y: torch.Tensor, x: torch.Tensor, dtype: str | None) -> torch.Tensor:
    """`y`, rounded once to the type that `result_dtype` has for x."""
    from ..torch_types import to_torch

    return y.to(x.dtype if dtype is None else to_torch(DType(dtype)))
