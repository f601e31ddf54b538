"""A backend as a plug-in brings it: a test installs this file as the package `infc_toy`.

It interprets programs as the backend `reference` does, and says another token than the model: the
one that is `toy.shift` further in the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from infc.codegen.base import WEIGHTS_FILE, Backend, Emission, EmitOptions, Verdict
from infc.codegen.weights_file import write_weights
from infc.ir.artifact import Artifact
from infc.ir.backends import BackendInfo, register_backend
from infc.ir.program import Node, Program
from infc.ir.targets import Target
from infc.ir.text import print_program
from infc.passes.base import Pass, PassContext, PassResult
from infc.passes.registry import register_pass
from infc.runtime.executors.base import ExecutorConfig, Finished, Running
from infc.runtime.scheduling.step import Step

CODE = "toy/step.txt"


@dataclass(frozen=True)
class ToyOptions:
    """The section `toy` of a recipe."""

    shift: int = field(default=0, metadata={"doc": "How far a token is from the model's."})


@dataclass(frozen=True)
class ToyCount(Pass):
    """`program {...}` => `program { attr {toy_nodes = 12} ...}`: what the backend plans."""

    name: ClassVar[str] = "toy-count"
    phase: ClassVar[str] = "plan"

    def run(self, program: Program, context: PassContext) -> PassResult:
        counted = {**program.attrs, "toy_nodes": len(program.nodes)}
        return PassResult(replace(program, attrs=counted), 1)


class ToyBackend(Backend):
    """Writes the program's text, and the shift on top of it."""

    name: ClassVar[str] = "toy"

    def __init__(self, options: ToyOptions) -> None:
        self._options = options

    def supports(self, node: Node, program: Program, target: Target) -> Verdict:
        return Verdict.yes()

    def plan_passes(self, target: Target) -> str:
        return "toy-count"

    def emit(
        self, program: Program, target: Target, directory: Path, options: EmitOptions
    ) -> Emission:
        used = dict.fromkeys(ref.name for node in program.nodes for ref in node.weights())
        weights = tuple(program.weights[name] for name in used)
        write_weights(program, weights, directory / WEIGHTS_FILE, options)
        (directory / CODE).parent.mkdir()
        text = f"# shift {self._options.shift}\n{print_program(program)}"
        (directory / CODE).write_text(text, encoding="utf-8")
        return Emission({"kind": "toy-text", "file": CODE}, weights)


class ToyExecutor:
    """Runs the text, and moves what it draws."""

    depth = 0

    def __init__(self, artifact: Artifact, config: ExecutorConfig) -> None:
        from infc.runtime.executors.reference import ReferenceExecutor

        first = artifact.read_text(artifact.manifest.main.entry.file).partition("\n")[0]
        self._shift = int(first.removeprefix("# shift "))
        self._vocab_size = artifact.manifest.model.vocab_size
        self._inner = ReferenceExecutor.open(artifact, config)

    def launch(self, step: Step) -> Running:
        output = self._inner.launch(step).result()
        moved = (output.tokens + np.int32(self._shift)) % np.int32(self._vocab_size)
        return Finished(replace(output, tokens=moved))

    def close(self) -> None:
        self._inner.close()


def register() -> None:
    """What the entry point names."""
    register_pass(ToyCount)
    register_backend(
        BackendInfo(
            name="toy",
            compiler="infc_toy:ToyBackend",
            executor="infc_toy:ToyExecutor",
            entry="toy-text",
            section="infc_toy:ToyOptions",
        )
    )
