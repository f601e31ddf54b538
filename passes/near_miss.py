"""Where a pass nearly did what it is for, and why it did not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..ir.analyses import node_label
from ..ir.interpret import describe
from ..ir.program import Node


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A node, or something else of a program, that a pass left as it was, with the reason.

    `where` says for people what it is; `node` is the label of a node (`analyses.node_label`), and
    `layer` its layer. Values, not nodes: two sweeps over a program report the same one once.
    """

    reason: str
    where: str | None = None
    node: str | None = None
    layer: int | None = None

    @classmethod
    def at(cls, node: Node, reason: str) -> NearMiss:
        """Of one node."""
        return cls(reason, describe(node), node_label(node), node.layer)

    def __str__(self) -> str:
        return self.reason if self.where is None else f"{self.where}: {self.reason}"

    def as_data(self) -> dict[str, Any]:
        """As plain data, for `report.json`."""
        return {
            "where": self.where,
            "node": self.node,
            "layer": self.layer,
            "reason": self.reason,
        }
