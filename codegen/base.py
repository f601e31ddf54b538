"""What every backend is: a verdict for each node, and an emission into an artifact's directory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

from numpy.typing import NDArray

from ..ir.errors import ProgramError, TargetError, UsageError
from ..ir.manifest import CompiledProgram, Entry, Limits, WeightsFile, input_types, output_types
from ..ir.program import (
    HIDDEN,
    LOGITS,
    STEP_INPUTS,
    Node,
    Program,
    Weight,
    further_outputs,
    further_symbols,
)
from ..ir.quantized_pairs import QuantizedPairs
from ..ir.resources import KvGroup, is_coded
from ..ir.row_codes import I8_ROWS
from ..ir.targets import FAMILIES, Target, resolve_target
from ..ir.types import DType, Sym, TensorType
from ..ir.weights import is_read_alike

if TYPE_CHECKING:
    from ..ir.formats import Format
    from ..ir.schemes import FeedbackCode, Quantizer


WEIGHTS_FILE: Final = "weights.safetensors"
"""What a backend calls the file of weights that it writes."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a backend takes a node; `reason` says why not."""

    accepted: bool
    reason: str = ""

    @classmethod
    def yes(cls) -> Verdict:
        """The node is taken."""
        return cls(True)

    @classmethod
    def no(cls, reason: str) -> Verdict:
        """The node is refused, with the reason that the user is shown."""
        return cls(False, reason)


@dataclass(frozen=True, slots=True)
class EmitOptions:
    """What emission may be told beside program and target.

    `on_weight(done_bytes, total_bytes)` is called before the first weight and after each that was
    written, `on_wait(what)` before waiting for something else that goes on meanwhile. `stored`
    gives weights that were made before, as they are to be written (bfloat16 as uint16). `pairs`
    has codes and scales of matrices. `begun` is what `Backend.begin` gave for the same program,
    target and directory. `shared` are weights that need not be written, because another program
    of the artifact has them. With `verify`, a backend may try what it made, where the program says
    what it should give.
    """

    on_weight: Callable[[int, int], None] | None = None
    on_wait: Callable[[str], None] | None = None
    stored: Callable[[Weight], NDArray[Any]] | None = None
    pairs: QuantizedPairs = field(default_factory=QuantizedPairs)
    begun: object = None
    shared: SharedWeights | None = None
    verify: bool = False


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """The weights of an artifact's main program, which its others need not store again.

    `names` are those that may be shared, where that is known; otherwise a weight is the same if its
    definition is, and if the same loaders read what it is made of.
    """

    program: Program
    weights: Mapping[str, Weight]
    names: frozenset[str] | None = None

    def among(self, program: Program, weights: Iterable[Weight]) -> tuple[str, ...]:
        """The names of those weights of another program that are the same."""
        return tuple(weight.name for weight in weights if self._is_same(program, weight))

    def _is_same(self, program: Program, weight: Weight) -> bool:
        if self.weights.get(weight.name) != weight:
            return False
        if self.names is not None:
            return weight.name in self.names
        return is_read_alike(weight.expr, program.loaders, self.program.loaders)


@dataclass(frozen=True, slots=True)
class Emission:
    """What a backend contributes to the manifest (see `docs/design/manifest.md`).

    `weights` are all that the code reads, in its order, whether they were written or are shared.
    With `shares`, those that may be shared were left out.
    """

    entry: dict[str, Any]
    weights: tuple[Weight, ...]
    arena_bytes: int = 0
    toolchain: dict[str, str] = field(default_factory=dict)
    shares: bool = True

    def compiled(
        self,
        program: Program,
        limits: Limits,
        *,
        folder: str = "",
        shared: SharedWeights | None = None,
        rank: int | None = None,
    ) -> CompiledProgram:
        """What the manifest says of the program that was emitted.

        `limits.sizes` are those of the program. `folder` is where in the artifact it was emitted,
        with a slash behind it, `shared` what was not written there.
        """
        sizes = {name: program.symbols[name].high for name in further_symbols(program)}
        names = tuple(weight.name for weight in self.weights)
        common = () if shared is None or not self.shares else shared.among(program, self.weights)
        return CompiledProgram(
            entry=Entry(**{**self.entry, "file": folder + self.entry["file"]}),
            inputs=input_types(program),
            outputs=output_types(program),
            limits=replace(limits, sizes=sizes),
            arena_bytes=self.arena_bytes,
            weights=WeightsFile(folder + WEIGHTS_FILE, names, common),
            resources=program.resources,
            rank=rank,
        )


