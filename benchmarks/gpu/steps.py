"""How long steps take: decoding and prompts of known shapes, against the ceilings of this run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from infc.ir.artifact import Artifact
from infc.ir.program import Program
from infc.ir.roofline import Ceilings, Roofline, StepShape
from infc.ir.text import parse_program
from infc.runtime.executors.base import ExecutorConfig
from infc.runtime.executors.gpu.driver import Bytes, Driver
from infc.runtime.executors.gpu.executor import GpuExecutor
from infc.runtime.sampling.draws import GREEDY, draws_of
from infc.runtime.scheduling.step import Step
from tests.codegen.harness import Chunk, make_step

from .setting import Results, Setting
from .shapes import make_artifact

STEPS: Final = 48
"""Steps that are timed, one ahead of the other; three before them only warm up."""
DECODES: Final = ((1, 512), (1, 8192), (8, 8192), (32, 2048), (128, 1024))
"""Sequences and their contexts."""
PROMPTS: Final = (512, 2048, 8192)
_WARM: Final = 3
_RANDOM_BYTES: Final = 8 << 20


class RandomWeights:
    """A driver that uploads random numbers instead of the holes in a file of weights.

    Zeros would take less power, and so be faster than weights are.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._first = self._end = 0
        normal = np.random.default_rng(0).normal(0, 0.02, _RANDOM_BYTES // 2)
        bits = normal.astype(np.float32).view(np.uint32) >> 16
        self._random = bits.astype(np.uint16).view(np.uint8)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def allocate(self, num_bytes: int, name: str) -> int:
        """As the driver does; where the weights lie is remembered."""
        address = self._driver.allocate(num_bytes, name)
        if name == "the weights":
            self._first, self._end = address, address + num_bytes
        return address

    def upload(self, address: int, source: Bytes) -> None:
        """As the driver does, but for weights."""
        if self._first <= address < self._end:
            source[:] = np.resize(self._random, len(source))
        self._driver.upload(address, source)


def measure(
    setting: Setting, shape: str, scheme: str, ceilings: Ceilings, small: bool = False
) -> Results:
    """Milliseconds of decode steps and prompts, and their share of the roofline."""
    sizes = {"step_tokens": 64} if small else {}
    folder = setting.folder / "shapes"
    artifact = make_artifact(shape, scheme, setting.target, folder, **sizes)
    program = parse_program(artifact.read_text("program.ir"), source="program.ir")
    found: Results = {"decode": {}, "prefill": {}}
    decodes, prompts = (((2, 40),), (48,)) if small else (DECODES, PROMPTS)
    begun = time.perf_counter()
    executor = _open(setting, artifact, program, decodes, prompts)
    found["open seconds"] = round(time.perf_counter() - begun, 2)
    for batch, context in decodes:
        if setting.left > 20:
            roofline = Roofline(program, ceilings)
            least = roofline.step_seconds(StepShape.of([(1, context)] * batch))
            timed = _decode(executor, program, batch, context)
            found["decode"][f"{batch} x {context}"] = {**timed, **_share(least, timed)}
    for tokens in prompts:
        if setting.left > 20:
            least = _prompt_seconds(program, ceilings, tokens)
            timed = _prompt(executor, program, tokens)
            found["prefill"][str(tokens)] = {**timed, **_share(least, timed)}
    executor.close()
    if setting.left > 20:
        batch, context = decodes[0]
        executor = _open(setting, artifact, program, decodes[:1], (), profile=True)
        found["launches of a decode step"] = _profile(executor, program, batch, context)
        executor.close()
    return found


def _profile(executor: GpuExecutor, program: Program, batch: int, context: int) -> Results:
    """Microseconds of each kernel in a step, the longest first, and how often it runs."""
    for place in range(_WARM):
        executor.launch(_decode_step(program, batch, context, place)).result()
    before = executor.profile()
    executor.launch(_decode_step(program, batch, context, _WARM)).result()
    times: dict[str, list[float]] = {}
    for old, new in zip(before, executor.profile(), strict=True):
        if new.count > old.count:
            times.setdefault(new.name, []).append((new.nanoseconds - old.nanoseconds) / 1e3)
    ordered = sorted(times.items(), key=lambda one: -sum(one[1]))
    return {name: {"µs": round(sum(each), 1), "launches": len(each)} for name, each in ordered}


def _prompt_seconds(program: Program, ceilings: Ceilings, tokens: int) -> float:
    # On tensor cores, attention multiplies in bfloat16 too, whatever the types of its operands.
    dense = replace(ceilings, fp32=ceilings.bf16)
    return Roofline(program, dense).step_seconds(StepShape.of([(tokens, tokens)]))


def _share(least: float, timed: dict[str, float]) -> dict[str, float]:
    return {"roofline ms": round(least * 1e3, 3), "share": round(least * 1e3 / timed["ms"], 3)}


def _open(
    setting: Setting,
    artifact: Artifact,
    program: Program,
    decodes: Sequence[tuple[int, int]],
    prompts: Sequence[int],
    *,
    profile: bool = False,
) -> GpuExecutor:
    most = []
    for group in program.resources:
        blocks = [batch * _blocks(context, group.block_size) for batch, context in decodes]
        blocks += [_blocks(tokens, group.block_size) for tokens in prompts]
        most.append(1 + max(blocks))
    driver: Any = RandomWeights(setting.new_driver())
    config = ExecutorConfig(num_blocks=tuple(most), profile=profile)
    return GpuExecutor.open_with(artifact, config, driver)


def _blocks(context: int, block_size: int) -> int:
    return -(-(context + STEPS + _WARM) // block_size)


def _decode(executor: GpuExecutor, program: Program, batch: int, context: int) -> dict[str, float]:
    """Steps of one token a sequence, each of which reads the tokens of the one before."""
    steps = [_decode_step(program, batch, context, place) for place in range(STEPS + _WARM)]
    hosts, begun, running = [], 0.0, None
    for place, step in enumerate(steps):
        if place == _WARM:
            begun = time.perf_counter()
        at = time.perf_counter()
        after = executor.launch(step)
        hosts.append(time.perf_counter() - at)
        if running is not None:
            running.result()
        running = after
    assert running is not None
    running.result()
    seconds = (time.perf_counter() - begun) / STEPS
    host = statistics.median(hosts[_WARM:])
    return {
        "ms": round(seconds * 1e3, 4),
        "tokens/s": round(batch / seconds, 1),
        "launching, µs": round(host * 1e6, 1),
    }


def _decode_step(program: Program, batch: int, context: int, place: int) -> Step:
    (block_size,) = {group.block_size for group in program.resources}
    blocks = _blocks(context, block_size)
    chunks = [
        Chunk([0 if place else 7], context - 1 + place, range(1 + b * blocks, 1 + (b + 1) * blocks))
        for b in range(batch)
    ]
    rows = list(range(batch))
    step = make_step(chunks, num_groups=len(program.resources), block_size=block_size, rows=rows)
    draws = [GREEDY._replace(row=row, position=context + place) for row in rows]
    carried = np.repeat(np.arange(batch if place else 0, dtype=np.int32), 2).reshape(-1, 2)
    none = np.zeros(0, np.int32)
    return replace(step, draws=draws_of(draws), carried=carried, logits_rows=none)


def _prompt(executor: GpuExecutor, program: Program, tokens: int) -> dict[str, float]:
    (block_size,) = {group.block_size for group in program.resources}
    chunk = Chunk(
        [7 + place % 400 for place in range(tokens)], 0, range(1, 1 + -(-tokens // block_size))
    )
    step = make_step(
        [chunk], num_groups=len(program.resources), block_size=block_size, rows=[tokens - 1]
    )
    step = replace(step, draws=draws_of([GREEDY]), logits_rows=np.zeros(0, np.int32))
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        executor.launch(step).result()
        times.append(time.perf_counter() - begun)
    seconds = statistics.median(times[1:])
    return {"ms": round(seconds * 1e3, 3), "tokens/s": round(tokens / seconds, 1)}
