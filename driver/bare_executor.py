"""An executor without an engine, opened as an engine would: for steps that are made by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from ..ir.artifact import Artifact
from ..ir.machine import available_cpus
from ..ir.manifest import MAIN

if TYPE_CHECKING:
    from ..ir.manifest import Manifest
    from ..runtime.executors.base import Executor, WeightPlacement
    from ..runtime.memory_plan import MemoryPlan


@contextmanager
def open_bare(
    artifact: Artifact,
    num_blocks: Sequence[int],
    *,
    num_threads: int | None = None,
    profile: bool = False,
    program: str = MAIN,
) -> Iterator[Executor]:
    """The executor of an artifact whose weights are whole, with so many blocks a KV group.

    It is closed at the end of the block; engines that are opened meanwhile do not plan its memory.
    `program` is the name of one of the artifact's programs.

    Threads, pinning and where weights lie are as the recipe says, or as they are by default.
    Raises what opening an engine raises.
    """
    from ..runtime.executors import open_executor
    from ..runtime.executors.base import ExecutorConfig
    from ..runtime.memory_plan import BROKER

    artifact.verify_weights().result()
    with ExitStack() as closing:
        with BROKER.opening():
            weights, memory = _plan(artifact, num_blocks, program)
            lease = BROKER.lease(memory)
            closing.callback(lease.end)
            config = ExecutorConfig(
                num_blocks=tuple(num_blocks),
                num_threads=num_threads or usual_threads(artifact.manifest),
                pin=(artifact.manifest.recipe.get("runtime") or {}).get("pin") is True,
                weights=weights,
                program=program,
                profile=profile,
            )
            executor = open_executor(artifact, config)
            closing.callback(executor.close)
            closing.callback(lease.end)  # nobody asks the executor what it touched once it closes
            lease.watch(executor)
        yield executor


def usual_threads(manifest: Manifest) -> int:
    """How many threads an artifact is opened with, where nobody says."""
    threads = (manifest.recipe.get("runtime") or {}).get("threads")
    return threads if isinstance(threads, int) else available_cpus()


def _plan(
    artifact: Artifact, num_blocks: Sequence[int], program: str
) -> tuple[WeightPlacement, MemoryPlan]:
    """Where the weights lie, and what memory all of it takes."""
    from ..runtime.executors.base import HOST
    from ..runtime.limits import (
        copies_weights,
        free_bytes,
        loaded_shared_bytes,
        memory_kind,
        memory_of,
        place_weights,
    )

    manifest, ours = artifact.manifest, artifact.weights_are_ours()
    compiled = manifest.program(program)
    wanted = (manifest.recipe.get("runtime") or {}).get("weights") or "auto"

    def memory(weights: WeightPlacement, loaded_bytes: int) -> MemoryPlan:
        return memory_of(
            manifest,
            compiled,
            num_blocks=num_blocks,
            step_tokens=compiled.limits.step_tokens,
            weights=weights,
            loaded_bytes=loaded_bytes,
        )

    if memory_kind(manifest) != HOST:
        return "loaded", memory("loaded", manifest.shared_bytes(compiled))
    free = free_bytes() - memory("mapped", 0)[HOST].taken
    loaded = loaded_shared_bytes(manifest, compiled, free, ours=ours)
    size = manifest.files[compiled.weights.file].bytes
    copies = copies_weights(manifest)
    weights = place_weights(wanted, size, free - loaded, ours=ours, copies=copies)
    return weights, memory(weights, loaded)
