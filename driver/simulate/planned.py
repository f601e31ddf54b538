"""From an artifact to the replicas that a simulation has of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ...ir.artifact import Artifact
from ...ir.errors import UsageError
from ...runtime.limits import plan_runtime
from ...runtime.options import RuntimeOptions
from ...runtime.scheduling.kv_groups import common_block_size
from ..bench.ceilings import known_ceilings
from ..explain.collect import read_program
from .costs import FrontCosts, StepCosts, roofline_costs
from .replica import ReplicaLimits
from .workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedReplica:
    """What an engine of an artifact can hold, what its steps take, and where that is from.

    `max_context` tokens a prompt and its answer may have.
    """

    limits: ReplicaLimits
    max_context: int
    costs: StepCosts
    source: str


def plan_replica(
    artifact: Artifact,
    options: RuntimeOptions,
    *,
    measure: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> PlannedReplica:
    """An engine of this artifact on this machine: measured, or at the machine's ceilings.

    UsageError where those are not known, and what opening raises.
    """
    manifest = artifact.manifest
    if measure:
        from ...runtime.engine import Engine
        from .measured import measure_costs

        engine = Engine.open(artifact, options)
        try:
            plan, costs = engine.plan, measure_costs(engine, clock)
        finally:
            engine.close()
        source = "measured on this machine"
    else:
        ceilings = known_ceilings(manifest)
        if ceilings is None:
            raise UsageError(
                "nothing is known of this machine",
                hint="run `infc bench --machine` once, or measure steps with --measure",
            )
        plan = plan_runtime(manifest, options, weights_are_ours=artifact.weights_are_ours())
        costs = roofline_costs(read_program(artifact), manifest.main.limits, ceilings)
        source = f"at the ceilings of this machine: {ceilings.describe()}"
    size = common_block_size(plan.groups)
    # The group that keeps all of a sequence has the fewest sequences to a block.
    limits = ReplicaLimits(
        max_running=plan.limits.max_running,
        step_tokens=plan.limits.step_tokens,
        num_blocks=max(plan.num_blocks) - 1,
        block_size=size,
    )
    context = plan.limits.max_context
    return PlannedReplica(limits=limits, max_context=context, costs=costs, source=source)


def with_blocks_of(limits: ReplicaLimits, block_size: int) -> ReplicaLimits:
    """The same memory in blocks of another size, which digests of a trace are of."""
    tokens = limits.num_blocks * limits.block_size
    return ReplicaLimits(
        max_running=limits.max_running,
        step_tokens=limits.step_tokens,
        num_blocks=max(1, tokens // block_size),
        block_size=block_size,
    )


@dataclass(frozen=True, slots=True)
class Saturation:
    """The load at which one front has no time left, and how many replicas give it that."""

    requests: float
    tokens: float
    replicas: int | None
    """None where no number of replicas does, as they are slower than that in all."""


def saturation(
    limits: ReplicaLimits, costs: StepCosts, front: FrontCosts, workload: Workload
) -> Saturation:
    """Of a front with replicas that are busy all the time, and find nothing in their caches."""
    output, prompt = workload.mean_output, workload.mean_prompt
    batch = max(
        1, min(limits.max_running, int(limits.num_blocks * limits.block_size / (output + prompt)))
    )
    context = int(batch * (prompt + output / 2))
    reading = costs.step(batch, context, limits.step_tokens) - costs.step(batch, context)
    seconds = output * costs.step(batch, context) / batch + prompt * reading / limits.step_tokens
    each = 1 / seconds
    count = 1
    while count <= 1 << 20:
        most = 1 / (front.token * output + front.routing(count))
        if count * each >= most:
            return Saturation(most, most * output, count)
        count += 1 if count < 4096 else count // 64
    return Saturation(1 / (front.token * output), 1 / front.token, None)
