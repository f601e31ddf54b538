"""The reference backend: every op by its meaning; slow, right, always there."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from ...ir.program import Node, Program
from ...ir.targets import Target
from ..base import WEIGHTS_FILE, Backend, Emission, EmitOptions, Verdict
from ..weights_file import write_weights


class ReferenceBackend(Backend):
    """Interprets the artifact's program with torch."""

    name: ClassVar[str] = "reference"
    interprets: ClassVar[bool] = True

    def supports(self, node: Node, program: Program, target: Target) -> Verdict:
        """Every op has a meaning."""
        return Verdict.yes()

    def can_multiply(self, dtype: str) -> bool:
        """All of it has a meaning."""
        return True

    def can_cache(self, dtype: str) -> bool:
        """All of it has a meaning."""
        return True

    def emit(
        self, program: Program, target: Target, directory: Path, options: EmitOptions
    ) -> Emission:
        """Write the weights as the program types them; `program.ir` is the code."""
        # In the order of use, as in the program's text: one that was read back emits the same.
        used = dict.fromkeys(ref.name for node in program.nodes for ref in node.weights())
        weights = tuple(program.weights[name] for name in used)
        write_weights(program, weights, directory / WEIGHTS_FILE, options)
        return Emission(
            entry={"kind": "program", "file": "program.ir"},
            weights=weights,
        )
