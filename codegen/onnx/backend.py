"""The ONNX backend: a model whose tensors lie in the artifact's file of weights."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Final

from ...ir.errors import ToolchainError
from ...ir.extras import ONNX, ONNX_COMPILE
from ...ir.formats import Format
from ...ir.onnx_session import OLDEST, OLDEST_GROUPED, check_version, install_hint, is_older
from ...ir.program import Node, Program
from ...ir.resources import is_coded
from ...ir.row_codes import I8_ROWS
from ...ir.schemes import get_scheme
from ...ir.slots import has_slots
from ...ir.targets import Target
from ...ir.types import DType, TensorType
from ..base import WEIGHTS_FILE, Backend, Emission, EmitOptions, Need, Verdict
from ..weights_file import write_weights
from .options import OnnxOptions

MODEL_FILE: Final = "model.onnx"
SEQUENCE_FILE: Final = "sequence.onnx"
SESSION_FILE: Final = "session.json"
ENTRY: Final = "onnx-model"
MOST_SLOT_BYTES: Final = 1 << 30
"""What slots of all sequences may take where nobody asked for them."""


class OnnxBackend(Backend):
    """A model in ONNX, for onnxruntime and whatever else reads it."""

    name: ClassVar[str] = "onnx"

    def __init__(self, options: OnnxOptions | None = None) -> None:
        self.options = options or OnnxOptions()

    def supports(self, node: Node, program: Program, target: Target) -> Verdict:
        """Whether the op can be said in ONNX, and onnxruntime has kernels for its types."""
        ONNX_COMPILE.require("compiling for the backend onnx")
        from .lower import LOWERED

        if node.op not in LOWERED:
            return Verdict.no("there is no op in ONNX for it")
        if "scheme" in node.attrs and not self.can_hold(get_scheme(node.attrs["scheme"]).weight):
            return Verdict.no("ONNX has no type for such codes: choose int8 or q4_0")
        if node.op == "quantize_rows" and node.attrs["codes"] != I8_ROWS.name:
            return Verdict.no("rows are quantized to int8 only: choose int8 or q4_0")
        types = [program.operand_type(operand) for operand in node.inputs]
        types += [value.type for value in node.outputs]
        if any(isinstance(kind, TensorType) and kind.dtype is DType.F64 for kind in types):
            return Verdict.no("float64 is not built")
        return Verdict.yes()

    def can_hold(self, form: Format) -> bool:
        """Whether a format can be multiplied."""
        from .layouts import can_store

        return can_store(form)

    def can_multiply(self, dtype: str) -> bool:
        """Matrices of 16 bits are widened, whichever these are."""
        return True

    def can_cache(self, dtype: str) -> bool:
        """Elements alone: there are no ops that read codes of rows."""
        return not is_coded(dtype)

    def plan_passes(self, target: Target) -> str:
        """Blocks that hold a whole context, where keys and values lie, or may lie, in slots."""
        if self.options.kv == "auto" and self.options.dialect == "onnxruntime":
            return f"one-block-each{{plain=true,most_bytes={MOST_SLOT_BYTES}}}"
        return "one-block-each" if self.options.kv == "slots" else ""

    def _form(self, program: Program) -> str:
        """Where a lowered program's keys and values lie: `paged` or `slots`."""
        if self.options.kv != "auto":
            return self.options.kv
        is_meant = self.options.dialect == "onnxruntime"
        return "slots" if is_meant and has_slots(program) else "paged"

    def emit(
        self, program: Program, target: Target, directory: Path, options: EmitOptions
    ) -> Emission:
        """Write the weights, and the model that names them, beside each other."""
        toolchain = dict(self.toolchain(target))
        self.check(program, target)
        from .checks import check_model
        from .contrib import is_grouped
        from .memory import slots_bytes, step_bytes, widened_bytes
        from .step import emit_graph, finish_model, session_file
        from .trial import expected_logits

        form = self._form(program)
        emitted = emit_graph(program, form, self.options.dialect)
        weights = emitted.weights
        # Readers of ONNX take data from files beside the model alone: nothing lies elsewhere.
        write_weights(program, weights, directory / WEIGHTS_FILE, replace(options, shared=None))
        (directory / SESSION_FILE).write_text(session_file(emitted), encoding="utf-8")
        models = {MODEL_FILE: emitted}
        if self.options.whole_sequence:
            models[SEQUENCE_FILE] = emit_graph(program, "none", self.options.dialect)
        if options.on_wait is not None:
            options.on_wait("a trial run")
        expected = expected_logits(program, options.pairs) if options.verify else None
        for name, made in models.items():
            model = finish_model(made, weights, directory)
            (directory / name).write_bytes(model.SerializeToString(deterministic=True))
            check_model(directory / name, program, expected)
        attended = 0
        if form == "slots":
            own = is_grouped if self.options.dialect == "onnxruntime" else lambda *_: False
            attended = slots_bytes(program, own)
        return Emission(
            entry={"kind": ENTRY, "file": MODEL_FILE},
            weights=weights,
            arena_bytes=step_bytes(program) + widened_bytes(weights) + attended,
            toolchain=toolchain,
            shares=False,
        )

    @property
    def oldest(self) -> str:
        """The oldest onnxruntime that runs what is made with these options."""
        is_grouped = self.options.kv != "paged" and self.options.dialect == "onnxruntime"
        return OLDEST_GROUPED if is_grouped else OLDEST

    def needs(self) -> Iterator[Need]:
        """The packages onnx, which writes models, and onnxruntime, which tries them."""
        for name in ONNX_COMPILE.libraries:
            version = _version(name)
            if version is None:
                yield Need(name, False, f"not installed: {ONNX_COMPILE.install}")
            elif name in ONNX.libraries and is_older(version, self.oldest):
                yield Need(name, False, f"{version} is too old: {install_hint(self.oldest)}")
            else:
                yield Need(name, True, version)

    def unable_here(self) -> str | None:
        """An onnxruntime that is too old for any model."""
        version = _version("onnxruntime")
        if version is None or not is_older(version, OLDEST):
            return None
        return f"onnxruntime {version} is too old: {install_hint(OLDEST)}"

    def toolchain(self, target: Target) -> Mapping[str, str]:
        """The version of onnx; ToolchainError without the packages, or where one is too old."""
        ONNX_COMPILE.require("compiling for the backend onnx")
        if (version := _version("onnx")) is None:
            raise ToolchainError("onnx has no version", hint=ONNX_COMPILE.install)
        check_version(str(_version("onnxruntime")), self.oldest, "what is to be compiled")
        return {"onnx": version}


def _version(name: str) -> str | None:
    """The version of a module, whatever the distribution is called that brings it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        return str(importlib.import_module(name).__version__)
    except ImportError:
        return None
