"""NVIDIA GPUs of this machine, as their driver tells of them, and what it reports in words."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any, Final

from .errors import DeviceError
from .extras import CUDA
from .sizes import format_size

_LOST: Final = frozenset(
    {
        "CUDA_ERROR_ILLEGAL_ADDRESS",
        "CUDA_ERROR_MISALIGNED_ADDRESS",
        "CUDA_ERROR_INVALID_PC",
        "CUDA_ERROR_INVALID_ADDRESS_SPACE",
        "CUDA_ERROR_ILLEGAL_INSTRUCTION",
        "CUDA_ERROR_HARDWARE_STACK_ERROR",
        "CUDA_ERROR_LAUNCH_FAILED",
        "CUDA_ERROR_LAUNCH_TIMEOUT",
        "CUDA_ERROR_ASSERT",
        "CUDA_ERROR_ECC_UNCORRECTABLE",
        "CUDA_ERROR_NVLINK_UNCORRECTABLE",
        "CUDA_ERROR_DEVICE_UNAVAILABLE",
        "CUDA_ERROR_CONTEXT_IS_DESTROYED",
        "CUDA_ERROR_CONTAINED",
        "CUDA_ERROR_TENSOR_MEMORY_LEAK",
        "CUDA_ERROR_UNKNOWN",
    }
)
"""After these nothing that the process has on the GPU works any more."""

_HINTS: Final = {
    "CUDA_ERROR_STUB_LIBRARY": "libcuda.so.1 is a stub for linking: remove it from LD_LIBRARY_PATH",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver was updated: restart the machine",
    "CUDA_ERROR_SYSTEM_NOT_READY": "start what the GPUs need, such as nvidia-fabricmanager",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "update the NVIDIA driver",
    "CUDA_ERROR_INVALID_IMAGE": "the artifact is damaged: compile it again",
}
_NO_DRIVER_HINT: Final = "install the driver; a container is given the GPU by docker run --gpus all"


@dataclass(frozen=True, slots=True)
class NvidiaGpu:
    """A GPU as its driver tells of it, without taking any of its memory."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int

    @property
    def target(self) -> str:
        """Its compute capability as targets spell it: sm_90."""
        return "sm_{}{}".format(*self.capability)


@dataclass(frozen=True, slots=True)
class Bindings:
    """The functions of the driver, as `cuda.bindings.driver` has them, and versions of CUDA."""

    calls: Any
    version: str
    driver_version: tuple[int, int]

    def ask(self, what: str, result: tuple[Any, ...]) -> Any:
        """What a call returned beside its error; DeviceError for an error, saying `what` failed."""
        if result[0] != 0:
            raise self.error(what, result[0])
        return result[1] if len(result) == 2 else result[1:]

    def error(self, what: str, code: Any) -> DeviceError:
        """The error that a code stands for, with its name and the driver's text."""
        name, text = (
            _text(self.calls.cuGetErrorName(code)),
            _text(self.calls.cuGetErrorString(code)),
        )
        if name in _LOST:
            return DeviceError(
                f"the GPU failed ({what}): {text} ({name})",
                hint="start the engine again; if it comes back, see dmesg and nvidia-smi",
            )
        return DeviceError(f"{what}: {text} ({name})", hint=_HINTS.get(name))


def _text(result: tuple[Any, ...]) -> str:
    value = result[1] if len(result) > 1 else None
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def load_bindings() -> Bindings:
    """The driver, initialized; DeviceError where it or what calls it is missing or too old."""
    try:
        calls = importlib.import_module("cuda.bindings.driver")
        version = str(importlib.import_module("cuda.bindings").__version__)
    except ImportError:
        raise DeviceError("cuda-bindings is not installed", hint=CUDA.install) from None
    try:
        result = calls.cuInit(0)
    except RuntimeError:  # what the bindings raise where there is no library to load
        raise DeviceError(
            "there is no NVIDIA driver (libcuda.so.1) on this machine", hint=_NO_DRIVER_HINT
        ) from None
    found = Bindings(calls, version, (0, 0))
    if result[0] != 0:
        if _text(calls.cuGetErrorName(result[0])) == "CUDA_ERROR_NO_DEVICE":
            raise DeviceError("the NVIDIA driver finds no GPU", hint=_visible())
        raise found.error("the NVIDIA driver does not start", result[0])
    number = int(found.ask("the version of the driver", calls.cuDriverGetVersion()))
    known = Bindings(calls, version, (number // 1000, number % 1000 // 10))
    if known.driver_version[0] < int(version.split(".")[0]):
        told = "{}.{}".format(*known.driver_version)
        raise DeviceError(
            f"the NVIDIA driver supports CUDA {told}, and cuda-bindings {version} is for"
            f" CUDA {version.split('.')[0]}",
            hint=f"update the driver, or: pip install 'cuda-bindings=={known.driver_version[0]}.*'",
        )
    return known


def _visible() -> str:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return "nvidia-smi lists GPUs; a container is given them by docker run --gpus all"
    return f"CUDA_VISIBLE_DEVICES is {chosen!r}"


def gpu_of(bindings: Bindings, index: int) -> tuple[Any, NvidiaGpu]:
    """The driver's handle of a GPU, and what it is; DeviceError where there is none."""
    calls = bindings.calls
    count = int(bindings.ask("the number of GPUs", calls.cuDeviceGetCount()))
    if index >= count:
        raise DeviceError(
            "the NVIDIA driver finds no GPU" if count == 0 else f"there is no GPU {index}",
            hint=_visible(),
        )
    what = f"GPU {index}"
    device = bindings.ask(what, calls.cuDeviceGet(index))
    attributes = calls.CUdevice_attribute
    major, minor = (
        int(bindings.ask(what, calls.cuDeviceGetAttribute(attribute, device)))
        for attribute in (
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    name = bindings.ask(what, calls.cuDeviceGetName(128, device))
    total = int(bindings.ask(what, calls.cuDeviceTotalMem(device)))
    return device, NvidiaGpu(name.split(b"\0")[0].decode(errors="replace"), (major, minor), total)


def find_gpu() -> tuple[NvidiaGpu, Bindings]:
    """The first GPU that this process may use; DeviceError, which says what is missing."""
    bindings = load_bindings()
    return gpu_of(bindings, 0)[1], bindings


def free_gpu_bytes() -> int:
    """Free memory of that GPU; DeviceError without one."""
    bindings = load_bindings()
    device, gpu = gpu_of(bindings, 0)
    calls = bindings.calls
    context = bindings.ask(f"{gpu.name} cannot be used", calls.cuDevicePrimaryCtxRetain(device))
    try:
        bindings.ask("the context", calls.cuCtxSetCurrent(context))
        free, _ = bindings.ask("free memory", calls.cuMemGetInfo())
    finally:
        calls.cuDevicePrimaryCtxRelease(device)
    return int(free)


def describe_gpu() -> str:
    """The GPU, its driver and the bindings in one line; DeviceError, which says what is missing."""
    gpu, bindings = find_gpu()
    version = "{}.{}".format(*bindings.driver_version)
    return (
        f"{gpu.name} ({gpu.target}, {format_size(gpu.memory_bytes)}), driver for CUDA {version},"
        f" cuda-bindings {bindings.version}"
    )
