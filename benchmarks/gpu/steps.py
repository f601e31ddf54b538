"""How long steps take: decoding and prompts of known shapes, against the ceilings of this run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from infc.codegen.triton.options import TritonOptions
from infc.ir.artifact import Artifact
from infc.ir.program import Program
from infc.ir.roofline import Ceilings, Roofline, StepShape, uncached_cost
from infc.ir.text import parse_program
from infc.runtime.executors.base import ExecutorConfig
from infc.runtime.executors.gpu.driver import Bytes, Driver
from infc.runtime.executors.gpu.executor import GpuExecutor

from .setting import Results, Setting
from .shapes import make_artifact
from .stepping import WARM, decode, decode_step, most_blocks, prompt

DECODES: Final = ((1, 512), (1, 8192), (8, 8192), (32, 2048), (128, 1024))
"""Sequences and their contexts."""
PROMPTS: Final = (512, 2048, 8192)
SMALL_STEP: Final = 64
"""Tokens of the longest step where a GPU is emulated."""
_LEAST_SECONDS: Final = 3
"""What a single measurement may take."""
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


@dataclass(frozen=True, slots=True)
class Workload:
    """What is measured of a shape: decode steps (sequences, context), prompts, and each launch."""

    shape: str
    scheme: str
    decodes: Sequence[tuple[int, int]] = DECODES
    prompts: Sequence[int] = PROMPTS
    invariant: bool = False
    launches: bool = True

    def artifact(self, setting: Setting) -> Artifact:
        """Its artifact; an emulated one takes only short steps."""
        sizes = {} if setting.emulated is None else {"step_tokens": SMALL_STEP}
        folder = setting.folder / "shapes"
        options = TritonOptions(batch_invariant=self.invariant)
        return make_artifact(
            self.shape, self.scheme, setting.target, folder, options=options, **sizes
        )


def measure(setting: Setting, workload: Workload, ceilings: Ceilings) -> Results:
    """Milliseconds of decode steps and prompts, and their share of the roofline."""
    artifact = workload.artifact(setting)
    program = program_of(artifact)
    decodes, prompts = workload.decodes, workload.prompts
    found: Results = {"decode": {}, "prefill": {}}
    begun = time.perf_counter()
    executor = open_executor(setting, artifact, decodes, prompts)
    found["open seconds"] = round(time.perf_counter() - begun, 2)
    for batch, context in decodes:
        if setting.left > _LEAST_SECONDS:
            roofline = Roofline(program, ceilings)
            least = roofline.step_seconds(StepShape.of([(1, context)] * batch))
            timed = decode(executor, program.resources, batch, context, setting.num_steps)
            found["decode"][f"{batch} x {context}"] = {**timed, **_share(least, timed)}
    for tokens in prompts:
        if setting.left > _LEAST_SECONDS:
            least = _prompt_seconds(program, ceilings, tokens)
            timed = prompt(executor, program.resources, tokens)
            of_peak = _operations(program, tokens) / (timed["ms"] * 1e-3) / ceilings.bf16
            shares = {**_share(least, timed), "of the matrix peak": round(of_peak, 3)}
            found["prefill"][str(tokens)] = {**timed, **shares}
    executor.close()
    if workload.launches and setting.left > _LEAST_SECONDS:
        found["launches of a decode step"] = profile(setting, artifact, decodes[0], ceilings)
    return found


def profile(
    setting: Setting, artifact: Artifact, shape: tuple[int, int], ceilings: Ceilings
) -> Results:
    """Microseconds of each kernel in a decode step, the longest first, and how often it runs."""
    batch, context = shape
    program = program_of(artifact)
    executor = open_executor(setting, artifact, [shape], (), profile=True)
    for place in range(WARM):
        executor.launch(decode_step(program.resources, batch, context, place)).result()
    before = executor.profile()
    executor.launch(decode_step(program.resources, batch, context, WARM)).result()
    least = Roofline(program, ceilings).node_seconds(StepShape.of([(1, context)] * batch))
    times: dict[str, list[tuple[float, float]]] = {}
    for old, new in zip(before, executor.profile(), strict=True):
        if new.count > old.count:
            bound = sum(least.get(node, 0.0) for node in new.nodes)
            measured = (new.nanoseconds - old.nanoseconds) / 1e3
            times.setdefault(new.name, []).append((measured, 1e6 * bound))
    executor.close()
    totals = {
        name: [sum(column) for column in zip(*each, strict=True)] for name, each in times.items()
    }
    return {
        name: {"µs": round(spent, 1), "launches": len(times[name]), "roofline µs": round(bound, 1)}
        for name, (spent, bound) in sorted(totals.items(), key=lambda one: -one[1][0])
    }


def program_of(artifact: Artifact) -> Program:
    """The planned program of an artifact."""
    return parse_program(artifact.read_text("program.ir"), source="program.ir")


def _operations(program: Program, tokens: int) -> int:
    """Of all products and sums of a prompt."""
    shape = StepShape.of([(tokens, tokens)])
    return sum(uncached_cost(program, node, shape).flops for node in program.nodes)


def _prompt_seconds(program: Program, ceilings: Ceilings, tokens: int) -> float:
    # On tensor cores, attention multiplies in bfloat16 too, whatever the types of its operands.
    dense = replace(ceilings, fp32=ceilings.bf16)
    return Roofline(program, dense).step_seconds(StepShape.of([(tokens, tokens)]))


def _share(least: float, timed: dict[str, float]) -> dict[str, float]:
    return {"roofline ms": round(least * 1e3, 3), "share": round(least * 1e3 / timed["ms"], 3)}


def open_executor(
    setting: Setting,
    artifact: Artifact,
    decodes: Sequence[tuple[int, int]],
    prompts: Sequence[int],
    *,
    profile: bool = False,
    driver: Driver | None = None,
) -> GpuExecutor:
    """An executor with pages for these steps, and with random weights."""
    resources = artifact.manifest.main.resources
    most = [most_blocks(group.block_size, decodes, prompts) for group in resources]
    random: Any = RandomWeights(driver or setting.new_driver())
    config = ExecutorConfig(num_blocks=tuple(most), profile=profile)
    return GpuExecutor.open_with(artifact, config, random)
