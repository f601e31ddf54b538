"""Artifacts of the first version of the manifest, as an infc of that time wrote them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from infc.ir.manifest import canonical_json
from infc.ir.shapes import parse_type


def as_version_1(text: str) -> str:
    """The text of a manifest, of an artifact with one program, in the first version."""
    data: dict[str, Any] = json.loads(text)
    del data["digest"]
    (main,) = data.pop("programs").values()
    hidden = main["outputs"].get("hidden")
    del main["limits"]["sizes"], main["weights"]["shared"]
    data |= {name: main[name] for name in ("entry", "limits", "arena_bytes", "weights")}
    data["kv"] = {"groups": main["resources"]}
    data["hidden_width"] = hidden and parse_type(hidden).shape[-1]
    data["version"] = 1
    digest = hashlib.sha256(canonical_json(data).encode()).hexdigest()
    return canonical_json({**data, "digest": digest})


def take_back(artifact: Path) -> None:
    """Give an artifact on disk a manifest of the first version."""
    place = artifact / "manifest.json"
    place.write_text(as_version_1(place.read_text()))
