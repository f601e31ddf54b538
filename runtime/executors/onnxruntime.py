"""Runs steps of models in ONNX with onnxruntime; keys and values are written in place."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ...ir.artifact import Artifact
from ...ir.errors import ArtifactError, CheckpointError, InfcError, ToolchainError
from ...ir.manifest import CompiledProgram
from ...ir.program import HIDDEN, LOGITS
from ...ir.resources import KvGroup
from ...ir.safetensors import Entry, read_header
from ...ir.step_facts import check_step_facts
from ..scheduling.step import Array, Step, StepOutput
from .base import HOST, ExecutorConfig, Finished, check_draws, check_hidden, check_rows, head_output
from .further import FurtherArrays, shape_of
from .onnxruntime_feeds import program_inputs
from .onnxruntime_pools import open_pools

_ARRAYS: Final = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
_STORED: Final = "kv."
_STATE: Final = "kv_out."

_NO_FACTS: Final = {"kv": None, "weights": None, "vocab_size": None, "hidden_width": None}
"""Those of a model that has none: nothing agrees with them."""


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
        groups = [one for one in self._compiled.resources if isinstance(one, KvGroup)]
        self._pools = open_pools(form, groups, config.num_blocks, str(artifact.path))
        self._inputs = {
            one.name: _ARRAYS[one.type]
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
        """The KV cache, which is filled with zeros at once; weights are counted as untouched."""
        return {HOST: self._pools.num_bytes}

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
            raise InfcError(f"onnxruntime failed in a step: {_one_line(error)}") from error
        outputs = self._binding.get_outputs()[len(self._pools.arrays) :]
        return {name: one.numpy() for name, one in zip(self._results, outputs, strict=True)}


def open_session(artifact: Artifact, compiled: CompiledProgram, num_threads: int) -> Any:
    """The session of a program, once its model and file of weights are known to fit.

    ArtifactError where they do not, or others could change the weights under the steps;
    ToolchainError for an onnxruntime that is too old.
    """
    settings = _settings(artifact, compiled)
    _check_version(settings["onnxruntime"])
    entries = _entries(artifact, compiled)
    if not artifact.weights_are_ours():
        raise ArtifactError(
            "the weight file belongs to another user or is writable by others, and onnxruntime"
            " maps it",
            where=str(artifact.path),
            hint="copy the artifact to a directory of yours (cp -r)",
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it says of an error is in ours
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # Threads that wait by spinning take the processors of whoever else works between steps.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    path = artifact.path / compiled.entry.file
    for key, value in settings["config"].items():
        options.add_session_config_entry(key, value)
    artifact.check_in_place(compiled.entry.file)
    try:
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has classes of its own for each kind
        raise ArtifactError(
            f"onnxruntime {onnxruntime.__version__} cannot open the model: {_one_line(error)}",
            where=str(path),
            hint="compile the model again",
        ) from error
    for name in (compiled.entry.file, compiled.weights.file):
        artifact.check_in_place(name)
    facts = json.loads(session.get_modelmeta().custom_metadata_map.get("infc.facts", "{}"))
    check_step_facts({**_NO_FACTS, **facts}, compiled, entries, where=str(path))
    return session


def _settings(artifact: Artifact, compiled: CompiledProgram) -> dict[str, Any]:
    """What the session is to be told, which lies beside the model."""
    name = str(PurePosixPath(compiled.entry.file).with_name("session.json"))
    settings: dict[str, Any] = json.loads(artifact.read_text(name))
    return settings


def _check_version(oldest: str) -> None:
    found, needed = (
        [int(part) for part in re.findall(r"\d+", text)[:2]]
        for text in (onnxruntime.__version__, oldest)
    )
    if found < needed:
        raise ToolchainError(
            f"onnxruntime {onnxruntime.__version__} is too old, this model needs {oldest} or later",
            hint=f"pip install 'onnxruntime>={oldest}'",
        )


def _entries(artifact: Artifact, compiled: CompiledProgram) -> Mapping[str, Entry]:
    """What is in the file of weights; ArtifactError where it is not whole.

    onnxruntime itself only says that an assertion failed.
    """
    name = compiled.weights.file
    handle = artifact.open_file(name)
    try:
        return read_header(artifact.path / name, handle)[0]
    except CheckpointError as error:
        raise ArtifactError(
            f"the weights of the model cannot be read: {error.message}",
            where=str(artifact.path / name),
            hint="the artifact is damaged: compile it again",
        ) from error
    finally:
        os.close(handle)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
