"""The Triton backend: launches as data, compiled kernels, and weights as the program has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from numpy.typing import NDArray

from ...ir.backends import DEFAULT
from ...ir.errors import DeviceError, InfcError, TargetError
from ...ir.formats import Format
from ...ir.launches import LAUNCHES_FILE, Form, LaunchPlan
from ...ir.nvidia import find_gpu
from ...ir.plan import planned_graphs
from ...ir.program import Node, Program, Weight
from ...ir.resources import KvGroup, is_coded
from ...ir.row_codes import ROW_CODES
from ...ir.schemes import get_scheme
from ...ir.targets import CUDA, Target
from ...ir.types import DType, TensorType
from ..base import (
    WEIGHTS_FILE,
    Backend,
    CompiledRounding,
    Emission,
    EmitOptions,
    Made,
    Need,
    Verdict,
)
from ..registry import get_backend
from ..weights_file import write_weights
from .aot import KernelBuild, triton_version
from .calls import TYPES, KernelCode
from .emitter import ALIGNMENT_BYTES, Emitter
from .expressions import SCALARS
from .loops import LOOP_OPS
from .lower import LOWERINGS
from .lower.attention import table_width
from .lower.coded import has_kernels
from .options import TritonOptions
from .steps import emit_form, form_specs

KERNELS: Final = "code/kernels"
ENTRY: Final = "launches"

_WIDEST_ROW: Final = 65536
"""Elements that a block holds of a row that is normed or ranked."""
_HEADS: Final = 256
_ROW_OPS: Final = frozenset(
    {"rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "softmax", "topk"}
)


class TritonBackend(Backend):
    """Kernels in Triton, compiled ahead of time for one GPU, and launches of them as data."""

    name: ClassVar[str] = "triton"
    device: ClassVar[str] = "gpu"
    example_target: ClassVar[str] = "sm_90"

    def __init__(self, options: TritonOptions | None = None) -> None:
        self.options = options or TritonOptions()

    def find_target(self, text: str) -> Target:
        """As for all, but `native` is the GPU of this machine."""
        if text.strip().lower() == "native":
            return self.native_target()
        return super().find_target(text)

    def native_target(self) -> Target:
        """The target of this machine's GPU; TargetError without one."""
        try:
            gpu, _ = find_gpu()
        except DeviceError as error:
            raise TargetError(error.message, hint="name the target, for example sm_90") from None
        (name,) = CUDA.native({gpu.target})
        return super().find_target(name)

    def supports(self, node: Node, program: Program, target: Target) -> Verdict:
        """Whether there is a kernel or a loop for the node."""
        if node.op not in LOWERINGS and node.op not in LOOP_OPS:
            return Verdict.no("there is no kernel for it")
        types = [program.operand_type(operand) for operand in node.inputs]
        types += [value.type for value in node.outputs]
        built = SCALARS if node.op in LOOP_OPS else TYPES
        for kind in types:
            if isinstance(kind, TensorType) and kind.dtype not in built:
                return Verdict.no(f"element type {kind.dtype.value} is not built")
        codes = _check_codes(node)
        return _check_sizes(node, program) if codes.accepted else codes

    def can_hold(self, form: Format) -> bool:
        """Whether a format can be multiplied."""
        return has_kernels(form)

    def can_cache(self, dtype: str) -> bool:
        """Elements that are multiplied, and all codes of rows."""
        return is_coded(dtype) or self.can_multiply(dtype)

    def plan_passes(self, target: Target) -> str:
        """Loops over rows, one arena for all values of a step, and the graphs it is captured as."""
        return f"group-loops,plan-memory{{alignment={ALIGNMENT_BYTES}}},plan-graphs"

    def begin(self, program: Program, target: Target, directory: Path) -> LaunchBuild:
        """Compile the kernels beside other work."""
        self.check(program, target)
        build = LaunchBuild(program, generate(program, target, self.options), target, directory)
        build.kernels.start()
        return build

    def emit(
        self, program: Program, target: Target, directory: Path, options: EmitOptions
    ) -> Emission:
        """Write `code/` and `weights.safetensors` into `directory`."""
        begun = options.begun
        if isinstance(begun, LaunchBuild) and begun.program == program:
            return begun.finish(options)
        with self.begin(program, target, directory) as build:
            return build.finish(options)

    def rebuild(
        self, program: Program, made: Made, target: Target, directory: Path, options: EmitOptions
    ) -> Emission:
        """Write kernels and launches for another GPU; no target changes the weights."""

        def stored(weight: Weight) -> NDArray[Any]:
            return made.weights(weight.name)

        return self.emit(program, target, directory, replace(options, stored=stored))

    def needs(self) -> Iterator[Need]:
        """Triton, in the version that the kernels are made for."""
        try:
            version = triton_version()
        except InfcError as error:
            yield Need("triton", False, str(error))
        else:
            yield Need("triton", True, version)

    def unable_here(self) -> str | None:
        """Why not, where there is no GPU of a target."""
        try:
            self.native_target()
        except TargetError as error:
            return error.message
        return None

    def rounding(self, log: Callable[[str], None]) -> AbstractContextManager[CompiledRounding]:
        """That of the backend for processors: one of them rounds, whatever runs the model."""
        return get_backend(DEFAULT).rounding(log)

    def toolchain(self, target: Target) -> Mapping[str, str]:
        """The version of Triton; ToolchainError without it."""
        return {"triton": triton_version()}


