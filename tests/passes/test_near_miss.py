"""Near misses: values that know their node, and read as a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from infc.ir.analyses import node_label
from infc.ir.program import Program
from infc.passes.base import Pass, PassContext, PassResult
from infc.passes.near_miss import NearMiss
from infc.passes.pass_manager import run_pipeline
from infc.passes.pipeline import Pipeline

from .test_verification import model


def test_a_near_miss_knows_its_node() -> None:
    program = model()
    node = next(node for node in program.nodes if node.layer == 1)
    miss = NearMiss.at(node, "too wide")
    assert (miss.node, miss.layer) == (node_label(node), 1)
    assert str(miss).startswith(f"%{miss.node} = {node.op} of layer 1")
    assert str(miss).endswith(": too wide")
    assert {miss, NearMiss.at(node, "too wide")} == {miss}, "two sweeps see it once"


@pytest.mark.parametrize(
    ("miss", "text"),
    [
        (NearMiss("why"), "why"),
        (NearMiss("its rows: odd", "@w"), "@w: its rows: odd"),
    ],
)
def test_one_of_no_node(miss: NearMiss, text: str) -> None:
    assert str(miss) == text
    assert (miss.node, miss.layer) == (None, None)


@dataclass(frozen=True)
class Misses(Pass):
    """Nearly matches a node and something else."""

    name: ClassVar[str] = "misses"
    phase: ClassVar[str] = "fuse"

    def run(self, program: Program, context: PassContext) -> PassResult:
        return PassResult(program, 0, (NearMiss.at(program.nodes[0], "no: not so"), "a text"))


def test_the_report_has_them_as_data() -> None:
    program = model()
    _, report = run_pipeline(program, Pipeline((Misses(),)), verify=False)
    (entry,) = report.as_data()["passes"]
    at, text = entry["near_misses"]
    first = program.nodes[0]
    assert (at["node"], at["layer"], at["reason"]) == (node_label(first), first.layer, "no: not so")
    assert text == {"where": None, "node": None, "layer": None, "reason": "a text"}
