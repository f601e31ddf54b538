"""Fronts over the bundled model, for tests of engine processes; and engines that fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import infc
from benchmarks.replica_kills import KV_MEMORY, transcript, undisturbed
from benchmarks.replica_kills import Job as AnyJob
from infc.ir.artifact import Artifact
from infc.runtime.options import RuntimeOptions
from infc.runtime.replicas.front import Front
from infc.runtime.replicas.opening import open_front
from infc.runtime.requests.outputs import RequestOutput, merge_outputs
from infc.runtime.sampling.sampling_params import SamplingParams

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny"
DEADLY, HANGING, FAILING, UNREADABLE, GREEDY, LARGE = range(4001, 4007)
"""Tokens: a step with one of them ends its process, never ends, or ends with an error.

There is no memory to read a request with the fourth one. A step with the fifth is killed by the
kernel for lack of memory, as `VMSTAT` tells; one with the last gets none.
"""

VMSTAT = "INFC_TEST_VMSTAT"
"""The variable that names the file that engines and front of a test read as `/proc/vmstat`."""

RISKY = f"""
import sys; sys.path[:] = sys.argv[3:]
import os, signal, time
from infc.ir.errors import InfcError
from infc.runtime.executors.cpp import CppExecutor
from infc.runtime.replicas import engine_process
from infc.runtime.replicas.engine_process import main
to_engine = engine_process.to_engine
def risky_to_engine(payload):
    message = to_engine(payload)
    if {UNREADABLE} in getattr(message, "prompt", ()):
        raise MemoryError
    return message
engine_process.to_engine = risky_to_engine
launch = CppExecutor.launch
def risky(self, step):
    if {DEADLY} in step.token_ids:
        os.kill(os.getpid(), signal.SIGSEGV)
    if {GREEDY} in step.token_ids:
        place = os.environ["{VMSTAT}"]
        count = int(open(place).read().split()[1])
        open(place, "w").write(f"oom_kill {{count + 1}}\\n")
        os.kill(os.getpid(), signal.SIGKILL)
    if {LARGE} in step.token_ids:
        raise MemoryError
    if {HANGING} in step.token_ids:
        time.sleep(1000)
    if {FAILING} in step.token_ids:
        raise InfcError("no such luck")
    return launch(self, step)
CppExecutor.launch = risky
main(int(sys.argv[1]), int(sys.argv[2]))
"""
RISKY_TOKENS = (DEADLY, HANGING, FAILING, UNREADABLE, GREEDY, LARGE)
PARAMS = SamplingParams(
    max_tokens=150, temperature=1.0, seed=5, ignore_eos=True, banned_token_ids=RISKY_TOKENS
)


def compile_bundled(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The bundled model."""
    output = tmp_path_factory.mktemp("replicas") / "tiny.infc"
    return infc.compile(TINY / "model.yaml", output=output, verify=False)


@contextmanager
def opened(artifact: Artifact, count: int, **options: Any) -> Iterator[Front]:
    """A front whose engines are ready; afterwards none of its processes is left."""
    runtime = RuntimeOptions(**{"kv_memory": KV_MEMORY, **options.pop("runtime", {})})
    front = open_front(artifact, runtime, count, **options)
    try:
        front.wait_until_open()
        yield front
        pids = [each.pid for each in front.replicas()]
    finally:
        front.shutdown()
    assert not front.healthy
    assert all(pid is None or not Path(f"/proc/{pid}").exists() for pid in pids)


async def whole(front: Front, prompt: str | list[int], params: SamplingParams) -> RequestOutput:
    """The answer, from what came of it."""
    return merge_outputs([output async for output in front.generate(prompt, params)])


async def eventually(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


def check(artifact: Artifact, prompt: str, params: SamplingParams, output: RequestOutput) -> None:
    """The answer is that of one engine that nothing happens to."""
    (alone,) = undisturbed(artifact, [(AnyJob(prompt, params, False), output)])
    assert transcript(output) == alone