@dataclass(frozen=True, slots=True)
class Generated:
    """The launches of a step, the kernels that they name, and what they read and need."""

    forms: tuple[Form, ...]
    codes: Mapping[str, KernelCode]
    weights: tuple[Weight, ...]
    arena_bytes: int
    table_width: Mapping[str, int]


class LaunchBuild:
    """The launches of a program's step, and the kernels that are being compiled for them."""

    def __init__(self, program: Program, made: Generated, target: Target, directory: Path) -> None:
        self.program = program
        self.made = made
        self.target = target
        self.directory = directory
        self.kernels = KernelBuild(made.codes, target, directory / KERNELS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.kernels.stop()

    def finish(self, options: EmitOptions) -> Emission:
        """Write the weights while kernels are compiled, then wait for them."""

        def on_weight(done: int, total: int) -> None:
            self.kernels.check()
            if options.on_weight is not None:
                options.on_weight(done, total)

        made = self.made
        watched = replace(options, on_weight=on_weight)
        write_weights(self.program, made.weights, self.directory / WEIGHTS_FILE, watched)
        if options.on_wait is not None:
            options.on_wait("Triton")
        graphs = planned_graphs(self.program)
        plan = LaunchPlan(
            target=self.target.name,
            kernels=self.kernels.wait(),
            forms=made.forms,
            arena_bytes=made.arena_bytes,
            table_width=made.table_width,
            buckets=graphs.buckets,
            pieces=graphs.pieces,
            toolchain={"triton": triton_version()},
        )
        path = self.directory / LAUNCHES_FILE
        path.write_text(plan.to_text(), encoding="utf-8")
        return Emission(
            entry={"kind": ENTRY, "file": LAUNCHES_FILE},
            weights=made.weights,
            arena_bytes=made.arena_bytes,
            toolchain=dict(plan.toolchain),
        )


def generate(program: Program, target: Target, options: TritonOptions | None = None) -> Generated:
    """The launches of a planned program; nothing is written or compiled."""
    codes: dict[str, KernelCode] = {}
    forms: list[Form] = []
    arena = 0
    for spec in form_specs(program, target, options or TritonOptions()):
        emitter = Emitter(program, target, spec)
        forms.append(emit_form(emitter))
        codes.update(emitter.kernels)
        arena = max(arena, emitter.arena_bytes)
    used = dict.fromkeys(ref.name for node in program.nodes for ref in node.weights())
    groups = [group for group in program.resources if isinstance(group, KvGroup)]
    return Generated(
        forms=tuple(forms),
        codes={key: codes[key] for key in sorted(codes)},
        weights=tuple(program.weights[name] for name in used),
        arena_bytes=arena,
        table_width={group.name: table_width(program, group) for group in groups},
    )


def _check_codes(node: Node) -> Verdict:
    """Whether there are kernels for the codes that a node makes or multiplies."""
    if node.op == "quantize_rows" and node.attrs["codes"] not in ROW_CODES:
        return Verdict.no(f"there are no kernels for rows of {node.attrs['codes']}")
    if "scheme" in node.attrs:
        form = get_scheme(node.attrs["scheme"]).weight
        if not has_kernels(form):
            return Verdict.no(f"there are no kernels for matrices in {form.name}")
    return Verdict.yes()


def _check_sizes(node: Node, program: Program) -> Verdict:
    kinds = [program.operand_type(operand) for operand in node.inputs]
    shapes = [kind.shape for kind in kinds if isinstance(kind, TensorType)]
    if node.op in _ROW_OPS and (not shapes[0] or not _fits(shapes[0][-1], _WIDEST_ROW)):
        return Verdict.no(f"rows of more than {_WIDEST_ROW} elements are not built")
    if node.op == "take" and node.attrs["dim"] != 0:
        return Verdict.no("only rows of the first dimension can be taken")
    rowwise = node.op in ("softmax", "gather", "scatter")
    if rowwise and node.attrs["dim"] != node.output.type.rank - 1:
        return Verdict.no("only over the last dimension")
    if node.op == "rotary" and node.output.type.dtype is not DType.F32:
        return Verdict.no("angles are computed in float32 only")
    if node.op == "paged_attention":
        heads = node.output.type.shape[-1], *shapes[0][-1:]
        if not all(_fits(size, _HEADS) for size in heads):
            return Verdict.no(f"heads of more than {_HEADS} elements are not built")
    return Verdict.yes()


def _fits(size: object, most: int) -> bool:
    return isinstance(size, int) and size <= most
