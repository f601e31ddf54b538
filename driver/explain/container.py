"""What a container needs to serve an artifact, whatever machine this is."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import yaml

from ...ir.errors import CapacityError, UsageError
from ...ir.manifest import CompiledProgram, Manifest
from ...ir.sizes import format_count, format_size
from ...runtime.executors.base import HOST
from ...runtime.limits import (
    copies_weights,
    handed_over_bytes,
    longest_context,
    memory_kind,
    parse_bytes,
    plan_blocks,
    room_for_copy,
)
from ...runtime.replicas.sizing import MAX_REPLICAS, PROCESS_BYTES
from ...runtime.scheduling.admission import SchedulerLimits
from .memory import kv_bytes

_MIB = 1 << 20
_STEP_BYTES = 16 << 20
# Measured with the bundled model: 49 MiB of its own as a front, 62 with an engine in it, and
# 30 MiB of libraries that all processes share.
_SERVER_BYTES = 96 << 20
_REQUEST_BYTES = 128 << 20  # bodies, answers and connections; a body has 8 MiB at most
# Of the file of a tokenizer, in a process that has read it: vocabulary, merges and their indices.
_TOKENIZER_FACTOR = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSizes:
    """Options of `infc serve`, and what they make of a container.

    `parts` are bytes of its memory by what they are for; `memory` is their sum, rounded up.
    """

    args: tuple[str, ...]
    cpus: int
    memory: int
    gpus: int
    parts: tuple[tuple[str, int], ...]

    def as_data(self) -> dict[str, Any]:
        """As values of the chart, and as keys of a container."""
        amounts = {"cpu": str(self.cpus), "memory": f"{self.memory // _MIB}Mi"}
        limits = dict(amounts)
        if self.gpus:
            limits["nvidia.com/gpu"] = str(self.gpus)
        return {"args": list(self.args), "resources": {"requests": amounts, "limits": limits}}


def container_text(sizes: ContainerSizes, *, as_json: bool) -> str:
    """As YAML, which begins with what the memory is for, or as JSON."""
    data = sizes.as_data()
    if as_json:
        parts = {name: size for name, size in sizes.parts if size}
        return json.dumps({**data, "memory": parts}, indent=1) + "\n"
    lines = [f"#   {format_size(size):>10}  {name}\n" for name, size in sizes.parts if size]
    head = f"# memory: {format_size(sizes.memory)}\n{''.join(lines)}"
    return head + yaml.dump(data, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Writes no anchors: not everything that reads such files knows them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def size_container(
    manifest: Manifest,
    *,
    replicas: int = 0,
    threads: int | None = None,
    kv_memory: int | None = None,
    batch: int | None = None,
    context: int | None = None,
) -> ContainerSizes:
    """Sizes a container for `replicas` engine processes, or for an engine in the server for 0.

    `kv_memory` is for each engine; without it, as compiled, or room for `batch` sequences (as
    many as run at once) of `context` tokens (all). Raises UsageError for what cannot be served
    so, CapacityError for a cache that does not hold one context.
    """
    is_host = memory_kind(manifest) == HOST
    if replicas > (MAX_REPLICAS if is_host else 1):
        most = f"0..{MAX_REPLICAS}" if is_host else "0..1, as engines would each have a GPU"
        raise UsageError(f"{replicas} replicas are outside {most}", where="--replicas")
    program, count = manifest.main, max(1, replicas)
    compiled = manifest.recipe.get("runtime") or {}
    num_threads = threads or compiled.get("threads") or count
    parts: list[tuple[str, int]] = []
    args = ["--replicas", str(replicas)] if replicas else []
    args += ["--threads", str(num_threads)]
    if is_host:
        kv = _kv_memory(manifest, kv_memory, batch, context)
        args += ["--kv-memory", f"{kv // _MIB}MiB"]
        parts.append((_of(count, "KV cache"), count * kv))
    elif kv_memory is not None:
        args += ["--kv-memory", f"{math.ceil(kv_memory / _MIB)}MiB"]
    args += ["--max-sequences", str(batch)] if batch else []
    args += ["--max-context", str(context)] if context else []
    step = handed_over_bytes(program, program.limits.step_tokens)
    step += program.arena_bytes if is_host else 0
    parts.append((_of(count, "a step"), count * step))
    parts.append(("weights", _weights_bytes(manifest, replicas)))
    num_processes = replicas + 1 if replicas else 0
    processes = format_count(num_processes, "engine process", "engine processes")
    parts.append((f"{processes}, one to spare", num_processes * PROCESS_BYTES))
    parts.append(("the server", _SERVER_BYTES))
    tokenizer = _TOKENIZER_FACTOR * _tokenizer_bytes(manifest)
    parts.append(("the tokenizer, in each process", (1 + num_processes) * tokenizer))
    parts.append(("requests", _REQUEST_BYTES))
    total = sum(size for _, size in parts)
    return ContainerSizes(
        args=tuple(args),
        cpus=num_threads,
        memory=math.ceil(total / _STEP_BYTES) * _STEP_BYTES,
        gpus=0 if is_host else 1,
        parts=tuple(parts),
    )


def _of(count: int, what: str) -> str:
    return what if count == 1 else f"{what}, of each of {count} engines"


def _weights_bytes(manifest: Manifest, replicas: int) -> int:
    """Of the container's memory: files that are mapped count for it, too, and once for all."""
    stored = sum(manifest.files[name].bytes for name in manifest.weight_files())
    if memory_kind(manifest) != HOST:
        return stored  # read on their way to the GPU, and kept as long as there is room
    if copies_weights(manifest):
        return stored * max(1, replicas)
    return stored if replicas > 1 else room_for_copy(stored)


def _tokenizer_bytes(manifest: Manifest) -> int:
    files = manifest.files.items()
    return sum(each.bytes for name, each in files if name.startswith("tokenizer"))


def _kv_memory(
    manifest: Manifest, wanted: int | None, batch: int | None, context: int | None
) -> int:
    """Bytes of an engine's cache, in whole MiB, that hold one sequence of the whole context."""
    program = manifest.main
    limits = program.limits
    stated = (manifest.recipe.get("kv_cache") or {}).get("memory")
    if wanted is None and stated not in (None, "auto"):
        wanted = parse_bytes(stated)
    if wanted is None:
        most = min(limits.max_sequences, limits.logit_rows, limits.step_tokens)
        number, tokens = (
            _within("--batch", batch, most),
            _within("--context", context, limits.max_context),
        )
        wanted = kv_bytes(program.resources, limits.step_tokens, tokens, number)
    budget = math.ceil(wanted / _MIB) * _MIB
    held = _longest(program, budget)
    if held < (context or limits.max_context):
        raise CapacityError(
            f"{format_size(budget)} of KV memory hold {held} tokens, and the context has"
            f" {limits.max_context}",
            hint="raise --kv-memory, or lower --context and serve with --max-context",
        )
    return budget


def _within(name: str, value: int | None, most: int) -> int:
    if value is not None and not 1 <= value <= most:
        raise UsageError(f"{value} is outside 1..{most}", where=name)
    return most if value is None else value


def _longest(program: CompiledProgram, budget: int) -> int:
    compiled = program.limits
    limits = SchedulerLimits(
        step_tokens=compiled.step_tokens,
        max_sequences=compiled.max_sequences,
        logit_rows=compiled.logit_rows,
        max_context=compiled.max_context,
    )
    blocks = plan_blocks(program.resources, limits, budget)
    return longest_context(program.resources, blocks, compiled.max_context)
