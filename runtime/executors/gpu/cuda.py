"""A GPU through NVIDIA's driver, with `cuda-bindings` alone: neither torch nor triton is needed."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from ....ir.errors import CapacityError, DeviceError
from ....ir.nvidia import Bindings, gpu_of, load_bindings
from ....ir.sizes import format_size
from .driver import Bytes, Device, Function, MatrixMap

_USUAL_SHARED_BYTES: Final = 48 << 10
"""Dynamic shared memory that a kernel has without asking for more."""
_MOST_PARAMETER_BYTES: Final = 32764
_BUFFER_POINTER, _BUFFER_SIZE = 1, 2
"""What `extra` calls the buffer of parameters and its size (CU_LAUNCH_PARAM_BUFFER_...)."""

MAP_BYTES: Final = 128
"""Of a CUtensorMap, and what its address is a multiple of."""
ENCODE_TILED: Final = b"cuTensorMapEncodeTiled"
_ENCODE_TILED_SINCE: Final = 12000
EncodeTiled = ctypes.CFUNCTYPE(
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p),
    *[ctypes.POINTER(ctypes.c_uint64)] * 2,
    *[ctypes.POINTER(ctypes.c_uint32)] * 2,
    *[ctypes.c_int] * 4,
)
"""CUresult of a descriptor, type, rank, address, sizes, strides, box, element strides, and the
enumerations of interleaving, swizzle, promotion to L2 and fill."""
_MAP_TYPES: Final = {
    "bf16": "BFLOAT16",
    "f16": "FLOAT16",
    "f32": "FLOAT32",
    "i8": "UINT8",
    "u8": "UINT8",
    "i32": "INT32",
}
_DEPENDENT_IN_GRAPHS: Final = (12, 3)
"""The first CUDA whose graphs have edges of dependent launches. They are right without them."""
_SIZES: Final = {"bf16": 2, "f16": 2, "f32": 4, "i8": 1, "u8": 1, "i32": 4}


class _Event:
    """An event of the driver, which another takes once nobody holds this one."""

    __slots__ = ("_free", "handle")

    def __init__(self, handle: Any, free: list[Any]) -> None:
        self.handle, self._free = handle, free

    def __del__(self) -> None:
        self._free.append(self.handle)


class _Graph:
    """A graph that can be launched; it goes where nobody holds it."""

    __slots__ = ("_calls", "handle")

    def __init__(self, handle: Any, calls: Any) -> None:
        self.handle, self._calls = handle, calls

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._calls.cuGraphExecDestroy(self.handle)


class CudaDriver:
    """One GPU, by its index among those that CUDA_VISIBLE_DEVICES leaves; see `Driver`.

    DeviceError where there is none, or no driver, or one that is too old.
    """

    def __init__(self, index: int = 0, bindings: Bindings | None = None) -> None:
        self._bindings = load_bindings() if bindings is None else bindings
        calls = self._calls = self._bindings.calls
        self._handle, gpu = gpu_of(self._bindings, index)
        self._local = threading.local()
        self._addresses: set[int] = set()
        self._pinned: set[int] = set()
        self._libraries: dict[bytes, Any] = {}
        self._encode_map: Callable[..., int] | None = None
        self._events: list[Any] = []
        self._timed_events: list[Any] = []
        self._all_events: list[Any] = []
        self._stream: Any = None
        self._context: Any = self._ask(
            f"{gpu.name} cannot be used", calls.cuDevicePrimaryCtxRetain(self._handle)
        )
        try:
            self._enter()
            flags = calls.CUstream_flags.CU_STREAM_NON_BLOCKING
            self._stream = self._ask("a stream", calls.cuStreamCreate(flags))
            free, total = self._ask("free memory", calls.cuMemGetInfo())
            names = calls.CUdevice_attribute
            shared = names.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            processors = names.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
            self.device = Device(
                name=gpu.name,
                capability=gpu.capability,
                memory_bytes=int(total),
                free_bytes=int(free),
                shared_bytes=self._attribute(shared),
                num_processors=self._attribute(processors),
                driver_version=self._bindings.driver_version,
            )
        except BaseException:
            self.close()
            raise
        # The driver copies parameters while it is called, so one buffer serves all launches.
        self._parameters = ctypes.create_string_buffer(_MOST_PARAMETER_BYTES)
        self._num_bytes = ctypes.c_size_t(0)
        self._extra = (ctypes.c_void_p * 5)(
            *(_BUFFER_POINTER, ctypes.addressof(self._parameters)),
            *(_BUFFER_SIZE, ctypes.addressof(self._num_bytes), 0),
        )
        self._extra_address = ctypes.addressof(self._extra)

    def _ask(self, what: str, result: tuple[Any, ...]) -> Any:
        return self._bindings.ask(what, result)

    def _do(self, what: str, result: tuple[Any, ...]) -> None:
        if result[0] != 0:
            raise self._bindings.error(what, result[0])

    def _attribute(self, which: Any) -> int:
        return int(self._ask("an attribute", self._calls.cuDeviceGetAttribute(which, self._handle)))

    def _enter(self) -> None:
        """Let the calling thread use the context, which each has to be told once."""
        if not getattr(self._local, "is_entered", False):
            if self._context is None:
                raise DeviceError("the GPU was given back")
            self._do("the context", self._calls.cuCtxSetCurrent(self._context))
            self._local.is_entered = True

    @property
    def stream(self) -> int:
        """See `Driver.stream`."""
        self._enter()
        return int(self._stream)

    # Kernels

    def load(
        self, image: bytes, source: str, entry: str, threads: int, shared_bytes: int
    ) -> Function:
        """See `Driver.load`; DeviceError where the GPU cannot run the code."""
        self._enter()
        if shared_bytes > self.device.shared_bytes:
            raise DeviceError(
                f"the kernel {entry} takes {format_size(shared_bytes)} of shared memory, and a"
                f" block of {self.device.name} has {format_size(self.device.shared_bytes)}"
            )
        calls, what = self._calls, f"the kernel {entry} cannot be loaded"
        library = self._libraries.get(image)
        if library is None:
            loaded = calls.cuLibraryLoadData(image, [], [], 0, [], [], 0)
            library = self._libraries[image] = self._ask(what, loaded)
        kernel = self._ask(what, calls.cuLibraryGetKernel(library, entry.encode()))
        handle = self._ask(what, calls.cuKernelGetFunction(kernel))
        if shared_bytes > _USUAL_SHARED_BYTES:
            name = calls.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._do(what, calls.cuFuncSetAttribute(handle, name, shared_bytes))
        # Drivers load code when it is first launched, which must not be while a graph is captured.
        with contextlib.suppress(RuntimeError):  # drivers before 12.4 have no such function
            self._do(what, calls.cuFuncLoad(handle))
        return Function(entry, handle, threads, shared_bytes)

    def launch(
        self, function: Function, grid: Sequence[int], parameters: bytes, *, dependent: bool = False
    ) -> None:
        """See `Driver.launch`."""
        self._enter()
        calls, size = self._calls, len(parameters)
        ctypes.memmove(self._parameters, parameters, size)
        self._num_bytes.value = size
        x, y, z = (*grid, 1, 1)[:3]
        if dependent and self.device.driver_version >= _DEPENDENT_IN_GRAPHS:
            config = self._dependent_config(function, (x, y, z))
            result = calls.cuLaunchKernelEx(config, function.handle, 0, self._extra_address)
        else:
            result = calls.cuLaunchKernel(
                *(function.handle, x, y, z, function.threads, 1, 1, function.shared_bytes),
                *(self._stream, 0, self._extra_address),
            )
        if result[0] != 0:
            raise self._bindings.error(f"the kernel {function.entry} cannot be launched", result[0])

    def _dependent_config(self, function: Function, grid: tuple[int, int, int]) -> Any:
        calls = self._calls
        attribute = calls.CUlaunchAttribute()
        names = calls.CUlaunchAttributeID
        attribute.id = names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = calls.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = function.threads, 1, 1
        config.sharedMemBytes = function.shared_bytes
        config.hStream = self._stream
        config.attrs, config.numAttrs = [attribute], 1
        return config

    def descriptor(self, matrix: MatrixMap) -> bytes:
        """See `Driver.descriptor`; the driver wants the innermost dimension first."""
        calls, rank = self._calls, len(matrix.shape)
        sizes = list(reversed(matrix.shape))
        strides, stride = [], _SIZES[matrix.dtype]
        for size in sizes[:-1]:
            stride *= size
            strides.append(stride)
        swizzle = "NONE" if matrix.swizzle_bytes == 0 else f"{matrix.swizzle_bytes}B"
        kind = f"CU_TENSOR_MAP_DATA_TYPE_{_MAP_TYPES[matrix.dtype]}"
        room = ctypes.create_string_buffer(2 * MAP_BYTES)
        start = -ctypes.addressof(room) % MAP_BYTES
        code = self._map_encoder()(
            ctypes.addressof(room) + start,
            int(getattr(calls.CUtensorMapDataType, kind)),
            rank,
            matrix.address,
            (ctypes.c_uint64 * rank)(*sizes),
            (ctypes.c_uint64 * rank)(*strides),
            (ctypes.c_uint32 * rank)(*reversed(matrix.box)),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            int(calls.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE),
            int(getattr(calls.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{swizzle}")),
            int(calls.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B),
            int(calls.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        )
        if code != 0:
            what = f"a descriptor of {matrix.shape} {matrix.dtype} at {matrix.address:#x}"
            raise self._bindings.error(what, calls.CUresult(code))
        return room.raw[start : start + MAP_BYTES]

    def _map_encoder(self) -> Callable[..., int]:
        """The driver's cuTensorMapEncodeTiled.

        It wants the descriptor at a multiple of its size, and cuda-bindings gives it one within a
        Python object, which lies at a multiple of 16.
        """
        if self._encode_map is None:
            found = self._ask(
                "the driver has no descriptors for the tensor memory accelerator",
                self._calls.cuGetProcAddress(ENCODE_TILED, _ENCODE_TILED_SINCE, 0),
            )
            self._encode_map = EncodeTiled(int(found[0]))
        return self._encode_map

    # Graphs

    def begin_capture(self) -> None:
        """See `Driver.begin_capture`: other threads may go on with what a capture forbids."""
        self._enter()
        mode = self._calls.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._do("a capture cannot begin", self._calls.cuStreamBeginCapture(self._stream, mode))

    def end_capture(self) -> object:
        """See `Driver.end_capture`."""
        self._enter()
        calls = self._calls
        graph = self._ask("a capture cannot end", calls.cuStreamEndCapture(self._stream))
        try:
            made = self._ask("a graph cannot be made", calls.cuGraphInstantiate(graph, 0))
        finally:
            calls.cuGraphDestroy(graph)
        return _Graph(made, calls)

    def replay(self, graph: object) -> None:
        """See `Driver.replay`."""
        assert isinstance(graph, _Graph)
        self._enter()
        self._do(
            "a graph cannot be launched", self._calls.cuGraphLaunch(graph.handle, self._stream)
        )

    # Memory

    def allocate(self, num_bytes: int, name: str) -> int:
        """See `Driver.allocate`."""
        self._enter()
        calls = self._calls
        result = calls.cuMemAlloc(max(1, num_bytes))
        if result[0] == calls.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free, _ = self._ask("free memory", calls.cuMemGetInfo())
            raise CapacityError(
                f"{self.device.name} has {format_size(int(free))} of memory free, and {name} take"
                f" {format_size(num_bytes)}",
                hint="lower kv_memory, or end what else uses the GPU",
            )
        address = int(self._ask(f"memory for {name}", result))
        self._addresses.add(address)
        return address

    def free(self, address: int) -> None:
        """See `Driver.free`."""
        self._enter()
        self._addresses.discard(address)
        self._do("memory cannot be given back", self._calls.cuMemFree(address))

    def host_array(self, num_bytes: int) -> Bytes:
        """See `Driver.host_array`."""
        self._enter()
        size = max(1, num_bytes)
        result = self._calls.cuMemHostAlloc(size, 0)
        if result[0] == self._calls.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise CapacityError(f"the host has no {format_size(size)} of pinned memory")
        address = int(self._ask("pinned memory", result))
        self._pinned.add(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))[:num_bytes]

    def free_host_array(self, array: Bytes) -> None:
        """See `Driver.free_host_array`."""
        self.synchronize()
        address = int(array.ctypes.data)
        self._pinned.remove(address)
        self._do("pinned memory cannot be given back", self._calls.cuMemFreeHost(address))

    def upload(self, address: int, source: Bytes) -> None:
        """See `Driver.upload`."""
        if len(source):
            self._enter()
            place = source.ctypes.data
            copied = self._calls.cuMemcpyHtoDAsync(address, place, len(source), self._stream)
            self._do("a copy to the GPU failed", copied)

    def download(self, target: Bytes, address: int) -> None:
        """See `Driver.download`."""
        if len(target):
            self._enter()
            place = target.ctypes.data
            copied = self._calls.cuMemcpyDtoHAsync(place, address, len(target), self._stream)
            self._do("a copy from the GPU failed", copied)

    def fill(self, address: int, num_bytes: int, byte: int) -> None:
        """See `Driver.fill`."""
        self._enter()
        filled = self._calls.cuMemsetD8Async(address, byte, num_bytes, self._stream)
        self._do("memory cannot be filled", filled)

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """See `Driver.copy`."""
        self._enter()
        copied = self._calls.cuMemcpyDtoDAsync(target, source, num_bytes, self._stream)
        self._do("a copy within the GPU failed", copied)

    # Waiting

    def record_event(self, *, timed: bool = False) -> object:
        """See `Driver.record_event`."""
        self._enter()
        calls = self._calls
        free = self._timed_events if timed else self._events
        if free:
            handle = free.pop()
        else:
            kinds = calls.CUevent_flags
            flags = kinds.CU_EVENT_DEFAULT if timed else kinds.CU_EVENT_DISABLE_TIMING
            handle = self._ask("an event", calls.cuEventCreate(flags))
            self._all_events.append(handle)
        self._do("an event cannot be recorded", calls.cuEventRecord(handle, self._stream))
        return _Event(handle, free)

    def seconds_between(self, first: object, second: object) -> float:
        """See `Driver.seconds_between`."""
        assert isinstance(first, _Event) and isinstance(second, _Event)
        self._enter()
        asked = self._calls.cuEventElapsedTime(first.handle, second.handle)
        return float(self._ask("the time between events", asked)) / 1e3

    def has_passed(self, event: object) -> bool:
        """See `Driver.has_passed`."""
        assert isinstance(event, _Event)
        self._enter()
        result = self._calls.cuEventQuery(event.handle)
        if result[0] == self._calls.CUresult.CUDA_ERROR_NOT_READY:
            return False
        self._do("a step failed", result)
        return True

    def wait(self, event: object) -> None:
        """See `Driver.wait`; the bindings let other threads go on meanwhile."""
        assert isinstance(event, _Event)
        self._enter()
        self._do("a step failed", self._calls.cuEventSynchronize(event.handle))

    def synchronize(self) -> None:
        """See `Driver.synchronize`."""
        self._enter()
        self._do("work on the GPU failed", self._calls.cuStreamSynchronize(self._stream))

    def close(self) -> None:
        """See `Driver.close`. A GPU that has failed gives its memory back with the process."""
        if self._context is None:
            return
        calls = self._calls
        with contextlib.suppress(DeviceError):
            self._enter()
        ends = [(calls.cuStreamSynchronize, self._stream)] if self._stream is not None else []
        ends += [(calls.cuEventDestroy, event) for event in self._all_events]
        ends += [(calls.cuLibraryUnload, library) for library in self._libraries.values()]
        ends += [(calls.cuMemFree, address) for address in self._addresses]
        ends += [(calls.cuMemFreeHost, address) for address in self._pinned]
        if self._stream is not None:
            ends.append((calls.cuStreamDestroy, self._stream))
        ends.append((calls.cuDevicePrimaryCtxRelease, self._handle))
        self._context = None
        self._local = threading.local()
        for end, handle in ends:
            end(handle)  # an error here says only that the GPU had failed before
