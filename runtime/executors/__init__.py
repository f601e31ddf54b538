"""Executors, one a backend, each imported only where an artifact asks for it."""

from __future__ import annotations

from ...ir.artifact import Artifact
from ...ir.errors import ArtifactError
from ...ir.extras import require_compiler
from .base import Executor, ExecutorConfig


def open_executor(artifact: Artifact, config: ExecutorConfig) -> Executor:
    """The executor of the backend that the artifact was compiled with."""
    backend = artifact.manifest.backend
    if backend == "cpp":
        from .cpp import CppExecutor

        return CppExecutor(artifact, config)
    if backend == "reference":
        require_compiler("an artifact of the backend reference")
        from .reference import ReferenceExecutor

        return ReferenceExecutor.open(artifact, config)
    raise ArtifactError(
        f"this infc has no executor for backend {backend!r}",
        where=str(artifact.path),
        hint="it runs cpp and reference",
    )
