"""An engine of TensorRT: read, once it is known to fit, and asked for work on a stream."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from ...ir.artifact import Artifact
from ...ir.errors import ArtifactError, DeviceError
from ...ir.manifest import CompiledProgram
from ...ir.resources import KvGroup
from ...ir.safetensors import Entry
from ...ir.shapes import parse_type
from ...ir.step_facts import check_step_facts
from ...ir.tensorrt_engine import FACTS_FILE, EngineFacts, import_library
from ...ir.types import DType
from .gpu.driver import Driver

Shape = tuple[int, ...]

_INT64: Final = "INT64"
_FLOATS: Final = {DType.BF16.value: "BF16", DType.F16.value: "HALF"}
_DAMAGED: Final = "the artifact is damaged: compile it again"


@dataclass(frozen=True, slots=True)
class EngineImage:
    """An engine as it lies in an artifact, known to be whole and of the library that is here.

    The file is mapped: all weights may be in it, and a container has no memory of the host for
    them.
    """

    facts: EngineFacts
    content: mmap.mmap
    library: Any
    where: str


def read_engine(artifact: Artifact, compiled: CompiledProgram) -> EngineImage:
    """The engine of a program; no GPU is needed.

    ToolchainError without TensorRT; ArtifactError where another version of it, or of something
    else, built the engine, and where it is not whole.
    """
    place = PurePosixPath(compiled.entry.file)
    text = artifact.read_text(str(place.with_name(FACTS_FILE)))
    facts = EngineFacts.parse(text, where=str(artifact.path / place.with_name(FACTS_FILE)))
    where = str(artifact.path / place)
    name, library = import_library()
    facts.check_version(name, str(library.__version__), where=where)
    with open(artifact.open_file(compiled.entry.file), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != facts.num_bytes:
            raise ArtifactError(
                f"the engine has {size} bytes instead of {facts.num_bytes}",
                where=where,
                hint=_DAMAGED,
            )
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return EngineImage(facts, mapped, library, where)


class Engine:
    """An engine on a GPU. Its contexts share one piece of memory, as steps run one after another.

    Each context is for one profile; what is captured of it stays right only if it is asked for
    nothing else.
    """

    def __init__(
        self,
        image: EngineImage,
        compiled: CompiledProgram,
        entries: Mapping[str, Entry],
        driver: Driver,
    ) -> None:
        self.facts, self._driver, self._where = image.facts, driver, image.where
        major, minor = driver.device.capability
        image.facts.check_chip(f"sm_{major}{minor}", driver.device.name, where=image.where)
        check_step_facts(image.facts.facts, compiled, entries, where=image.where)
        self._library = image.library
        try:
            self._read(image, compiled, set(entries))
        except BaseException:
            self.close()
            raise

    def _read(self, image: EngineImage, compiled: CompiledProgram, weights: set[str]) -> None:
        library = self._library
        self._log = library.Logger(library.Logger.ERROR)
        self._runtime = library.Runtime(self._log)
        validity, reasons = self._runtime.get_engine_validity(image.content)
        if validity == library.EngineValidity.INVALID:
            raise self._unreadable(f"it is not valid here (diagnostics {reasons:#x})")
        self._engine = self._runtime.deserialize_cuda_engine(image.content)
        if self._engine is None:
            raise self._unreadable("it does not say why")
        self.inputs, self.outputs = self._names("INPUT"), self._names("OUTPUT")
        self._check_interface(compiled, weights)
        self._workspace_bytes = int(self._engine.device_memory_size_v2)
        self._workspace = self._driver.allocate(max(1, self._workspace_bytes), "values of a step")

    def _unreadable(self, reason: str) -> ArtifactError:
        return ArtifactError(
            f"{self.facts.library} {self.facts.version} cannot read the engine: {reason}",
            where=self._where,
            hint="compile the model again, for this GPU",
        )

    def _names(self, mode: str) -> dict[str, Any]:
        """The names of inputs or outputs, and their types."""
        engine, wanted = self._engine, getattr(self._library.TensorIOMode, mode)
        names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
        return {n: engine.get_tensor_dtype(n) for n in names if engine.get_tensor_mode(n) == wanted}

    def _check_interface(self, compiled: CompiledProgram, weights: set[str]) -> None:
        """ArtifactError where an engine takes or gives other arrays than its steps do."""
        types = self._library.DataType
        takes, gives = {}, {}
        for name, kind in _expected_inputs(compiled):
            takes[name] = getattr(types, kind)
        for name, text in compiled.outputs.items():
            assert parse_type(text).dtype.is_float, name
            gives[name] = types.FLOAT
        for name, kind in _expected_pools(compiled):
            takes[f"kv.{name}"] = gives[f"kv_out.{name}"] = getattr(types, kind)
        found = {name: kind for name, kind in self.inputs.items() if name not in weights}
        for what, these, those in (("input", found, takes), ("output", self.outputs, gives)):
            if differing := sorted({*these.items()} ^ {*those.items()}, key=str):
                raise ArtifactError(
                    f"the engine is not that of a step: its {what} {differing[0][0]} differs",
                    where=self._where,
                    hint=_DAMAGED,
                )
        for name in (one for one in gives if one.startswith("kv_out.")):
            aliased = self._engine.get_aliased_input_tensor(name)
            if aliased != name.replace("kv_out.", "kv.", 1):
                raise ArtifactError(
                    f"the engine does not write {name} in place", where=self._where, hint=_DAMAGED
                )

    def context(self, profile: int) -> Any:
        """A new context for a profile."""
        strategy = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise DeviceError("TensorRT could not make an execution context")
        context.set_device_memory(self._workspace, self._workspace_bytes)
        if not context.set_optimization_profile_async(profile, self._driver.stream):
            raise DeviceError(f"TensorRT did not take profile {profile} of its engine")
        return context

    def bind(self, context: Any, shapes: Mapping[str, Shape], places: Mapping[str, int]) -> None:
        """Tell a context the shapes of inputs, and where all arrays lie."""
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise DeviceError(f"TensorRT did not take the shape {shape} of {name}")
        for name in (*self.inputs, *self.outputs):
            if not context.set_tensor_address(name, places[name]):
                raise DeviceError(f"TensorRT did not take the address of {name}")

    def enqueue(self, context: Any) -> None:
        """Ask for the step that was bound."""
        if not context.execute_async_v3(self._driver.stream):
            raise DeviceError("TensorRT failed in a step")

    def is_capturable(self, context: Any) -> bool:
        """Whether what was bound can be captured."""
        ask = getattr(context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(self._driver.stream))

    def close(self) -> None:
        """Give back what TensorRT has, before the driver is closed, whose context it needs."""
        for name in ("_engine", "_runtime"):
            self.__dict__.pop(name, None)


def _expected_inputs(compiled: CompiledProgram) -> Iterator[tuple[str, str]]:
    for name in compiled.inputs:
        yield name, _INT64
    for group in compiled.resources:
        for kind in ("row_of_padded", "padded_of_row", "write_at", "key_places"):
            yield f"{kind}.{group.name}", _INT64


def _expected_pools(compiled: CompiledProgram) -> Iterator[tuple[str, str]]:
    for group in compiled.resources:
        assert isinstance(group, KvGroup)
        for layer in group.layers:
            for part in ("key", "value"):
                yield f"{layer}.{part}", _FLOATS[group.dtype]


def slot_bytes(group: KvGroup, part: str) -> int:
    """Bytes of keys or values of one layer in one slot."""
    size = group.key_head_dim if part == "key" else group.value_head_dim
    return math.prod(slot_shape(group, size)) * DType(group.dtype).size_bytes


def slot_shape(group: KvGroup, size: int) -> Shape:
    """The shape of a slot, for heads of a size."""
    return group.num_kv_heads, group.block_size, size
