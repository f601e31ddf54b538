"""Facts as JSON: the same fields under the same names."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter

from .differences import Diff
from .facts import ArtifactFacts, NodeFacts
from .narrow import pick_nodes


def artifact_json(facts: ArtifactFacts) -> str:
    """Everything that is known of an artifact."""
    return _to_json(TypeAdapter(ArtifactFacts), facts)


def nodes_json(facts: ArtifactFacts, layer: int | None = None, op: str | None = None) -> str:
    """The nodes of a layer or an op; UsageError where there are none."""
    return _to_json(TypeAdapter(tuple[NodeFacts, ...]), pick_nodes(facts, layer, op))


def diff_json(diff: Diff) -> str:
    """A difference."""
    return _to_json(TypeAdapter(type(diff)), diff)


def _to_json(adapter: TypeAdapter[Any], value: Any) -> str:
    """Indented JSON of a value of the adapter's type."""
    return json.dumps(adapter.dump_python(value, mode="json"), indent=1)
