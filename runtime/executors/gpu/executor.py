"""Executes steps on a GPU: carries out the launches of an artifact through a driver."""

from __future__ import annotations

import math
import os
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from ....ir.artifact import Artifact
from ....ir.errors import ArtifactError, DeviceError, InfcError
from ....ir.launches import LaunchPlan, read_launches
from ....ir.manifest import folder_of
from ....ir.types import DType
from ...sampling.adjustments import Mask
from ...sampling.draws import DRAW
from ...scheduling.step import Float32Array, Step, StepOutput
from ..base import (
    DEVICE,
    HOST,
    ExecutorConfig,
    Finished,
    ProfileEntry,
    Running,
    check_draws,
    check_hidden,
    check_rows,
)
from ..further import FurtherArrays, shape_of
from .arrays import GENERATION, Layout
from .driver import Bytes, Driver, Function
from .facts import StepFacts
from .launching import Piece, Places, ReadyForm, ReadyLaunch
from .memory import DeviceMemory
from .profile import GpuProfile
from .shapes import StepShape, StepShapes
from .staging import PinnedBuffer, raw, room
from .step_arrays import StepWriter, growing_arrays
from .weights import DeviceWeights

_DEPTH: Final = 1


@dataclass(slots=True, eq=False)
class _Turn:
    """Pinned memory of one of the steps in flight, used again once that step has ended."""

    upload: PinnedBuffer
    download: PinnedBuffer
    running: GpuStep | None = None


@dataclass(frozen=True, slots=True)
class _Rest:
    """What of a step is launched when its late masks come, which go to `address`."""

    pieces: list[Piece]
    shape: StepShape
    layout: Layout
    further: Mapping[str, int]
    address: int


@dataclass(slots=True, eq=False)
class GpuStep:
    """A step that was launched. What it returns is in pinned memory once `event` has passed.

    While it awaits late masks, it has a `rest` and no event.
    """

    executor: GpuExecutor
    step: Step
    turn: _Turn
    rest: _Rest | None = None
    event: object | None = None
    tokens: Bytes = field(default_factory=lambda: np.zeros(0, np.uint8))
    arrays: Mapping[str, tuple[Bytes, tuple[int, ...], np.dtype[np.generic]]] = field(
        default_factory=dict
    )
    output: StepOutput | None = None
    error: InfcError | None = None

    def result(self) -> StepOutput:
        """Wait for the step; see `Running.result`."""
        self.finish()
        if self.error is not None:
            raise self.error
        assert self.output is not None
        return self.output

    def finish(self) -> None:
        """Wait for the step, and take what it returned out of memory that others will use."""
        if self.output is not None or self.error is not None:
            return
        if self.event is None:
            self.error = InfcError("the masks of this step never came")
            return
        try:
            self.executor.wait(self.event)
        except DeviceError as error:
            self.error = error
            return
        found = {
            name: memory.view(kind).reshape(shape).copy()
            for name, (memory, shape, kind) in self.arrays.items()
        }
        logits: Float32Array = found.pop("logits")
        hidden = found.pop("hidden", None)
        self.output = StepOutput(self.tokens.view(np.int32).copy(), logits, hidden, found)


