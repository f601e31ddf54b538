"""Everything that `infc bench ARTIFACT` measures, in order."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...ir.errors import InfcError, ToolchainError
from ...ir.machine import available_cpus, cpu_model
from ...ir.roofline import Ceilings, Roofline
from ..bare_executor import usual_threads
from ..explain.collect import read_program
from ..progress import Reporter
from .ceilings import ceilings_of
from .engine_rounds import EngineRounds
from .first_token import PROMPT_TOKENS, measure_start
from .ops import StepTime, measure_steps
from .peak_memory import peak_rss_bytes, reset_peak
from .results import BenchResult, StartResult, WorkloadResult
from .trial_steps import TrialStep
from .workloads import START, Workload

if TYPE_CHECKING:
    from ...ir.artifact import Artifact
    from ...ir.manifest import Limits
    from ...runtime.api.llm import LLM

INTERRUPTED = "interrupted"
"""Why a workload was skipped in which Ctrl-C came; those after it were not begun."""

_OP_CONTEXT = 160
_OP_PROMPT = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure: workloads, whether a fresh process too, and steps line by line.

    `measure_ceilings` asks for ceilings of this very moment, not those in the cache.
    """

    workloads: tuple[Workload, ...]
    start: bool = False
    steps: bool = False
    rounds: int = 3
    threads: int | None = None
    measure_ceilings: bool = False


def run_bench(
    artifact: Artifact,
    options: BenchOptions,
    reporter: Reporter,
    on_note: Callable[[str], None] | None = None,
) -> BenchResult:
    """Measures what was asked for. `on_note` hears what had to be decided otherwise.

    A workload that fails is skipped, with its reason; Ctrl-C in one ends it and those after it,
    and what was measured before is given. CapacityError where the memory is too little.
    """
    manifest = artifact.manifest
    threads = options.threads or usual_threads(manifest)
    start = _measure_start(artifact, options, reporter, on_note) if options.start else None
    ceilings = _ceilings(min(threads, available_cpus()), options, reporter, on_note)
    workloads, at_once, peak = _measure_workloads(artifact, options, ceilings, reporter, on_note)
    steps: list[StepTime] = []
    interrupted = any(one.skipped == INTERRUPTED for one in workloads)
    if options.steps and not interrupted:
        with reporter.stage("steps, line by line"):
            steps = measure_steps(
                artifact,
                trial_steps(manifest.main.limits, options.workloads),
                threads=threads,
                ceilings=ceilings,
                on_step=reporter.advance,
            )
    return BenchResult(
        artifact=str(artifact.path),
        identity=artifact.identity,
        model=manifest.model.architecture,
        backend=manifest.backend,
        target=manifest.target.name,
        cpu=cpu_model(),
        infc_version=manifest.infc_version,
        threads=threads,
        at_once=at_once,
        ceilings=ceilings,
        workloads=workloads,
        start=start,
        peak_rss_bytes=peak,
        steps=tuple(steps),
    )


def trial_steps(limits: Limits, workloads: tuple[Workload, ...]) -> dict[str, TrialStep]:
    """A decode step and a prefill step: of the workload, where there is only one."""
    batch, context, prompt = 1, _OP_CONTEXT, _OP_PROMPT
    if len(workloads) == 1:
        only = workloads[0]
        batch, context = min(only.requests, only.concurrency), only.context
        prompt = only.shared_tokens + only.prompt_tokens
    batch = min(batch, limits.max_sequences, limits.logit_rows, limits.step_tokens)
    prompt = min(prompt, limits.step_tokens, limits.max_context)
    return {
        "decode": TrialStep(batch, 1, min(context, limits.max_context)),
        "prefill": TrialStep(1, prompt, prompt),
    }


def _measure_start(
    artifact: Artifact,
    options: BenchOptions,
    reporter: Reporter,
    on_note: Callable[[str], None] | None,
) -> StartResult | None:
    # The process is told of no threads where the user told us of none: it decides as always.
    limits = artifact.manifest.main.limits
    count = max(1, min(PROMPT_TOKENS, limits.max_context - 4))
    draw = random.Random(START)
    prompt = [draw.randrange(artifact.manifest.model.vocab_size) for _ in range(count)]
    try:
        with reporter.stage(START):
            return measure_start(
                artifact.path,
                prompt,
                rounds=options.rounds,
                threads=options.threads,
                on_round=reporter.advance,
            )
    except InfcError as error:
        if on_note is not None:
            on_note(f"{START} was not measured: {error}")
        return None


def _measured(
    llm: LLM, runs: EngineRounds, workload: Workload, rounds: int, reporter: Reporter
) -> WorkloadResult:
    """A workload's figures; where it fails or is interrupted, why. Others' figures are kept."""
    try:
        return runs.measure(workload, rounds, reporter.advance)
    except InfcError as error:
        reason = str(error)
    except KeyboardInterrupt:
        reason = INTERRUPTED
    llm.engine.abort_all()
    return WorkloadResult(workload=workload, skipped=reason, failed=True)


def _ceilings(
    threads: int,
    options: BenchOptions,
    reporter: Reporter,
    on_note: Callable[[str], None] | None,
) -> Ceilings | None:
    try:
        return ceilings_of(threads, reporter, anew=options.measure_ceilings)
    except ToolchainError as error:
        if on_note is not None:
            on_note(f"the limits of this machine are unknown: {error}")
        return None


def _measure_workloads(
    artifact: Artifact,
    options: BenchOptions,
    ceilings: Ceilings | None,
    reporter: Reporter,
    on_note: Callable[[str], None] | None,
) -> tuple[tuple[WorkloadResult, ...], int, int | None]:
    """The results, how many sequences run at once, and the peak of memory meanwhile."""
    from ...runtime.api.llm import LLM

    roofline = None if ceilings is None else Roofline(read_program(artifact), ceilings)
    knows_peak = reset_peak()
    results = []
    with LLM(artifact, threads=options.threads, on_note=on_note) as llm:
        llm.engine.work_ahead()
        limits = llm.engine.plan.limits
        runs = EngineRounds(llm.engine, roofline)
        for workload in options.workloads:
            if workload.context > limits.max_context:
                reason = f"{workload.context} tokens do not fit into {limits.max_context}"
                results.append(WorkloadResult(workload=workload, skipped=reason))
                continue
            with reporter.stage(workload.name):
                results.append(_measured(llm, runs, workload, options.rounds, reporter))
            if results[-1].skipped == INTERRUPTED:
                break
        at_once = limits.max_running
    return tuple(results), at_once, peak_rss_bytes() if knows_peak else None
