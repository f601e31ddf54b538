"""The cpp backend: generated C++ for a step, the kernels beside it, and packed weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import ClassVar

from ...ir.plan import loop_groups
from ...ir.program import Node, Program, Value, WeightRef
from ...ir.target import Target
from ...ir.types import DType, TensorType
from ..base import Backend, Emission, EmitOptions, Verdict
from ..weights_file import WEIGHTS_FILE, write_weights
from .calls import c_dim, place_barriers
from .emitter import Emitter, pointer
from .expressions import SCALARS
from .loops import LOOP_OPS, lower_group
from .lower import LOWERINGS
from .roll import roll
from .source import source_text
from .toolchain import compile_library

ABI = 3
"""Version of the C interface in `kernels/abi.hpp`."""

KERNELS = Path(__file__).parent / "kernels"

_STORED = frozenset(SCALARS) | {DType.I8}
"""Element types that kernels take; loops compute in those of `SCALARS` alone."""


class CppBackend(Backend):
    """Generated C++ over header-only kernels, compiled by the system's compiler."""

    name: ClassVar[str] = "cpp"

    def supports(self, node: Node, program: Program, target: Target) -> Verdict:
        """Whether there is a kernel or a loop for the node."""
        if node.op not in LOWERINGS and node.op not in LOOP_OPS:
            return Verdict.no("there is no kernel for it")
        types = [program.operand_type(operand) for operand in node.inputs]
        types += [value.type for value in node.outputs]
        built = SCALARS if node.op in LOOP_OPS else _STORED
        for kind in types:
            if isinstance(kind, TensorType) and kind.dtype not in built:
                return Verdict.no(f"element type {kind.dtype.value} is not built")
        return _check_operands(node, program)

    def emit(
        self, program: Program, target: Target, directory: Path, options: EmitOptions
    ) -> Emission:
        """Write `code/` and `weights.safetensors` into `directory`."""
        self.check(program, target)
        emitter = Emitter(program, target)
        emit_calls(emitter)
        items = roll(place_barriers(emitter.calls))
        weights = tuple(emitter.weights.entries.values())
        code = directory / "code"
        (code / "kernels").mkdir(parents=True)
        for header in sorted(KERNELS.glob("*.hpp")):
            shutil.copyfile(header, code / "kernels" / header.name)
        source = code / "step.cpp"
        source.write_text(
            source_text(program, items, num_weights=len(weights), arena_bytes=emitter.arena_bytes),
            encoding="utf-8",
        )
        compile_library(source, code / "model.so", target)
        write_weights(program, weights, directory / WEIGHTS_FILE, options)
        return Emission(
            entry={"kind": "cpp-shared-library", "file": "code/model.so", "abi": ABI},
            weight_names=tuple(weight.name for weight in weights),
            arena_bytes=emitter.arena_bytes,
        )


def _check_operands(node: Node, program: Program) -> Verdict:
    copied = {"take": node.inputs[:1], "concat": node.inputs}.get(node.op, ())
    if any(operand in program.inputs for operand in copied):
        return Verdict.no("the step's own arrays are read by index or in loops only")
    if node.op == "linear" and not isinstance(node.inputs[1], WeightRef):
        return Verdict.no("the matrix of a linear must be a weight")
    if node.op == "scaled_linear" and not isinstance(node.inputs[2], WeightRef):
        return Verdict.no("the matrix of a scaled_linear must be a weight")
    if node.op == "moe" and not all(isinstance(w, WeightRef) for w in node.inputs[3:5]):
        return Verdict.no("the matrices of experts must be weights")
    if node.op == "take" and node.attrs.get("dim", 0) != 0:
        return Verdict.no("only rows of the first dimension can be taken")
    rowwise = node.op in ("softmax", "gather", "scatter")
    if rowwise and node.attrs["dim"] != node.output.type.rank - 1:
        return Verdict.no("only over the last dimension")
    return Verdict.yes()


def emit_calls(emitter: Emitter) -> None:
    """Turn every node into calls, groups of loops as one, and hand the outputs over."""
    program = emitter.program
    by_output = {node.outputs[0].name: node for node in program.nodes if node.outputs}
    group_of: dict[str, list[Node]] = {}
    for names in loop_groups(program):
        nodes = [by_output[name] for name in names]
        group_of.update({node.outputs[0].name: nodes for node in nodes})
    logits, *rest = program.outputs
    hidden = rest[0] if rest else None
    for node in program.nodes:
        if node.op in LOOP_OPS:
            group = group_of.get(node.output.name, [node])
            if node is group[-1]:
                lower_group(emitter, group)
        else:
            LOWERINGS[node.op](emitter, node)
        if hidden is not None and hidden.name in emitter.buffers:
            # At once, not at the end: a step that wants no logits is done here.
            _store_rows(emitter, hidden, "hidden")
            emitter.call("if (logits == nullptr) return;", (), reads=(), writes=())
            hidden = None
    _store_rows(emitter, logits, "logits")


def _store_rows(emitter: Emitter, value: Value, array: str) -> None:
    """Rows leave as float32 where the step has an array for them."""
    buffer = emitter.dense(emitter.buffer(value))
    assert value.type.dtype in (DType.F32, DType.BF16), f"{array} are floating-point"
    count = " * ".join(c_dim(dim) for dim in value.type.shape)
    emitter.call(
        f"if ({array} != nullptr) widen_rows(t, {{0}}, {array}, {count});",
        (pointer(buffer),),
        reads=(buffer,),
        writes=(),
        comment=array,
    )
