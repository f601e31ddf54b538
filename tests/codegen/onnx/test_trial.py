"""What verification finds in a model that was made wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

import infc
from infc.codegen.onnx import lower
from infc.codegen.onnx.emitter import Emitter
from infc.ir.errors import ProgramError
from infc.ir.program import Node

from ...checkpoints import make_checkpoint


def up_before_gate(emitter: Emitter, node: Node) -> None:
    """The halves of a gated activation, exchanged."""
    gate, up = emitter.graph.split(emitter.operand(node.inputs[0]), -1)
    turned = emitter.graph.op("Swish", [up], alpha=1.0)
    emitter.give(node, emitter.graph.op("Mul", [turned, gate]))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_logits_than_those_of_the_program_are_refused(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint("llama", tmp_path / "checkpoint", num_hidden_layers=1)
    overrides = ["backend=onnx", f"dtype={dtype}", "onnx.whole_sequence=true"]

    def compiled(name: str, *, verify: bool) -> None:
        infc.compile(checkpoint, tmp_path / name, overrides=overrides, verify=verify, cache=False)

    compiled("right", verify=True)
    monkeypatch.setitem(lower.LOWERINGS, "gated_act", up_before_gate)
    compiled("unverified", verify=False)
    with pytest.raises(ProgramError, match="gives other logits than its program: an error of"):
        compiled("wrong", verify=True)
