"""What an engine is made of, opened one engine after the other."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ..ir.artifact import Artifact
from .executors import open_executor
from .executors.base import Executor, ExecutorConfig
from .limits import RuntimePlan, plan_runtime
from .memory_plan import BROKER, Lease
from .options import RuntimeOptions
from .text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class OpenedParts:
    """The plan of an artifact and what was opened by it; the lease watches the executor."""

    plan: RuntimePlan
    executor: Executor
    tokenizer: Tokenizer | None
    lease: Lease

    def close(self) -> None:
        """Give threads and memory back."""
        self.lease.end()
        self.executor.close()


def open_parts(
    artifact: Artifact, options: RuntimeOptions, *, only_decodes: bool = False
) -> OpenedParts:
    """Plan, and open executor and tokenizer; where either fails, nothing stays open.

    Raises ArtifactError, TargetError, or CapacityError for what does not fit.
    """
    with BROKER.opening(), contextlib.ExitStack() as failing:
        plan = plan_runtime(
            artifact.manifest, options, weights_are_ours=artifact.weights_are_ours()
        )
        lease = BROKER.lease(plan.memory)
        failing.callback(lease.end)
        config = ExecutorConfig(
            num_blocks=plan.num_blocks,
            num_threads=plan.num_threads,
            pin=plan.pin,
            weights=plan.weights,
        )
        # Either may take a good part of a second, and they meet nowhere.
        with ThreadPoolExecutor(1) as beside:
            tokenizer = beside.submit(Tokenizer.load, artifact, only_decodes=only_decodes)
            executor = open_executor(artifact, config)
            failing.callback(executor.close)
        parts = OpenedParts(plan, executor, tokenizer.result(), lease)
        lease.watch(executor)
        failing.pop_all()
    return parts
