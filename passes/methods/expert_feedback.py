"""Error feedback for a mixture of experts: each expert on the rows that are routed to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ...ir.ops.experts import expert_gate
from ...ir.program import Node
from ...ir.schemes import Quantizer, get_scheme
from .correction import HELD_OUT
from .feedback import Factor, Rounded

if TYPE_CHECKING:
    import torch

LEAST_ROWS: Final = 32
"""With fewer rows, an expert is rounded to nearest."""

Round = Callable[["torch.Tensor", Factor], Sequence[Rounded]]
"""Rounds a matrix `[N, K]` with feedback, some rows at a time."""


@dataclass(frozen=True, slots=True)
class RoundedExpert:
    """The parts of one expert's matrix and what they stand for, `[N, K]`.

    `error`, `nearest` and `size` are as in `Rounded`, over the rows that feedback was made for.
    """

    parts: Mapping[str, torch.Tensor]
    values: torch.Tensor
    is_fed: bool
    error: float = 0.0
    nearest: float = 0.0
    size: float = 0.0


def routed(
    rows: Sequence[torch.Tensor], index: Sequence[torch.Tensor], expert: int
) -> torch.Tensor:
    """The rows `[n, K]` of windows `[T, K]` that `index` `[T, slots]` sends to an expert."""
    import torch

    return torch.cat(
        [x[(slots == expert).any(1)] for x, slots in zip(rows, index, strict=True)]
    ).float()


def round_expert(
    matrix: torch.Tensor,
    rows: torch.Tensor,
    scheme: str,
    factorize: Callable[[torch.Tensor], Factor],
    round_matrix: Round,
    nearest: Quantizer,
) -> RoundedExpert:
    """One matrix `[N, K]` in a scheme, on the rows `[n, K]` that multiply it.

    A Hessian of few rows leaves directions open in which errors grow, so each fourth row is left
    out of it: where feedback does not lower the error there, the matrix is rounded to nearest.
    """
    import torch

    form, depth = get_scheme(scheme).weight, matrix.shape[-1]
    codes, scales = nearest(matrix)
    plain = form.decode(codes, scales, depth)
    result = RoundedExpert({"codes": codes, "scales": scales}, plain, is_fed=False)
    if len(rows) < LEAST_ROWS:
        return result
    is_held = torch.arange(len(rows)) % HELD_OUT == HELD_OUT - 1
    made = round_matrix(matrix, factorize(rows[~is_held]))
    values = torch.cat([one.values for one in made])
    held, wide = rows[is_held], matrix.float()
    before, after = (float((held @ (one - wide).T).square().sum()) for one in (plain, values))
    if after >= before:
        return result
    parts = {part: torch.cat([one.parts[part] for one in made]) for part in result.parts}
    sums = (sum(getattr(one, key) for one in made) for key in ("error", "nearest", "size"))
    return RoundedExpert(parts, values, True, *sums)


def hidden_rows(
    node: Node, rows: torch.Tensor, gate_up: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """What the second product of an expert reads, for rows `[n, K]` and its `gate_up` `[2I, K]`."""
    gate: dict[str, Any] = {name: node.attrs[name] for name in ("act", "alpha", "limit", "shift")}
    both = rows @ gate_up.float().T
    return expert_gate(both if bias is None else both + bias.float(), **gate)
