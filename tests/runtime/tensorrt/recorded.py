"""TensorRT's API as the executor calls it, over memory of a recorded driver.

An engine computes what it was built from: the same graph in onnxruntime, on the arrays that it was
bound to; its weights are inputs. Types and enumerations are those of the real module, and so are
the names of methods: what the real classes do not have cannot be called.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto

from infc.codegen.tensorrt.graph import engine_graph, engine_model
from infc.codegen.tensorrt.profiles import input_extents
from infc.ir.artifact import Artifact
from infc.ir.tensorrt_engine import EngineFacts
from infc.ir.text import parse_program

from ..gpu.late_driver import DEVICE, STREAM, LateDriver

trt: Any = pytest.importorskip(
    "tensorrt_rtx", reason="builds engines: pip install 'infc[tensorrt]'"
)

_DTYPES: Final = {
    TensorProto.FLOAT: (trt.DataType.FLOAT, np.float32),
    TensorProto.FLOAT16: (trt.DataType.HALF, np.float16),
    TensorProto.INT64: (trt.DataType.INT64, np.int64),
}
ADA: Final = replace(DEVICE, capability=(8, 9))


@dataclass
class Machine:
    """A GPU with TensorRT. `chip` is its driver's device; what happened is in `calls`."""

    artifact: Artifact
    validity: Any = trt.EngineValidity.VALID
    reads: bool = True
    fails_after: int | None = None
    driver: LateDriver = field(default_factory=lambda: LateDriver(device=ADA))
    calls: list[str] = field(default_factory=list)
    deleted_late: list[bool] = field(default_factory=list)  # of engines: whether without a driver
    __version__: str = trt.__version__

    EngineValidity = trt.EngineValidity
    TensorIOMode = trt.TensorIOMode
    DataType = trt.DataType
    ExecutionContextAllocationStrategy = trt.ExecutionContextAllocationStrategy
    Logger = trt.Logger

    def Runtime(self, log: Any) -> Runtime:
        """What reads engines."""
        return Runtime(self)


class _Checked:
    """Has no method that the class of the real module does not have."""

    REAL: Any = None

    def __init_subclass__(cls) -> None:
        for name in vars(cls):
            if not name.startswith("_") and name != "REAL":
                assert hasattr(cls.REAL, name), f"{cls.REAL.__name__} has no {name}"


class Runtime(_Checked):
    """Reads engines, as `trt.Runtime`."""

    REAL = trt.Runtime

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def get_engine_validity(self, buffer: mmap.mmap) -> tuple[Any, int]:
        return self._machine.validity, 0

    def deserialize_cuda_engine(self, buffer: mmap.mmap) -> Engine | None:
        assert isinstance(buffer, mmap.mmap), "all weights may be in it"
        return Engine(self._machine) if self._machine.reads else None


class Engine(_Checked):
    """An engine, as `trt.ICudaEngine`."""

    REAL = trt.ICudaEngine

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._facts = EngineFacts.parse(machine.artifact.read_text("engine.json"), where="")
        self._program = parse_program(machine.artifact.read_text("program.ir"))
        emitter = engine_graph(self._program)
        model = engine_model(emitter, None)
        graph = model.graph
        self._io: dict[str, Any] = {
            v.name: (trt.TensorIOMode.INPUT, v.type.tensor_type) for v in graph.input
        }
        self._io |= {v.name: (trt.TensorIOMode.OUTPUT, v.type.tensor_type) for v in graph.output}
        assert set(emitter.used) == set(self._facts.weights), "only engines without weights"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        with tempfile.TemporaryDirectory() as place:
            path = Path(place, "model.onnx")
            path.write_bytes(model.SerializeToString())
            self._session = onnxruntime.InferenceSession(
                str(path), options, ["CPUExecutionProvider"]
            )
        self.num_io_tensors = len(self._io)
        self.device_memory_size_v2 = 4096

    num_io_tensors = 0
    device_memory_size_v2 = 0

    def get_tensor_name(self, index: int) -> str:
        return [*self._io][index]

    def get_tensor_mode(self, name: str) -> Any:
        return self._io[name][0]

    def get_tensor_dtype(self, name: str) -> Any:
        return _DTYPES[self._io[name][1].elem_type][0]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return name.replace("kv_out.", "kv.") if name.startswith("kv_out.") else None

    def __del__(self) -> None:
        self._machine.deleted_late.append(self._machine.driver.is_closed)

    def create_execution_context(self, strategy: Any) -> Context:
        assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self, self._machine)

    def _extents(self, profile: int, name: str, shape: tuple[int, ...]) -> Any:
        longest = self._program.spec.max_context
        kind = name.partition(".")[0]
        return input_extents(self._facts.profiles[profile], kind, shape, longest)

    def _declared(self, name: str) -> tuple[int, ...]:
        dims = self._io[name][1].shape.dim
        return tuple(-1 if dim.dim_param else dim.dim_value for dim in dims)

    def _compute(self, bound: Mapping[str, tuple[tuple[int, ...], int]]) -> None:
        """Run the graph on the memory that a context was bound to."""
        memory = self._machine.driver.memory
        feeds: dict[str, Any] = {}
        for name, (shape, address) in bound.items():
            mode, kind = self._io[name]
            if mode == trt.TensorIOMode.INPUT:
                dtype = _DTYPES[kind.elem_type][1]
                count = int(np.prod(shape))
                feeds[name] = memory.array(address, count, dtype).reshape(shape).copy()
        names = [value.name for value in self._session.get_outputs()]
        for name, array in zip(names, self._session.run(names, feeds), strict=True):
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            memory.view(bound[name][1], raw.nbytes)[...] = raw


class Context(_Checked):
    """An execution context, as `trt.IExecutionContext`."""

    REAL = trt.IExecutionContext

    def __init__(self, engine: Engine, machine: Machine) -> None:
        self._engine, self._machine = engine, machine
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: int | None = None

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0 and size >= self._engine.device_memory_size_v2
        self._memory = memory

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == STREAM
        self._profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None
        extents = self._engine._extents(self._profile, name, self._engine._declared(name))
        if extents is not None:
            least, _, most = extents
            fits = zip(least, shape, most, strict=True)
            assert all(low <= size <= high for low, size, high in fits), (name, shape, extents)
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0, name
        self._addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return stream == STREAM

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM and self._memory is not None
        machine = self._machine
        machine.calls.append(f"enqueue {self._profile}")
        if machine.fails_after is not None:
            machine.fails_after -= 1
            if machine.fails_after < 0:
                return False
        bound = {}
        for name in self._engine._io:
            shape = self._shapes.get(name, self._engine._declared(name))
            bound[name] = (shape, self._addresses[name])
        machine.driver._ask("enqueue", lambda: self._engine._compute(bound))
        return True
