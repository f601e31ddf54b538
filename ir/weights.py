"""Weight expressions: how an entry of the weight table is made, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from .errors import CheckpointError, InfcError, ProgramError
from .ops import get_op
from .ops.base import Attrs
from .program import Attr, Literal, Program, Weight, WeightExpr, WeightLoader
from .quantized_pairs import PARTS, QuantizedPairs
from .schemes import get_scheme
from .torch_types import from_torch, to_torch
from .types import Dim, DType, TensorType

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")

LEAVES: Final = {"checkpoint": "name", "data": "key", "calibrated": "key", "packed": "name"}
"""Expressions that are read by a loader of the program, and the attribute that names the tensor.

`data` are constants of the model's code, `calibrated` what a method of quantization made of a
weight: like those of a checkpoint, such tensors differ from layer to layer. `packed` are the codes
of a checkpoint tensor as its file has them."""

WeightMeaning = Callable[[Sequence["torch.Tensor"], Attrs], "torch.Tensor"]
WeightRule = Callable[[Sequence[TensorType], Attrs], TensorType]


@dataclass(frozen=True, slots=True)
class WeightOp:
    """One op of weight expressions: its meaning with torch and its type rule.

    `required` names the attributes it cannot do without, `inputs` how many expressions it takes
    (None: any number from one).
    """

    name: str
    meaning: WeightMeaning
    rule: WeightRule
    required: tuple[str, ...] = ()
    inputs: int | None = 1


_OPS: dict[str, WeightOp] = {}


def register_weight_op(op: WeightOp) -> WeightOp:
    """Add an op to weight expressions, as a backend does for its packed layouts."""
    if op.name in _OPS or op.name in LEAVES:
        raise ProgramError(f"weight op {op.name} is registered twice")
    _OPS[op.name] = op
    return op


def weight_op(name: str) -> WeightOp:
    """The op of that name; ProgramError where there is none."""
    if name not in _OPS:
        known = ", ".join([*LEAVES, *_OPS])
        raise ProgramError(f"unknown weight op {name}", hint=f"known: {known}")
    return _OPS[name]


def checkpoint(name: str, kind: TensorType | None = None, stored: str | None = None) -> WeightExpr:
    """The expression that reads a checkpoint tensor; its type where it is known.

    `stored` is the format of few bits that its file holds it in, such as q4_1.
    """
    attrs: dict[str, Attr] = {"name": name}
    if kind is not None:
        attrs |= {"dtype": kind.dtype.value, "shape": tuple(_sizes(kind.shape))}
    if stored is not None:
        attrs["stored"] = stored
    return WeightExpr("checkpoint", (), attrs)


def packed(name: str, stored: str, codes: TensorType) -> WeightExpr:
    """The expression that reads the codes of a checkpoint tensor in the format of its file."""
    attrs: dict[str, Attr] = {"name": name, "dtype": codes.dtype.value}
    return WeightExpr(
        "packed", (), {**attrs, "shape": tuple(_sizes(codes.shape)), "stored": stored}
    )


def ones(kind: TensorType) -> WeightExpr:
    """The expression of a float32 tensor of ones, of the shape of a type."""
    return WeightExpr("ones", (), {"shape": tuple(_sizes(kind.shape))})


def leaves(expr: WeightExpr) -> list[WeightExpr]:
    """The leaves of an expression, left to right."""
    if expr.op in LEAVES:
        return [expr]
    return [leaf for part in expr.inputs for leaf in leaves(part)]


def is_read_alike(
    expr: WeightExpr, loaders: Mapping[str, WeightLoader], others: Mapping[str, WeightLoader]
) -> bool:
    """Whether the leaves of an expression are read by the same loaders of two programs.

    One function, or the same method of one object, whatever equals it.
    """
    read = {leaf.op for leaf in leaves(expr)}
    return all(_is_same_function(loaders.get(op), others.get(op)) for op in read)


def _is_same_function(one: object, other: object) -> bool:
    parts = [(getattr(f, "__self__", f), getattr(f, "__func__", None)) for f in (one, other)]
    return all(a is b for a, b in zip(*parts, strict=True))


def infer_weight(expr: WeightExpr) -> TensorType | None:
    """The type of an expression, or None where a leaf does not say its own.

    ProgramError for an unknown op, a missing attribute or parts that do not fit.
    """
    if expr.op in LEAVES:
        return _leaf_type(expr)
    op = weight_op(expr.op)
    _check_shape_of(op, expr)
    kinds = [infer_weight(part) for part in expr.inputs]
    known = [kind for kind in kinds if kind is not None]
    if len(known) != len(kinds):
        return None
    return op.rule(known, expr.attrs)


def _check_shape_of(op: WeightOp, expr: WeightExpr) -> None:
    for name in op.required:
        if name not in expr.attrs:
            raise ProgramError(f"weight op {op.name}: attribute {name} is missing")
    count = len(expr.inputs)
    if count != op.inputs if op.inputs is not None else count < 1:
        wanted = "some" if op.inputs is None else op.inputs
        raise ProgramError(f"weight op {op.name} takes {wanted} inputs, given {count}")


def _leaf_type(expr: WeightExpr) -> TensorType | None:
    key = LEAVES[expr.op]
    if not isinstance(expr.attrs.get(key), str) or expr.inputs:
        raise ProgramError(f"weight op {expr.op} takes the attribute {key} and no inputs")
    dtype, shape = expr.attrs.get("dtype"), expr.attrs.get("shape")
    if dtype is None or not isinstance(shape, tuple):
        return None
    if dtype not in [kind.value for kind in DType]:
        raise ProgramError(f"weight op {expr.op}: unknown element type {dtype!r}")
    return TensorType(DType(dtype), tuple(_sizes(shape)))


def _sizes(shape: Sequence[object]) -> list[int]:
    sizes = [size for size in shape if isinstance(size, int) and size >= 0]
    if len(sizes) != len(shape):
        raise ProgramError(f"the shape of a weight must be constant, not {shape}")
    return sizes


def evaluate_expr(
    expr: WeightExpr, loaders: Mapping[str, WeightLoader], pairs: QuantizedPairs | None = None
) -> torch.Tensor:
    """The tensor that an expression stands for; CheckpointError where a leaf cannot be read.

    Codes and scales of matrices are taken from `pairs` where it has them already.
    """
    if expr.op in LEAVES:
        return _load(expr, loaders)
    op = weight_op(expr.op)
    _check_shape_of(op, expr)
    try:
        if pairs is not None and expr.op in PARTS:
            readers = [loaders[leaf.op] for leaf in leaves(expr) if leaf.op in loaders]
            return pairs.part(expr, readers, lambda: evaluate_expr(expr.inputs[0], loaders, pairs))
        parts = [evaluate_expr(part, loaders, pairs) for part in expr.inputs]
        return op.meaning(parts, expr.attrs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ProgramError(f"weight op {op.name} failed: {error}") from error


def _load(expr: WeightExpr, loaders: Mapping[str, WeightLoader]) -> torch.Tensor:
    declared = _leaf_type(expr)
    name = str(expr.attrs[LEAVES[expr.op]])
    if expr.op not in loaders:
        raise CheckpointError(
            f"nothing to read {expr.op} tensors from",
            where=name,
            hint="a program read from text has no weights; give it loaders",
        )
    tensor = loaders[expr.op](name)
    if declared is not None:
        _check_type(tensor, declared, name)
    return tensor


def _check_type(tensor: torch.Tensor, kind: TensorType, name: str) -> None:
    found = TensorType(from_torch(tensor.dtype), tuple(tensor.shape))
    if found != kind:
        raise CheckpointError(f"is {found}, expected {kind}", where=name)


def evaluate_weight(
    program: Program,
    weight: Weight | str,
    *,
    check_finite: bool = True,
    pairs: QuantizedPairs | None = None,
) -> torch.Tensor:
    """The tensor of one entry of the weight table, contiguous; see `evaluate_expr` for `pairs`.

    CheckpointError names the weight where it cannot be read, is not of its declared type, or
    (with `check_finite`) holds NaN or infinity.
    """
    entry = program.weights.get(weight) if isinstance(weight, str) else weight
    if entry is None:
        raise ProgramError(f"no weight @{weight}", where=program.name)
    try:
        tensor = evaluate_expr(entry.expr, program.loaders, pairs).contiguous()
    except InfcError as error:
        if error.where is None:
            error.where = f"@{entry.name}"
        raise
    _check_type(tensor, entry.type, f"@{entry.name}")
    if check_finite:
        require_finite(tensor, _origin(entry))
    return tensor


def _origin(entry: Weight) -> str:
    names = [str(leaf.attrs.get(LEAVES[leaf.op])) for leaf in leaves(entry.expr)]
    return f"@{entry.name}" if names in ([entry.name], []) else f"@{entry.name} (of {names[0]} ...)"


def require_finite(tensor: torch.Tensor, name: str) -> None:
    """CheckpointError naming the tensor where it holds NaN or infinity."""
    import torch

    if not tensor.is_floating_point():
        return
    # A sum is finite only if all its terms are, and takes no memory; it may overflow on its own.
    if torch.isfinite(tensor.sum(dtype=torch.float32)):
        return
    for row in tensor.reshape(-1).split(1 << 22):
        bad = ~torch.isfinite(row)
        if bad.any():
            kind = "NaN" if torch.isnan(row).any() else "infinity"
            raise CheckpointError(f"holds {kind}", where=name, hint="the checkpoint is damaged")


def program_weights(program: Program, *, cache: bool = True) -> WeightLoader:
    """A source of the program's weights for the interpreter; with `cache` each is made once."""
    kept: dict[str, torch.Tensor] = {}

    def source(name: str) -> torch.Tensor:
        if name in kept:
            return kept[name]
        tensor = evaluate_weight(program, name)
        if cache:
            kept[name] = tensor
        return tensor

    return source


