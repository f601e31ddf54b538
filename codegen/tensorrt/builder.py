"""A thin builder: a model in ONNX becomes an engine for several chips, with no driver needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from ...ir.errors import ProgramError, TargetError
from ...ir.tensorrt_engine import StepProfile, import_library
from .profiles import Extents

CHIPS: Final = ("sm_80", "sm_86", "sm_89", "sm_120")
"""The targets that TensorRT-RTX builds engines with attention for."""

_REASONS: Final = 3
_REASON_LENGTH: Final = 300
_IDLE: Final = ("Make sure input", "is unused or used only", "Unused Input")
"""What TensorRT warns of in every network."""


def build_engine(
    model: Path,
    chips: Sequence[str],
    profiles: Sequence[StepProfile],
    extents: Callable[[StepProfile, str, Sequence[int]], Extents | None],
) -> memoryview:
    """The engine of a model, whose weights may lie in files beside it.

    `extents` says which shapes of an input a profile has, or None where it has only one.
    ProgramError with TensorRT's own reason where it refuses the model.
    """
    _, library = import_library()
    log = _logger(library)
    builder = library.Builder(log)
    strong = 1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strong)
    parser = library.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        errors = [parser.get_error(place) for place in range(parser.num_errors)]
        told = [f"{one.desc()} (node {one.node_name() or 'unknown'})" for one in errors]
        raise _refused(model.stem, "read", told or log.lines)
    config = builder.create_builder_config()
    _set_chips(library, config, chips)
    inputs = [network.get_input(place) for place in range(network.num_inputs)]
    for one in profiles:
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            shapes = extents(one, tensor.name, tuple(tensor.shape))
            if shapes is not None:
                profile.set_shape(tensor.name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise _refused(model.stem, f"give a profile of {one} to", log.lines)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _refused(model.stem, f"build for {', '.join(chips)}", log.lines)
    return memoryview(engine)


def _set_chips(library: Any, config: Any, chips: Sequence[str]) -> None:
    """Tell the chips; TargetError where the library builds for the GPU of this machine alone."""
    kinds = getattr(library, "ComputeCapability", None)
    if kinds is None:
        if len(chips) > 1:
            raise TargetError(
                f"tensorrt {library.__version__} builds for the GPU of this machine alone",
                hint="leave tensorrt.chips empty, or pip install tensorrt-rtx",
            )
        return
    config.num_compute_capabilities = len(chips)
    for place, chip in enumerate(chips):
        config.set_compute_capability(getattr(kinds, chip.upper().replace("_", "")), place)


def _logger(library: Any) -> Any:
    class Lines(library.ILogger):  # type: ignore[misc]  # known only when it is imported
        """Keeps warnings and errors for the message of a refusal."""

        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            """Called by TensorRT for each line."""
            is_idle = any(part in text for part in _IDLE)
            if severity <= library.ILogger.WARNING and not is_idle:
                self.lines.append(text)

    return Lines()


def _refused(name: str, what: str, reasons: Sequence[str]) -> ProgramError:
    told = "; ".join(" ".join(text.split())[:_REASON_LENGTH] for text in reasons[-_REASONS:])
    return ProgramError(
        f"TensorRT could not {what} the model: {told or 'it does not say why'}",
        where=name,
        hint="backend: onnx runs every op on a processor, backend: triton most on a GPU",
    )
