"""Holds the matrices of the model as codes of few bits, and multiplies codes by codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.program import Node, Operand, Program, Weight, WeightExpr
from ..ir.schemes import ADOPTING, INT8, SCHEMES, Scheme
from .base import PassContext, PassResult, finish
from .near_miss import NearMiss
from .pattern_uses import PatternUses
from .quantized_products import QuantizedProducts
from .scheme_choices import (
    SchemeChoices,
    SchemePass,
    matrix_exprs,
    stored_formats,
)


@dataclass(frozen=True)
class QuantizeWeights(SchemePass):
    """`linear(%x, @w)` => `%q, %s = quantize_rows(%x);
    scaled_linear(%q, %s, @w.codes, @w.scales) {scheme = int8}`.

    `rules` are pairs `pattern=scheme`, separated by spaces: a matrix whose name matches gets the
    scheme of the first such pair, and the others get `scheme`. `skip` are patterns of matrices that
    are not quantized, whatever the rules say. Each pattern must decide about a matrix (of any of
    the programs that are compiled together), and both matrices of a mixture of experts must get the
    same scheme. In schemes that end in `-weights`,
    rows are not quantized: `decoded_linear(%x, @w.codes, @w.scales)`. The scheme `adopt` is int8
    here for what the file holds in few bits and adopt-formats could not keep (`adopt-weights`:
    int8-weights), and leaves others as they are.
    `head` is the scheme of the output head if no rule matches it, and `attention` that of the
    products that make queries, keys and values and read what attention gives; empty means `scheme`.
    With `auto`, a `scheme` of 4 bits is replaced by `auto_head` for the head (empty: by the one of
    8), and by the one of 8 for keys, values and results of attention. What a table that is not the
    head saves with 4 bits is spent on 8 bits for queries, and then for products that follow an
    activation function, if it is enough for all.
    `embedding` is the scheme of a table in which tokens are looked up, which becomes
    `scaled_embedding(@w.codes, @w.scales, %ids)`; `auto` means that of the head if it is the same
    matrix, so that both read the same codes, and otherwise `scheme` if that has fewer than 8
    bits or is fp8, else int8.
    Other tables are quantized if a rule says so. A pattern matches the name of a weight, with or
    without `.weight`.

    Requires: unit-batch-squeezed. Ensures: nothing more (by default the scheme is none).
    Keeps: what the bits can say of a row: errors near 1 % of its largest value with 8, 8 % with 4.
    Why: decoding reads every weight once per token, and codes are at most half of the bytes. With
    VNNI, integer products are twice as fast as others; on AVX2, they are equally fast. An embedding
    takes up to a third of a small model, and twice that if the head is a copy in another format.
    """

    name: ClassVar[str] = "quantize-weights"
    phase: ClassVar[str] = "quantize"
    contract: ClassVar[str] = "lossy"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})

    @property
    def allowed_error(self) -> float:
        """What the schemes may be off by."""
        names = self.named() | ({INT8.name} if self.named() & ADOPTING.keys() else set())
        return max((SCHEMES[x].tolerance for x in names if x in SCHEMES), default=self.tolerance)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantise every matrix but routers and those that an option leaves alone."""
        if not self.is_used:
            return finish(program, program, 0)

        def pick(node: Node, scheme: str, matrices: Sequence[Operand]) -> Scheme | str:
            if scheme not in ADOPTING:
                return SCHEMES[scheme]
            if stored_formats(matrix_exprs(program, matrices)):
                return ADOPTING[scheme]
            return "the file does not hold it in a format of few bits"

        choices = SchemeChoices(program, self, pick)
        products = QuantizedProducts(ProgramBuilder.from_program(program), _rounded)
        misses = []
        for node in program.nodes:
            chosen = choices.choose(node)
            if isinstance(chosen, str):
                misses.append(NearMiss.at(node, chosen))
            if isinstance(chosen, Scheme):
                products.add(node, choices, chosen)
            else:
                products.copy(node)
        uses = PatternUses() if context.patterns is None else context.patterns
        uses.add(self, choices.unused())
        if context.patterns is None:
            uses.require_all_used()
        result = remove_dead_code(products.builder.build())
        return finish(program, result, products.matches, tuple(misses))


def _rounded(weight: Weight, scheme: Scheme) -> tuple[WeightExpr, WeightExpr]:
    """The parts of a matrix that is rounded to nearest."""
    attrs = {"scheme": scheme.name}
    return WeightExpr("codes", (weight.expr,), attrs), WeightExpr("scales", (weight.expr,), attrs)