def _int(attrs: Attrs, name: str) -> int:
    value = attrs[name]
    if not isinstance(value, int):
        raise ProgramError(f"attribute {name} is {value!r}, expected an integer")
    return value


def _ints(attrs: Attrs, name: str) -> list[int]:
    value = attrs[name]
    if not isinstance(value, tuple):
        raise ProgramError(f"attribute {name} is {value!r}, expected a tuple")
    return _sizes(value)


def _number(attrs: Attrs) -> float | int:
    value = attrs["value"]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ProgramError(f"attribute value is {value!r}, expected a number")
    return value


def _like(op: str) -> WeightRule:
    """The type rule of the op of that name in the dialect, for weights."""

    def rule(kinds: Sequence[TensorType], attrs: Attrs) -> TensorType:
        known = get_op(op)
        (kind,) = known.infer(list(kinds), attrs)
        return kind

    return rule


def _stack_rule(kinds: Sequence[TensorType], attrs: Attrs) -> TensorType:
    first, dim = kinds[0], _int(attrs, "dim")
    for kind in kinds:
        if kind != first:
            raise ProgramError(f"stack: {first} and {kind} differ")
    if not 0 <= dim <= first.rank:
        raise ProgramError(f"stack: dimension {dim} is out of range for {first}")
    shape: list[Dim] = list(first.shape)
    shape.insert(dim, len(kinds))
    return TensorType(first.dtype, tuple(shape))