@dataclass(frozen=True, slots=True)
class CompiledRounding:
    """Compiled code that rounds matrices, by the names of schemes.

    `nearest` rounds each weight by itself, `feedback` makes later weights of a row make up for the
    errors of earlier ones.
    """

    nearest: Mapping[str, Quantizer] = field(default_factory=dict)
    feedback: Mapping[str, FeedbackCode] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Made:
    """What a backend wrote before: for which target, where, and the weights that lie there."""

    target: Target
    directory: Path
    weights: Callable[[str], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Need:
    """What compiling takes beside infc and its libraries: whether it is there, and what it is.

    `detail` says why not where it is not `fine`.
    """

    subject: str
    fine: bool
    detail: str


class MachineProbe(Protocol):
    """What measures this machine at its limits, in code built as a step is."""

    def read_rate(self, threads: int, num_bytes: int) -> float:
        """Bytes a second that the threads read together; CapacityError without the memory."""
        ...

    def product_rate(self, kind: str, threads: int) -> float:
        """Operations a second of a kind ("fp32", "bf16", "int8"), all threads together."""
        ...


class Backend(ABC):
    """A way to execute lowered programs. Backends never import one another, but
    for `tensorrt`, which builds engines of what `onnx` writes.

    `interprets` says that it executes the definitions of ops, so that its results are those of the
    program by definition. `stores` are the kinds of resources (`ir/resources.py`) that it has
    memory and kernels for. `device` is that of the families of targets it compiles for, one of
    which messages name (`example_target`) where this machine need not have it. One with a section
    in recipes (`ir/backends.py`) is made with its values.
    """

    name: ClassVar[str]
    interprets: ClassVar[bool] = False
    stores: ClassVar[frozenset[str]] = frozenset({KvGroup.kind})
    device: ClassVar[str] = "cpu"
    example_target: ClassVar[str] = ""

    @abstractmethod
    def supports(self, node: Node, program: Program, target: Target) -> Verdict:
        """Whether this backend can execute `node` of `program` on `target`."""

    @abstractmethod
    def emit(
        self, program: Program, target: Target, directory: Path, options: EmitOptions
    ) -> Emission:
        """Write code and weights of a lowered program into `directory`."""

    def begin(
        self, program: Program, target: Target, directory: Path
    ) -> AbstractContextManager[object]:
        """Begin, beside other work, what `emit` does that takes long and needs no weights.

        Whatever it is has ended when the block is left. By default it is nothing.
        """
        return nullcontext()

    def find_target(self, text: str) -> Target:
        """The target that `text` names for this backend; `native` is this machine.

        TargetError for a name that is unknown, or a target of another device.
        """
        target = resolve_target(text)
        if target.family.device != self.device:
            raise TargetError(
                f"the backend {self.name} does not compile for {target} ({target.family.name})",
                hint=f"its targets: {', '.join(self.target_names())}",
            )
        return target

    def target_names(self) -> Sequence[str]:
        """The targets that messages name: by default, all of its device."""
        fitting = [family for family in FAMILIES if family.device == self.device]
        return [name for family in fitting for name in family.targets]

    def can_hold(self, form: Format) -> bool:
        """Whether there are kernels for matrices in a format of few bits.

        A recipe that names another is refused before its matrices are quantized, which may take
        minutes. By default, only `supports` decides.
        """
        return True

    def can_multiply(self, dtype: str) -> bool:
        """Whether there are kernels for matrices of elements of that type.

        A recipe that names another is refused before its model is captured. By default, a backend
        takes float32 and bfloat16.
        """
        return dtype in (DType.F32.value, DType.BF16.value)

    def can_cache(self, dtype: str) -> bool:
        """Whether there are kernels for state of that type (`ir/resources.py`).

        By default, a backend takes the elements that it multiplies, and codes of int8.
        """
        return dtype == I8_ROWS.name if is_coded(dtype) else self.can_multiply(dtype)

    def plan_passes(self, target: Target) -> str:
        """The passes that this backend wants at the end of the pipeline, as pipeline text.

        They may be infc's own or those of the package that brings the backend. By default there
        are none.
        """
        return ""

    def needs(self) -> Iterable[Need]:
        """What compiling for this machine takes, tried out. By default it is nothing."""
        return ()

    def unable_here(self) -> str | None:
        """Why no artifact of this backend runs on this machine; None where they do."""
        return None

    def probe(self, target: Target) -> MachineProbe:
        """What measures this machine; UsageError where this backend cannot.

        ToolchainError where it cannot be built.
        """
        raise UsageError(f"the backend {self.name} cannot measure a machine")

    def toolchain(self, target: Target) -> Mapping[str, str]:
        """What the artifact depends on beside infc itself, for the key of the cache.

        Raises an InfcError if something that `emit` needs is missing. By default it is nothing.
        """
        return {}

    def rounding(self, log: Callable[[str], None]) -> AbstractContextManager[CompiledRounding]:
        """Compiled code for rounding matrices, where this backend has any.

        It is usable until the block is left. `log` is told why there is none.
        """
        return nullcontext(CompiledRounding())

    def rebuild(
        self, program: Program, made: Made, target: Target, directory: Path, options: EmitOptions
    ) -> Emission:
        """Write code and weights for another target, of what was made for one before."""
        raise UsageError(
            f"the backend {self.name} makes the same for every target",
            where=str(made.directory),
            hint="the artifact runs wherever its backend does",
        )

    def check(self, program: Program, target: Target) -> None:
        """Raise `ProgramError` for the first input, output, resource or node that it refuses."""
        _check_interface(program)
        for resource in program.resources:
            if resource.kind not in self.stores:
                known = ", ".join(sorted(self.stores))
                raise ProgramError(
                    f"backend {self.name!r} cannot store the {resource.kind} group"
                    f" {resource.name!r}, only groups of the kind {known}",
                    where=program.name,
                )
            if not self.can_cache(resource.dtype):
                raise ProgramError(
                    f"backend {self.name!r} has no kernels for the {resource.kind} group"
                    f" {resource.name!r} in {resource.dtype}",
                    where=program.name,
                    hint="kv_cache.dtype: int8 takes as much memory"
                    if self.can_cache(I8_ROWS.name)
                    else "kv_cache.dtype: auto",
                )
        for node in program.nodes:
            verdict = self.supports(node, program, target)
            if not verdict.accepted:
                place = f"layer {node.layer}" if node.layer is not None else "outside the layers"
                raise ProgramError(
                    f"backend {self.name!r} refuses op {node.op!r}: {verdict.reason}",
                    where=node.source or place,
                    hint="backend: reference runs every op",
                )


def _check_interface(program: Program) -> None:
    """ProgramError for what no step has an array for, or of which nobody knows the size."""
    for value in program.inputs:
        symbol = STEP_INPUTS.get(value.name)
        fits = not value.type.dtype.is_float and value.type.shape == (Sym(symbol or ""),)
        if symbol is not None and not fits:
            raise ProgramError(
                f"the input {value.name} is {value.type}, expected i64[{symbol}]",
                where=program.name,
                hint="another array takes another name",
            )
    for name, value in program.named_outputs().items():
        symbols = {LOGITS: ("R", "T"), HIDDEN: ("R",)}.get(name)
        if symbols is not None and not _is_rows(value.type, symbols):
            raise ProgramError(
                f"the output {name} is {value.type}, expected a row for each of R",
                where=program.name,
                hint="another array takes another name",
            )
    known = {"T", "R", *further_symbols(program)}
    for name, value in further_outputs(program).items():
        for dim in value.type.shape:
            if isinstance(dim, Sym) and dim.name not in known:
                raise ProgramError(
                    f"the output {name} is {value.type}, and no input has {dim.name} in its shape",
                    where=program.name,
                )


def _is_rows(kind: TensorType, symbols: tuple[str, ...]) -> bool:
    """Whether it is `[R, width]`; logits may be `[T, width]`, for steps in which R is T."""
    return (
        len(kind.shape) == 2
        and kind.shape[0] in [Sym(name) for name in symbols]
        and kind.dtype.is_float
    ) and isinstance(kind.shape[1], int)