class GpuExecutor:
    """Runs steps on a GPU, each while the host plans the next."""

    depth = _DEPTH

    def __init__(self, artifact: Artifact, config: ExecutorConfig) -> None:
        from .cuda import CudaDriver

        driver = CudaDriver()
        try:
            self._open(artifact, config, driver, capture=True)
        except BaseException:
            driver.close()
            raise

    @classmethod
    def open_with(
        cls, artifact: Artifact, config: ExecutorConfig, driver: Driver, *, capture: bool = True
    ) -> GpuExecutor:
        """An executor that works through this driver, and closes it. Graphs only with `capture`."""
        executor = cls.__new__(cls)
        executor._open(artifact, config, driver, capture=capture)
        return executor

    def _open(
        self, artifact: Artifact, config: ExecutorConfig, driver: Driver, *, capture: bool
    ) -> None:
        program = artifact.manifest.program(config.program)
        where = str(artifact.path / program.entry.file)
        plan = read_launches(artifact.read_text(program.entry.file), where=where)
        _check_chip(plan, driver)
        self._driver = driver
        self._groups = tuple(group.name for group in program.resources)
        self._facts = StepFacts(plan, program, where)
        self._further = FurtherArrays(program)
        # Each is read from the text of a type, which would take half of a step's time on the host.
        self._vocab_size, self._hidden_width = program.vocab_size, program.hidden_width
        self._logits_of_tokens = program.logits_of_tokens
        self._mask_bytes = 4 * -(-(self._vocab_size or 0) // 32)
        weights = DeviceWeights(artifact, program)
        try:
            self._memory = DeviceMemory(driver, plan, program, weights, config.num_blocks)
            functions = _load(artifact, config.program, plan, driver)
            weights.upload(driver)
        finally:
            weights.close()
        self._generation = 0
        places = Places(
            self._memory.fixed, self._memory.packed, self._memory.grown, self._place_depends
        )
        forms = {
            form.name: ReadyForm(
                form,
                [ReadyLaunch(one, functions[one.kernel], places, driver) for one in form.launches],
            )
            for form in plan.forms
        }
        self._profile = GpuProfile.of(forms.values()) if config.profile else None
        self._shapes = StepShapes(plan, forms, self._facts.greatest, capture=capture)
        upload = self._memory.packed_bytes + sum(
            table.num_bytes for table in self._memory.tables.values()
        )
        self._turns = deque(
            _Turn(PinnedBuffer(driver, upload + 4096), PinnedBuffer(driver, 4096))
            for _ in range(_DEPTH + 2)
        )
        self._process = os.getpid()
        self._fault: DeviceError | None = None
        self._closed = False
        # Also where nobody calls close; not at the end of the process, which waits for no step.
        self._end = weakref.finalize(self, _end, driver, os.getpid())
        self._end.atexit = False

    def _place_depends(self, name: str) -> set[str]:
        if name in self._memory.growing:
            return {GENERATION}
        return self._memory.layouts.sizes_before(name)

    # Steps

    def launch(self, step: Step) -> Running:
        """Start the step; see `Executor.launch`.

        Raises CapacityError for a step beyond the limits that were compiled in, DeviceError where
        the GPU failed, now or before, InfcError once it is closed and in a forked process.
        """
        self._check(step)
        if step.num_tokens == 0 and not step.inputs:
            empty = np.empty((step.num_logits, self._vocab_size or 0), np.float32)
            return Finished(StepOutput(np.empty(len(step.draws), np.int32), empty))
        turn = self._turns[0]
        if turn.running is not None:
            turn.running.finish()
        self._turns.rotate(-1)
        try:
            turn.running = self._run(step, turn)
        except BaseException as error:
            # What was not uploaded must not pass for what the device has.
            for table in self._memory.tables.values():
                table.forget()
            if isinstance(error, DeviceError):
                self._fault = error
            raise
        return turn.running

    def _check(self, step: Step) -> None:
        if self._closed:
            raise InfcError("the engine is closed")
        if os.getpid() != self._process:
            raise InfcError(
                "the engine was opened before this process was forked, and its GPU cannot be used"
                " in this process",
                hint="open the artifact after the fork",
            )
        if self._fault is not None:
            raise self._failed(self._fault)
        assert step.draws.dtype == DRAW
        self._facts.check(step)
        check_hidden(step, self._hidden_width)
        check_draws(step, self._vocab_size)
        check_rows(step, self._logits_of_tokens)

    def _run(self, step: Step, turn: _Turn) -> GpuStep:
        driver, memory, a = self._driver, self._memory, step.adjustments
        num_late = 0 if a is None else a.num_late
        further = self._further.sizes(step) if self._further.any or step.inputs else {}
        shape, tiles = self._shapes.of(step, further)
        growing = growing_arrays(step, self._groups, shape.sizes["C"])
        sizes = {name: len(content) for name, content in growing.items()}
        if a is not None and num_late:
            sizes["masks"] = (len(a.masks) + num_late) * self._mask_bytes
        for name, size in sizes.items():
            self._generation += memory.growing[name].make_room(size)
        shape.sizes[GENERATION] = self._generation
        layout = memory.layouts.of(shape.sizes)
        tables = sum(table.num_bytes for table in memory.tables.values())
        turn.upload.reserve(room(layout.num_bytes, tables, *sizes.values()) + 4096)
        packed = turn.upload.take(layout.num_bytes)
        StepWriter(packed, layout, shape.sizes).write(step, self._groups, tiles)
        driver.upload(memory.packed, packed)
        for name, table in zip(self._groups, step.block_tables, strict=True):
            for address, content in memory.tables[name].changes(table):
                self._upload(turn, address, content)
        for name, content in growing.items():
            self._upload(turn, memory.growing[name].address, content)
        running, pieces = GpuStep(self, step, turn), shape.form.pieces(shape.active)
        if a is not None and num_late:
            pieces, rest = shape.form.halves(shape.active)
            address = memory.growing["masks"].address + len(a.masks) * self._mask_bytes
            running.rest = _Rest(rest, shape, layout, further, address)
        self._carry_out(pieces, shape, layout)
        if running.rest is None:
            self._download(running, further)
        return running

    def give_masks(self, running: Running, masks: Mask) -> None:
        """Launch the rest of a step, now that its masks are known; see `TakesLateMasks`."""
        assert isinstance(running, GpuStep) and running.rest is not None
        rest, running.rest = running.rest, None
        if self._fault is not None:
            raise self._failed(self._fault)
        try:
            self._upload(running.turn, rest.address, raw(masks))
            self._carry_out(rest.pieces, rest.shape, rest.layout)
            self._download(running, rest.further)
        except DeviceError as error:
            self._fault = error
            raise

    def _carry_out(self, pieces: Sequence[Piece], shape: StepShape, layout: Layout) -> None:
        for piece in pieces:
            if self._profile is None:
                piece.run(self._driver, shape.sizes, layout, capture=shape.captured)
            else:
                self._profile.run(self._driver, piece.launches, shape.sizes, layout)

    def _upload(self, turn: _Turn, address: int, content: Bytes) -> None:
        pinned = turn.upload.take(len(content))
        pinned[:] = content
        self._driver.upload(address, pinned)

    def _download(self, running: GpuStep, further: Mapping[str, int]) -> None:
        """Ask for what the step returns, and for an event behind it."""
        step, turn = running.step, running.turn
        width, rows = self._vocab_size or 0, len(step.logits_index)
        float32 = np.dtype(np.float32)
        shapes: dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]] = {
            "logits": ((step.num_logits, width), float32)
        }
        if step.wants_hidden:
            shapes["hidden"] = (rows, self._hidden_width or 0), float32
        for name, kind in self._further.outputs.items():
            shapes[name] = shape_of(kind, further), _NUMPY[kind.dtype]
        wanted = {name: math.prod(shape) * kind.itemsize for name, (shape, kind) in shapes.items()}
        tokens_bytes = 4 * len(step.draws)
        turn.download.reserve(room(tokens_bytes, *wanted.values()))
        tokens = turn.download.take(tokens_bytes)
        if tokens_bytes:
            self._driver.download(tokens, self._memory.tokens)
        arrays = {}
        for name, num_bytes in wanted.items():
            target = turn.download.take(num_bytes)
            if num_bytes:
                self._driver.download(target, self._memory.outputs[name])
            arrays[name] = (target, *shapes[name])
        running.tokens, running.arrays = tokens, arrays
        running.event = self._driver.record_event()

    def wait(self, event: object) -> None:
        """Wait until an event has passed; where the GPU has failed, nothing works any more."""
        if self._fault is not None:
            raise self._failed(self._fault)
        try:
            self._driver.wait(event)
        except DeviceError as error:
            self._fault = error
            raise

    def _failed(self, fault: DeviceError) -> DeviceError:
        return DeviceError(
            f"the GPU failed in an earlier step: {fault.message}", hint="start the engine again"
        )

    def work_ahead(self, seconds: float) -> bool:
        """Capture graphs of usual steps for about so long, the largest first; whether any is left.

        Steps that come meanwhile wait for the one that is being captured, a millisecond or so.
        """
        if self._closed or self._fault is not None:
            return False
        end = time.perf_counter() + seconds
        for shape in self._shapes.usual():
            shape.sizes[GENERATION] = self._generation
            layout = self._memory.layouts.of(shape.sizes)
            for piece in shape.form.pieces(shape.active):
                captured = piece.capture(self._driver, shape.sizes, layout)
                if captured and time.perf_counter() >= end:
                    return True
        return False

    def touched_bytes(self) -> dict[str, int]:
        """All of the device's memory, which a driver commits at once."""
        return {DEVICE: 0 if self._closed else self._memory.num_bytes, HOST: 0}

    def profile(self) -> list[ProfileEntry]:
        """What each launch of the steps so far took; empty unless opened with `profile`."""
        return [] if self._profile is None else self._profile.entries(self._driver)

    def close(self) -> None:
        """Wait for what runs and give the memory back; a second call does nothing."""
        if not self._closed:
            self._closed = True
            for turn in self._turns:
                if turn.running is not None:
                    turn.running.finish()
            self._turns.clear()
            self._end()