def _stack(parts: Sequence[torch.Tensor], attrs: Attrs) -> torch.Tensor:
    import torch

    return torch.stack(list(parts), _int(attrs, "dim"))


def _concat(parts: Sequence[torch.Tensor], attrs: Attrs) -> torch.Tensor:
    import torch

    if len({part.dtype for part in parts}) != 1:
        raise ProgramError("concat: parts have different element types")
    return torch.cat(list(parts), _int(attrs, "dim"))


def _slice(parts: Sequence[torch.Tensor], attrs: Attrs) -> torch.Tensor:
    dim, start, stop = (_int(attrs, name) for name in ("dim", "start", "stop"))
    return parts[0][(slice(None),) * dim + (slice(start, stop),)]


def _cast(parts: Sequence[torch.Tensor], attrs: Attrs) -> torch.Tensor:
    """CheckpointError for numbers that float16 does not reach; other types hold any magnitude."""
    import torch

    dtype = DType(attrs["dtype"])
    result = parts[0].to(to_torch(dtype))
    if dtype is DType.F16 and torch.isinf(result).any() and not torch.isinf(parts[0]).any():
        raise CheckpointError(
            f"has numbers up to {float(parts[0].abs().max()):.4g}, and float16 ends at 65504",
            hint="dtype: bfloat16 takes as much memory and has no such limit",
        )
    return result


def _ones(parts: Sequence[torch.Tensor], attrs: Attrs) -> torch.Tensor:
    import torch

    return torch.ones(_ints(attrs, "shape"))


def _scalar_rule(kinds: Sequence[TensorType], attrs: Attrs) -> TensorType:
    _number(attrs)
    if not kinds[0].dtype.is_float:
        raise ProgramError(f"operand is {kinds[0]}, expected floating point")
    return kinds[0]


