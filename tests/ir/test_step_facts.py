"""What code says of itself, and manifests and weights that are not its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from infc.ir.artifact import open_artifact
from infc.ir.errors import ArtifactError
from infc.ir.manifest import CompiledProgram, WeightsFile
from infc.ir.safetensors import Entry, MappedSafetensors
from infc.ir.step_facts import StepFacts, check_step_facts, step_facts
from infc.ir.text import parse_program

from ..runtime.small_artifact import write_small_artifact

Case = tuple[StepFacts, CompiledProgram, dict[str, Entry]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The facts of a small program, what its manifest says, and what its file of weights holds."""
    artifact = open_artifact(write_small_artifact(tmp_path_factory.mktemp("facts") / "small"))
    program = parse_program(artifact.read_text("program.ir"))
    kinds = [(name, program.weights[name].type) for name in artifact.manifest.main.weights.tensors]
    entries = MappedSafetensors(artifact.weights_path).entries
    return step_facts(program, kinds), artifact.manifest.main, entries


def with_limits(main: CompiledProgram, **changes: Any) -> CompiledProgram:
    """The program with other limits."""
    return replace(main, limits=replace(main.limits, **changes))


def with_group(main: CompiledProgram, **changes: Any) -> CompiledProgram:
    """The program with changes of its last KV group."""
    *others, group = main.resources
    return replace(main, resources=(*others, replace(group, **changes)))


def with_outputs(main: CompiledProgram, **types: str | None) -> CompiledProgram:
    """The program with other types of outputs; None for none of that name."""
    outputs = {name: kind for name, kind in {**main.outputs, **types}.items() if kind is not None}
    return replace(main, outputs=outputs)


def complaint(facts: StepFacts, main: CompiledProgram, entries: dict[str, Entry]) -> str | None:
    """What is said against a manifest and weights beside code."""
    try:
        check_step_facts(facts, main, entries, where="x")
    except ArtifactError as error:
        return str(error)
    return None


def test_what_belongs_together_is_taken(case: Case) -> None:
    facts, main, entries = case
    assert complaint(facts, main, entries) is None
    # Fewer than were compiled for, and no hidden states: nothing goes astray.
    smaller = with_limits(main, max_context=8, step_tokens=4, logit_rows=1)
    assert complaint(facts, with_outputs(smaller, hidden=None), entries) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: with_outputs(m, logits=f"f32[R, {m.vocab_size - 1}]"), "vocab_size"),
        (lambda m: with_outputs(m, hidden=f"f32[R, {m.hidden_width + 1}]"), "hidden_width"),
        (lambda m: with_limits(m, max_context=97), "max_context"),
        (lambda m: with_limits(m, step_tokens=65), "step_tokens"),
        (lambda m: with_limits(m, logit_rows=9), "logit_rows"),
        (lambda m: with_group(m, num_kv_heads=1), "kv"),
        (lambda m: with_group(m, layers=(0,)), "kv"),
        (lambda m: with_group(m, window=None), "kv"),
        (lambda m: replace(m, resources=m.resources[:1]), "kv"),
        (lambda m: replace(m, weights=WeightsFile("w", m.weights.tensors[:-1])), "weights"),
        (lambda m: replace(m, weights=WeightsFile("w", m.weights.tensors[::-1])), "weights"),
    ],
)
def test_another_manifest_is_refused(
    case: Case, change: Callable[[CompiledProgram], CompiledProgram], named: str
) -> None:
    facts, main, entries = case
    with pytest.raises(ArtifactError, match=f"does not match the manifest: {named} "):
        check_step_facts(facts, change(main), entries, where="x")


@pytest.mark.parametrize("changes", [{"shape": (1, 1)}, {"dtype": "BF16"}])
def test_other_weights_are_refused(case: Case, changes: dict[str, Any]) -> None:
    facts, main, entries = case
    name = main.weights.tensors[0]
    others = {**entries, name: replace(entries[name], **changes)}
    with pytest.raises(ArtifactError, match="does not match the manifest: weights"):
        check_step_facts(facts, main, others, where="x")
