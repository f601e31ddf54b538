"""What code says of itself, and manifests and weights that are not its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from infc.ir.artifact import open_artifact
from infc.ir.errors import ArtifactError
from infc.ir.manifest import KvLayout, Manifest, WeightsFile
from infc.ir.safetensors import Entry, MappedSafetensors
from infc.ir.step_facts import StepFacts, check_step_facts, step_facts
from infc.ir.text import parse_program

from ..runtime.small_artifact import write_small_artifact

Case = tuple[StepFacts, Manifest, dict[str, Entry]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The facts of a small program, its manifest, and what its file of weights holds."""
    artifact = open_artifact(write_small_artifact(tmp_path_factory.mktemp("facts") / "small"))
    program = parse_program(artifact.read_text("program.ir"))
    kinds = [(name, program.weights[name].type) for name in artifact.manifest.weights.tensors]
    entries = MappedSafetensors(artifact.weights_path).entries
    return step_facts(program, kinds), artifact.manifest, entries


def changed(manifest: Manifest, place: str, **changes: Any) -> Manifest:
    """The manifest with changes in one of its parts."""
    return replace(manifest, **{place: replace(getattr(manifest, place), **changes)})


def with_group(manifest: Manifest, **changes: Any) -> Manifest:
    """The manifest with changes of its last KV group."""
    *others, group = manifest.kv.groups
    return replace(manifest, kv=KvLayout((*others, replace(group, **changes))))


def complaint(facts: StepFacts, manifest: Manifest, entries: dict[str, Entry]) -> str | None:
    """What is said against a manifest and weights beside code."""
    try:
        check_step_facts(facts, manifest, entries, where="x")
    except ArtifactError as error:
        return str(error)
    return None


def test_what_belongs_together_is_taken(case: Case) -> None:
    facts, manifest, entries = case
    assert complaint(facts, manifest, entries) is None
    # Fewer than were compiled for, and no hidden states: nothing goes astray.
    smaller = changed(manifest, "limits", max_context=8, step_tokens=4, logit_rows=1)
    assert complaint(facts, replace(smaller, hidden_width=None), entries) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: changed(m, "model", vocab_size=m.model.vocab_size - 1), "vocab_size"),
        (lambda m: replace(m, hidden_width=m.hidden_width + 1), "hidden_width"),
        (lambda m: changed(m, "limits", max_context=97), "max_context"),
        (lambda m: changed(m, "limits", step_tokens=65), "step_tokens"),
        (lambda m: changed(m, "limits", logit_rows=9), "logit_rows"),
        (lambda m: with_group(m, num_kv_heads=1), "kv"),
        (lambda m: with_group(m, layers=(0,)), "kv"),
        (lambda m: with_group(m, window=None), "kv"),
        (lambda m: replace(m, kv=KvLayout(m.kv.groups[:1])), "kv"),
        (lambda m: replace(m, weights=WeightsFile("w", m.weights.tensors[:-1])), "weights"),
        (lambda m: replace(m, weights=WeightsFile("w", m.weights.tensors[::-1])), "weights"),
    ],
)
def test_another_manifest_is_refused(
    case: Case, change: Callable[[Manifest], Manifest], named: str
) -> None:
    facts, manifest, entries = case
    with pytest.raises(ArtifactError, match=f"does not match the manifest: {named} "):
        check_step_facts(facts, change(manifest), entries, where="x")


@pytest.mark.parametrize("changes", [{"shape": (1, 1)}, {"dtype": "BF16"}])
def test_other_weights_are_refused(case: Case, changes: dict[str, Any]) -> None:
    facts, manifest, entries = case
    name = manifest.weights.tensors[0]
    others = {**entries, name: replace(entries[name], **changes)}
    with pytest.raises(ArtifactError, match="does not match the manifest: weights"):
        check_step_facts(facts, manifest, others, where="x")
