"""Small activations of a feed-forward layer become zero: an op, its kernel and its pass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from infc.ir.ops import Cost, Kind, Op, register_op
from infc.ir.ops.base import AttrKind, AttrSpec, need_float, tensor
from infc.ir.types import TensorType
from infc.passes.base import Pass, PassResult, finish
from infc.passes.match import OpPattern, Rule, Var, rewrite_all
from infc.passes.registry import register_pass


def result_type(types, attrs):
    """[.., 2I] -> [.., I]."""
    x = need_float(tensor(types, 0), "gate_up")
    return (TensorType(x.dtype, (*x.shape[:-1], x.shape[-1] // 2)),)


def meaning(gate_up, *, threshold):
    """What the op computes, in torch: the oracle that its kernel is tested against."""
    import torch.nn.functional as F

    gate, up = gate_up.float().chunk(2, -1)
    y = F.silu(gate) * up
    return y.masked_fill(y.abs() < threshold, 0.0).to(gate_up.dtype)


def cost(types, outs, attrs, bindings):
    """Both halves are read, one is written; five operations an element."""
    (out,) = outs
    return Cost(
        types[0].num_bytes(bindings), out.num_bytes(bindings), 5 * out.num_elements(bindings)
    )


THRESHOLD_GATE = Op(
    "threshold_gate",
    Kind.FUSED,
    "silu(gate) * up of gate_up[.., 2I], gate first, and 0 where that is below `threshold`.",
    ("gate_up",),
    result_type,
    meaning,
    (AttrSpec("threshold", AttrKind.FLOAT),),
    cost_rule=cost,
)


@dataclass(frozen=True)
class ThresholdGate(Pass):
    """`gated_act(%x) {act = "silu"}` => `threshold_gate(%x) {threshold = 0.02}`.

    Requires: nothing. Ensures: nothing more.
    Keeps: what is above the threshold; the rest is lost (activation sparsity, as in TEAL).
    Why: a product that skips zeros reads fewer weights.
    """

    threshold: float = 0.02

    name: ClassVar[str] = "threshold-gate"
    phase: ClassVar[str] = "fuse"
    contract: ClassVar[str] = "lossy"
    tolerance: ClassVar[float] = 0.1

    def run(self, program, context) -> PassResult:
        """Replace every gated activation by silu."""

        def replace(emit, match):
            return emit("threshold_gate", match.value("x"), threshold=self.threshold)

        pattern = OpPattern("gated_act", (Var("x", "value"),), {"act": "silu"})
        swept = rewrite_all(program, [Rule(pattern, replace)])
        return finish(program, swept.program, swept.matches, swept.near_misses)


def register() -> None:
    """What the entry point names: called once, when infc first asks for something it lacks."""
    from infc.codegen.cpp.extensions import register_kernel, row_kernel

    register_op(THRESHOLD_GATE)
    register_pass(ThresholdGate)
    kernel = row_kernel("threshold_gate::run", attrs=["threshold"])
    register_kernel("threshold_gate", kernel, [Path(__file__).with_name("threshold_gate.hpp")])
