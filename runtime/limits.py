"""The memory plan: exact, made before the start; it fits, or the error says what would."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ..ir.backends import known_backend
from ..ir.errors import ArtifactError, CapacityError, UsageError
from ..ir.machine import available_cpus, available_memory, huge_page_setting
from ..ir.manifest import LEAST_CONTEXT, MAIN, CompiledProgram, Manifest
from ..ir.resources import Resource
from ..ir.shapes import parse_type
from ..ir.sizes import format_count, format_size, parse_size
from ..ir.targets import device_of
from .executors.base import DEVICE, HOST, WeightPlacement
from .memory_plan import BROKER, MemoryPlan, MemoryUse
from .options import RuntimeOptions, check_types, checked_threads
from .scheduling.admission import SchedulerLimits
from .scheduling.kv_cache import KvCache
from .scheduling.kv_groups import (
    blocks_alone,
    blocks_for,
    common_block_size,
    planned_blocks,
    planned_bytes,
)

_SHARE_OF_FREE_MEMORY = {HOST: 0.5, DEVICE: 0.9}
_MOST_COPIED = 0.75  # of what memory is left
_LEAST_COPIED_BYTES = 64 << 20  # less than that mostly stays in the last-level cache
_MOST_MS = 24 * 3600 * 1000
_KV_MEMORY = "kv_memory (--kv-memory, or kv_cache.memory in the recipe)"


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimePlan:
    """What a running engine takes. `num_blocks` counts the null block of each group."""

    limits: SchedulerLimits
    groups: tuple[Resource, ...]
    num_blocks: tuple[int, ...]
    num_threads: int
    pin: bool
    weights: WeightPlacement
    prefix_reuse: bool
    notes: tuple[str, ...] = ()
    memory: MemoryPlan = field(default_factory=dict)

    def make_cache(self) -> KvCache:
        """An empty KV cache of this size."""
        return KvCache(
            self.groups,
            self.num_blocks,
            max_sequences=self.limits.max_running,
            max_context=self.limits.max_context,
            prefix_reuse=self.prefix_reuse,
        )


def plan_runtime(
    manifest: Manifest,
    options: RuntimeOptions,
    *,
    weights_are_ours: bool = True,
    program: str = MAIN,
    device_bytes: int | None = None,
) -> RuntimePlan:
    """Sizes everything; raises CapacityError where it does not fit, naming settings that would.

    `program` is the name of the program that is to run. UsageError where there is none, and for
    an option that is not of its type, ArtifactError where the weights would have to be mapped
    from a file that is not ours, DeviceError without a GPU unless `device_bytes` says what is free.
    """
    check_types(options)
    compiled = manifest.program(program)
    groups = compiled.resources
    runtime = _section(manifest.recipe, "runtime")
    limits = _limits(compiled, options, runtime.get("itl_target_ms"))
    weights_bytes = manifest.files[compiled.weights.file].bytes
    stated = _section(manifest.recipe, "kv_cache").get("memory")
    memory = stated if options.kv_memory is None else options.kv_memory
    wanted = options.weights or runtime.get("weights") or "auto"
    kind = memory_kind(manifest)
    free = free_bytes(kind) if kind == HOST or device_bytes is None else device_bytes
    step_bytes = step_bytes_of(compiled, limits.step_tokens, kind)
    mappable = weights_are_ours and kind == HOST
    loaded_bytes = loaded_shared_bytes(manifest, compiled, free - step_bytes, ours=mappable)
    rest = free - step_bytes - loaded_bytes
    unplaced = weights_bytes
    if kind == DEVICE:
        rest, unplaced = _beside_weights(rest, weights_bytes, free), 0
    copies = copies_weights(manifest)
    is_asked = wanted == "mapped" or (wanted == "auto" and weights_are_ours)
    may_map = kind == HOST and is_asked and not copies
    budgets = _budgets(memory, rest, unplaced, may_map=may_map, kind=kind)
    least = LEAST_CONTEXT if options.max_context is None else limits.max_context
    limits, num_blocks, notes = _plan_cache(groups, limits, budgets, least)
    kv_bytes = planned_bytes(groups, num_blocks)
    if memory not in (None, "auto") and kv_bytes < free < budgets[0]:
        notes.append(
            f"KV memory of {format_size(budgets[0])} exceeds the free memory of"
            f" {format_size(free)}: {format_size(kv_bytes)} are used, enough for"
            f" {limits.max_running} sequences of {limits.max_context} tokens"
        )
    if kv_bytes > rest:
        shared = f", and shared weights {format_size(loaded_bytes)}" if loaded_bytes else ""
        raise CapacityError(
            f"KV memory of {format_size(kv_bytes)} exceeds the {format_size(free)} that are free,"
            f" of which a step takes {format_size(step_bytes)}{shared}",
            hint=f"lower {_KV_MEMORY}, or set it to auto{_planned_by_others()}",
        )
    (num_threads, pin), cpus = _team(options, runtime), available_cpus()
    if num_threads > cpus:
        notes.append(
            f"{num_threads} threads share {format_count(cpus, 'processor')}: with more threads than"
            " processors, threads wait for each other, which is slower"
        )
    weights: WeightPlacement = "loaded"
    if kind == HOST:
        left = rest - kv_bytes
        weights = place_weights(wanted, weights_bytes, left, ours=weights_are_ours, copies=copies)
    return RuntimePlan(
        limits=limits,
        groups=groups,
        num_blocks=num_blocks,
        num_threads=num_threads,
        pin=pin,
        weights=weights,
        prefix_reuse=options.prefix_reuse,
        notes=tuple(notes),
        memory=memory_of(
            manifest,
            compiled,
            num_blocks=num_blocks,
            step_tokens=limits.step_tokens,
            weights=weights,
            loaded_bytes=loaded_bytes,
        ),
    )


def memory_of(
    manifest: Manifest,
    program: CompiledProgram,
    *,
    num_blocks: Sequence[int],
    step_tokens: int,
    weights: WeightPlacement,
    loaded_bytes: int,
) -> MemoryPlan:
    """What a program takes that is opened so; for `loaded_bytes` see `loaded_shared_bytes`."""
    own, shared = manifest.files[program.weights.file].bytes, manifest.shared_bytes(program)
    mapped = shared - loaded_bytes + (own if weights == "mapped" else 0)
    kind, handed_over = memory_kind(manifest), handed_over_bytes(program, step_tokens)
    use = MemoryUse(
        weights=own + shared - mapped,
        kv=planned_bytes(program.resources, num_blocks),
        arena=step_bytes_of(program, step_tokens, kind) - handed_over,
        handed_over=handed_over,
        mapped=mapped,
    )
    if kind == HOST:
        return {HOST: use}
    return {DEVICE: use, HOST: MemoryUse(handed_over=handed_over)}


def memory_kind(manifest: Manifest) -> str:
    """The kind of memory in which weights and cache of an artifact lie: HOST or DEVICE."""
    return DEVICE if device_of(manifest.target.features) == "gpu" else HOST


def step_bytes_of(program: CompiledProgram, step_tokens: int, kind: str) -> int:
    """What a step takes of that kind of memory: its arena, and what it hands over.

    On a device there are the arrays that it reads as well, at the limits that were compiled in.
    """
    if kind == HOST:
        return program.arena_bytes + handed_over_bytes(program, step_tokens)
    from .executors.gpu.memory import step_bytes

    return program.arena_bytes + step_bytes(program)


def _beside_weights(rest: int, weights_bytes: int, free: int) -> int:
    """What a GPU has for its cache; CapacityError where not even a step fits beside the weights."""
    if rest < weights_bytes:
        raise CapacityError(
            f"the GPU has {format_size(free)} of memory free, and the weights take"
            f" {format_size(weights_bytes)}, a step {format_size(free - rest)}",
            hint=f"end what else uses the GPU, or use one with more memory{_planned_by_others()}",
        )
    return rest - weights_bytes


def _plan_cache(
    groups: Sequence[Resource], limits: SchedulerLimits, budgets: Sequence[int], least: int
) -> tuple[SchedulerLimits, tuple[int, ...], list[str]]:
    """Blocks of the first budget that holds a whole context; else of the last, for a shorter one.

    CapacityError where that would have fewer than `least` tokens. Gives what to say of it as well.
    """
    for budget in budgets:
        num_blocks = plan_blocks(groups, limits, budget)
        held = longest_context(groups, num_blocks, limits.max_context)
        if held == limits.max_context:
            return limits, num_blocks, []
    if held < least:
        raise _too_little(groups, limits.max_context, budget, held)
    note = (
        f"max_context is reduced to {held} to fit into {format_size(budget)} of KV memory"
        f"{_planned_by_others()}"
    )
    return replace(limits, max_context=held), num_blocks, [note]


def _budgets(memory: Any, free: int, weights_bytes: int, *, may_map: bool, kind: str) -> list[int]:
    """Bytes of KV memory to plan with, those to be tried first at the front."""
    if memory not in (None, "auto"):
        return [parse_bytes(memory)]
    budgets = [_share_of(free - weights_bytes, kind)]
    # Mapped weights are not taken: rather those than a shorter context, or none.
    return [*budgets, _share_of(free, kind)] if may_map else budgets


def free_bytes(kind: str = HOST) -> int:
    """What may still be planned: free memory, without what engines of this process have planned.

    DeviceError for that of a GPU where there is none.
    """
    if kind == HOST:
        return max(0, available_memory() - BROKER.untouched())
    from ..ir.nvidia import free_gpu_bytes

    return max(0, free_gpu_bytes() - BROKER.untouched(kind))


def _share_of(free: int, kind: str) -> int:
    """What a KV cache takes of free memory where nobody says how much."""
    return int(max(0, free) * _SHARE_OF_FREE_MEMORY[kind])


def _planned_by_others() -> str:
    """What to add to a message that memory is short, where other engines have planned some."""
    planned = BROKER.untouched()
    text = f"; other engines of this process have planned {format_size(planned)}: close one"
    return text if planned else ""


def handed_over_bytes(program: CompiledProgram, step_tokens: int) -> int:
    """Of what a step of so many tokens hands over, such as logits and hidden states.

    No token gives more than one row; where other arrays are taken, rows may be of those.
    """
    limits = program.limits
    rows = limits.logit_rows if program.further_inputs else min(limits.logit_rows, step_tokens)
    sizes = {**limits.sizes, "T": step_tokens, "R": rows}
    return sum(parse_type(kind).num_bytes(sizes) for kind in program.outputs.values())


def plan_blocks(
    groups: Sequence[Resource], limits: SchedulerLimits, budget: int
) -> tuple[int, ...]:
    """The most blocks a group that `budget` bytes hold, in the proportion the groups need them.

    At most what `max_sequences` sequences of `max_context` tokens can use; a windowed group
    never gets more than the windows of all sequences and one step's tokens.
    """
    if not groups:
        return ()
    size = common_block_size(groups)
    plan = partial(
        planned_blocks, groups, sequences=limits.max_running, step_tokens=limits.step_tokens
    )
    low, high = 0, limits.max_running * blocks_for(limits.max_context, size)
    while low < high:
        middle = (low + high + 1) // 2
        if planned_bytes(groups, plan(middle)) <= budget:
            low = middle
        else:
            high = middle - 1
    return plan(low)


def longest_context(groups: Sequence[Resource], num_blocks: Sequence[int], limit: int) -> int:
    """The most tokens, up to `limit`, that one sequence alone can reach."""
    held = limit
    for group, count in zip(groups, num_blocks, strict=True):
        if blocks_alone(group, limit) > count - 1:
            held = min(held, (count - 1) * group.block_size)
    return held


def parse_bytes(value: int | str) -> int:
    """Bytes from a number, or from text such as "512MiB"."""
    if type(value) is int and value > 0:
        return value
    count = 0
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            count = parse_size(value)
    if count < 1:
        raise UsageError(f"{value!r} is not a memory size", hint='write it as "512MiB" or "2GiB"')
    return count


def _team(options: RuntimeOptions, runtime: dict[str, Any]) -> tuple[int, bool]:
    """How many threads, and whether each stays on one processor."""
    chosen = runtime.get("threads") if options.threads is None else options.threads
    num_threads = available_cpus() if chosen is None else checked_threads(chosen)
    pin = runtime.get("pin") if options.pin is None else options.pin
    if pin and num_threads > (usable := len(os.sched_getaffinity(0))):
        raise CapacityError(
            f"{num_threads} threads cannot be pinned to the {usable} processors there are",
            hint="lower runtime.threads, or remove runtime.pin",
        )
    return num_threads, bool(pin)


def room_for_copy(weights_bytes: int) -> int:
    """Memory besides that of cache and steps with which weights are copied, not mapped."""
    if weights_bytes < _LEAST_COPIED_BYTES:
        return weights_bytes
    return math.ceil(weights_bytes / _MOST_COPIED)


def copies_weights(manifest: Manifest) -> bool:
    """Whether the backend of an artifact holds a copy of the weights whatever is chosen."""
    info = known_backend(manifest.backend)
    return info is not None and info.copies_weights


def place_weights(
    wanted: str, weights_bytes: int, free: int, *, ours: bool, copies: bool = False
) -> WeightPlacement:
    """Where weights lie, of whose memory `free` bytes are left.

    A file that others can write to is never mapped: they could change weights under the steps,
    and end the process by cutting the file short. Nor are small weights, whose copy costs little.
    With `copies`, there is a copy of them in any case.
    """
    if wanted not in ("auto", "mapped", "copied"):
        raise UsageError(f"weights is {wanted!r}", hint="use auto, mapped or copied")
    instead = "" if copies else "use weights=mapped, or "
    if (copies or wanted == "copied") and weights_bytes > free:
        raise CapacityError(
            f"a copy of the weights takes {format_size(weights_bytes)}, but only"
            f" {format_size(free)} are left besides the KV memory",
            hint=f"{instead}lower {_KV_MEMORY}{_planned_by_others()}",
        )
    if copies:
        return "loaded"
    # Beside the copy, what serves needs some memory, and others of this machine may.
    fits = weights_bytes <= free * _MOST_COPIED
    small = weights_bytes < _LEAST_COPIED_BYTES
    if wanted == "copied":
        return "copied" if ours else "loaded"
    if wanted == "auto" and fits and (small or not ours):
        return "loaded"
    if not ours:
        raise ArtifactError(
            "the weight file belongs to another user or is writable by others, so it is not"
            " safe to map",
            hint="copy the artifact to a directory of yours (cp -r), or use weights=copied",
        )
    if wanted == "auto" and fits and huge_page_setting() in ("always", "madvise"):
        return "copied"
    return "mapped"


def loaded_shared_bytes(
    manifest: Manifest, program: CompiledProgram, free: int, *, ours: bool
) -> int:
    """What a program reads into memory of the main program's weights: all, unless they are mapped.

    `free` bytes are left for them: CapacityError if they take more.
    """
    loaded = 0 if ours else manifest.shared_bytes(program)
    if loaded > max(0, free):
        raise CapacityError(
            f"the weights that are shared with the main program take {format_size(loaded)}, as"
            f" others can write to their file, but only {format_size(max(0, free))} are left",
            hint="copy the artifact to a directory of yours (cp -r), where they are mapped"
            f"{_planned_by_others()}",
        )
    return loaded


def _section(recipe: Any, name: str) -> dict[str, Any]:
    section = recipe.get(name)
    return dict(section) if section else {}


def _limits(
    program: CompiledProgram, options: RuntimeOptions, compiled_ms: int | None
) -> SchedulerLimits:
    target_ms = compiled_ms if options.itl_target_ms is None else options.itl_target_ms
    if target_ms is not None and (type(target_ms) is not int or not 0 <= target_ms <= _MOST_MS):
        raise UsageError(
            f"itl_target_ms is {target_ms!r}", hint="use milliseconds, or 0 for no target"
        )
    chosen = {}
    for name in ("max_context", "max_sequences", "step_tokens"):
        compiled, wanted = getattr(program.limits, name), getattr(options, name)
        least = LEAST_CONTEXT if name == "max_context" else 1
        if wanted is not None and not least <= wanted <= compiled:
            more = f"compile with runtime.{name} of at least {wanted}"
            raise CapacityError(
                f"{name} is {wanted}, outside {least}..{compiled}",
                hint=more if wanted > compiled else None,
            )
        chosen[name] = compiled if wanted is None else wanted
    return SchedulerLimits(
        **chosen,
        logit_rows=min(program.limits.logit_rows, chosen["step_tokens"]),
        max_waiting=options.max_waiting,
        compiled_context=program.limits.max_context,
        itl_target_seconds=target_ms / 1000 if target_ms else None,
    )


def _too_little(
    groups: Sequence[Resource], max_context: int, budget: int, held: int
) -> CapacityError:
    alone = [blocks_alone(group, max_context) for group in groups]
    # Groups share one unit, so the least that holds one sequence has the largest of them.
    needed = planned_bytes(groups, [max(alone) + 1] * len(groups))
    instead = f", or lower max_context to at most {held}" if held >= LEAST_CONTEXT else ""
    return CapacityError(
        f"a context of {max_context} tokens does not fit into {format_size(budget)} of KV memory",
        hint=f"raise {_KV_MEMORY} to at least {format_size(needed)}{instead}{_planned_by_others()}",
    )
