"""What the code of a step was made for, kept with the code: no manifest may say otherwise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import ArtifactError
from .manifest import CompiledProgram
from .program import (
    Program,
    Value,
    further_inputs,
    further_outputs,
    further_symbols,
    hidden_width,
    vocabulary_size,
)
from .resources import Resource
from .safetensors import Entry, element_type
from .types import TensorType, handed_over

StepFacts = Mapping[str, Any]
"""Plain JSON. `vocab_size`, `hidden_width` (or null) and the groups of `kv` are those of the
program. `max_context`, `step_tokens` and `logit_rows` are the most that it can take, or null where
that does not matter. `weights` stands for names, element types and shapes in their order.
`inputs`, `outputs` and `sizes` are there for a program that takes or gives other arrays than every
step does: their types by name, and the most of each of their symbols."""

_LIMITS = ("max_context", "step_tokens", "logit_rows")


def step_facts(program: Program, weights: Iterable[tuple[str, TensorType]]) -> StepFacts:
    """The facts of a lowered program, whose code reads `weights` in this order."""
    bounds = {name: bound.high for name, bound in program.symbols.items()}
    further: dict[str, dict[str, Any]] = {
        "inputs": _types(further_inputs(program)),
        "outputs": _types(further_outputs(program)),
        "sizes": {name: bounds[name] for name in further_symbols(program)},
    }
    return {
        **{name: value for name, value in further.items() if value},
        "vocab_size": vocabulary_size(program),
        "hidden_width": hidden_width(program),
        "max_context": program.spec.max_context or None,
        "step_tokens": bounds.get("T"),
        "logit_rows": bounds.get("R"),
        "kv": _groups(program.resources),
        "weights": _digest((name, element_type(kind.dtype), kind.shape) for name, kind in weights),
    }


def check_step_facts(
    facts: StepFacts, program: CompiledProgram, entries: Mapping[str, Entry], *, where: str
) -> None:
    """ArtifactError where the manifest, or the file of weights, is not that of this code.

    Code that is run with other sizes than its own reads and writes where nothing is.
    """
    names = [name for name in program.weights.tensors if name in entries]
    found = (entries[name] for name in names)
    said: dict[str, Any] = {
        "vocab_size": program.vocab_size,
        "hidden_width": program.hidden_width or facts["hidden_width"],
        "kv": _groups(program.resources),
        "weights": _digest((entry.name, entry.dtype, entry.shape) for entry in found),
    }
    wrong = [name for name, value in said.items() if facts.get(name) != value]
    further = {"inputs": program.further_inputs, "outputs": program.further_outputs}
    for side, kinds in further.items():
        if facts.get(side, {}) != {name: str(kind) for name, kind in kinds.items()}:
            wrong.append(side)
    sizes, most = program.limits.sizes, facts.get("sizes", {})
    is_alike = isinstance(most, Mapping) and sizes.keys() == most.keys()
    if not is_alike or not all(_holds(most[name], size) for name, size in sizes.items()):
        wrong.append("sizes")
    limits = {name: facts.get(name) for name in _LIMITS}
    wrong += [n for n, m in limits.items() if m and not _holds(m, getattr(program.limits, n))]
    if wrong:
        raise ArtifactError(
            f"the compiled code does not match the manifest: {wrong[0]}",
            where=where,
            hint="the artifact is damaged: compile it again",
        )


def _holds(most: object, size: int) -> bool:
    """Whether a fact, which may be of any type, is a number that a size does not exceed."""
    return type(most) is int and size <= most


def _types(values: Mapping[str, Value]) -> dict[str, str]:
    return {name: str(handed_over(value.type)) for name, value in values.items()}


def _groups(groups: Iterable[Resource]) -> list[dict[str, Any]]:
    return [{**group.plain(), "layers": list(group.layers)} for group in groups]


def _digest(weights: Iterable[tuple[str, str, Iterable[Any]]]) -> str:
    lines = [json.dumps([name, kind, list(shape)]) for name, kind, shape in weights]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
