"""The option `batch_invariant`: a row's bits are its own, whatever else a step computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from infc.codegen.registry import get_backend
from infc.codegen.triton.backend import generate
from infc.codegen.triton.options import TritonOptions
from infc.ir.program import Program
from infc.ir.text import parse_program
from infc.passes.pass_manager import run_passes
from infc.passes.pipeline import parse_pipeline
from infc.runtime.executors.program_weights import ProgramWeights

from ...e2e.builds import Build, Builds
from ..harness import Chunk, make_step
from .interpreting import Interpreting
from .running import TARGET, Runner

BLOCK_SIZE = 16
INVARIANT = TritonOptions(batch_invariant=True)


def planned(builds: Builds, build: Build) -> tuple[Program, ProgramWeights]:
    sets = (("kv_cache.block_size", BLOCK_SIZE), *build.sets)
    artifact = builds.artifact(replace(build, backend="reference", sets=sets))
    program = parse_program(artifact.read_text("program.ir"), source="program.ir")
    passes = parse_pipeline(get_backend("triton").plan_passes(TARGET))
    program, _ = run_passes(program, passes)
    weights = ProgramWeights(artifact, artifact.manifest.main, "loaded")
    return replace(program, phase="planned"), weights


def test_there_is_one_form(builds: Builds) -> None:
    program, _ = planned(builds, Build("llama"))
    (form,) = generate(program, TARGET, INVARIANT).forms
    assert not form.one_query and form.max_tokens == program.symbols["T"].high
    assert len(generate(program, TARGET).forms) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequence_has_the_same_bits_alone_and_among_others(
    dtype: str, builds: Builds, interpreting: Interpreting
) -> None:
    """In chunks of other sizes and other blocks, and decoded."""
    program, weights = planned(builds, Build("llama", dtype=dtype))
    groups, rng = len(program.resources), np.random.default_rng(1)
    ids = rng.integers(1, program.spec.vocab_size, 23).tolist()
    other = rng.integers(1, program.spec.vocab_size, 37).tolist()

    def rows(steps: list[list[Chunk]], which: int) -> np.ndarray:
        runner = Runner(program, weights.tensor, interpreting, options=INVARIANT)
        found = []
        for chunks in steps:
            step = make_step(chunks, num_groups=groups, block_size=BLOCK_SIZE)
            first = int(step.query_starts[which])
            found.append(runner.run(step).logits[first : int(step.query_starts[which + 1])])
        return np.concatenate(found)

    alone = rows([[Chunk(ids, 0, (3, 9))]], 0)
    among = rows(
        [
            [Chunk(other[:20], 0, (1, 2, 4)), Chunk(ids[:7], 0, (11, 6))],
            [Chunk(other[20:21], 20, (1, 2, 4)), Chunk(ids[7:22], 7, (11, 6))],
            [Chunk(other[21:22], 21, (1, 2, 4)), Chunk(ids[22:], 22, (11, 6))],
        ],
        1,
    )
    assert np.array_equal(alone, among)
