"""Whole engines on an emulated GPU: compiled kernels, captured or not, as the program says."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from infc.codegen.registry import get_backend
from infc.codegen.triton import aot
from infc.ir.artifact import Artifact
from infc.ir.program import Program
from infc.ir.targets import resolve_target
from infc.passes.pass_manager import run_passes
from infc.passes.pipeline import parse_pipeline
from infc.runtime.engine import Engine
from infc.runtime.executors.base import Executor, ExecutorConfig
from infc.runtime.executors.gpu.executor import GpuExecutor
from infc.runtime.executors.reference import ReferenceExecutor
from infc.runtime.limits import RuntimePlan
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.scheduling.admission import SchedulerLimits

from ...codegen.harness import build, random_weights, with_weights
from ...conftest import kept
from ...emulation.driver import DEVICE, EmulatedDriver
from ..small_artifact import CONTEXT, make_program
from ..test_steps_in_flight import finish

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton compiles the kernels"),
]

VOCAB, NUM_BLOCKS = 96, (24, 24)
CONFIG = ExecutorConfig(num_blocks=NUM_BLOCKS)
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 4, "logprobs": 2},
    "sampled": {"max_tokens": 3, "temperature": 0.8, "seed": 3, "top_k": 20, "n": 2},
    "adjusted": {
        **{"max_tokens": 4, "repetition_penalty": 1.4, "presence_penalty": 0.3, "logprobs": 1},
        **{"logit_bias": {5: 1.5}, "banned_token_ids": [7]},
    },
}


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Program, Artifact]:
    """Two layers in float32, one with a window; what is compiled is kept from run to run."""
    target, backend = resolve_target(request.param), get_backend("triton")
    program = make_program(VOCAB)
    weights = {name: w * 0.4 for name, w in random_weights(program, 7).items()}
    passes = parse_pipeline(backend.plan_passes(target))
    planned, _ = run_passes(with_weights(program, weights), passes, verify=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "kept_kernels", lambda: kept(request.config, "triton"))
        path: Path = tmp_path_factory.mktemp("emulated") / request.param
        return planned, build(planned, path, target, backend="triton")


def engine_over(executor: Executor, program: Program) -> Engine:
    plan = RuntimePlan(
        limits=SchedulerLimits(max_context=CONTEXT, max_sequences=4, step_tokens=16, logit_rows=8),
        groups=program.resources,
        num_blocks=NUM_BLOCKS,
        num_threads=1,
        pin=False,
        weights="loaded",
        prefix_reuse=True,
    )
    return Engine(executor, plan, vocab_size=VOCAB, hidden_width=16)


def answers(executor: Executor, program: Program) -> dict[str, Any]:
    engine = engine_over(executor, program)
    for index, (name, params) in enumerate(REQUESTS.items()):
        prompt = [(3 * index + 5 * i) % VOCAB for i in range(7 + 4 * index)]
        engine.add_request(name, prompt, SamplingParams(ignore_eos=True, **params))
    found = {name: answer.outputs for name, answer in finish(engine).items()}
    engine.close()
    return found


def test_an_engine_on_an_emulated_gpu(compiled: tuple[Program, Artifact]) -> None:
    program, artifact = compiled
    capability = (9, 0) if artifact.manifest.target.name == "sm_90" else (8, 0)
    told: list[dict[str, Any]] = []
    for capture in (True, False):
        driver = EmulatedDriver(replace(DEVICE, capability=capability))
        executor = GpuExecutor.open_with(artifact, CONFIG, driver, capture=capture)
        told.append(answers(executor, program))
        assert not driver.violations
        assert (driver.num_replays > 0) == capture
    assert repr(told[0]) == repr(told[1]), "padding and replay change no bit"
    weights = program.loaders["checkpoint"]
    reference = ReferenceExecutor(program, artifact.manifest.main, weights, CONFIG)
    expected = answers(reference, program)
    for name, outputs in expected.items():
        for mine, other in zip(told[0][name], outputs, strict=True):
            assert mine.token_ids == other.token_ids, name
            if other.logprobs is not None:
                assert mine.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-3)
