"""What an artifact for GPUs launches: by form of steps, and what its kernels use."""

from __future__ import annotations

from collections import Counter

from ...ir.analyses import node_label
from ...ir.artifact import Artifact
from ...ir.gpus import LAUNCH_SECONDS
from ...ir.launches import LAUNCHES_FILE, Form, When, read_launches
from ...ir.program import Program
from .facts import FormFacts, LaunchFacts, Predictions

_SAMPLING: tuple[When, ...] = ("always", "head", "draws", "sampled")
"""What a step needs that samples, adjusts nothing and returns no logits."""


def launch_facts(
    artifact: Artifact, program: Program | None, predictions: Predictions | None
) -> LaunchFacts | None:
    """The launches of the model's step; None where its backend made none."""
    if artifact.manifest.main.entry.file != LAUNCHES_FILE:
        return None
    text = artifact.read_text(LAUNCHES_FILE)
    plan = read_launches(text, where=str(artifact.path / LAUNCHES_FILE))
    layers = {} if program is None else {node_label(n): n.layer for n in program.nodes}
    forms = tuple(_form(form, layers) for form in plan.forms)
    kernels = plan.kernels.values()
    decode = None
    if predictions is not None and forms:
        decode = predictions.decode + LAUNCH_SECONDS * forms[0].launches
    files = artifact.manifest.files
    return LaunchFacts(
        forms=forms,
        kernels=len(plan.kernels),
        image_bytes=sum(files[one].bytes for one in {kernel.image for kernel in kernels}),
        registers=max((kernel.registers for kernel in kernels), default=0),
        spilled_bytes=max((kernel.spilled_bytes for kernel in kernels), default=0),
        shared_bytes=max((kernel.shared_bytes for kernel in kernels), default=0),
        buckets=plan.buckets,
        pieces=plan.pieces,
        decode=decode,
    )


def _form(form: Form, layers: dict[str, int | None]) -> FormFacts:
    launches = [one for one in form.launches if one.when in _SAMPLING]
    found = (next((layers[n] for n in one.nodes if n in layers), None) for one in launches)
    by_layer = Counter(layer for layer in found if layer is not None)
    usual = Counter(by_layer.values()).most_common(1)
    return FormFacts(
        name=form.name,
        max_tokens=form.max_tokens,
        launches=len(launches),
        layer_launches=usual[0][0] if usual else 0,
        eager=sum(one.eager for one in launches),
    )
