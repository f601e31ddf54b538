"""The artifact that a job or an application was made for, on whichever node."""

from __future__ import annotations

from ...ir.artifact import Artifact, open_artifact
from ...ir.errors import ArtifactError


def open_same(path: str, identity: str) -> Artifact:
    """What is at a path of this node, if it is that artifact; else raises ArtifactError.

    Its files are verified, those of the weights by `Artifact.verify_weights`.
    """
    artifact = open_artifact(path, "stamp", weights="later")
    if artifact.identity != identity:
        raise ArtifactError(
            "this node has another artifact here than the one that was asked for",
            where=path,
            hint="copy the same artifact to all nodes; to use another one, begin the job or deploy"
            " the application again",
        )
    return artifact
