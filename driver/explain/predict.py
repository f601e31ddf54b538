"""What the ops of a program would take at the ceilings of a machine."""

from __future__ import annotations

from dataclasses import replace

from ...ir.analyses import node_label
from ...ir.program import Program
from ...ir.roofline import Ceilings, Roofline, StepShape
from .facts import PredictedOp, Predictions, Workload


def predict_steps(
    program: Program, workload: Workload, ceilings: Ceilings, where: str
) -> Predictions:
    """Seconds of each op in the two steps of a workload, those that take most first."""
    decode_shape = StepShape.of([(1, workload.context)] * workload.batch)
    prefill_shape = StepShape.of([(workload.tokens, workload.context)])
    decode, prefill = (
        _node_seconds(program, ceilings, shape) for shape in (decode_shape, prefill_shape)
    )
    labels: dict[str, list[str]] = {}
    for node in program.nodes:
        labels.setdefault(node.op, []).append(node_label(node))
    ops = [
        PredictedOp(
            op=op,
            count=len(members),
            decode=sum(decode[label] for label in members),
            prefill=sum(prefill[label] for label in members),
        )
        for op, members in labels.items()
    ]
    shown = [op for op in ops if op.decode or op.prefill]
    return Predictions(
        where=where,
        ceilings=ceilings,
        ops=tuple(sorted(shown, key=lambda op: -(op.decode + op.prefill))),
        decode=sum(decode.values()),
        prefill=sum(prefill.values()),
    )


def _node_seconds(program: Program, ceilings: Ceilings, shape: StepShape) -> dict[str, float]:
    """Seconds of each node. The tensor cores of a GPU multiply queries by a cache of few bits."""
    found = Roofline(program, ceilings).node_seconds(shape)
    if ceilings.threads or any(group.dtype == "f32" for group in program.resources):
        return found
    dense = Roofline(program, replace(ceilings, fp32=ceilings.bf16)).node_seconds(shape)
    labels = [node_label(node) for node in program.nodes if node.op == "paged_attention"]
    return found | {label: dense[label] for label in labels}
