"""What depends on positions alone: that angles are looked for no longer than there may be some."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from infc.ir.text import parse_program
from infc.passes import position_nodes
from infc.passes.position_nodes import PositionNodes, find_angles

GOLDEN = Path(__file__).parent / "golden/fold-rotary-tables"


@pytest.mark.parametrize(("case", "is_angle"), [("no_angles", False), ("halves", True)])
def test_positions_are_evaluated_while_a_candidate_is_left(
    case: str, is_angle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (GOLDEN / f"{case}.ir").read_text(encoding="utf-8")
    program = parse_program("".join(x for x in text.splitlines(True) if not x.startswith("#")))
    positions = next(value for value in program.inputs if value.name == "positions")
    found = PositionNodes(program, positions)
    monkeypatch.setattr(position_nodes, "_CHUNK", 4)
    evaluated: list[int] = []
    plain = PositionNodes.at

    def counted(self: PositionNodes, places: Sequence[int]) -> dict[str, torch.Tensor]:
        evaluated.extend(places)
        return plain(self, places)

    monkeypatch.setattr(PositionNodes, "at", counted)
    length = 32
    angles = find_angles(found, found.tables(), length)
    assert bool(angles) == is_angle
    assert evaluated == [1, *range(length if is_angle else 4)]
