"""What `pip install infc` leaves out, and the one line that says how to get it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Final

from .errors import ToolchainError


@dataclass(frozen=True, slots=True)
class Extra:
    """Libraries beside those that infc always has, and the command that installs them.

    `libraries` are modules, whatever the distributions are called that bring them; `a|b` is met by
    either.
    """

    libraries: tuple[str, ...]
    install: str

    def missing(self) -> list[str]:
        """The libraries that are not installed; only packages around a module are imported."""
        wanted = [name.split("|") for name in self.libraries]
        return [names[0] for names in wanted if not any(map(_is_installed, names))]

    def require(self, purpose: str) -> None:
        """Raises ToolchainError where a library is not installed."""
        if missing := self.missing():
            raise missing_library(missing[0], purpose, self)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package around it
        return False


COMPILE: Final = Extra(("torch", "transformers"), "pip install 'infc[compile]'")
"""The compiler's heavy half."""
TRITON: Final = Extra(("triton",), "pip install 'infc[triton]'")
"""What compiles kernels for GPUs."""
CUDA: Final = Extra(("cuda.bindings",), "pip install 'infc[cuda]'")
"""What runs them."""
ONNX: Final = Extra(("onnxruntime",), "pip install 'infc[onnx]'")
"""What runs models in ONNX."""
ONNX_COMPILE: Final = Extra(("onnx", *ONNX.libraries), "pip install 'infc[onnx-compile]'")
"""What writes and tries them."""
TENSORRT: Final = Extra(("tensorrt_rtx|tensorrt", "cuda.bindings"), "pip install 'infc[tensorrt]'")
"""What runs engines of TensorRT."""
TENSORRT_COMPILE: Final = Extra(
    ("onnx", "tensorrt_rtx|tensorrt"), "pip install 'infc[tensorrt-compile]'"
)
"""What builds them."""

RAY: Final = Extra(("ray", "pyarrow"), "pip install 'infc[ray]'")
"""What runs infc on a cluster."""


def require_compiler(purpose: str) -> None:
    """Raises ToolchainError where a library of the extra `compile` is not installed."""
    COMPILE.require(purpose)


def missing_library(name: str, purpose: str, extra: Extra = COMPILE) -> ToolchainError:
    """The error that says which library is missing, for what, and the command that installs it."""
    return ToolchainError(f"{purpose} needs {name}, which is not installed", hint=extra.install)
