"""Whole steps by Triton's interpreter: what the reference executor computes, and draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from infc.codegen.registry import get_backend
from infc.ir.text import parse_program
from infc.passes.pass_manager import run_passes
from infc.passes.pipeline import parse_pipeline
from infc.runtime.executors.base import ExecutorConfig, run_step
from infc.runtime.executors.program_weights import ProgramWeights
from infc.runtime.executors.reference import ReferenceExecutor
from infc.runtime.sampling.draws import Draw, draws_of
from infc.runtime.sampling.sampler import drawn_token

from ...e2e.builds import Build, Builds, quantized_alike
from ...gpu_breadth import RARELY
from ..harness import Chunk, make_step
from .emulating import Emulating
from .interpreting import Interpreting
from .running import TARGET, Carrier, Runner

BLOCK_SIZE = 16
BLOCKS = ((3, 9, 5, 12), (7, 2, 11, 4), (1, 8, 6, 10))
"""Of three sequences, in no order."""
SHAPES = ((0.0, 1.0, 0.0, 0), (0.8, 1.0, 0.0, 0), (1.1, 0.7, 0.02, 9))
"""Temperature, top_p, min_p and top_k of a draw of each sequence."""


@dataclass(slots=True)
class Both:
    """One program for the interpreter and for the reference executor."""

    runner: Runner
    reference: ReferenceExecutor
    groups: int
    vocab: int

    def run(self, lengths: Sequence[tuple[int, int]], form: str | None = None) -> float:
        """The error of logits, relative to the largest; draws follow from logits.

        Each sequence has so many tokens before, and so many new ones.
        """
        rng = np.random.default_rng(len(lengths) + sum(map(sum, lengths)))
        chunks = [
            Chunk(rng.integers(1, self.vocab, new).tolist(), past, BLOCKS[place])
            for place, (past, new) in enumerate(lengths)
        ]
        ends = np.cumsum([new for _, new in lengths]) - 1
        step = make_step(
            chunks, num_groups=self.groups, block_size=BLOCK_SIZE, rows=[int(e) for e in ends]
        )
        draws = [
            Draw(1000 + place, *SHAPES[place % 3], place, 1, sum(lengths[place]))
            for place in range(len(lengths))
        ]
        step = replace(step, draws=draws_of(draws), wants_hidden=True)
        found, wanted = self.runner.run(step, form), run_step(self.reference, step)
        drawn = [drawn_token(found.logits[one.row], one) for one in draws]
        assert found.tokens.tolist() == drawn
        assert found.hidden is not None and wanted.hidden is not None
        return max(
            float(np.abs(a - b).max() / np.abs(b).max())
            for a, b in ((found.logits, wanted.logits), (found.hidden, wanted.hidden))
        )


def both(builds: Builds, build: Build, process: Carrier) -> Both:
    sets = (("kv_cache.block_size", BLOCK_SIZE), *build.sets)
    artifact = builds.artifact(replace(build, backend="reference", sets=sets))
    program = parse_program(artifact.read_text("program.ir"), source="program.ir")
    passes = parse_pipeline(get_backend("triton").plan_passes(TARGET))
    planned, _ = run_passes(program, passes)
    planned = replace(planned, phase="planned")
    weights = ProgramWeights(artifact, artifact.manifest.main, "loaded")
    blocks = (16,) * len(program.resources)
    reference = ReferenceExecutor.open(artifact, ExecutorConfig(num_blocks=blocks))
    runner = Runner(planned, weights.tensor, process)
    return Both(runner, reference, len(blocks), program.spec.vocab_size)


CODES = 0.1
"""A last bit can round to the neighbouring code, which changes a row by up to that."""


def quantized(scheme: str, arch: str = "llama", cache: str = "int8") -> Build:
    return Build(arch, sets=(("quantization", quantized_alike(scheme)), ("kv_cache.dtype", cache)))


CASES = {
    "llama": (Build("llama"), 2e-5),
    "gemma2": (Build("gemma2"), 2e-5),
    "gpt2": (Build("gpt2"), 2e-5),
    "gpt_oss": (Build("gpt_oss"), 2e-5),
    "llama-bf16": (Build("llama", dtype="bfloat16"), 2e-2),
    "int8": (quantized("int8"), CODES),
    "int4": (quantized("int4", cache="float32"), CODES),
    "int8-token": (quantized("int8-token"), CODES),
    "int4-token": (quantized("int4-token", cache="float32"), CODES),
    "int4-weights": (quantized("int4-weights", cache="float32"), 2e-5),
    "q4_1": (quantized("q4_1", cache="float32"), CODES),
    "q8_0-weights": (quantized("q8_0-weights", cache="float32"), 2e-5),
    "mixtral-int4": (quantized("int4", "mixtral", "float32"), CODES),
    "mixtral-int8-weights": (quantized("int8-weights", "mixtral", "float32"), 2e-5),
    "fp8-cache": (Build("llama", sets=(("kv_cache.dtype", "fp8"),)), CODES),
    "gemma2-fp8-cache": (Build("gemma2", sets=(("kv_cache.dtype", "fp8"),)), CODES),
    "fp8": (quantized("fp8", cache="float32"), CODES),
    "fp8-block-weights": (quantized("fp8-block-weights", cache="float32"), 2e-5),
    "mixtral-fp8-block": (quantized("fp8-block", "mixtral", "float32"), CODES),
    "mixtral-fp8-weights": (quantized("fp8-weights", "mixtral", "float32"), 2e-5),
    "falcon": (Build("falcon"), 2e-5),
    "qwen3": (Build("qwen3"), 2e-5),
    "gemma4_text": (Build("gemma4_text"), 2e-5),
}


SOME = ("llama", "gemma2", "int8")
"""One plain, one with windows, caps and norms on both sides, one of codes, in the cache too."""
MARKED = [name if name in SOME else pytest.param(name, marks=pytest.mark.breadth) for name in CASES]
INTERPRETED = [name if name in SOME else pytest.param(name, marks=RARELY) for name in CASES]


@pytest.mark.parametrize("name", INTERPRETED)
def test_steps_are_those_of_the_reference(
    name: str, builds: Builds, interpreting: Interpreting
) -> None:
    build, bound = CASES[name]
    pair = both(builds, build, interpreting)
    errors = [pair.run([(0, 19), (0, 5)]), pair.run([(19, 1), (5, 9), (0, 3)])]
    errors.append(pair.run([(20, 1), (14, 1), (3, 1)]))
    assert max(errors) < bound


@pytest.mark.parametrize("name", MARKED)
def test_compiled_kernels_are_those_of_the_reference(
    name: str, builds: Builds, tmp_path: Path
) -> None:
    """The PTX of sm_90, in the emulation."""
    build, bound = CASES[name]
    process = Emulating()
    pair = both(builds, build, process)
    process.compile(pair.runner.made.codes, tmp_path)
    assert max(pair.run([(0, 19), (0, 5)]), pair.run([(19, 1), (5, 1)])) < bound