_NUMPY: Final[Mapping[DType, np.dtype[np.generic]]] = {
    DType.F32: np.dtype(np.float32),
    DType.I32: np.dtype(np.int32),
}


def _end(driver: Driver, process: int) -> None:
    if os.getpid() == process:  # a fork has no part in the GPU
        driver.close()


def _check_chip(plan: LaunchPlan, driver: Driver) -> None:
    """DeviceError where machine code of the artifact is that of another chip."""
    major, minor = driver.device.capability
    here = f"sm_{major}{minor}"
    if plan.target.rstrip("abcdefghijklmnopqrstuvwxyz") != here:
        raise DeviceError(
            f"the artifact was compiled for {plan.target}, this GPU is {here}"
            f" ({driver.device.name})",
            hint=f"`infc rebuild ARTIFACT --target {here}` compiles its kernels for this GPU",
        )


def _load(
    artifact: Artifact, program: str, plan: LaunchPlan, driver: Driver
) -> dict[str, Function]:
    """The kernels by their names; ArtifactError for a file that there is not."""
    folder, functions, images = folder_of(program), {}, {}
    for name, kernel in plan.kernels.items():
        image = folder + kernel.image
        if image not in images:
            images[image] = _read(artifact, image)
        source = _read(artifact, folder + kernel.source).decode(errors="replace")
        functions[name] = driver.load(
            images[image], source, kernel.entry, kernel.threads, kernel.shared_bytes
        )
    return functions


def _read(artifact: Artifact, name: str) -> bytes:
    if name not in artifact.manifest.files:
        raise ArtifactError(
            f"the launches name {name}, which the artifact does not have",
            where=str(artifact.path),
            hint="the artifact is damaged: compile it again",
        )
    handle = artifact.open_file(name)
    with open(handle, "rb") as file:
        return file.read()
