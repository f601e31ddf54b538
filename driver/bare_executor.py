"""An executor without an engine, opened as an engine would: for steps that are made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..ir.artifact import Artifact
from ..ir.machine import available_cpus, available_memory
from ..ir.manifest import MAIN

if TYPE_CHECKING:
    from ..ir.manifest import Manifest
    from ..runtime.executors.base import Executor, WeightPlacement


def open_bare(
    artifact: Artifact,
    num_blocks: Sequence[int],
    *,
    num_threads: int | None = None,
    profile: bool = False,
    program: str = MAIN,
) -> Executor:
    """The executor of an artifact whose weights are whole, with so many blocks a KV group.

    `program` is the name of one of the artifact's programs.

    Threads, pinning and where weights lie are as the recipe says, or as they are by default.
    Raises what opening an engine raises.
    """
    from ..runtime.executors import open_executor
    from ..runtime.executors.base import ExecutorConfig

    artifact.verify_weights().result()
    config = ExecutorConfig(
        num_blocks=tuple(num_blocks),
        num_threads=num_threads or usual_threads(artifact.manifest),
        pin=(artifact.manifest.recipe.get("runtime") or {}).get("pin") is True,
        weights=_place_weights(artifact, program),
        program=program,
        profile=profile,
    )
    return open_executor(artifact, config)


def usual_threads(manifest: Manifest) -> int:
    """How many threads an artifact is opened with, where nobody says."""
    threads = (manifest.recipe.get("runtime") or {}).get("threads")
    return threads if isinstance(threads, int) else available_cpus()


def _place_weights(artifact: Artifact, program: str) -> WeightPlacement:
    from ..runtime.limits import loaded_shared_bytes, place_weights
    from ..runtime.memory_plan import BROKER

    manifest = artifact.manifest
    compiled = manifest.program(program)
    wanted = (manifest.recipe.get("runtime") or {}).get("weights") or "auto"
    free = available_memory() - BROKER.untouched() - compiled.arena_bytes
    ours = artifact.weights_are_ours()
    free -= loaded_shared_bytes(manifest, compiled, free, ours=ours)
    size = manifest.files[compiled.weights.file].bytes
    return place_weights(wanted, size, free, ours=ours)
