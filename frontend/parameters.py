"""Parameters and computed buffers as weights of the program, defined when first read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..ir.builder import ProgramBuilder
from ..ir.program import WeightExpr, WeightRef
from ..ir.types import DType, TensorType

DefineParameter = Callable[[str, DType], WeightExpr]
"""A parameter's canonical name and element type -> how it is made from the checkpoint."""


@dataclass(frozen=True, slots=True)
class _Use:
    source: str
    transposed: bool


@dataclass(slots=True)
class ParameterTable:
    """Declares weights in `builder`: `names` gives tied parameters one name.

    `buffers` holds the values that no checkpoint has; `data` collects those that are read.
    """

    builder: ProgramBuilder
    names: Mapping[str, str]
    buffers: Mapping[str, torch.Tensor]
    define: DefineParameter
    data: dict[str, torch.Tensor] = field(default_factory=dict)
    _uses: dict[str, _Use] = field(default_factory=dict)

    def ref(self, name: str, kind: TensorType) -> WeightRef:
        """The parameter or buffer of that name as an operand."""
        return self._declare(self.names.get(name, name), kind, transposed=False)

    def transposed(self, ref: WeightRef) -> WeightRef:
        """The transpose of a two-dimensional weight, as a weight of its own."""
        use = self._uses[ref.name]
        kind = self.builder.weights[ref.name].type
        flipped = TensorType(kind.dtype, kind.shape[::-1])
        return self._declare(use.source, flipped, transposed=not use.transposed)

    def moved(self, ref: WeightRef, old_prefix: str, new_prefix: str) -> WeightRef | None:
        """The same weight of another layer; None where the name does not lie in the first."""
        use = self._uses[ref.name]
        if not use.source.startswith(old_prefix):
            return None
        name = new_prefix + use.source.removeprefix(old_prefix)
        kind = self.builder.weights[ref.name].type
        return self._declare(self.names.get(name, name), kind, transposed=use.transposed)

    def relative_name(self, ref: WeightRef, prefix: str) -> tuple[str, bool]:
        """The source's name after `prefix` (whole where it does not start so), and whether
        the weight is its transpose."""
        use = self._uses[ref.name]
        return use.source.removeprefix(prefix), use.transposed

    def _declare(self, source: str, kind: TensorType, *, transposed: bool) -> WeightRef:
        name = f"{source}.transposed" if transposed else source
        if name in self._uses:
            return WeightRef(name)
        self._uses[name] = _Use(source, transposed)
        if source in self.buffers:
            self.data[source] = self.buffers[source]
            expr = WeightExpr("data", (), {"key": source})
        else:
            expr = self.define(source, kind.dtype)
        if transposed:
            expr = WeightExpr("transpose", (expr,), {"perm": (1, 0)})
        return self.builder.weight(name, kind, expr)
