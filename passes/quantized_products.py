"""Products and tables over codes, in the place of those over matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..ir.builder import ProgramBuilder
from ..ir.program import Attr, Node, Operand, Value, Weight, WeightExpr, WeightRef
from ..ir.schemes import Activations, Scheme
from ..ir.types import DType, TensorType
from .match import adopt_name
from .scheme_choices import SchemeChoices

Parts = Callable[[Weight, Scheme], tuple[WeightExpr, WeightExpr]]
"""Gives the expressions of the codes and scales of a matrix in a scheme."""


@dataclass(slots=True)
class QuantizedProducts:
    """Emits products over codes; rows that several products read are quantised once.

    `parts` gives the expressions of the codes and scales of a matrix in a scheme. `wide` has by
    name what was rounded to 16 bits as a row of a table, and is float32 now.
    """

    builder: ProgramBuilder
    parts: Parts
    rows: dict[tuple[str, int, str], tuple[Value, Value]] = field(default_factory=dict)
    wide: dict[str, Value] = field(default_factory=dict)
    matches: int = 0

    def add(self, node: Node, choices: SchemeChoices, scheme: Scheme) -> None:
        """A node over matrices in its form over codes."""
        if node.op == "linear":
            self._linear(node, scheme)
        elif node.op == "embedding":
            self._embedding(node, choices.table(node), scheme)
        else:
            self._experts(node, scheme)

    def copy(self, node: Node) -> None:
        """A node as it is, but for a cast of what is float32 already, and rows known in codes."""
        if node.op == "quantize_rows":
            self._known_rows(node)
            return
        source = node.inputs[0] if node.op == "cast" else None
        wide = self.wide.get(source.name) if isinstance(source, Value) else None
        if wide is not None and node.output.type.dtype is DType.F32:
            self.builder.replace(node.output, wide)
        else:
            self.builder.copy(node)

    def _embedding(self, node: Node, matrix: WeightRef, scheme: Scheme) -> None:
        """Rows in float32, for all that would widen them at once."""
        kind = node.output.type
        mark = len(self.builder.nodes)
        made = self.builder.add(
            "scaled_embedding",
            (*self._weight(matrix, scheme), node.inputs[1]),
            {"dtype": DType.F32.value, "scheme": scheme.name, "width": kind.shape[-1]},
            names=(f"{node.output.name}.scaled",),
            layer=node.layer,
            source=node.source,
        ).output
        if kind.dtype is not DType.F32:
            self.wide[node.output.name] = made
            made = self.builder.emit("cast", made, dtype=kind.dtype.value)
        adopt_name(self.builder, mark, node.output, made)
        self.matches += 1

    def _linear(self, node: Node, scheme: Scheme) -> None:
        x, matrix, *bias = node.inputs
        attrs = {"dtype": node.output.type.dtype.value}
        parts = (*self._weight(matrix, scheme), *bias)
        if scheme.activations is None:
            self._emit("decoded_linear", (x, *parts), attrs, node, scheme)
        else:
            rows = self._rows(x, node, scheme.activations)
            self._emit("scaled_linear", (*rows, *parts), attrs, node, scheme)

    def _experts(self, node: Node, scheme: Scheme) -> None:
        x, index, weight, gate_up, down, *biases = node.inputs
        matrices = (*self._weight(gate_up, scheme), *self._weight(down, scheme))
        operands = (x, index, weight, *matrices, *biases)
        self._emit("scaled_moe", operands, node.attrs, node, scheme)

    def _emit(
        self,
        op: str,
        operands: tuple[Operand, ...],
        attrs: Mapping[str, Attr],
        node: Node,
        scheme: Scheme,
    ) -> None:
        mark = len(self.builder.nodes)
        made = self.builder.add(
            op,
            operands,
            {**attrs, "scheme": scheme.name},
            names=(f"{node.output.name}.scaled",),
            layer=node.layer,
            source=node.source,
        )
        adopt_name(self.builder, mark, node.output, made.output)
        self.matches += 1

    def _rows(self, x: Operand, node: Node, how: Activations) -> tuple[Value, Value]:
        assert isinstance(x, Value)
        key = x.name, how.group, how.codes.name
        if key not in self.rows:
            made = self.builder.add(
                "quantize_rows",
                (x,),
                {"group": how.group, "codes": how.codes.name},
                names=(f"{x.name}.codes", f"{x.name}.scale"),
                layer=node.layer,
                source=node.source,
            )
            self.rows[key] = made.outputs[0], made.outputs[1]
        return self.rows[key]

    def _known_rows(self, node: Node) -> None:
        x, group = node.inputs[0], node.attrs["group"]
        assert isinstance(x, Value) and isinstance(group, int)
        key = x.name, group, str(node.attrs["codes"])
        made = self.rows.get(key)
        if made is None:
            copied = self.builder.copy(node)
            self.rows[key] = copied.outputs[0], copied.outputs[1]
            return
        for old, new in zip(node.outputs, made, strict=True):
            self.builder.replace(old, new)

    def _weight(self, ref: Operand, scheme: Scheme) -> tuple[WeightRef, WeightRef]:
        assert isinstance(ref, WeightRef)
        weight = self.builder.weights[ref.name]
        codes, scales = self.parts(weight, scheme)
        return (
            self._entry(ref.name, scheme, "codes", scheme.weight.code_type(weight.type), codes),
            self._entry(ref.name, scheme, "scales", scheme.weight.scale_type(weight.type), scales),
        )

    def _entry(
        self, name: str, scheme: Scheme, part: str, kind: TensorType, expr: WeightExpr
    ) -> WeightRef:
        """An entry of the weight table; a table and a head may differ in the scheme."""
        plain = f"{name}.{part}"
        known = self.builder.weights.get(plain)
        is_other = known is not None and known.expr != expr
        return self.builder.weight(
            f"{name}.{scheme.name}.{part}" if is_other else plain, kind, expr
        )
