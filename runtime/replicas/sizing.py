"""What several engines take of the memory and the processors of a machine, before any starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...ir.artifact import Artifact
from ...ir.errors import CapacityError, UsageError
from ...ir.machine import available_cpus
from ...ir.sizes import format_count, format_size
from ..executors.base import HOST
from ..limits import RuntimePlan, free_bytes, memory_kind, plan_runtime
from ..memory_plan import MemoryUse
from ..options import RuntimeOptions

MAX_REPLICAS = 64
_SHARE_OF_FREE_MEMORY = 0.5
PROCESS_BYTES = 40 << 20  # Python and what it imports: of each engine, and of the spare process


@dataclass(frozen=True, slots=True)
class ReplicaSizes:
    """The plan of one engine, the options of each, the processors of each, and a line to print.

    `cpus` has an empty list for an engine that may run anywhere.
    """

    plan: RuntimePlan
    options: tuple[RuntimeOptions, ...]
    cpus: tuple[list[int], ...]
    text: str

    @property
    def host_bytes(self) -> int:
        """What all engines take of the memory of the machine, beside Python."""
        return self.plan.memory.get(HOST, MemoryUse()).taken * len(self.options)


def size_replicas(artifact: Artifact, options: RuntimeOptions, count: int) -> ReplicaSizes:
    """Divides threads and memory among `count` engines, which map the same weights.

    Of the options, `threads` is for all of them together, and `kv_memory` for each. Raises
    CapacityError where they do not fit, and what `plan_runtime` raises.
    """
    manifest = artifact.manifest
    if memory_kind(manifest) != HOST and count > 1:
        raise UsageError(
            "several engine processes on one GPU would each have their own weights there",
            hint="use one",
        )
    ours = artifact.weights_are_ours()
    if count > 1 and options.weights is None and ours:
        options = replace(options, weights="mapped")  # one copy of them, whoever reads them
    first = plan_runtime(manifest, options, weights_are_ours=ours)
    if count > 1 and memory_kind(manifest) == HOST:
        options = replace(options, kv_memory=_kv_memory(artifact, options, first, count))
    threads = [len(part) for part in _divided(range(first.num_threads), count)]
    options = replace(options, threads=max(threads))
    plan = plan_runtime(manifest, options, weights_are_ours=ours)
    use = plan.memory[memory_kind(manifest)]
    free = free_bytes(memory_kind(manifest))
    taken = use.taken * count
    if memory_kind(manifest) == HOST:
        taken += _of_processes(count)
    if taken > free:
        raise CapacityError(
            f"{count} replicas take {format_size(taken)}, and {format_size(free)} are free",
            hint="use fewer, or lower kv_memory (--kv-memory), which is that of each",
        )
    options = replace(options, max_context=plan.limits.max_context)
    each = tuple(replace(options, threads=number) for number in threads)
    return ReplicaSizes(
        plan, each, _cpus(plan, count), _text(plan, count, free, memory_kind(manifest))
    )


def _kv_memory(
    artifact: Artifact, options: RuntimeOptions, plan: RuntimePlan, count: int
) -> int | str | None:
    """Bytes of KV for each: what was asked for, or its part of half of what is free."""
    recipe = artifact.manifest.recipe.get("kv_cache")
    compiled = recipe.get("memory") if isinstance(recipe, dict) else None
    wanted = compiled if options.kv_memory is None else options.kv_memory
    if wanted not in (None, "auto"):
        return wanted
    use = plan.memory[HOST]
    others = use.taken - use.kv
    half = int(free_bytes() * _SHARE_OF_FREE_MEMORY)
    share = (half - _of_processes(count)) // count - others
    return min(use.kv, max(1, share))


def _of_processes(count: int) -> int:
    """Bytes that processes take before they open anything, one to spare included."""
    return PROCESS_BYTES * (count + 1)


def _divided(items: Sequence[int], count: int) -> list[list[int]]:
    """Items in `count` parts as equal as can be; a part that would be empty has the first one."""
    size, rest = divmod(len(items), count)
    parts, at = [], 0
    for index in range(count):
        end = at + size + (index < rest)
        parts.append(list(items[at:end]) or [items[index % len(items)]])
        at = end
    return parts


def _cpus(plan: RuntimePlan, count: int) -> tuple[list[int], ...]:
    """The processors of each engine whose threads are pinned; else the system chooses."""
    if not plan.pin or count == 1:
        return tuple([] for _ in range(count))
    return tuple(_divided(sorted(os.sched_getaffinity(0)), count))


def _text(plan: RuntimePlan, count: int, free: int, kind: str) -> str:
    use = plan.memory[kind]
    step = use.arena + use.handed_over
    parts = [f"KV {format_size(use.kv)}", f"steps {format_size(step)}"]
    if use.weights:
        parts.append(f"weights {format_size(use.weights)}")
    shared = f", and weights of {format_size(use.mapped)} once for all" if use.mapped else ""
    total, processes = count * use.taken + use.mapped, ""
    if kind == HOST:
        total += _of_processes(count)
        number = format_count(count + 1, "process", "processes")
        processes = f", and {number} of {format_size(PROCESS_BYTES)}"
    return (
        f"{format_count(count, 'replica')} with {format_count(plan.num_threads, 'thread')} each:"
        f" {' + '.join(parts)} each{shared}{processes}: {format_size(total)} of the"
        f" {format_size(free)} that are free"
    )


def too_many_threads(count: int) -> str | None:
    """A note where engines have to share processors."""
    if count <= (cpus := available_cpus()):
        return None
    return (
        f"{count} replicas share {format_count(cpus, 'processor')}: each has one thread, and waits"
        " for the others"
    )
