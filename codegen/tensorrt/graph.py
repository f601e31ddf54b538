"""The ONNX graph that an engine is built of: narrow types kept, weights beside it or its inputs."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from ...ir.program import Program
from ...ir.safetensors import read_header
from ..base import WEIGHTS_FILE
from ..onnx.emitter import Emitter
from ..onnx.lower import LOWERINGS
from ..onnx.lower.attention import lowerings
from .coded import LOWERINGS as CODED
from .slots import EngineSlots


def engine_graph(program: Program) -> Emitter:
    """The graph of a lowered program, before its weights have a place."""
    emitter = Emitter(program, keeps_narrow=True)
    caches = EngineSlots(emitter)
    emitter.declare_inputs()
    caches.declare()
    emitter.emit({**LOWERINGS, **CODED, **lowerings(caches)})
    emitter.declare_outputs()
    return emitter


def engine_model(emitter: Emitter, weights: Path | None) -> onnx.ModelProto:
    """The model, whose weights lie in a file beside it; without one, they are its inputs."""
    graph = emitter.graph
    if weights is None:
        for name, tensor in emitter.used.items():
            value = helper.make_tensor_value_info(name, tensor.dtype, tensor.shape)
            graph.inputs.append(value)
    else:
        entries, _, data_at = read_header(weights)
        for name, tensor in emitter.used.items():
            graph.external(entries[name], data_at, WEIGHTS_FILE, tensor.dtype, tensor.shape)
    return graph.model(emitter.program.name, {})
