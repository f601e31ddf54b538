"""The table of weights that the generated code indexes: which, in what layout, in what order."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...ir.formats import Format
from ...ir.program import Program, Weight, WeightExpr
from ...ir.targets import Target
from .layout import weight_layout
from .packing import PACK

PACKED_OPS = {
    "linear": (1,),
    "scaled_linear": (2,),
    "decoded_linear": (1,),
    "moe": (3, 4),
    "scaled_moe": (3, 5),
    "scaled_embedding": (0,),
}
"""Op -> which of its operands are read in panels."""

PACKED = ":packed"
"""What follows the name of a weight that lies in panels."""


@dataclass(slots=True)
class WeightTable:
    """Entries in order of first use; a weight that any matrix product reads lies packed.

    `packed_names` are those that rows are gathered from as well, as they lie: floats, not codes.
    """

    program: Program
    target: Target
    entries: dict[str, Weight] = field(default_factory=dict)
    packed_names: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        names = set()
        for node in self.program.nodes:
            for place in PACKED_OPS.get(node.op, ()):
                names |= {ref.name for ref in node.weights() if ref is node.inputs[place]}
        floats = (name for name in names if self.program.weights[name].type.dtype.is_float)
        self.packed_names = frozenset(floats)

    def plain(self, name: str) -> int:
        """Index of a weight that lies as the program types it."""
        return self._index(self.program.weights[name])

    def packed(self, name: str, form: Format | None = None) -> int:
        """Index of a weight that lies in panels (see `layout.py`); its format if it is of codes."""
        weight = self.program.weights[name]
        layout = weight_layout(form or weight.type.dtype, self.target)
        expr = WeightExpr(PACK.name, (weight.expr,), layout.attrs())
        return self._index(Weight(name + PACKED, layout.packed_type(weight.type), expr))

    def _index(self, weight: Weight) -> int:
        self.entries.setdefault(weight.name, weight)
        return list(self.entries).index(weight.name)
