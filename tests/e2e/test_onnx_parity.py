"""Every architecture in every form of caches and both dialects, made of the reference's program.

The table of architectures has pages and ops of the standard, compiled as a recipe is.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from infc.codegen.base import EmitOptions
from infc.codegen.onnx.backend import OnnxBackend
from infc.codegen.onnx.options import OnnxOptions
from infc.ir.artifact import Artifact, ArtifactWriter, open_artifact
from infc.ir.manifest import MAIN
from infc.ir.program import Weight
from infc.ir.safetensors import MappedSafetensors
from infc.ir.targets import resolve_target
from infc.ir.text import parse_program
from infc.passes.base import PassContext
from infc.passes.one_block_each import OneBlockEach

from ..configs import CONFIGS
from .builds import Build, Builds
from .support import forced_rows, parity_prompts, relative_error

BOUND = 1e-5
OWN_BOUND = 2e-5
"""onnxruntime's own norm behind an addition sums in another order."""

FORMS = {
    "slots": OnnxOptions(kv="slots"),
    "own ops, pages": OnnxOptions(dialect="onnxruntime"),
    "own ops, slots": OnnxOptions(dialect="onnxruntime", kv="slots"),
}


def made_of(reference: Artifact, options: OnnxOptions, directory: Path) -> Artifact:
    """The program of an artifact in ONNX, with the same weights."""
    program = parse_program(reference.read_text("program.ir"))
    if options.kv == "slots":
        program = OneBlockEach().run(program, PassContext()).program
    file = MappedSafetensors(reference.weights_path)

    def stored(weight: Weight) -> NDArray[Any]:
        tensor = file.tensor(weight.name)
        return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()

    manifest = reference.manifest
    with ArtifactWriter(directory) as writer:
        emission = OnnxBackend(options).emit(
            program, resolve_target("native"), writer.path, EmitOptions(stored=stored)
        )
        main = emission.compiled(program, manifest.main.limits)
        writer.commit(replace(manifest, backend="onnx", files={}, programs={MAIN: main}))
    return open_artifact(directory)


@pytest.mark.parametrize("arch", CONFIGS)
def test_logits_and_tokens_are_those_of_the_reference(
    arch: str, builds: Builds, tmp_path: Path
) -> None:
    reference = builds.artifact(Build(arch, "reference"))
    sequences = parity_prompts(arch)
    expected, _ = forced_rows(reference, sequences)
    for name, options in FORMS.items():
        found, _ = forced_rows(made_of(reference, options, tmp_path / name), sequences)
        bound = BOUND if options.dialect == "standard" else OWN_BOUND
        for ours, theirs in zip(found, expected, strict=True):
            assert relative_error(ours, theirs) < bound, name
            assert np.array_equal(ours.argmax(-1), theirs.argmax(-1)), name
