"""Executes steps by interpreting the program with torch: slow, right, always there."""

from __future__ import annotations

import numpy as np

from ...ir.artifact import Artifact
from ...ir.interpret import Interpreter, WeightSource
from ...ir.paged_state import PagedState
from ...ir.program import Program, hidden_width
from ...ir.safetensors import MappedSafetensors
from ...ir.step_facts import check_step_facts, step_facts
from ...ir.torch_types import to_torch
from ..scheduling.step import Step
from .base import HOST, ExecutorConfig, Finished, WeightPlacement, check_hidden, head_output
from .weight_memory import open_artifact_weights


class ReferenceExecutor:
    """Runs steps of a lowered program on the meanings of its ops."""

    depth = 0

    def __init__(self, program: Program, weights: WeightSource, config: ExecutorConfig) -> None:
        self._program = program
        self._groups = program.resources
        self._hidden_width = hidden_width(program)
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
        manifest = artifact.manifest
        names = manifest.main.weights.tensors
        text = artifact.read_text(manifest.main.entry.file)
        program = parse_program(text, source=str(artifact.entry_path))
        # What is copied beside the steps has no tensors; reading all of it first is as safe.
        placement: WeightPlacement = "mapped" if config.weights == "mapped" else "loaded"
        weights = open_artifact_weights(artifact, placement)
        assert isinstance(weights, MappedSafetensors)
        kinds = [(name, program.weights[name].type) for name in names if name in program.weights]
        check_step_facts(
            step_facts(program, kinds), manifest.main, weights.entries, where=str(artifact.path)
        )
        return cls(program, weights.tensor, config)

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
        # The program wants at least one row; a chunk inside a prompt asks for none.
        wanted = step.logits_index if len(step.logits_index) else np.zeros(1, np.int32)
        arrays = {
            "input_ids": step.token_ids,
            "positions": step.positions,
            "logits_index": wanted,
        }
        inputs = {
            value.name: torch.from_numpy(arrays[value.name]).to(to_torch(value.type.dtype))
            for value in self._program.inputs
        }
        rows = len(step.logits_index)
        check_hidden(step, self._hidden_width)
        results = self._interpreter.run(inputs)
        logits = results[0].float().numpy()[:rows]
        hidden = results[1].float().numpy()[:rows] if step.wants_hidden else None
        return Finished(head_output(step, logits, hidden))

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
