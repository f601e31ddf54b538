"""Parameters and computed buffers as weights of the program, defined when first read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from ..ir.builder import ProgramBuilder
from ..ir.program import WeightExpr, WeightRef
from ..ir.types import DType, TensorType

DefineParameter = Callable[[str, DType], WeightExpr]
"""A parameter's canonical name and element type -> how it is made from the checkpoint."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a weight is made of its parameter: views (`transpose` by a permutation, `reshape` to a
    shape) one after the other. `name` is put behind the parameter's; without, it is as published.
    """

    name: str = ""
    steps: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def apply(self, expr: WeightExpr) -> WeightExpr:
        """The weight's expression from its parameter's."""
        for op, numbers in self.steps:
            expr = WeightExpr(op, (expr,), {_NUMBERS[op]: numbers})
        return expr


_NUMBERS: Final = {"transpose": "perm", "reshape": "shape"}
_AS_PUBLISHED: Final = Layout()
_TRANSPOSED: Final = Layout("transposed", (("transpose", (1, 0)),))


@dataclass(frozen=True, slots=True)
class _Use:
    source: str
    layout: Layout


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
        return self._declare(self.names.get(name, name), kind, _AS_PUBLISHED)

    def constant(self, ref: WeightRef) -> torch.Tensor | None:
        """The value of a buffer that no checkpoint has; None for other weights."""
        use = self._uses[ref.name]
        return self.buffers.get(use.source) if use.layout == _AS_PUBLISHED else None

    def transposed(self, ref: WeightRef) -> WeightRef:
        """The transpose of a two-dimensional weight, as a weight of its own."""
        use = self._uses[ref.name]
        kind = self.builder.weights[ref.name].type
        flipped = TensorType(kind.dtype, kind.shape[::-1])
        layout = _TRANSPOSED if use.layout == _AS_PUBLISHED else _AS_PUBLISHED
        return self._declare(use.source, flipped, layout)

    def arranged(self, ref: WeightRef, shape: Sequence[int], layout: Layout) -> WeightRef:
        """A weight that is stored as published, in another layout, as a weight of its own."""
        use = self._uses[ref.name]
        assert use.layout == _AS_PUBLISHED, f"{ref.name} is arranged already"
        kind = TensorType(self.builder.weights[ref.name].type.dtype, tuple(shape))
        return self._declare(use.source, kind, layout)

    def moved(self, ref: WeightRef, old_prefix: str, new_prefix: str) -> WeightRef | None:
        """The same weight of another layer; None where the name does not lie in the first."""
        use = self._uses[ref.name]
        if not use.source.startswith(old_prefix):
            return None
        name = new_prefix + use.source.removeprefix(old_prefix)
        kind = self.builder.weights[ref.name].type
        return self._declare(self.names.get(name, name), kind, use.layout)

    def relative_name(self, ref: WeightRef, prefix: str) -> tuple[str, Layout]:
        """The source's name after `prefix` (whole where it does not start so), and how the
        weight is made of it."""
        use = self._uses[ref.name]
        return use.source.removeprefix(prefix), use.layout

    def _declare(self, source: str, kind: TensorType, layout: Layout) -> WeightRef:
        name = f"{source}.{layout.name}" if layout.name else source
        if name in self._uses:
            return WeightRef(name)
        self._uses[name] = _Use(source, layout)
        if source in self.buffers:
            self.data[source] = self.buffers[source]
            expr = WeightExpr("data", (), {"key": source})
        else:
            expr = self.define(source, kind.dtype)
        return self.builder.weight(name, kind, layout.apply(expr))
