"""A program as an ONNX model: its step, or a whole sequence at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import onnx

from ...ir.onnx_session import ACCURACY, OLDEST, OLDEST_GROUPED, SessionSettings
from ...ir.program import Program, Weight
from ...ir.safetensors import read_header
from ...ir.step_facts import step_facts
from ..base import WEIGHTS_FILE
from . import contrib
from .caches import CacheForm, Paged, WholeSequence
from .emitter import Emitter
from .lower import LOWERINGS
from .lower.attention import lowerings
from .options import Dialect
from .slots import Slots

_FORMS: Final[Mapping[str, type[CacheForm]]] = {
    form.name: form for form in (Paged, WholeSequence, Slots, contrib.GroupedQueries)
}


@dataclass(frozen=True, slots=True)
class Emitted:
    """The graph of a program, before its weights have a place."""

    emitter: Emitter
    form: str

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What it reads, in the order of use."""
        return tuple(tensor.weight for tensor in self.emitter.used.values())


def emit_graph(program: Program, form: str, dialect: Dialect) -> Emitted:
    """The graph of a lowered program with caches of a form (`caches.py`, `slots.py`)."""
    if form == Slots.name and dialect == "onnxruntime":
        form = contrib.GroupedQueries.name
    emitter = Emitter(program)
    caches = _FORMS[form](emitter)
    emitter.declare_inputs()
    caches.declare()
    own = contrib.LOWERINGS if dialect == "onnxruntime" else {}
    emitter.emit({**LOWERINGS, **own, **lowerings(caches)})
    emitter.declare_outputs()
    return Emitted(emitter, form)


def session_file(emitted: Emitted) -> str:
    """What onnxruntime has to be told to run the model, and the oldest that has, as JSON."""
    level = "0" if emitted.emitter.exact_rows else "4"
    kinds = {node.op_type for node in emitted.emitter.graph.nodes}
    oldest = OLDEST_GROUPED if "GroupQueryAttention" in kinds else OLDEST
    return SessionSettings({ACCURACY: level}, oldest).text()


def finish_model(emitted: Emitted, weights: Iterable[Weight], directory: Path) -> onnx.ModelProto:
    """The model, whose tensors are those of the file of weights in a directory."""
    program, graph = emitted.emitter.program, emitted.emitter.graph
    entries, _, data_at = read_header(directory / WEIGHTS_FILE)
    for name, stack in emitted.emitter.used.items():
        whole = entries[name]
        size = (whole.end - whole.begin) // stack.count
        for part in stack.parts:
            begin = whole.begin + part.index * size
            entry = replace(whole, name=part.name, begin=begin, end=begin + size)
            graph.external(entry, data_at, WEIGHTS_FILE, part.dtype, part.shape)
    facts = step_facts(program, [(weight.name, weight.type) for weight in weights])
    metadata = {
        "infc.facts": json.dumps(facts, sort_keys=True),
        "infc.kv": emitted.form,
    }
    return graph.model(program.name, metadata)
