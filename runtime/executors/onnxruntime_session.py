"""Opens models in ONNX, once it is known that they are those of the artifact and whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, Final

import numpy as np
import onnxruntime

from ...ir.artifact import Artifact
from ...ir.errors import ArtifactError, CheckpointError
from ...ir.manifest import CompiledProgram
from ...ir.onnx_session import SessionSettings, check_version, json_object
from ...ir.safetensors import Entry, read_header
from ...ir.shapes import parse_type
from ...ir.step_facts import check_step_facts
from .onnxruntime_pools import Pools

ARRAYS: Final[Mapping[str, Any]] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
}
"""What holds the inputs of a step in numpy, by their types in ONNX."""

_FLOAT: Final = frozenset({"tensor(float)"})
_WHOLE: Final = frozenset({"tensor(int64)", "tensor(int32)"})
_GIVEN: Final = _WHOLE | {"tensor(int8)", "tensor(uint8)", "tensor(bool)"}

_Fitting = tuple[frozenset[str], tuple[int | None, ...]]
"""Types in ONNX, and dimensions: None for one that differs from step to step."""

_NO_FACTS: Final = {"kv": None, "weights": None, "vocab_size": None, "hidden_width": None}
"""Those of a model that has none: nothing agrees with them."""


def open_session(artifact: Artifact, compiled: CompiledProgram, num_threads: int) -> Any:
    """The session of a program, once its model and file of weights are known to fit.

    ArtifactError where they do not, or others could change the weights under the steps;
    ToolchainError for an onnxruntime that is too old.
    """
    name = str(PurePosixPath(compiled.entry.file).with_name("session.json"))
    settings = SessionSettings.parse(artifact.read_text(name), where=str(artifact.path / name))
    check_version(onnxruntime.__version__, settings.oldest, "this model")
    entries = _entries(artifact, compiled)
    if not artifact.weights_are_ours():
        raise ArtifactError(
            "the weight file belongs to another user or is writable by others, and onnxruntime"
            " maps it",
            where=str(artifact.path),
            hint="copy the artifact to a directory of yours (cp -r), or chmod go-w its files if"
            " they are yours",
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it says of an error is in ours
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # Threads wait for the next op of a step by spinning: to wake them takes about as long as an op
    # of a short step. Between steps they would take the processors of whoever else works.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    path = artifact.path / compiled.entry.file
    for key, value in settings.config.items():
        options.add_session_config_entry(key, value)
    artifact.check_in_place(compiled.entry.file)
    try:
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has classes of its own for each kind
        raise ArtifactError(
            f"onnxruntime {onnxruntime.__version__} cannot open the model: {one_line(error)}",
            where=str(path),
            hint="compile the model again",
        ) from error
    for name in (compiled.entry.file, compiled.weights.file):
        artifact.check_in_place(name)
    text = session.get_modelmeta().custom_metadata_map.get("infc.facts", "{}")
    facts = json_object(text, where=str(path))
    check_step_facts({**_NO_FACTS, **facts}, compiled, entries, where=str(path))
    return session


def check_interface(session: Any, compiled: CompiledProgram, pools: Pools, *, where: str) -> None:
    """ArtifactError where a session takes or gives other arrays than its steps do."""
    stored = {
        name: (frozenset({kind}), (None, *array.shape[1:]))
        for name, kind, array in pools.described()
    }
    takes: dict[str, _Fitting] = {f"kv.{name}": one for name, one in stored.items()}
    takes |= {name: (frozenset({kind}), dims) for name, (kind, dims) in pools.takes().items()}
    gives: dict[str, _Fitting] = {f"kv_out.{name}": one for name, one in stored.items()}
    for side, types, whole in ((takes, compiled.inputs, _WHOLE), (gives, compiled.outputs, _GIVEN)):
        for name, text in types.items():
            kind = parse_type(text)
            dims = tuple(dim if isinstance(dim, int) else None for dim in kind.shape)
            side[name] = (_FLOAT if kind.dtype.is_float else whole, dims)
    _check_side("input", session.get_inputs(), takes, where)
    _check_side("output", session.get_outputs(), gives, where)


def _check_side(
    what: str, found: Iterable[Any], expected: Mapping[str, _Fitting], where: str
) -> None:
    by_name = {one.name: one for one in found}
    problem = ""
    if differing := sorted(by_name.keys() ^ expected.keys()):
        is_there = differing[0] in by_name
        problem = f"it has the {what} {differing[0]}" if is_there else f"no {what} {differing[0]}"
    for name in () if problem else expected:
        one, (kinds, dims) = by_name[name], expected[name]
        sizes = tuple(size if isinstance(size, int) else None for size in one.shape)
        if one.type not in kinds or sizes != dims:
            problem = f"its {what} {name} is {one.type}{list(one.shape)}"
            break
    if problem:
        raise ArtifactError(
            f"the model is not that of a step: {problem}",
            where=where,
            hint="the artifact is damaged: compile it again",
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


def one_line(error: Exception) -> str:
    """The text of an error of onnxruntime, short."""
    return " ".join(str(error).split())[:300]
