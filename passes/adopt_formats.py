"""Keeps the blocks of matrices that a file holds in a format that kernels multiply by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.errors import UsageError
from ..ir.formats import GGUF_FORMATS
from ..ir.program import Node, Operand, Program, Weight, WeightExpr
from ..ir.schemes import ADOPT, ADOPTING, INT8, Scheme, get_scheme, weights_name
from ..ir.types import TensorType
from ..ir.weights import infer_weight, ones, packed
from .base import PassContext, PassResult, finish
from .near_miss import NearMiss
from .quantized_products import QuantizedProducts
from .scheme_choices import SchemeChoices, SchemePass, matrix_exprs, stored_formats


@dataclass(frozen=True)
class AdoptFormats(SchemePass):
    """`linear(%x, @w)` with `@w = checkpoint{stored = "q4_1"}` => `%q, %s = quantize_rows(%x);
    scaled_linear(%q, %s, @w.codes, @w.scales) {scheme = q4_1}` with `@w.codes = packed{...}`.

    The options are those of quantize-weights: what has the scheme `adopt` or `adopt-weights` is
    kept as the file has it in Q8_0, Q4_0 or Q4_1, also where rows are permuted, cut or stacked.
    quantize-weights decides about all else. A table of embeddings becomes `scaled_embedding`,
    experts `scaled_moe`, and with `adopt-weights` products become `decoded_linear`.

    Requires: unit-batch-squeezed. Ensures: nothing more (by default the scheme is none).
    Keeps: the weights, bit for bit; rows of activations are rounded to int8 in groups of 32, or
    stay as they are with `adopt-weights`.
    Why: rounding what is rounded already loses more, and what is widened takes many times the
    bytes.
    """

    name: ClassVar[str] = "adopt-formats"
    phase: ClassVar[str] = "quantize"
    contract: ClassVar[str] = "lossy"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})
    # With `adopt-weights`, for programs whose own type has taken more from the weights than that.
    tolerance: ClassVar[float] = INT8.tolerance

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Adopt what can be, and say of the rest why not."""
        if not self.named() & ADOPTING.keys():
            return finish(program, program, 0)
        if not stored_formats(weight.expr for weight in program.weights.values()):
            raise UsageError(
                "no matrix of the model is stored in a format of few bits",
                where=self.name,
                hint="adopt is for quantized GGUF files; use int8 or int4 for others",
            )
        misses: dict[int, tuple[NearMiss, set[str]]] = {}
        misfits: set[str] = set()

        def pick(node: Node, scheme: str, matrices: Sequence[Operand]) -> Scheme | str:
            exprs = matrix_exprs(program, matrices)
            formats = stored_formats(exprs)
            if scheme not in ADOPTING or not formats:
                return ""
            found = _common_format(exprs)
            if found in GGUF_FORMATS:
                return get_scheme(found if scheme == ADOPT else weights_name(found))
            misses[id(node)] = NearMiss.at(node, found), formats
            misfits.add(ADOPTING[scheme].name)
            return found

        choices = SchemeChoices(program, self, pick)
        products = QuantizedProducts(ProgramBuilder.from_program(program), _kept)
        for node in program.nodes:
            chosen = choices.choose(node)
            if isinstance(chosen, Scheme):
                products.add(node, choices, chosen)
            else:
                products.copy(node)
        if misses:
            context.log(_remark([formats for _, formats in misses.values()], misfits))
        result = remove_dead_code(products.builder.build())
        return finish(program, result, products.matches, tuple(miss for miss, _ in misses.values()))


def _remark(formats: Sequence[set[str]], misfits: Iterable[str]) -> str:
    """What is said of matrices in these formats, which become those schemes."""
    counts = Counter(_named(one) for one in formats)
    listed = ", ".join(f"{count} in {name}" for name, count in sorted(counts.items()))
    return (
        f"matrices that cannot be kept as the file has them: {listed}; they are rounded to"
        f" {' and '.join(sorted(misfits))} (report.json lists them)"
    )


def _named(formats: Iterable[str]) -> str:
    return " and ".join(sorted(one.upper() for one in formats))


def _common_format(exprs: Sequence[WeightExpr]) -> str:
    """The format of all these matrices; or why they are not adopted."""
    formats = stored_formats(exprs)
    for name in sorted(formats - GGUF_FORMATS.keys()):
        return f"there is no kernel for {name.upper()}"
    if len(formats) != 1:
        return f"it is stored in {_named(formats)}"
    (name,) = formats
    for expr in exprs:
        if (reason := _obstacle(expr)) is not None:
            return reason
    return name


_STACKED: Final = ("concat", "slice", "stack")


def _obstacle(expr: WeightExpr) -> str | None:
    """Why blocks would not survive what is done to a matrix; None where rows stay whole."""
    if not expr.inputs:
        return None if expr.attrs.get("stored") else "a part of it is not stored in few bits"
    kinds = [infer_weight(part) for part in expr.inputs]
    if any(kind is None for kind in kinds):
        return "the shape of a part of it is not known"
    rank, depths = kinds[0].rank if kinds[0] else 0, {kind.shape[-1] for kind in kinds if kind}
    keeps = expr.op == "cast"
    if expr.op == "reshape":
        shape = expr.attrs["shape"]
        keeps = isinstance(shape, tuple) and {shape[-1]} == depths
    elif expr.op == "transpose":
        perm = expr.attrs["perm"]
        keeps = isinstance(perm, tuple) and perm[-1] == rank - 1
    elif expr.op in _STACKED:
        dim = expr.attrs["dim"]
        keeps = isinstance(dim, int) and 0 <= dim < (rank if expr.op == "stack" else rank - 1)
    if not keeps:
        return f"{expr.op} changes the inside of its rows"
    return next(filter(None, map(_obstacle, expr.inputs)), None)


def _kept(weight: Weight, scheme: Scheme) -> tuple[WeightExpr, WeightExpr]:
    """The blocks of a matrix, and a scale of one for each row."""
    return _packed(weight.expr, scheme), ones(scheme.weight.scale_type(weight.type))


def _packed(expr: WeightExpr, scheme: Scheme) -> WeightExpr:
    """What is done to the rows of a matrix, done to their blocks."""
    if not expr.inputs:
        kind = infer_weight(expr)
        assert isinstance(kind, TensorType)
        return packed(str(expr.attrs["name"]), scheme.weight.name, scheme.weight.code_type(kind))
    inputs = tuple(_packed(part, scheme) for part in expr.inputs)
    if expr.op == "cast":  # of numbers that codes are exact for
        return inputs[0]
    if expr.op != "reshape":
        return replace(expr, inputs=inputs)
    kind, shape = infer_weight(inputs[0]), expr.attrs["shape"]
    assert kind is not None and isinstance(shape, tuple)
    width = kind.shape[-1]
    assert isinstance(width, int)
    return replace(expr, inputs=inputs, attrs={"shape": (*shape[:-1], width)})
