"""The matrices of a quantised program, and the program with each as one plain weight again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...ir.builder import ProgramBuilder, remove_dead_code
from ...ir.program import Node, Operand, Program, Value, WeightExpr, WeightRef
from ...ir.types import Dim, TensorType
from ...ir.weights import infer_weight, leaves
from ..match import adopt_name


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A matrix that is held in the parts of a scheme, which are entries of the weight table.

    `name` is its own in the plain program, where `input` is what multiplies it (None: a mixture's
    experts). `source` is what it is made of (None where that is not known any more), `parts` has
    the entries by part. `is_table` is whether rows are looked up in the same entries, `is_adopted`
    whether the codes are those of the file.
    """

    name: str
    scheme: str
    source: WeightExpr | None
    parts: Mapping[str, str]
    input: Value | None
    is_table: bool = False
    is_adopted: bool = False


@dataclass(frozen=True, slots=True)
class PlainProgram:
    """`program` computes with plain weights; `matrices` has those that stand for a quantised one.

    The latter by the name of the weight.
    """

    program: Program
    matrices: Mapping[str, QuantizedMatrix]


def plain_program(program: Program) -> PlainProgram:
    """`scaled_linear(quantize_rows(%x), codes(w), scales(w))` => `linear(%x, @w)`; experts and
    `decoded_linear` too.

    Rows are not quantised: each token's rounding is its own, and feedback can do nothing about it.
    Tables stay in codes, of which only the rows that are looked up are decoded.
    """
    tables = {str(node.inputs[0]) for node in program.nodes if node.op == "scaled_embedding"}
    plain = _Plain(program, ProgramBuilder.from_program(program), program.producers(), {}, tables)
    for node in program.nodes:
        if node.op in ("scaled_linear", "decoded_linear"):
            plain.linear(node)
        elif node.op == "scaled_moe":
            plain.experts(node)
        else:
            plain.builder.copy(node)
    return PlainProgram(remove_dead_code(plain.builder.build()), plain.matrices)


@dataclass(slots=True)
class _Plain:
    program: Program
    builder: ProgramBuilder
    producers: Mapping[str, Node]
    matrices: dict[str, QuantizedMatrix]
    tables: set[str]

    def linear(self, node: Node) -> None:
        quantizes = node.op == "scaled_linear"
        codes, scales, *bias = node.inputs[2 if quantizes else 1 :]
        x = self._rows_of(node) if quantizes else node.inputs[0]
        assert isinstance(x, Value)
        matrix = self._matrix(node, (codes, scales), x.type.shape[-1], x)
        self._emit(node, "linear", (x, matrix, *bias), {})

    def experts(self, node: Node) -> None:
        x, index, weight, *matrices = node.inputs[:7]
        assert isinstance(x, Value)
        gate_up = self._matrix(node, (matrices[0], matrices[1]), x.type.shape[-1], None)
        hidden = self.builder.weights[gate_up.name].type.shape[1]
        assert isinstance(hidden, int)
        down = self._matrix(node, (matrices[2], matrices[3]), hidden // 2, None)
        attrs = {name: value for name, value in node.attrs.items() if name != "scheme"}
        self._emit(node, "moe", (x, index, weight, gate_up, down, *node.inputs[7:]), attrs)

    def _rows_of(self, node: Node) -> Value:
        """What was quantised to the rows that a product reads."""
        codes = node.inputs[0]
        assert isinstance(codes, Value)
        source = self.producers[codes.name].inputs[0]
        assert isinstance(source, Value)
        return source

    def _matrix(
        self, node: Node, parts: tuple[Operand, Operand], depth: Dim, x: Value | None
    ) -> WeightRef:
        codes, scales = parts
        assert isinstance(codes, WeightRef) and isinstance(scales, WeightRef)
        entry = self.program.weights[codes.name]
        name = f"{codes.name}.plain"
        kind = TensorType(node.output.type.dtype, (*entry.type.shape[:-1], depth))
        source = entry.expr.inputs[0] if entry.expr.op == "codes" else None
        places = {"codes": codes.name, "scales": scales.name}
        scheme = str(node.attrs["scheme"])
        is_table = str(codes) in self.tables
        is_adopted = any(leaf.op == "packed" for leaf in leaves(entry.expr))
        self.matrices.setdefault(
            name, QuantizedMatrix(name, scheme, source, places, x, is_table, is_adopted)
        )
        # Without a source never evaluated: whoever runs the plain program gives its matrices.
        expr = source or WeightExpr("checkpoint", (), {"name": name})
        if source is not None and infer_weight(source) != kind:
            expr = WeightExpr("cast", (expr,), {"dtype": kind.dtype.value})
        return self.builder.weight(name, kind, expr)

    def _emit(
        self, node: Node, op: str, operands: tuple[Operand, ...], attrs: Mapping[str, object]
    ) -> None:
        mark = len(self.builder.nodes)
        made = self.builder.add(
            op,
            operands,
            attrs,
            names=(f"{node.output.name}.plain",),
            layer=node.layer,
            source=node.source,
        )
        adopt_name(self.builder, mark, node.output, made.output)
