"""Executors, one a backend, each imported only where an artifact asks for it."""

from __future__ import annotations

from ...ir.artifact import Artifact
from ...ir.backends import backend_of_artifact
from ...ir.errors import ArtifactError
from .base import Executor, ExecutorConfig


def open_executor(artifact: Artifact, config: ExecutorConfig) -> Executor:
    """The executor of the backend that the artifact was compiled with.

    Raises ArtifactError where this infc has no such backend or the artifact is not of its kind,
    ToolchainError where a library that the backend runs on is not installed, UsageError where
    there is no such program.
    """
    manifest = artifact.manifest
    backend = backend_of_artifact(manifest.backend, where=str(artifact.path))
    kind = manifest.program(config.program).entry.kind
    if kind != backend.entry:
        raise ArtifactError(
            f"the backend {backend.name} runs a {backend.entry}, not a {kind}",
            where=str(artifact.path),
            hint="compile the model again",
        )
    if backend.extra is not None:
        backend.extra.require(f"an artifact of the backend {backend.name}")
    executor: Executor = backend.load_executor()(artifact, config)
    return executor
