"""Engines whose executor drives an emulated GPU, and what can be seen of their steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from infc.ir.artifact import Artifact
from infc.ir.launches import LaunchPlan, read_launches
from infc.runtime.executors.base import Running, head_output
from infc.runtime.executors.gpu import cuda
from infc.runtime.executors.gpu import executor as gpu_executor
from infc.runtime.executors.gpu.executor import GpuExecutor
from infc.runtime.scheduling.step import Step, StepOutput

from ..e2e.builds import Build, Builds
from .driver import EmulatedDriver
from .running import device

ChangePlan = Callable[[LaunchPlan], LaunchPlan]
MakeDriver = Callable[[int], EmulatedDriver]


def no_graphs(plan: LaunchPlan) -> LaunchPlan:
    """Every launch by itself."""
    return replace(plan, buckets=(), pieces=())


@dataclass(frozen=True, slots=True)
class Case:
    """A small model for a chip."""

    build: Build
    target: str = "sm_90"

    @property
    def compiled(self) -> Build:
        """For the chip."""
        sets = (("target", self.target), *self.build.sets)
        return replace(self.build, backend="triton", sets=sets)

    @property
    def reference(self) -> Build:
        """What it is compared with."""
        return replace(self.build, backend="reference")

    @property
    def capability(self) -> int:
        """That of the chip, such as 90."""
        return int(self.target.removeprefix("sm_"))

    @property
    def name(self) -> str:
        """In a word that is not the architecture's: all of these are few, whatever they are."""
        return f"{self.target}-{self.build.model_name}"

    def artifact(self, builds: Builds) -> Artifact:
        """Compiled, as nothing but the driver needs a GPU."""
        return builds.artifact(self.compiled)


@contextmanager
def emulated(
    capability: int,
    *,
    change: ChangePlan | None = None,
    make: MakeDriver = device,
    depth: int = 1,
) -> Iterator[list[EmulatedDriver]]:
    """Within it, this machine has a GPU; yields the drivers that were opened.

    `change` is made to the launches that an executor reads.
    """
    drivers: list[EmulatedDriver] = []

    def opened() -> EmulatedDriver:
        drivers.append(make(capability))
        return drivers[-1]

    def read(text: str, *, where: str) -> LaunchPlan:
        plan = read_launches(text, where=where)
        return plan if change is None else change(plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "CudaDriver", opened)
        patch.setattr("infc.ir.nvidia.free_gpu_bytes", lambda: 1 << 28)
        patch.setattr(gpu_executor, "read_launches", read)
        patch.setattr(GpuExecutor, "depth", depth)
        yield drivers


@dataclass(slots=True)
class Seen:
    """What the steps were that an executor was given, counted by kind."""

    counts: Counter[str] = field(default_factory=Counter)

    def note(self, step: Step) -> None:
        """Count a step."""
        queries = np.diff(step.query_starts)
        one_query = step.num_tokens == step.num_sequences
        kinds = {
            "one query each": one_query,
            "mixed": not one_query and bool((queries == 1).any()),
            "chunks of prompts": bool((step.context_lengths - queries > 0)[queries > 1].any()),
            "padded": one_query and step.num_sequences & (step.num_sequences - 1) != 0,
            "carried tokens": len(step.carried) > 0,
            "copied blocks": any(len(pairs) > 0 for pairs in step.block_copies),
            "adjusted": step.adjustments is not None,
        }
        self.counts.update(name for name, holds in kinds.items() if holds)


@contextmanager
def seen_steps() -> Iterator[Seen]:
    """Counts the steps of executors for GPUs within it."""
    seen, launch = Seen(), GpuExecutor.launch

    def noted(executor: GpuExecutor, step: Step) -> Running:
        seen.note(step)
        return launch(executor, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GpuExecutor, "launch", noted)
        yield seen


@dataclass(slots=True)
class _Drawn:
    """A step all of whose logits were asked for."""

    step: Step
    running: Running
    before: _Drawn | None
    tokens: list[int] | None = None

    def result(self) -> StepOutput:
        """As the step without them; AssertionError where tokens do not follow from the logits."""
        found = self.running.result()
        step = replace(self.step, token_ids=self.step.token_ids.copy())
        if len(step.carried):
            assert self.before is not None
            assert self.before.tokens is not None
            drawn = np.array(self.before.tokens, np.int32)
            step.token_ids[step.carried[:, 0]] = drawn[step.carried[:, 1]]
        expected = head_output(step, found.logits, found.hidden)
        assert found.tokens.tolist() == expected.tokens.tolist()
        self.tokens, self.before = found.tokens.tolist(), None
        return replace(found, logits=expected.logits)


@contextmanager
def checked_draws() -> Iterator[None]:
    """Within it, each token that a GPU draws is compared with infc's own sampler's."""
    launch = GpuExecutor.launch
    last: dict[int, _Drawn] = {}

    def checked(executor: GpuExecutor, step: Step) -> Running:
        running = launch(executor, replace(step, logits_rows=None))
        drawn = last[id(executor)] = _Drawn(step, running, last.get(id(executor)))
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GpuExecutor, "launch", checked)
        yield
