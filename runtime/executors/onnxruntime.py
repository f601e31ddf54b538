"""Runs steps of models in ONNX with onnxruntime; keys and values are written in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...ir.artifact import Artifact
from ...ir.errors import InfcError
from ...ir.program import HIDDEN, LOGITS
from ...ir.resources import KvGroup
from ..scheduling.step import Array, Step, StepOutput
from .base import HOST, ExecutorConfig, Finished, check_draws, check_hidden, check_rows, head_output
from .further import FurtherArrays, shape_of
from .onnxruntime_feeds import program_inputs
from .onnxruntime_pools import open_pools
from .onnxruntime_session import ARRAYS, check_interface, one_line, open_session

_STORED: Final = "kv."
_STATE: Final = "kv_out."


class OnnxruntimeExecutor:
    """Runs steps of one program in a session of onnxruntime, on the CPU."""

    depth = 0

    def __init__(self, artifact: Artifact, config: ExecutorConfig) -> None:
        self._compiled = artifact.manifest.program(config.program)
        self._further = FurtherArrays(self._compiled)
        self._groups = tuple(g for g in self._compiled.resources if isinstance(g, KvGroup))
        self._session = open_session(artifact, self._compiled, config.num_threads)
        self._binding = self._session.io_binding()
        form = self._session.get_modelmeta().custom_metadata_map.get("infc.kv", "")
        where = str(artifact.path / self._compiled.entry.file)
        self._pools = open_pools(form, self._groups, config.num_blocks, where)
        check_interface(self._session, self._compiled, self._pools, where=where)
        self._inputs = {
            one.name: ARRAYS[one.type]
            for one in self._session.get_inputs()
            if not one.name.startswith(_STORED)
        }
        names = [one.name for one in self._session.get_outputs()]
        self._results = [name for name in names if not name.startswith(_STATE)]

    def launch(self, step: Step) -> Finished:
        """Compute the step; see `Executor.launch`."""
        compiled = self._compiled
        check_hidden(step, compiled.hidden_width)
        check_draws(step, compiled.vocab_size)
        check_rows(step, compiled.logits_of_tokens)
        has_further = self._further.any or bool(step.inputs)
        sizes = self._further.sizes(step) if has_further else {}
        self._pools.copy(step)
        self._pools.note(step)
        feeds = self._pools.feeds(step, self._binding) | program_inputs(step, compiled.inputs)
        results = self._run(feeds)
        rows = len(step.logits_index)
        logits = results[LOGITS][:rows] if LOGITS in results else np.empty((rows, 0), np.float32)
        hidden = results[HIDDEN][:rows] if step.wants_hidden else None
        output: StepOutput = head_output(step, logits, hidden)
        others: dict[str, Array] = {}
        for name, kind in self._further.outputs.items():
            dtype: Any = np.float32 if kind.dtype.is_float else np.int32
            others[name] = results[name].astype(dtype)[tuple(map(slice, shape_of(kind, sizes)))]
        output.others = others
        return Finished(output)

    def touched_bytes(self) -> dict[str, int]:
        """What steps have written of the KV cache; weights are counted as untouched."""
        return {HOST: self._pools.touched_bytes}

    def close(self) -> None:
        """Give threads and memory back."""
        self.__dict__.pop("_binding", None)
        self.__dict__.pop("_session", None)
        self._pools.clear()

    def _run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the session; the outputs of the program by name."""
        for name, dtype in self._inputs.items():
            array = np.ascontiguousarray(feeds[name], dtype)
            self._binding.bind_cpu_input(name, array)
        for name in self._results:  # anew: what is bound has the shape of the step before
            self._binding.bind_output(name)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime has classes of its own for each kind
            raise InfcError(f"onnxruntime failed in a step: {one_line(error)}") from error
        outputs = self._binding.get_outputs()[len(self._pools.arrays) :]
        return {name: one.numpy() for name, one in zip(self._results, outputs, strict=True)}
