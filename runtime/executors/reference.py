"""Executes steps by interpreting the program with torch: slow, right, always there."""

from __future__ import annotations

import numpy as np

from ...ir.artifact import Artifact
from ...ir.interpret import Interpreter, WeightSource
from ...ir.manifest import CompiledProgram
from ...ir.paged_state import PagedState
from ...ir.program import HIDDEN, LOGITS, Program, hidden_width, vocabulary_size
from ...ir.step_facts import check_step_facts, step_facts
from ...ir.torch_types import to_torch
from ..scheduling.step import Step
from .base import (
    HOST,
    ExecutorConfig,
    Finished,
    WeightPlacement,
    check_draws,
    check_hidden,
    check_rows,
    head_output,
)
from .further import FurtherArrays, shape_of
from .program_weights import ProgramWeights


class ReferenceExecutor:
    """Runs steps of a lowered program on the meanings of its ops."""

    depth = 0

    def __init__(
        self,
        program: Program,
        compiled: CompiledProgram,
        weights: WeightSource,
        config: ExecutorConfig,
    ) -> None:
        self._program = program
        self._groups = program.resources
        self._hidden_width = hidden_width(program)
        self._vocab_size = vocabulary_size(program)
        self._compiled = compiled
        self._further = FurtherArrays(compiled)
        self._outputs = self._further.outputs
        self._state = PagedState.allocate((), 0)
        for group, count in zip(self._groups, config.num_blocks, strict=True):
            self._state.add(group, count)
        self._interpreter = Interpreter(program, weights, self._state)

    @classmethod
    def open(cls, artifact: Artifact, config: ExecutorConfig) -> ReferenceExecutor:
        """The executor of an artifact compiled with the backend `reference`."""
        import torch

        from ...ir.text import parse_program

        torch.set_num_threads(config.num_threads)
        compiled = artifact.manifest.program(config.program)
        names = compiled.weights.tensors
        text = artifact.read_text(compiled.entry.file)
        program = parse_program(text, source=str(artifact.path / compiled.entry.file))
        # What is copied beside the steps has no tensors; reading all of it first is as safe.
        placement: WeightPlacement = "mapped" if config.weights == "mapped" else "loaded"
        weights = ProgramWeights(artifact, compiled, placement)
        kinds = [(name, program.weights[name].type) for name in names if name in program.weights]
        check_step_facts(
            step_facts(program, kinds), compiled, weights.entries, where=str(artifact.path)
        )
        return cls(program, compiled, weights.tensor, config)

    def launch(self, step: Step) -> Finished:
        """Compute the step; see `Executor.launch`."""
        import torch

        state = self._state
        names = [group.name for group in self._groups]
        state.set_step(
            torch.from_numpy(step.positions),
            torch.from_numpy(step.query_starts),
            torch.from_numpy(step.context_lengths),
            dict(zip(names, map(torch.from_numpy, step.block_tables), strict=True)),
        )
        state.slots = dict(zip(names, map(torch.from_numpy, step.slots), strict=True))
        self._copy_blocks(step)
        has_further = self._further.any or bool(step.inputs)
        sizes = self._further.sizes(step) if has_further else {}
        rows = len(step.logits_index)
        # The program wants at least one row; a chunk inside a prompt asks for none.
        wanted = step.logits_index if rows or step.inputs else np.zeros(1, np.int32)
        arrays = {
            **step.inputs,
            "input_ids": step.token_ids,
            "positions": step.positions,
            "logits_index": wanted,
        }
        inputs = {
            value.name: torch.from_numpy(arrays[value.name]).to(to_torch(value.type.dtype))
            for value in self._program.inputs
        }
        check_hidden(step, self._hidden_width)
        check_draws(step, self._vocab_size)
        check_rows(step, self._compiled.logits_of_tokens)
        results = dict(
            zip(self._program.named_outputs(), self._interpreter.run(inputs), strict=True)
        )
        logits, hidden = np.empty((rows, 0), np.float32), None
        if LOGITS in results:
            logits = results[LOGITS].float().numpy()[:rows]
        if step.wants_hidden:
            hidden = results[HIDDEN].float().numpy()[:rows]
        output = head_output(step, logits, hidden)
        wholes = {name: results[name].to(to_torch(k.dtype)) for name, k in self._outputs.items()}
        output.others = {
            name: whole.numpy()[tuple(map(slice, shape_of(self._outputs[name], sizes)))]
            for name, whole in wholes.items()
        }
        return Finished(output)

    def touched_bytes(self) -> dict[str, int]:
        """The KV cache, which torch fills with zeros at once; weights are counted as untouched."""
        return {HOST: self._state.num_bytes}

    def close(self) -> None:
        """Give the memory back."""
        self._state.clear()

    def _copy_blocks(self, step: Step) -> None:
        for group, copies in zip(self._groups, step.block_copies, strict=True):
            for source, destination in copies.tolist():
                for layer in group.layers:
                    self._state.copy_block(layer, source, destination)
