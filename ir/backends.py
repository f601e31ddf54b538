"""The backends: one table that says of each where its parts are and what it takes to use it."""

from __future__ import annotations

import importlib
import re
from dataclasses import MISSING, dataclass, fields, is_dataclass
from operator import attrgetter
from typing import Any, Final

from .errors import ArtifactError, InfcError, UsageError
from .extras import COMPILE, CUDA, ONNX, TENSORRT, Extra
from .nearest import did_you_mean
from .plugins import load_plugins


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendInfo:
    """One row of the table. Parts are named `module:attribute`, and imported when used.

    `compiler` is a `codegen.base.Backend`. `executor` is called with an artifact and an
    `ExecutorConfig`, and gives an `Executor` (`runtime/executors/base.py`). `entry` is the kind of
    entry point that its artifacts have. `extra` has the libraries that running an artifact takes
    beside infc. `section` is a frozen dataclass: the keys that a recipe may give under the name of
    the backend, each with a default (or a factory of it) and, in its metadata, `doc`. An
    instance of it is what the compiler is made with. With `copies_weights`, the executor has a
    copy of the weights in memory whatever is chosen.
    """

    name: str
    compiler: str
    executor: str
    entry: str
    extra: Extra | None = None
    section: str | None = None
    copies_weights: bool = False

    def load_compiler(self) -> Any:
        """The class of the compiler; UsageError where importing it fails, whatever the reason."""
        return self._load(self.compiler)

    def load_executor(self) -> Any:
        """What opens an artifact; UsageError where importing it fails, whatever the reason."""
        return self._load(self.executor)

    def load_section(self) -> Any | None:
        """The dataclass of the recipe's section; None for a backend without options.

        UsageError where it cannot be imported, is no dataclass, or has a field without a default.
        """
        if self.section is None:
            return None
        section = self._load(self.section)
        if not (isinstance(section, type) and is_dataclass(section)):
            message = f"the section of the backend {self.name} is not a dataclass"
            raise UsageError(message, where=self.section)
        for one in fields(section):
            if one.default is MISSING and one.default_factory is MISSING:
                raise UsageError(
                    f"the option {self.name}.{one.name} has no default",
                    where=self.section,
                    hint="a recipe need not give it: declare the field with a default",
                )
        return section

    def _load(self, path: str) -> Any:
        module_name, _, attribute = path.partition(":")
        try:
            return attrgetter(attribute)(importlib.import_module(module_name))
        except InfcError:
            raise
        except Exception as error:
            extra = self.extra if isinstance(error, ImportError) else None
            raise UsageError(
                f"the backend {self.name} cannot be loaded: {type(error).__name__}: {error}",
                where=path,
                hint=None if extra is None else extra.install,
            ) from error


_OURS: Final = (
    BackendInfo(
        name="cpp",
        compiler="infc.codegen.cpp.backend:CppBackend",
        executor="infc.runtime.executors.cpp:CppExecutor",
        entry="cpp-shared-library",
    ),
    BackendInfo(
        name="reference",
        compiler="infc.codegen.reference.backend:ReferenceBackend",
        executor="infc.runtime.executors.reference:ReferenceExecutor.open",
        entry="program",
        extra=COMPILE,
    ),
    BackendInfo(
        name="triton",
        compiler="infc.codegen.triton.backend:TritonBackend",
        executor="infc.runtime.executors.gpu.executor:GpuExecutor",
        entry="launches",
        extra=CUDA,
        section="infc.codegen.triton.options:TritonOptions",
    ),
    BackendInfo(
        name="onnx",
        compiler="infc.codegen.onnx.backend:OnnxBackend",
        executor="infc.runtime.executors.onnxruntime:OnnxruntimeExecutor",
        entry="onnx-model",
        extra=ONNX,
        section="infc.codegen.onnx.options:OnnxOptions",
        copies_weights=True,
    ),
    BackendInfo(
        name="tensorrt",
        compiler="infc.codegen.tensorrt.backend:TensorrtBackend",
        executor="infc.runtime.executors.tensorrt:TensorrtExecutor",
        entry="tensorrt-engine",
        extra=TENSORRT,
        section="infc.codegen.tensorrt.options:TensorrtOptions",
    ),
)

DEFAULT: Final = _OURS[0].name
"""The backend of a recipe that names none."""

_TABLE: dict[str, BackendInfo] = {one.name: one for one in _OURS}
_NAME: Final = re.compile(r"[a-z][a-z0-9_]*")


def register_backend(info: BackendInfo) -> BackendInfo:
    """Adds a backend; plug-ins call it.

    One of the same name is replaced, as in a notebook whose cell runs again. UsageError for the
    name of a built-in backend, or for one that could not be a key of a recipe.
    """
    if is_built_in(info.name):
        raise UsageError(f"{info.name} is a built-in backend", hint="give it another name")
    if not _NAME.fullmatch(info.name):
        raise UsageError(
            f"{info.name!r} cannot be the name of a backend",
            hint="use lower-case letters, digits and underscores",
        )
    _TABLE[info.name] = info
    return info


def find_backend(name: str) -> BackendInfo:
    """The row of that name, of a plug-in if need be; UsageError with the nearest name."""
    if name not in _TABLE:
        load_plugins()
    if name not in _TABLE:
        hint = did_you_mean(name, _TABLE, f"choose one of: {', '.join(_TABLE)}")
        raise UsageError(f"unknown backend {name!r}", hint=hint)
    return _TABLE[name]


def is_built_in(name: str) -> bool:
    """Whether a backend is infc's own: its name then determines what it does."""
    return any(name == ours.name for ours in _OURS)


def known_backend(name: str) -> BackendInfo | None:
    """The row of that name if it is known already; no plug-in is loaded."""
    return _TABLE.get(name)


def known_backends() -> tuple[BackendInfo, ...]:
    """The rows that are known already: infc's own first, then those of plug-ins in use."""
    return tuple(_TABLE.values())


def backend_of_artifact(name: str, *, where: str) -> BackendInfo:
    """The row of the backend that an artifact names; ArtifactError where there is none."""
    if name not in _TABLE:
        load_plugins()
    if name not in _TABLE:
        raise ArtifactError(
            f"this infc has no executor for backend {name!r}",
            where=where,
            hint=f"it runs {' and '.join(_TABLE)}",
        )
    return _TABLE[name]
