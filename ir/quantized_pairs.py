"""Codes and scales of matrices, kept from one use of their expressions to the next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from .program import WeightExpr, WeightLoader
from .schemes import Quantizer, get_scheme
from .text import print_expr

if TYPE_CHECKING:
    import torch

PARTS: Final = {"codes": 0, "scales": 1}
"""Weight ops that take a part of what a scheme makes of a matrix, and which."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """What a scheme made of a matrix, and its loaders, whose ids are part of the key.

    They are kept alive, so that their ids are not used again for other loaders.
    """

    parts: tuple[torch.Tensor, torch.Tensor]
    readers: Sequence[WeightLoader]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.parts)


@dataclass(slots=True)
class QuantizedPairs:
    """Gives codes and scales of matrices; those that fit into `max_bytes` are made once.

    Of a matrix both are wanted, most often one right after the other, so the last pair of each
    thread stays in any case. Others stay for good until the bytes are used up: uses come in rounds,
    in the order of the program, where giving up the oldest would leave nothing to find again.
    `quantizers` do by scheme what the scheme's own quantiser does, bit for bit, in less time.
    Several threads may ask.
    """

    max_bytes: int = 0
    quantizers: Mapping[str, Quantizer] = field(default_factory=dict)
    _kept: dict[tuple[object, ...], _Pair] = field(default_factory=dict, init=False)
    _last: threading.local = field(default_factory=threading.local, init=False)
    _bytes: int = field(default=0, init=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False)

    def part(
        self, expr: WeightExpr, readers: Sequence[WeightLoader], matrix: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """The codes or scales that `expr` stands for; nobody may write to them.

        `readers` are the loaders behind it: the same name read by another is another matrix.
        """
        (inner,) = expr.inputs
        key = (expr.attrs["scheme"], print_expr(inner), *map(id, readers))
        with self._lock:
            pair = self._pair(key, expr, readers, matrix)
        return pair.parts[PARTS[expr.op]]

    def _pair(
        self,
        key: tuple[object, ...],
        expr: WeightExpr,
        readers: Sequence[WeightLoader],
        matrix: Callable[[], torch.Tensor],
    ) -> _Pair:
        pair = self._kept.get(key)
        last: tuple[tuple[object, ...], _Pair] | None = getattr(self._last, "pair", None)
        if pair is None and last is not None and last[0] == key:
            pair = last[1]
        if pair is None:
            scheme = get_scheme(expr.attrs["scheme"])
            quantize = self.quantizers.get(scheme.name, scheme.quantize)
            pair = _Pair(quantize(matrix()), readers)
            self._keep(key, pair)
        return pair

    def _keep(self, key: tuple[object, ...], pair: _Pair) -> None:
        self._last.pair = key, pair
        if self._bytes + pair.num_bytes <= self.max_bytes:
            self._kept[key] = pair
            self._bytes += pair.num_bytes
