"""Executes steps with an engine of TensorRT; decode steps are captured as CUDA graphs."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ...ir.artifact import Artifact
from ...ir.errors import DeviceError, InfcError
from ...ir.manifest import CompiledProgram
from ...ir.program import HIDDEN, LOGITS
from ...ir.resources import KvGroup
from ...ir.tensorrt_engine import ALIGNMENT
from ..scheduling.step import Float32Array, Step
from .base import (
    DEVICE,
    HOST,
    ExecutorConfig,
    Finished,
    check_draws,
    check_hidden,
    check_rows,
    head_output,
)
from .gpu.driver import Driver
from .gpu.staging import PinnedBuffer, room
from .gpu.weights import DeviceWeights
from .tensorrt_engine import Engine, read_engine, slot_bytes, slot_shape
from .tensorrt_feeds import Feeds, Part, StepParts, part_feeds

_MOST_GRAPHS: Final = 64


@dataclass(slots=True)
class _Captured:
    """A context that is bound for one combination of sizes, and its graph once it has run."""

    context: Any
    graph: object | None = None


class TensorrtExecutor:
    """Runs steps of one program on a GPU, one after the other.

    The arrays of a step lie in fixed places, so that a graph of a decode bucket is replayed for
    every step with the same slots and as many keys.
    """

    depth = 0

    def __init__(self, artifact: Artifact, config: ExecutorConfig) -> None:
        compiled = artifact.manifest.program(config.program)
        image = read_engine(artifact, compiled)  # before the GPU is looked for

        from .gpu.cuda import CudaDriver

        with contextlib.ExitStack() as failed:
            driver = CudaDriver()
            failed.callback(driver.close)
            weights = DeviceWeights(artifact, compiled, aligned=True)
            self._engine = Engine(image, compiled, weights.entries, driver)
            failed.callback(self._engine.close)  # before the driver
            self._open(compiled, config, weights, driver)
            failed.pop_all()

    def _open(
        self,
        compiled: CompiledProgram,
        config: ExecutorConfig,
        weights: DeviceWeights,
        driver: Driver,
    ) -> None:
        self._compiled, self._driver, self._closed = compiled, driver, False
        self._fault: DeviceError | None = None
        self._groups = tuple(g for g in compiled.resources if isinstance(g, KvGroup))
        self._profiles = self._engine.facts.profiles
        most = max(one.rows for one in self._profiles)
        # A bucket is bound to as many slots as it has rows, wherever its sequences lie.
        self._num_slots = [max(count, most) for count in config.num_blocks]
        self._lengths = [np.zeros(count, np.int64) for count in self._num_slots]
        self._parts = StepParts(
            self._profiles,
            self._num_slots,
            compiled.limits.max_context,
        )
        weights.upload(driver)
        found = {name: weights.address(name) for name in weights.entries}
        self._places = {name: place for name, place in found.items() if place is not None}
        self._pools = self._allocate_pools()
        self._allocate_arrays()
        self._contexts: dict[int, Any] = {}
        self._captured: OrderedDict[tuple[int, ...], _Captured] = OrderedDict()
        self._upload = PinnedBuffer(driver, self._array_bytes)
        self._download = PinnedBuffer(driver, sum(self._output_bytes.values()))

    def _allocate_pools(self) -> dict[str, int]:
        """Keys and values by layer and part, all zero: what was never written is masked, and must
        not be NaN."""
        pools = {}
        for group, count in zip(self._groups, self._num_slots, strict=True):
            for layer in group.layers:
                for part in ("key", "value"):
                    size = count * slot_bytes(group, part)
                    address = self._driver.allocate(size, f"the KV cache, group {group.name}")
                    self._driver.fill(address, size, 0)
                    pools[f"{layer}.{part}"] = address
        return pools

    def _allocate_arrays(self) -> None:
        """Places of the arrays that every part takes and gives, at their greatest sizes."""
        most = {name: max(getattr(one, name) for one in self._profiles)
                for name in ("rows", "queries", "tokens", "logit_rows")}  # fmt: skip
        padded = max(one.rows * one.queries for one in self._profiles)
        counts = {"input_ids": most["tokens"], "positions": most["tokens"],
                  "logits_index": most["logit_rows"]}  # fmt: skip
        for group in self._groups:
            counts |= {
                f"row_of_padded.{group.name}": padded,
                f"padded_of_row.{group.name}": most["tokens"],
                f"write_at.{group.name}": most["rows"],
                f"key_places.{group.name}": self._compiled.limits.max_context,
            }
        self._offsets, at = {}, 0
        for name, count in counts.items():
            self._offsets[name] = at
            at += -(-count * 8 // ALIGNMENT) * ALIGNMENT
        self._array_bytes = at
        self._arrays = self._driver.allocate(at, "the arrays of a step")
        self._places |= {name: self._arrays + offset for name, offset in self._offsets.items()}
        widths = {LOGITS: self._compiled.vocab_size, HIDDEN: self._compiled.hidden_width}
        self._output_bytes = {
            name: 4 * most["logit_rows"] * (widths[name] or 0) for name in self._compiled.outputs
        }
        for name, size in self._output_bytes.items():
            self._places[name] = self._driver.allocate(max(1, size), f"the output {name}")

    def launch(self, step: Step) -> Finished:
        """Compute the step; see `Executor.launch`."""
        if self._closed:
            raise InfcError("the engine is closed")
        if self._fault is not None:
            raise DeviceError(
                f"the GPU failed in an earlier step: {self._fault.message}",
                hint="start the engine again",
            )
        compiled = self._compiled
        check_hidden(step, compiled.hidden_width)
        check_draws(step, compiled.vocab_size)
        check_rows(step, compiled.logits_of_tokens)
        rows = len(step.logits_index)
        widths = {LOGITS: compiled.vocab_size, HIDDEN: compiled.hidden_width}
        results: dict[str, Float32Array] = {
            name: np.zeros((rows, widths[name] or 0), np.float32) for name in compiled.outputs
        }
        try:
            self._copy_blocks(step)
            for part in self._parts.of(step):
                self._compute(step, part, results)
        except DeviceError as error:
            self._fault = error
            raise
        logits = results.get(LOGITS, np.zeros((rows, 0), np.float32))
        hidden = results.get(HIDDEN) if step.wants_hidden else None
        return Finished(head_output(step, logits, hidden))

    def _copy_blocks(self, step: Step) -> None:
        copied = zip(self._groups, self._lengths, step.block_copies, strict=True)
        for group, lengths, copies in copied:
            for source, target in copies.tolist():
                lengths[target] = lengths[source]
                for layer in group.layers:
                    for part in ("key", "value"):
                        size, pool = slot_bytes(group, part), self._pools[f"{layer}.{part}"]
                        self._driver.copy(pool + target * size, pool + source * size, size)

    def _compute(self, step: Step, part: Part, results: Mapping[str, Float32Array]) -> None:
        """Compute a part of a step, and put what it gives into the results of the step."""
        driver = self._driver
        feeds = part_feeds(step, part, self._profiles[part.profile], self._groups, self._lengths)
        self._upload.reserve(room(self._array_bytes))
        packed = self._upload.take(self._array_bytes)
        for name, array in feeds.arrays.items():
            begin = self._offsets[name]
            packed[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
        driver.upload(self._arrays, packed)
        self._run(part, feeds)
        for lengths, slots in zip(self._lengths, part.slots, strict=True):
            lengths[slots] = step.context_lengths[part.sequences]
        found = len(feeds.logit_rows)
        wanted = {n: 4 * found * array.shape[1] for n, array in results.items()}
        self._download.reserve(room(*wanted.values()))
        targets = {name: self._download.take(size) for name, size in wanted.items()}
        for name, target in targets.items():
            driver.download(target, self._places[name])
        driver.wait(driver.record_event())
        for name, target in targets.items():
            rows = target.view(np.float32).reshape(found, results[name].shape[1])
            results[name][feeds.logit_rows] = rows

    def _run(self, part: Part, feeds: Feeds) -> None:
        """Ask for a part: as a graph where one was captured for these sizes.

        A context runs once before it is captured, as TensorRT makes kernels ready then.
        """
        engine, driver = self._engine, self._driver
        if not part.decode:
            context = self._contexts.get(part.profile)
            if context is None:
                context = self._contexts[part.profile] = engine.context(part.profile)
            self._bind(context, part, feeds)
            engine.enqueue(context)
            return
        key = (part.profile, part.keys, *part.firsts)
        kept = self._captured.get(key)
        if kept is None:
            kept = self._captured[key] = _Captured(engine.context(part.profile))
            self._bind(kept.context, part, feeds)
            if len(self._captured) > _MOST_GRAPHS:
                self._captured.popitem(last=False)
            engine.enqueue(kept.context)
            return
        self._captured.move_to_end(key)
        if kept.graph is None and engine.is_capturable(kept.context):
            kept.graph = self._capture(kept.context)
        if kept.graph is None:
            engine.enqueue(kept.context)
        else:
            driver.replay(kept.graph)

    def _capture(self, context: Any) -> object:
        self._driver.begin_capture()
        try:
            self._engine.enqueue(context)
        except BaseException:
            with contextlib.suppress(Exception):  # the driver would record whatever comes next
                self._driver.end_capture()
            raise
        return self._driver.end_capture()

    def _bind(self, context: Any, part: Part, feeds: Feeds) -> None:
        shapes: dict[str, tuple[int, ...]] = {n: a.shape for n, a in feeds.arrays.items()}
        places = dict(self._places)
        bound = zip(self._groups, part.firsts, part.rows, strict=True)
        for group, first, rows in bound:
            for layer in group.layers:
                sizes = {"key": group.key_head_dim, "value": group.value_head_dim}
                for name, size in sizes.items():
                    address = self._pools[f"{layer}.{name}"] + first * slot_bytes(group, name)
                    places[f"kv.{layer}.{name}"] = places[f"kv_out.{layer}.{name}"] = address
                    shapes[f"kv.{layer}.{name}"] = (rows, *slot_shape(group, size))
        self._engine.bind(context, shapes, places)

    def touched_bytes(self) -> dict[str, int]:
        """All of the device's memory, which a driver commits at once."""
        pools = zip(self._groups, self._num_slots, strict=True)
        held = sum(count * group.bytes_per_block() for group, count in pools)
        return {DEVICE: 0 if self._closed else held, HOST: 0}

    def close(self) -> None:
        """Wait for what runs and give the memory back; a second call does nothing."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(DeviceError):
                self._driver.synchronize()
            self._captured.clear()
            self._contexts.clear()
            self._engine.close()
            self._driver.close()
