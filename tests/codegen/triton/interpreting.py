"""Launches by Triton's interpreter, in another process: it and the compiler exclude each other.

The process takes launches whose arguments are places in named arrays, and gives the arrays back.
Each array has a margin on both sides, which nothing may change.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
ROOT = Path(__file__).resolve().parents[3]
MARGIN_BYTES = 512
_MARGIN = 0xA5


@dataclass(frozen=True, slots=True)
class Place:
    """An argument that is an address: bytes into a named array, and Triton's element type."""

    array: str
    offset: int
    type: str


@dataclass(frozen=True, slots=True)
class Matrix:
    """An argument that is a dense matrix of so many rows and columns, of which tiles are copied."""

    place: Place
    shape: tuple[int, int]
    box: tuple[int, int]
    swizzle_bytes: int


@dataclass(frozen=True, slots=True)
class Call:
    """One launch: the kernel's code as `KernelCode.plain` has it, and all that it is given."""

    code: Mapping[str, Any]
    grid: tuple[int, ...]
    arguments: tuple[Place | Matrix | int | float, ...]
    dependent: bool = False


class Interpreting:
    """The process; one runs any number of launches."""

    def __init__(self) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        paths = [str(ROOT / "src"), str(ROOT), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command = [sys.executable, "-m", "tests.codegen.triton.interpreting"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)

    def run(self, calls: Sequence[Call], arrays: Mapping[str, Bytes]) -> dict[str, Bytes]:
        """The arrays after the calls; AssertionError for what failed there."""
        assert self._process.stdin is not None and self._process.stdout is not None
        pickle.dump((list(calls), dict(arrays)), self._process.stdin)
        self._process.stdin.flush()
        result = pickle.load(self._process.stdout)
        assert not isinstance(result, str), result
        assert isinstance(result, dict)
        return result

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _serve() -> None:
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from .mended import mend

    mend()
    while True:
        try:
            calls, arrays = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: object = _run(calls, arrays)
        except Exception:
            import traceback

            answer = traceback.format_exc()
        pickle.dump(answer, results)
        results.flush()


def _run(calls: Sequence[Call], arrays: Mapping[str, Bytes]) -> dict[str, Bytes]:
    import torch

    memory = {}
    for name, data in arrays.items():
        wide = np.full(len(data) + 2 * MARGIN_BYTES, _MARGIN, np.uint8)
        wide[MARGIN_BYTES : MARGIN_BYTES + len(data)] = data
        memory[name] = torch.from_numpy(wide)
    for call in calls:
        if 0 not in call.grid:
            try:
                _launch(call, memory)
            except Exception as error:
                error.add_note(f"in {call.code['function']}: {call.code['source']}")
                raise
    results = {}
    for name, tensor in memory.items():
        whole = tensor.numpy()
        begin, end = whole[:MARGIN_BYTES], whole[-MARGIN_BYTES:]
        assert (begin == _MARGIN).all() and (end == _MARGIN).all(), f"written beside {name}"
        results[name] = whole[MARGIN_BYTES:-MARGIN_BYTES].copy()
    return results


def _launch(call: Call, memory: Mapping[str, Any]) -> None:
    from infc.codegen.triton.loading import load_function

    function = load_function(dict(call.code))
    given: dict[str, Any] = dict(call.code["constants"])
    for (name, kind), value in zip(call.code["parameters"], call.arguments, strict=True):
        match value:
            case Place():
                given[name] = _elements(value, memory)
            case Matrix():
                given[name] = _descriptor(value, kind, memory)
            case _:
                given[name] = value
    function[call.grid](**given)


def _elements(place: Place, memory: Mapping[str, Any]) -> Any:
    """What lies behind an address."""
    import torch

    types = {
        **{"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32},
        **{"fp64": torch.float64, "i1": torch.bool, "i8": torch.int8, "u8": torch.uint8},
        **{"i32": torch.int32, "i64": torch.int64},
    }
    bytes_from = memory[place.array][MARGIN_BYTES + place.offset :]
    kind = types[place.type]
    whole = len(bytes_from) // kind.itemsize * kind.itemsize
    return bytes_from[:whole].view(kind)


def _descriptor(matrix: Matrix, kind: str, memory: Mapping[str, Any]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows, columns = matrix.shape
    whole = _elements(matrix.place, memory)[: rows * columns].view(rows, columns)
    tile = [int(size) for size in kind.partition("[")[2].rstrip("]>").split(",")]
    return TensorDescriptor.from_tensor(whole, tile)


if __name__ == "__main__":
    # As the module that pickled values name.
    from tests.codegen.triton import interpreting

    interpreting._serve()
