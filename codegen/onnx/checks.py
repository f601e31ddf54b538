"""What a model is tried with when it is compiled: a checker, types, and a step on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from ...ir.errors import ProgramError
from ...ir.program import LOGITS, Program
from ...ir.types import DType, Sym
from .trial import check_logits
from .types import NUMPY

_TOKENS = 2

_TRIAL: Final[Mapping[str, Any]] = {
    "key_positions": [[0, 1]],
    "row_of_padded": [[0, 1]],
    "padded_of_row": [0, 1],
    "write_at": [0],
    "lengths": [2],
    "key_count": [2],
    "seqlens_k": [1],
    "query_seqlens": [2],
    "total_length": 2,
}
"""What the inputs of a group of caches are in the trial step, without the group's name."""
_NARROW: Final = frozenset({"seqlens_k", "query_seqlens", "total_length"})


def check_model(path: Path, program: Program, expected: NDArray[np.float32] | None = None) -> None:
    """Raises ProgramError where onnx or onnxruntime refuses the model, or its logits are NaN, or
    not those that are expected."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise _refused(program, "onnx", error) from error
    logits = _run_once(path, program)
    if expected is not None and logits is not None:
        check_logits(program, logits, expected)


def _refused(program: Program, what: str, error: Exception) -> ProgramError:
    text = " ".join(str(error).split())
    return ProgramError(
        f"{what} refuses the model that was made: {text[:400]}",
        where=program.name,
        hint="this is a bug of the backend onnx: please report it",
    )


def _run_once(path: Path, program: Program) -> NDArray[Any] | None:
    """The logits of two tokens of one sequence; what no step has written is NaN."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # What is tried once need not be made fast first.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        binding = session.io_binding()
        for value in session.get_inputs():
            array = _array(value.name, list(value.shape), program)
            kind = _element_type(value.type)
            given = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind)
            binding.bind_ortvalue_input(value.name, given)
        names = [value.name for value in session.get_outputs()]
        for name in names:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
    except Exception as error:  # onnxruntime has classes of its own for each kind
        raise _refused(program, "onnxruntime", error) from error
    if LOGITS not in names:
        return None
    logits: NDArray[Any] = binding.get_outputs()[names.index(LOGITS)].numpy()
    if not np.isfinite(logits).all():
        raise _refused(program, "a trial run", ValueError("its logits are not finite"))
    return logits


def _element_type(text: str) -> int:
    """The ONNX type of `tensor(float)` and the like."""
    names = {"float": "FLOAT", "int64": "INT64", "int32": "INT32", "bool": "BOOL", "int8": "INT8"}
    names |= {"float16": "FLOAT16", "bfloat16": "BFLOAT16", "uint8": "UINT8"}
    kind: int = TensorProto.DataType.Value(names[text.removeprefix("tensor(").removesuffix(")")])
    return kind


def _array(name: str, shape: list[Any], program: Program) -> NDArray[Any]:
    """What an input is in the trial step: tokens 0 and 1 of a sequence in block 1."""
    known: dict[str, Any] = {
        "input_ids": [0, 1],
        "positions": [0, 1],
        "logits_index": [_TOKENS - 1],
    }
    if name in ("row_of_padded", "padded_of_row"):
        known[name] = _TRIAL[name]
    if name in known:
        return np.asarray(known[name], np.int64)
    kind, _, rest = name.partition(".")
    for group in program.resources:
        first = group.block_size
        if rest == group.name:
            trial = {"slots": [[first], [first + 1]], "key_slots": [[first, first + 1]], **_TRIAL}
            return np.asarray(trial[kind], np.int32 if kind in _NARROW else np.int64)
        if kind == "kv" and int(rest.partition(".")[0]) in group.layers:
            count = 2 * first if len(shape) == 2 else 1
            sizes = [dim if isinstance(dim, int) else count for dim in shape]
            dtype = DType(group.dtype)
            return np.full(sizes, np.nan, np.float32) if dtype is DType.F32 else _nan_bits(sizes)
    value = next(value for value in program.inputs if value.name == name)
    sizes = [
        dim.evaluate({dim.name: 1}) if isinstance(dim, Sym) else dim for dim in value.type.shape
    ]
    return np.ones(sizes, NUMPY[DType.F32 if value.type.dtype.is_float else value.type.dtype])


def _nan_bits(sizes: list[int]) -> NDArray[np.uint16]:
    """NaN in either type of 16 bits."""
    return np.full(sizes, 0x7FFF, np.uint16)
