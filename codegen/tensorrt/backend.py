"""The TensorRT backend: an engine of the ONNX graph of a step, for one or several chips."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final

from numpy.typing import NDArray

from ...ir.errors import DeviceError, ProgramError, TargetError, ToolchainError, UsageError
from ...ir.extras import TENSORRT_COMPILE
from ...ir.formats import CENTERED_I4, E4M3, Format
from ...ir.nvidia import find_gpu
from ...ir.program import Node, Program, Weight, further_inputs, further_outputs
from ...ir.resources import KvGroup
from ...ir.row_codes import E4M3_ROWS
from ...ir.schemes import get_scheme
from ...ir.step_facts import step_facts
from ...ir.targets import Target
from ...ir.tensorrt_engine import (
    ALIGNMENT,
    ENGINE_FILE,
    FACTS_FILE,
    SLOTS,
    EngineFacts,
    StepProfile,
    import_library,
)
from ...ir.types import DType, TensorType
from ..base import WEIGHTS_FILE, Backend, Emission, EmitOptions, Made, Need, Verdict
from ..weights_file import write_weights
from .builder import CHIPS, build_engine
from .options import TensorrtOptions
from .profiles import Extents, StepLimits, input_extents, step_profiles

ENTRY: Final = "tensorrt-engine"

_NOT_BUILT: Final[Mapping[str, str]] = {
    "sm_75": "TensorRT-RTX has no attention for it",
    "sm_90": "TensorRT-RTX does not build for it",
    "sm_100": "TensorRT-RTX does not build for it",
    "sm_103": "TensorRT-RTX does not build for it",
}
_PRODUCTS: Final = frozenset({"scaled_linear", "decoded_linear"})
_E4M3_CHIPS: Final = ("sm_89", "sm_120")
_NEW: Final = " or ".join(_E4M3_CHIPS)
_OTHER_CODES: Final = (
    "only matrices of products are codes: quantization: {embedding: none, skip: ['*experts*']}"
)
_OTHER_SCHEMES: Final = (
    "there is no product of such codes: choose q4_0-weights, int8-weights or fp8"
)


class TensorrtBackend(Backend):
    """An engine of TensorRT-RTX, or of TensorRT, built ahead of time."""

    name: ClassVar[str] = "tensorrt"
    device: ClassVar[str] = "gpu"
    example_target: ClassVar[str] = "sm_89"

    def __init__(self, options: TensorrtOptions | None = None) -> None:
        self.options = options or TensorrtOptions()

    def find_target(self, text: str) -> Target:
        """As for all, but `native` is the GPU of this machine; TargetError for one not built for.

        The chips of the options are looked at as well.
        """
        for name in (text.strip().lower(), *self._further):
            if name in _NOT_BUILT:
                raise TargetError(
                    f"the backend tensorrt does not compile for {name}: {_NOT_BUILT[name]}",
                    hint=f"its targets: {', '.join(CHIPS)}; backend: triton has sm_90 and others",
                )
        for chip in self._further:
            if chip not in CHIPS:
                raise TargetError(
                    f"{chip!r} in tensorrt.chips is no GPU that engines are built for",
                    hint=f"they are built for {', '.join(CHIPS)}",
                )
        if text.strip().lower() == "native":
            return super().find_target(_own_chip())
        return super().find_target(text)

    def target_names(self) -> Sequence[str]:
        """Those that TensorRT-RTX builds for."""
        return CHIPS

    def chips(self, target: Target) -> tuple[str, ...]:
        """What an engine is built for, the target first."""
        return tuple(dict.fromkeys([target.name, *self._further]))

    @property
    def _further(self) -> list[str]:
        """The chips of the options, written as targets may be."""
        return [chip.strip().lower() for chip in self.options.chips]

    def supports(self, node: Node, program: Program, target: Target) -> Verdict:
        """Whether the op can be said in ONNX as TensorRT reads it."""
        TENSORRT_COMPILE.require("compiling for the backend tensorrt")
        from ..onnx.lower import LOWERED

        if reason := self._unable(node, target):
            return Verdict.no(reason)
        if node.op not in LOWERED:
            return Verdict.no("there is no op in ONNX for it: backend: triton may have a kernel")
        types = [program.operand_type(operand) for operand in node.inputs]
        types += [value.type for value in node.outputs]
        if any(isinstance(kind, TensorType) and kind.dtype is DType.F64 for kind in types):
            return Verdict.no("float64 is not built")
        return Verdict.yes()

    def _unable(self, node: Node, target: Target) -> str | None:
        """Why there is no product of the codes of a node, and what there is instead."""
        is_rows, scheme = node.op == "quantize_rows", node.attrs.get("scheme")
        if is_rows and (node.attrs["codes"] != E4M3_ROWS.name or node.attrs["group"]):
            return "rows are quantized to e4m3 by token only: choose the scheme with -weights"
        form = None if scheme is None else get_scheme(scheme).weight
        if scheme is not None and node.op not in _PRODUCTS:
            return _OTHER_CODES
        if form is not None and not self.can_hold(form):
            return _OTHER_SCHEMES
        if is_rows or form is E4M3:
            old = [chip for chip in self.chips(target) if chip not in _E4M3_CHIPS]
            if old:
                return f"{old[0]} has no products of e4m3: choose q4_0-weights, or build for {_NEW}"
        return None

    def can_hold(self, form: Format) -> bool:
        """Numbers of 8 or 4 bits with a scale for each group, and e4m3 with one for each row."""
        is_number = not form.levels or form.levels == CENTERED_I4
        return form is E4M3 or (is_number and form.is_grouped and form.minimum is None)

    def can_multiply(self, dtype: str) -> bool:
        """Matrices of 16 bits: those of float32 would be as slow as on other backends."""
        return dtype in (DType.BF16.value, DType.F16.value)

    def can_cache(self, dtype: str) -> bool:
        """Elements of 16 bits: attention has no others."""
        return self.can_multiply(dtype)

    def check(self, program: Program, target: Target) -> None:
        """As for all; float32 and arrays of other steps are named before ops are."""
        for group in program.resources:
            if group.kind == KvGroup.kind and group.dtype == DType.F32.value:
                raise ProgramError(
                    "attention of TensorRT has no float32, in which this model keeps keys and"
                    " values",
                    where=program.name,
                    hint="dtype: bfloat16, or dtype: float16",
                )
        if others := [*further_inputs(program), *further_outputs(program)]:
            raise ProgramError(
                f"the backend tensorrt builds no steps with {others[0]}, only those with tokens,"
                " positions, logits and hidden states",
                where=program.name,
                hint="backend: onnx, or backend: triton",
            )
        super().check(program, target)

    def plan_passes(self, target: Target) -> str:
        """Blocks that hold a whole context: slots, any of which may be bound."""
        return f"one-block-each{{align_bytes={ALIGNMENT}}}"

    def emit(
        self, program: Program, target: Target, directory: Path, options: EmitOptions
    ) -> Emission:
        """Write the engine, what it is, and the weights that are not in it."""
        toolchain = dict(self.toolchain(target))
        self.check(program, target)
        from ..onnx.memory import step_bytes
        from .graph import engine_graph, engine_model

        limits, embeds = StepLimits.of(program), self.options.weights == "embedded"
        profiles = step_profiles(limits, self.options)
        emitted = engine_graph(program)
        weights = tuple(tensor.weight for tensor in emitted.used.values())
        alone = replace(options, shared=None)
        with tempfile.TemporaryDirectory(dir=directory) as place:
            beside = Path(place) if embeds else directory
            write_weights(program, weights, beside / WEIGHTS_FILE, alone)
            if embeds:
                write_weights(program, (), directory / WEIGHTS_FILE, alone)
            model = engine_model(emitted, beside / WEIGHTS_FILE if embeds else None)
            path = Path(place) / "model.onnx"
            path.write_bytes(model.SerializeToString(deterministic=True))
            if options.on_wait is not None:
                options.on_wait("TensorRT")

            def extents(profile: StepProfile, name: str, shape: Sequence[int]) -> Extents | None:
                kind = name.partition(".")[0]
                return input_extents(profile, kind, shape, limits.context)

            chips = self.chips(target)
            engine = build_engine(path, chips, profiles, extents)
            (directory / ENGINE_FILE).write_bytes(engine)
        held = () if embeds else weights
        library, version = _library()
        facts = EngineFacts(
            library=library,
            version=version,
            chips=chips,
            num_bytes=engine.nbytes,
            kv=SLOTS,
            profiles=profiles,
            weights=tuple(weight.name for weight in held),
            facts=step_facts(program, [(weight.name, weight.type) for weight in held]),
        )
        (directory / FACTS_FILE).write_text(facts.text(), encoding="utf-8")
        return Emission(
            entry={"kind": ENTRY, "file": ENGINE_FILE},
            weights=held,
            # On the GPU, an engine takes about what its file does, beside the values of a step.
            arena_bytes=step_bytes(program) + engine.nbytes,
            toolchain=toolchain,
            shares=False,
        )

    def rebuild(
        self, program: Program, made: Made, target: Target, directory: Path, options: EmitOptions
    ) -> Emission:
        """Build for another GPU; UsageError where the artifact does not have the weights.

        An engine is no source of those that it contains.
        """
        if self.options.weights == "embedded":
            raise UsageError(
                "the engine contains its weights, from which no other can be built",
                where=str(made.directory),
                hint=f"compile the model again with --set target={target.name}; with"
                " tensorrt.weights: inputs, artifacts can be rebuilt",
            )

        def stored(weight: Weight) -> NDArray[Any]:
            return made.weights(weight.name)

        return self.emit(program, target, directory, replace(options, stored=stored))

    def needs(self) -> Iterator[Need]:
        """The packages onnx, which writes models, and TensorRT-RTX, which builds engines."""
        for name in TENSORRT_COMPILE.missing():
            yield Need(name, False, f"not installed: {TENSORRT_COMPILE.install}")
        if not TENSORRT_COMPILE.missing():
            yield Need(*self._found())

    def _found(self) -> tuple[str, bool, str]:
        name, version = _library()
        return name, True, version

    def unable_here(self) -> str | None:
        """Why not, where there is no GPU that engines are built for."""
        try:
            _own_chip()
        except TargetError as error:
            return error.message
        return None

    def toolchain(self, target: Target) -> Mapping[str, str]:
        """The versions of TensorRT and onnx; ToolchainError without them."""
        TENSORRT_COMPILE.require("compiling for the backend tensorrt")
        name, version = _library()
        return {name: version, "onnx": importlib.metadata.version("onnx")}


def _library() -> tuple[str, str]:
    name, library = import_library()
    version = getattr(library, "__version__", None)
    if version is None:
        raise ToolchainError(f"{name} has no version", hint=TENSORRT_COMPILE.install)
    return name, str(version)


def _own_chip() -> str:
    """The target of this machine's GPU; TargetError where it has none that engines run on."""
    try:
        gpu, _ = find_gpu()
    except DeviceError as error:
        raise TargetError(error.message, hint="name the target, for example sm_89") from None
    if gpu.target not in CHIPS:
        raise TargetError(
            f"the backend tensorrt does not compile for {gpu.target} ({gpu.name})",
            hint=f"its targets: {', '.join(CHIPS)}",
        )
    return gpu.target
