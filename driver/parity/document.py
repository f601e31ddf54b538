"""A comparison of two executors as JSON: the same fields under the same names."""

from __future__ import annotations

import json

from pydantic import TypeAdapter

from .report import Parity


def parity_json(parity: Parity) -> str:
    """Indented JSON; null stands for an error that is infinite, which JSON does not have."""
    return json.dumps(json.loads(TypeAdapter(Parity).dump_json(parity)), indent=1)
