"""Parameters and computed buffers as weights of the program, defined when first read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import torch

from ..ir.builder import ProgramBuilder
from ..ir.program import WeightExpr, WeightRef
from ..ir.types import DType, TensorType

DefineParameter = Callable[[str, DType], WeightExpr]
"""A parameter's canonical name and element type -> how it is made from the checkpoint."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How a weight is made of its parameter: `transpose` by a permutation, `reshape` to a shape,
    `cast` to a type, one after the other. `name` is put behind the parameter's.
    """

    name: str = ""
    steps: tuple[tuple[str, tuple[int, ...] | str], ...] = ()

    def then(self, other: Arrangement) -> Arrangement:
        """This one first, then the other."""
        name = ".".join(filter(None, (self.name, other.name)))
        return Arrangement(name, (*self.steps, *other.steps))

    def apply(self, expr: WeightExpr) -> WeightExpr:
        """The weight's expression from its parameter's."""
        for op, value in self.steps:
            expr = WeightExpr(op, (expr,), {_ATTRS[op]: value})
        return expr


_ATTRS: Final = {"transpose": "perm", "reshape": "shape", "cast": "dtype"}
_AS_PUBLISHED: Final = Arrangement()
_TRANSPOSED: Final = Arrangement("transposed", (("transpose", (1, 0)),))


@dataclass(frozen=True, slots=True)
class _Use:
    source: str
    layout: Arrangement
    dtype: DType  # as the model has it, before any layout


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
        use = _Use(self.names.get(name, name), _AS_PUBLISHED, kind.dtype)
        return self._declare(use, kind)

    def hold(self, name: str, value: torch.Tensor, kind: TensorType) -> WeightRef:
        """A value that no checkpoint has as an operand; the first of that name counts."""
        if name not in self.buffers:
            self.buffers = {**self.buffers, name: value}
        return self.ref(name, kind)

    def constant(self, ref: WeightRef) -> torch.Tensor | None:
        """The value of a buffer that no checkpoint has; None for other weights."""
        use = self._uses[ref.name]
        return self.buffers.get(use.source) if use.layout == _AS_PUBLISHED else None

    def transposed(self, ref: WeightRef) -> WeightRef:
        """The transpose of a two-dimensional weight, as a weight of its own."""
        use, kind = self._uses[ref.name], self.builder.weights[ref.name].type
        back = use.layout == _TRANSPOSED
        layout = _AS_PUBLISHED if back else use.layout.then(_TRANSPOSED)
        return self._declare(replace(use, layout=layout), replace(kind, shape=kind.shape[::-1]))

    def arranged(self, ref: WeightRef, shape: Sequence[int], layout: Arrangement) -> WeightRef:
        """A weight in another layout, as a weight of its own."""
        use, kind = self._uses[ref.name], self.builder.weights[ref.name].type
        layout = use.layout.then(layout)
        return self._declare(replace(use, layout=layout), replace(kind, shape=tuple(shape)))

    def cast(self, ref: WeightRef, dtype: DType) -> WeightRef:
        """A weight in another element type, as a weight of its own."""
        use, kind = self._uses[ref.name], self.builder.weights[ref.name].type
        layout = use.layout.then(Arrangement(dtype.value, (("cast", dtype.value),)))
        return self._declare(replace(use, layout=layout), replace(kind, dtype=dtype))

    def moved(self, ref: WeightRef, old_prefix: str, new_prefix: str) -> WeightRef | None:
        """The same weight of another layer; None where the name does not lie in the first."""
        use = self._uses[ref.name]
        if not use.source.startswith(old_prefix):
            return None
        name = new_prefix + use.source.removeprefix(old_prefix)
        kind = self.builder.weights[ref.name].type
        return self._declare(replace(use, source=self.names.get(name, name)), kind)

    def relative_name(self, ref: WeightRef, prefix: str) -> tuple[str, Arrangement]:
        """The source's name after `prefix` (whole where it does not start so), and how the
        weight is made of it."""
        use = self._uses[ref.name]
        return use.source.removeprefix(prefix), use.layout

    def _declare(self, use: _Use, kind: TensorType) -> WeightRef:
        source, layout = use.source, use.layout
        name = f"{source}.{layout.name}" if layout.name else source
        if name in self._uses:
            return WeightRef(name)
        self._uses[name] = use
        if source in self.buffers:
            self.data[source] = self.buffers[source]
            expr = WeightExpr("data", (), {"key": source})
        else:
            expr = self.define(source, use.dtype)
        return self.builder.weight(name, kind, layout.apply(expr))