def _matrix(kinds: Sequence[TensorType]) -> TensorType:
    if kinds[0].rank < 2 or not kinds[0].dtype.is_float:
        raise ProgramError(f"operand is {kinds[0]}, expected a floating-point matrix")
    return kinds[0]


def compute_expr(op: str, operands: Sequence[WeightExpr | Literal], attrs: Attrs) -> WeightExpr:
    """What an op of the dialect makes of weights and literals, computed when compiling.

    `literals` holds the latter with their places among the operands, `attrs` the op's attributes.
    """
    parts = tuple(operand for operand in operands if isinstance(operand, WeightExpr))
    literals = tuple(
        (place, operand)
        for place, operand in enumerate(operands)
        if not isinstance(operand, WeightExpr)
    )
    said: dict[str, Attr] = {"op": op}
    if literals:
        said["literals"] = literals
    if attrs:
        said["attrs"] = tuple((name, value) for name, value in attrs.items())
    return WeightExpr("compute", parts, said)


def _operands(parts: Sequence[_T], attrs: Attrs) -> list[_T | Literal]:
    """The parts with the literals of a computed weight in their places."""
    literals: Any = attrs.get("literals", ())
    operands: list[_T | Literal] = list(parts)
    for place, literal in literals:
        operands.insert(place, literal)
    return operands


def _computed_attrs(attrs: Attrs) -> dict[str, Attr]:
    pairs: Any = attrs.get("attrs", ())
    return dict(pairs)


def _computed_rule(kinds: Sequence[TensorType], attrs: Attrs) -> TensorType:
    results = get_op(str(attrs["op"])).infer(_operands(kinds, attrs), _computed_attrs(attrs))
    if len(results) != 1:
        raise ProgramError(f"compute: {attrs['op']} has {len(results)} results")
    return results[0]


def _computed(parts: Sequence[torch.Tensor], attrs: Attrs) -> torch.Tensor:
    """With `wide` (an element type) all is computed in it, as the interpreter's override does."""
    op, wide = get_op(str(attrs["op"])), attrs.get("wide")
    override = None if wide is None else DType(wide)
    if override is not None:
        parts = [p.to(to_torch(override)) if p.is_floating_point() else p for p in parts]
    kinds = [TensorType(from_torch(part.dtype), tuple(part.shape)) for part in parts]
    full = op.complete(_computed_attrs(attrs), _operands(kinds, attrs))
    result: Any = op.meaning(*_operands(parts, attrs), **op.resolve(full, {}, override))
    tensor: torch.Tensor = result
    return tensor


BUILTIN: Final = (
    WeightOp("compute", _computed, _computed_rule, ("op",), None),
    WeightOp("concat", _concat, _like("concat"), ("dim",), None),
    WeightOp("stack", _stack, _stack_rule, ("dim",), None),
    WeightOp("slice", _slice, _like("slice"), ("dim", "start", "stop")),
    WeightOp(
        "transpose",
        lambda parts, attrs: parts[0].permute(_ints(attrs, "perm")),
        _like("transpose"),
        ("perm",),
    ),
    WeightOp(
        "reshape",
        lambda parts, attrs: parts[0].reshape(_ints(attrs, "shape")),
        _like("reshape"),
        ("shape",),
    ),
    WeightOp(
        "cast",
        _cast,
        _like("cast"),
        ("dtype",),
    ),
    WeightOp(
        "codes",
        lambda parts, attrs: get_scheme(attrs["scheme"]).quantize(parts[0])[0],
        lambda kinds, attrs: get_scheme(attrs["scheme"]).weight.code_type(_matrix(kinds)),
        ("scheme",),
    ),
    WeightOp(
        "scales",
        lambda parts, attrs: get_scheme(attrs["scheme"]).quantize(parts[0])[1],
        lambda kinds, attrs: get_scheme(attrs["scheme"]).weight.scale_type(_matrix(kinds)),
        ("scheme",),
    ),
    WeightOp(
        "ones",
        _ones,
        lambda kinds, attrs: TensorType(DType.F32, tuple(_ints(attrs, "shape"))),
        ("shape",),
        0,
    ),
    WeightOp("add", lambda parts, attrs: parts[0] + _number(attrs), _scalar_rule, ("value",)),
    WeightOp("mul", lambda parts, attrs: parts[0] * _number(attrs), _scalar_rule, ("value",)),
)

for _op in BUILTIN:
    register_weight_op(_op)
