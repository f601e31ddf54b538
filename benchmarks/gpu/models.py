"""Whether steps of a whole model are on this GPU what `reference` computes, captured or not."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from infc.codegen.registry import get_backend
from infc.frontend.load import DTypeName, load_model
from infc.ir.artifact import open_artifact
from infc.passes.pass_manager import run_passes, run_pipeline
from infc.passes.pipeline import build_pipeline, parse_pipeline
from infc.runtime.executors.base import Executor, ExecutorConfig
from infc.runtime.executors.gpu.executor import GpuExecutor
from infc.runtime.executors.reference import ReferenceExecutor
from infc.runtime.sampling.draws import Draw, draws_of
from infc.runtime.sampling.sampler import drawn_token
from infc.runtime.scheduling.step import Step, StepOutput
from tests.codegen.harness import Chunk, build, make_step

from .setting import Results, Setting

TINY: Final = Path(__file__).parents[2] / "recipes/tiny/checkpoint"
BLOCK, NUM_BLOCKS = 32, 40
BOUNDS: Final[tuple[tuple[DTypeName, float], ...]] = (("float32", 1e-4), ("bfloat16", 3e-2))
PROMPTS: Final = (7, 40, 19)
SHAPES: Final = ((0.0, 1.0, 0.0, 0), (0.8, 1.0, 0.0, 0), (1.1, 0.7, 0.02, 9))
"""Temperature, top_p, min_p and top_k of each sequence's draws."""


@dataclass(slots=True)
class Sequences:
    """Three sequences and their blocks; their steps are those of any executor."""

    groups: int
    tokens: list[list[int]] = field(default_factory=list)
    done: list[int] = field(default_factory=lambda: [0] * len(PROMPTS))

    def step(self, counts: list[int]) -> Step:
        """The step in which each computes so many tokens and draws one."""
        chosen = [place for place, count in enumerate(counts) if count]
        chunks = [
            Chunk(
                self.tokens[place][self.done[place] : self.done[place] + counts[place]],
                self.done[place],
                list(range(1 + place * 4, 5 + place * 4)),
            )
            for place in chosen
        ]
        ends = np.cumsum([counts[place] for place in chosen]) - 1
        step = make_step(
            chunks, num_groups=self.groups, block_size=BLOCK, rows=[int(end) for end in ends]
        )
        draws = [
            Draw(1000 + place, *SHAPES[place], row, 0, self.done[place] + counts[place])
            for row, place in enumerate(chosen)
        ]
        return replace(step, draws=draws_of(draws))

    def take(self, counts: list[int], output: StepOutput) -> None:
        """Go on with the tokens that the step drew."""
        drawn = iter(output.tokens.tolist())
        for place, count in enumerate(counts):
            self.done[place] += count
            if count:
                token = next(drawn)
                if self.done[place] >= len(self.tokens[place]):
                    self.tokens[place].append(token)


def check_model(setting: Setting) -> Results:
    """Errors of logits and wrong draws of the bundled model, in each type, eager and captured."""
    found: Results = {}
    for dtype, bound in BOUNDS:
        lowered, _ = run_pipeline(
            load_model(TINY, dtype=dtype, step_tokens=128, logit_rows=8, log=lambda _: None),
            build_pipeline(),
            verify=False,
        )
        passes = parse_pipeline(get_backend("triton").plan_passes(setting.target))
        planned, _ = run_passes(lowered, passes)
        folder = setting.folder / f"model-{dtype}"
        config = ExecutorConfig(num_blocks=(NUM_BLOCKS,) * len(lowered.resources))
        if not folder.exists():
            build(lowered, folder / "reference", backend="reference")
            planned = replace(planned, phase="planned")
            build(planned, folder / "triton", setting.target, backend="triton")
        for capture in (False, True):
            reference = ReferenceExecutor.open(open_artifact(folder / "reference"), config)
            artifact = open_artifact(folder / "triton")
            driver = setting.new_driver()
            device = GpuExecutor.open_with(artifact, config, driver, capture=capture)
            error, wrong = _compare(device, reference, len(lowered.resources))
            device.close()
            name = f"{dtype} {'captured' if capture else 'eager'}"
            fine = error < bound and not wrong
            found[name] = {"fine": fine, "error": error, "bound": bound, "wrong draws": wrong}
    return {"cases": found, "wrong": [name for name, one in found.items() if not one["fine"]]}


def _compare(device: Executor, reference: Executor, groups: int) -> tuple[float, int]:
    rng, error, wrong = np.random.default_rng(0), 0.0, 0
    sequences = Sequences(groups, [rng.integers(5, 4000, n).tolist() for n in PROMPTS])
    for counts in ([7, 30, 0], [1, 10, 19], [1, 1, 1], [1, 1, 1], [0, 1, 1]):
        step = sequences.step(counts)
        found, wanted = (one.launch(step).result() for one in (device, reference))
        error = max(error, _error(found.logits, wanted.logits))
        drawn: list[Any] = [
            drawn_token(found.logits[one["row"]], Draw(*one.item())) for one in step.draws
        ]
        wrong += sum(a != b for a, b in zip(found.tokens.tolist(), drawn, strict=True))
        sequences.take(counts, found)
    return error, wrong


def _error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
