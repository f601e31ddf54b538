"""What parity tests measured, kept for the table in the docs and held against the next run."""

from __future__ import annotations

import json
import math
from pathlib import Path

from filelock import FileLock

TABLE = Path(__file__).with_name("parity.json")
"""Name of the small model -> backend -> the bound that its logits' error stays below."""

BACKENDS = ("cpp", "reference", "onnx")
GREEDY_TOKENS = 32
_HEADROOM = 3
"""Another processor sums in another order."""


def load_table() -> dict[str, dict[str, str]]:
    """The bounds as they are written."""
    table: dict[str, dict[str, str]] = json.loads(TABLE.read_text())
    return table


def record(arch: str, backend: str, error: float, *, bound: float, update: bool) -> None:
    """Writes the power of ten above an error, or asserts that the error is below the one written.

    No bound that is written is looser than `bound`.
    """
    if not update:
        assert error <= float(load_table()[arch][backend]), "the table in the docs says less"
        return
    power = math.ceil(math.log10(max(error, 1e-12) * _HEADROOM))
    shown = f"{min(10.0**power, bound):.0e}".replace("e-0", "e-")
    with FileLock(f"{TABLE}.lock"):
        table = load_table() if TABLE.exists() else {}
        table.setdefault(arch, {})[backend] = shown
        ordered = {name: dict(sorted(table[name].items())) for name in sorted(table)}
        TABLE.write_text(json.dumps(ordered, indent=1) + "\n")
