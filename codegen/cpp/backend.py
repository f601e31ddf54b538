"""The cpp backend: generated C++ for a step, the kernels beside it, and packed weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

from ...ir.errors import ArtifactError, InfcError, TargetError
from ...ir.formats import Format
from ...ir.plan import loop_groups
from ...ir.program import (
    HIDDEN,
    LOGITS,
    Node,
    Operand,
    Program,
    Value,
    Weight,
    WeightRef,
    further_outputs,
)
from ...ir.row_codes import I8_ROWS
from ...ir.schemes import get_scheme
from ...ir.step_facts import step_facts
from ...ir.targets import Target, resolve_target
from ...ir.types import DType, TensorType
from ..base import (
    WEIGHTS_FILE,
    Backend,
    CompiledRounding,
    Emission,
    EmitOptions,
    MachineProbe,
    Made,
    Need,
    Verdict,
)
from ..weights_file import write_weights
from .buffers import Buffer, has_kernels
from .calls import applied, c_dim, place_barriers, read_ahead
from .emitter import Emitter, Lowering, pointer
from .expressions import SCALARS
from .extensions import FOLDER, extension_headers, find_extension
from .further import check_further
from .loops import LOOP_OPS, lower_group
from .lower import LOWERINGS
from .profile import profile_text
from .roll import roll
from .source import source_text
from .toolchain import LibraryBuild, toolchain_for, try_compiler
from .units import unit_sources
from .weight_table import PACKED_OPS

KERNELS = Path(__file__).parent / "kernels"
ABI = int(
    (KERNELS / "abi.hpp").read_text(encoding="utf-8").split("#define INFC_ABI ")[1].split()[0]
)
"""Version of the C interface, which the header has."""

SOURCE = "code/step.cpp"
PROFILE = "code/profile.json"
LIBRARY = "code/model.so"

_STORED = frozenset(SCALARS) | {DType.I8, DType.U8}
"""Element types that kernels take; loops compute in those of `SCALARS` alone."""


_OTHER_CODES = "choose a scheme with weights of int8 or int4 (quantization)"


class CppBackend(Backend):
    """Generated C++ over header-only kernels, compiled by the system's compiler."""

    name: ClassVar[str] = "cpp"

    def supports(self, node: Node, program: Program, target: Target) -> Verdict:
        """Whether there is a kernel or a loop for the node."""
        if node.op not in LOWERINGS and node.op not in LOOP_OPS and find_extension(node.op) is None:
            return Verdict.no("there is no kernel for it")
        types = [program.operand_type(operand) for operand in node.inputs]
        types += [value.type for value in node.outputs]
        built = SCALARS if node.op in LOOP_OPS else _STORED
        for kind in types:
            if isinstance(kind, TensorType) and kind.dtype not in built:
                return Verdict.no(f"element type {kind.dtype.value} is not built")
        codes = _check_codes(node)
        return _check_operands(node, program) if codes.accepted else codes

    def can_hold(self, form: Format) -> bool:
        """Whether panels of a format can be multiplied."""
        return has_kernels(form)

    def check(self, program: Program, target: Target) -> None:
        """Raise `ProgramError` for the first thing that generated code cannot do."""
        super().check(program, target)
        check_further(program)

    def begin(self, program: Program, target: Target, directory: Path) -> CodeBuild:
        """Write `code/`, and compile it beside other work."""
        self.check(program, target)
        made = generate(program, target)
        for name, data in made.files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        library = LibraryBuild(directory / SOURCE, directory / LIBRARY, target)
        return CodeBuild(program, made, library)

    def emit(
        self, program: Program, target: Target, directory: Path, options: EmitOptions
    ) -> Emission:
        """Write `code/` and `weights.safetensors` into `directory`."""
        begun = options.begun
        if isinstance(begun, CodeBuild) and begun.program == program:
            return begun.finish(directory, options)
        with self.begin(program, target, directory) as build:
            return build.finish(directory, options)

    def plan_passes(self, target: Target) -> str:
        """Loops over rows, and one arena for all values of a step."""
        # plan-memory is last: it looks at the order of nodes, and at which run together.
        return "group-loops,plan-memory"

    def needs(self) -> Iterator[Need]:
        """A C++ compiler, which compiles a few lines."""
        try:
            found = try_compiler()
        except InfcError as error:
            yield Need("C++ compiler", False, str(error))
        else:
            yield Need("C++ compiler", True, f"{found.path}: {found.version}")

    def unable_here(self) -> str | None:
        """Why not, where this machine is of no target."""
        try:
            resolve_target("native")
        except TargetError:
            return "there are no kernels for this instruction set"
        return None

    def probe(self, target: Target) -> MachineProbe:
        """The library of `ceilings.py`, compiled for a target that this machine has."""
        from .ceilings import build_probe

        return build_probe(target)

    def toolchain(self, target: Target) -> Mapping[str, str]:
        """The version of the compiler; ToolchainError without one."""
        return {"version": toolchain_for(target).version}

    @contextlib.contextmanager
    def rounding(self, log: Callable[[str], None]) -> Iterator[CompiledRounding]:
        """What `quantize.cpp` rounds, compiled for this machine beside other work."""
        from .quantizers import NOT_COMPILED, compiled_quantizers

        with contextlib.ExitStack() as stack:
            found = CompiledRounding()
            try:
                quantizers = stack.enter_context(compiled_quantizers(log))
                found = CompiledRounding(quantizers.table(), quantizers.feedback())
            except (OSError, InfcError) as error:  # no place or compiler for them
                log(f"{NOT_COMPILED}: {error}")
            yield found

    def rebuild(
        self, program: Program, made: Made, target: Target, directory: Path, options: EmitOptions
    ) -> Emission:
        """Write `code/` and `weights.safetensors` for another target, from the source in `made`.

        ArtifactError where that source is not what this infc generates.
        """
        from .rebuild import stored_weights

        before = generate(program, made.target)
        _check_source(before.files, made.directory)
        stored = stored_weights(program, before.weights, made)
        return self.emit(program, target, directory, replace(options, stored=stored))


