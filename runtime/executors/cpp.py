"""Executes steps with the generated library: weights, KV cache and arena in memory of its own."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import time
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ir.artifact import Artifact
from ...ir.errors import ArtifactError, CapacityError, InfcError
from ...ir.sizes import format_count
from ...ir.step_facts import check_step_facts
from ...ir.targets import check_target
from ..sampling.adjustments import ADJUSTED, Adjustments
from ..sampling.draws import DRAW
from ..scheduling.step import Float32Array, Int32Array, Step, StepOutput
from .address_space import resident_bytes
from .base import (
    HOST,
    ExecutorConfig,
    Finished,
    ProfileEntry,
    check_draws,
    check_hidden,
    check_rows,
)
from .cpp_abi import AdjustmentArrays, Config, GroupStep, StepArrays, load_library
from .cpp_profile import CppProfile
from .further import FurtherArrays
from .program_weights import ProgramWeights
from .reserve import reserve

_COPIED_SHARE = 1 / 8
"""Of the time of steps, what copying weights may take beside them until all are copied."""


class CppExecutor:
    """Runs steps on the CPU."""

    depth = 0

    def __init__(self, artifact: Artifact, config: ExecutorConfig) -> None:
        program = artifact.manifest.program(config.program)
        check_target(artifact.manifest.target.features, where=str(artifact.path))
        self._vocab_size = program.vocab_size
        self._hidden_width = program.hidden_width
        self._limits = program.limits
        self._logits_of_tokens = program.logits_of_tokens
        self._further = FurtherArrays(program)
        self._library = load_library(artifact.path / program.entry.file)
        artifact.check_in_place(program.entry.file)
        self._step_seconds = 0.0
        self._weights = ProgramWeights(artifact, program, config.weights)
        facts = json.loads(self._library.infc_facts())
        where = str(artifact.path)
        check_step_facts(facts, program, self._weights.entries, where=where)
        groups = program.resources
        self._kv = [
            reserve(count * group.bytes_per_block())
            for group, count in zip(groups, config.num_blocks, strict=True)
        ]
        self._arena = reserve(program.arena_bytes)
        self._process = os.getpid()
        self._profile = CppProfile(artifact, program, self._library) if config.profile else None
        self._handle = self._open(program.weights.tensors, config)
        # Also where nobody calls close; not at the end of the process, which waits for no step.
        self._end = weakref.finalize(self, _end_session, self._library, self._handle, os.getpid())
        self._end.atexit = False
        self._groups = (GroupStep * max(1, len(groups)))()

    def _open(self, names: Sequence[str], config: ExecutorConfig) -> int:
        weights = [self._weights.address(name) for name in names]
        profile = self._profile
        tables = Config(
            abi=self._library.infc_abi(),
            num_threads=config.num_threads,
            num_weights=len(weights),
            weights=(ctypes.c_void_p * max(1, len(weights)))(*weights),
            num_groups=len(self._kv),
            kv=(ctypes.c_void_p * max(1, len(self._kv)))(*(_address(kv) for kv in self._kv)),
            arena=_address(self._arena),
            arena_bytes=len(self._arena),
            pin_threads=int(config.pin),
            num_profile=profile.num_entries if profile else 0,
            profile=profile.address if profile else None,
        )
        handle = self._library.infc_open(ctypes.byref(tables))
        if not handle and ctypes.get_errno() == errno.EAGAIN:
            raise CapacityError(
                f"cannot start {format_count(config.num_threads, 'thread')}: {self._message()}",
                hint="lower threads (--threads, or runtime.threads in the recipe)",
            )
        if not handle:
            raise ArtifactError(f"the generated library cannot be opened: {self._message()}")
        return int(handle)

    def launch(self, step: Step) -> Finished:
        """Compute the step; see `Executor.launch`.

        Raises CapacityError for a step beyond the limits that were compiled in, InfcError once
        it is closed and in a forked process.
        """
        if not self._handle:
            raise InfcError("the engine is closed")
        if os.getpid() != self._process:
            raise InfcError(
                "the engine was opened before this process was forked, and its threads do not"
                " exist in this process",
                hint="open the artifact after the fork",
            )
        rows = len(step.logits_index)
        assert step.draws.dtype == DRAW and not len(step.carried)
        if step.num_tokens > self._limits.step_tokens or rows > self._limits.logit_rows:
            raise CapacityError(
                f"a step of {step.num_tokens} tokens and {rows} rows of logits exceeds the "
                f"compiled limits {self._limits.step_tokens} and {self._limits.logit_rows}"
            )
        check_hidden(step, self._hidden_width)
        check_draws(step, self._vocab_size)
        check_rows(step, self._logits_of_tokens)
        tokens = np.empty(len(step.draws), np.int32)
        logits = np.empty((step.num_logits, self._vocab_size or 0), dtype=np.float32)
        hidden = None
        if step.wants_hidden:
            hidden = np.empty((rows, self._hidden_width or 0), dtype=np.float32)
        output = StepOutput(tokens, logits, hidden)
        if step.num_tokens == 0 and not step.inputs:
            return Finished(output)
        for index, group in enumerate(self._groups[: len(self._kv)]):
            table, copies = step.block_tables[index], step.block_copies[index]
            group.block_table = _pointer(table)
            group.slots = _pointer(step.slots[index])
            group.copies = _pointer(copies)
            group.table_width = table.shape[1]
            group.num_copies = len(copies)
        arrays = StepArrays(
            num_tokens=step.num_tokens,
            num_rows=rows,
            num_sequences=step.num_sequences,
            token_ids=_pointer(step.token_ids),
            positions=_pointer(step.positions),
            query_starts=_pointer(step.query_starts),
            context_lengths=_pointer(step.context_lengths),
            logits_index=_pointer(step.logits_index),
            groups=self._groups,
            hidden=None if hidden is None else _data(hidden),
            num_logits=step.num_logits,
            logits_rows=None if step.logits_rows is None else _pointer(step.logits_rows),
            num_draws=len(step.draws),
            draws=_data(step.draws),
            tokens=_pointer(tokens),
            adjustments=adjustment_arrays(step.adjustments),
            logits=_data(logits),
        )
        if self._further.any or step.inputs:
            output.others = self._give_further(step, arrays)
        # Never before the first step, which somebody has waited for longest.
        if self._step_seconds:
            self.work_ahead(self._step_seconds * _COPIED_SHARE)
        begun = time.perf_counter()
        if self._library.infc_run(self._handle, ctypes.byref(arrays)):
            raise InfcError(f"the step failed: {self._message()}")
        self._step_seconds = time.perf_counter() - begun
        return Finished(output)

    def _give_further(self, step: Step, arrays: StepArrays) -> dict[str, Float32Array]:
        """Let the step have its further arrays; those that it fills."""
        further = self._further
        sizes = further.sizes(step)
        outputs = further.empty_outputs(sizes)
        inputs = [step.inputs[name].ctypes.data for name in further.inputs]
        filled = [array.ctypes.data for array in outputs.values()]
        known = [sizes[symbol] for symbol in further.symbols]
        arrays.inputs = (ctypes.c_void_p * max(1, len(inputs)))(*inputs)
        arrays.outputs = (ctypes.c_void_p * max(1, len(filled)))(*filled)
        arrays.sizes = (ctypes.c_int64 * max(1, len(known)))(*known)
        return outputs

    def work_ahead(self, seconds: float) -> bool:
        """Copy weights into huge pages for about so long; whether any are left to copy."""
        return self._weights.copy(seconds)

    def touched_bytes(self) -> dict[str, int]:
        """What lies in memory of the weights' own, the KV cache and the arena."""
        if not self._handle:
            return {HOST: 0}
        own = [*self._kv, self._arena]
        touched = sum(resident_bytes(_address(memory), len(memory)) for memory in own)
        return {HOST: touched + self._weights.taken_bytes}

    def profile(self) -> list[ProfileEntry]:
        """What each statement of the steps so far took; empty unless opened with `profile`."""
        return self._profile.entries() if self._profile else []

    def close(self) -> None:
        """Stop the threads and give the memory back; a second call does nothing."""
        if self._handle:
            self._end()
            self._handle = 0
            self._weights.close()
            self._kv, self._arena = [], mmap.mmap(-1, 1)

    def _message(self) -> str:
        return str(self._library.infc_error().decode(errors="replace"))


def _end_session(library: ctypes.CDLL, handle: int, process: int) -> None:
    if os.getpid() == process:  # a fork has none of the threads to wait for
        library.infc_close(handle)


def adjustment_arrays(adjustments: Adjustments | None) -> ctypes._Pointer[AdjustmentArrays] | None:
    if adjustments is None:
        return None
    a = adjustments
    assert a.rows.dtype == ADJUSTED and a.masks.flags.c_contiguous
    arrays = AdjustmentArrays(
        rows=_data(a.rows),
        bias_ids=_pointer(a.bias_ids),
        bias=_data(a.bias),
        count_ids=_pointer(a.count_ids),
        counts=_pointer(a.counts),
        masks=_data(a.masks),
        mask_words=a.masks.shape[1],
        num_rows=len(a.rows),
    )
    return ctypes.pointer(arrays)


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _pointer(array: Int32Array) -> int:
    assert array.dtype == np.int32 and array.flags.c_contiguous, "see docs/design/step.md"
    return _data(array)


def _data(array: NDArray[Any]) -> int:
    """Where an array lies. Takes a third of the time of `array.ctypes.data`."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
    except (TypeError, ValueError):  # it is read-only, or has no elements
        return int(array.ctypes.data)
