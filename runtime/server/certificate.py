"""The certificate of a served artifact, as its report has it."""

from __future__ import annotations

import json
from typing import Any, Final

from ...ir.artifact import Artifact
from ...ir.errors import ArtifactError

REPORT: Final = "report.json"
MAX_BYTES: Final = 1 << 26
"""Of a report: more is not read by a server."""


def read_certificate(artifact: Artifact) -> dict[str, Any] | None:
    """The certificate, None without one; ArtifactError for a report that is no JSON."""
    digest = artifact.manifest.files.get(REPORT)
    if digest is None or digest.bytes > MAX_BYTES:
        return None
    try:
        report = json.loads(artifact.read_text(REPORT))
    except (ValueError, RecursionError) as error:
        where = str(artifact.path / REPORT)
        raise ArtifactError(f"it is not JSON: {error}", where=where) from None
    found = report.get("certificate") if isinstance(report, dict) else None
    return found if isinstance(found, dict) else None