@dataclass(frozen=True, slots=True)
class Generated:
    """The source of a step, and what it reads: files by name, weights in order, arena."""

    files: Mapping[str, bytes]
    weights: tuple[Weight, ...]
    arena_bytes: int


@dataclass(frozen=True, slots=True)
class CodeBuild:
    """The source of a program's step, and the library that is being compiled from it."""

    program: Program
    made: Generated
    library: LibraryBuild

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.library.stop()

    def finish(self, directory: Path, options: EmitOptions) -> Emission:
        """Write the weights while the library is compiled, then wait for it."""

        def on_weight(done: int, total: int) -> None:
            self.library.check()  # what the compiler refuses is told before minutes of writing
            if options.on_weight is not None:
                options.on_weight(done, total)

        weights = self.made.weights
        watched = replace(options, on_weight=on_weight)
        write_weights(self.program, weights, directory / WEIGHTS_FILE, watched)
        if options.on_wait is not None:
            options.on_wait("the C++ compiler")
        self.library.wait()
        return Emission(
            entry={"kind": "cpp-shared-library", "file": LIBRARY, "abi": ABI},
            weights=weights,
            arena_bytes=self.made.arena_bytes,
        )


def generate(program: Program, target: Target) -> Generated:
    """The source for a planned program; nothing is written or compiled."""
    emitter = Emitter(program, target)
    emit_calls(emitter)
    items = roll(read_ahead(place_barriers(emitter.calls)))
    weights = tuple(emitter.weights.entries.values())
    own = extension_headers([node.op for node in program.nodes])
    text = source_text(
        program,
        items,
        num_weights=len(weights),
        arena_bytes=emitter.arena_bytes,
        facts=step_facts(program, [(weight.name, weight.type) for weight in weights]),
        scratch=list(emitter.thread_scratch),
        includes=[f"{FOLDER}/{name}" for name in sorted(own)],
        kernels=list(emitter.kernels),
    )
    headers = {f"code/{FOLDER}/{name}": data for name, data in own.items()}
    headers |= {f"code/kernels/{path.name}": path.read_bytes() for path in KERNELS.glob("*.hpp")}
    units = unit_sources(emitter.kernels)
    headers |= {f"code/{name}": source.encode() for name, source in units.items()}
    files = {SOURCE: text.encode(), PROFILE: profile_text(items).encode(), **headers}
    return Generated(files, weights, emitter.arena_bytes)


def _check_source(files: Mapping[str, bytes], directory: Path) -> None:
    """Kernels, source and the layout of weights belong together: all three must be ours."""
    for name, data in sorted(files.items()):
        path = directory / name
        if not path.is_file() or path.read_bytes() != data:
            raise ArtifactError(
                "it is not what this infc generates, so its weights may lie otherwise",
                where=str(path),
                hint="rebuild with the infc that compiled it, or compile the model again",
            )


def _check_codes(node: Node) -> Verdict:
    """Whether there are kernels for the codes that a node makes or multiplies."""
    if node.attrs.get("codes", I8_ROWS.name) != I8_ROWS.name and node.op == "quantize_rows":
        return Verdict.no(f"there are no kernels for rows of {node.attrs['codes']}; {_OTHER_CODES}")
    if "scheme" in node.attrs:
        form = get_scheme(node.attrs["scheme"]).weight
        if not has_kernels(form):
            return Verdict.no(f"there are no kernels for matrices in {form.name}; {_OTHER_CODES}")
    return Verdict.yes()


