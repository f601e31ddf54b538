"""What passes did, as values and as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..ir.analyses import total_cost
from ..ir.cost import Cost
from ..ir.program import Program
from .compare import Distance
from .lossy_stages import LossyStage
from .near_miss import NearMiss


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did. `cost` is of one step at the upper bounds of all symbols.

    `ops` counts the nodes of the program it left by op; `distance` is there for a lossy pass whose
    effect on the model's predictions was measured, `details` what the pass itself has to say.
    """

    name: str
    phase: str
    contract: str
    options: Mapping[str, Any]
    matches: int
    near_misses: tuple[NearMiss, ...]
    nodes: int
    ops: Mapping[str, int]
    cost: Cost
    verified: str
    distance: Distance | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """As plain data, for `report.json`."""
        return {
            "name": self.name,
            "phase": self.phase,
            "contract": self.contract,
            "options": dict(self.options),
            "matches": self.matches,
            "near_misses": [miss.as_data() for miss in self.near_misses],
            "nodes": self.nodes,
            "ops": dict(self.ops),
            "bytes_read": self.cost.bytes_read,
            "bytes_written": self.cost.bytes_written,
            "operations": self.cost.flops,
            "verified": self.verified,
            **({"distance": self.distance.as_data()} if self.distance else {}),
            **({"details": dict(self.details)} if self.details else {}),
        }


@dataclass(slots=True)
class PipelineReport:
    """What a whole pipeline did; times (seconds by pass, in order) are kept apart.

    `makers` says of each node that is left, by its label, which pass (its place in `passes`)
    made it; nodes that are not in it were captured. `lossy` has what each lossy pass left.
    """

    passes: list[PassReport] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    times: list[tuple[str, float]] = field(default_factory=list)
    makers: dict[str, int] = field(default_factory=dict)
    lossy: list[LossyStage] = field(default_factory=list)

    def as_data(self) -> dict[str, Any]:
        """As plain data without times, so that equal compiles report equally."""
        made: dict[int, list[str]] = {}
        for label, index in self.makers.items():
            made.setdefault(index, []).append(label)
        passes = [{**one.as_data(), "made": made.get(i, [])} for i, one in enumerate(self.passes)]
        return {"passes": passes, "verification": self.phases}


def step_cost(program: Program) -> Cost:
    """What one step costs at the upper bounds of all symbols."""
    return total_cost(program, {name: bound.high for name, bound in program.symbols.items()})