def _check_operands(node: Node, program: Program) -> Verdict:
    copied = {"take": node.inputs[:1], "concat": node.inputs}.get(node.op, ())
    if any(operand in program.inputs and not _is_float(operand) for operand in copied):
        return Verdict.no(
            "whole numbers among the step's own arrays are read by index or in loops only"
        )
    matrices = [node.inputs[place] for place in PACKED_OPS.get(node.op, ())]
    if not all(isinstance(matrix, WeightRef) for matrix in matrices):
        return Verdict.no(f"what a {node.op} multiplies by must be a weight")
    if node.op == "rotary" and node.output.type.dtype is not DType.F32:
        return Verdict.no("angles are computed in float32 only")
    if node.op == "take" and node.attrs.get("dim", 0) != 0:
        return Verdict.no("only rows of the first dimension can be taken")
    rowwise = node.op in ("softmax", "gather", "scatter")
    if rowwise and node.attrs["dim"] != node.output.type.rank - 1:
        return Verdict.no("only over the last dimension")
    return Verdict.yes()


def _is_float(operand: Operand) -> bool:
    return isinstance(operand, Value) and operand.type.dtype.is_float


def emit_calls(emitter: Emitter) -> None:
    """Turn every node into calls, groups of loops as one, and hand the outputs over."""
    program = emitter.program
    by_output = {node.outputs[0].name: node for node in program.nodes if node.outputs}
    group_of: dict[str, list[Node]] = {}
    for names in loop_groups(program):
        nodes = [by_output[name] for name in names]
        group_of.update({node.outputs[0].name: nodes for node in nodes})
    hidden, further = program.output(HIDDEN), further_outputs(program)
    for node in program.nodes:
        if node.op in LOOP_OPS:
            group = group_of.get(node.output.name, [node])
            if node is group[-1]:
                emitter.nodes = tuple(group)
                lower_group(emitter, group)
        else:
            emitter.nodes = (node,)
            _lowering(node.op)(emitter, node)
        emitter.nodes = ()
        if hidden is not None and hidden.name in emitter.buffers:
            # At once, not at the end: a step that wants nothing of the head is done here.
            _store_hidden(emitter, hidden)
            if not further:
                emitter.statement(("if (!needs_head(s)) return;",), reads=(), writes=())
            hidden = None
    if (logits := program.output(LOGITS)) is not None:
        _store_logits(emitter, logits)
    for place, value in enumerate(further.values()):
        _store_rows(emitter, value, f"s.outputs[{place}]", "output")


def _lowering(op: str) -> Lowering:
    if op in LOWERINGS:
        return LOWERINGS[op]
    extension = find_extension(op)
    assert extension is not None, "supports() takes ops with a kernel only"
    return extension.lowering


def _store_hidden(emitter: Emitter, value: Value) -> None:
    """What enters the head leaves as float32 where the step has an array for it."""
    _store_rows(emitter, value, "hidden", "hidden", "if (hidden != nullptr) ")


def _store_rows(
    emitter: Emitter, value: Value, array: str, comment: str, condition: str = ""
) -> None:
    buffer = _floats(emitter, value)
    count = " * ".join(c_dim(dim) for dim in value.type.shape) or "1"
    widened = applied("widen_rows", "t", pointer(buffer), array, count)
    emitter.statement(
        (condition, *widened, ";"),
        reads=(buffer,),
        writes=(),
        comment=comment,
    )


def _store_logits(emitter: Emitter, value: Value) -> None:
    """The tokens that are drawn, and as float32 those rows that are wanted."""
    buffer = _floats(emitter, value)
    width = c_dim(value.type.shape[-1])
    emitter.thread_scratch[f"draw_scratch_bytes({width})"] = None
    emitter.call(
        emitter.apart("draw_tokens", buffer.ctype),
        (pointer(buffer), "s", width),
        reads=(buffer,),
        writes=(),
        comment="tokens",
    )
    emitter.call(
        "widen_chosen",
        (pointer(buffer), "s.logits_rows", "s.num_logits", "s.logits", width),
        reads=(buffer,),
        writes=(),
        comment="logits",
    )


def _floats(emitter: Emitter, value: Value) -> Buffer:
    assert value.type.dtype in (DType.F32, DType.BF16), f"%{value.name} is floating-point"
    return emitter.dense(emitter.buffer(value))
