"""The generated library in a process: pinned threads, private memory, forks, and its end."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import infc
from infc.ir.artifact import Artifact
from infc.ir.errors import CapacityError, InfcError
from infc.runtime.executors import cpp, open_executor, weight_memory
from infc.runtime.executors.address_space import move_pages
from infc.runtime.executors.base import ExecutorConfig

from ..checkpoints import make_checkpoint
from .support import compile_checkpoint

PROMPT = list(range(1, 20))
PARAMS = infc.SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    place = tmp_path_factory.mktemp("lifetime")
    make_checkpoint("llama", place / "checkpoint", num_hidden_layers=1)
    return compile_checkpoint(place / "checkpoint", place / "artifact")


def cpus_of_tasks() -> list[str]:
    """The CPUs that each thread of this process may use, as the kernel writes them."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            lines = (task / "status").read_text().splitlines()
            found += [line.split()[1] for line in lines if line.startswith("Cpus_allowed_list")]
    return found


@pytest.fixture
def two_cpus() -> Iterator[list[int]]:
    """Two processors, and no more, for the calling thread."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("one processor")
    chosen = sorted(allowed)[:2]
    os.sched_setaffinity(0, chosen)
    yield chosen
    os.sched_setaffinity(0, allowed)


def test_pinned_threads_stay_on_one_processor(artifact: Artifact, two_cpus: list[int]) -> None:
    with infc.LLM(artifact, threads=2) as llm:
        free = llm.generate([PROMPT], PARAMS)
        assert str(two_cpus[1]) not in cpus_of_tasks()
    with infc.LLM(artifact, threads=2, pin=True) as llm:
        pinned = llm.generate([PROMPT], PARAMS)
        assert cpus_of_tasks().count(str(two_cpus[1])) == 1
        # The caller is kept on the first one for the time of a step only.
        assert os.sched_getaffinity(0) == set(two_cpus)
    assert [a.outputs for a in pinned] == [a.outputs for a in free]
    with pytest.raises(CapacityError, match="3 threads cannot be pinned to the 2 processors"):
        infc.LLM(artifact, threads=3, pin=True)


def test_a_team_that_cannot_be_had(artifact: Artifact) -> None:
    """It is no fault of the artifact, and fewer threads would do."""
    more = len(os.sched_getaffinity(0)) + 1
    blocks = (2,) * len(artifact.manifest.main.resources)
    config = ExecutorConfig(num_blocks=blocks, num_threads=more, pin=True)
    with pytest.raises(CapacityError, match=f"cannot start {more} threads: more threads are") as e:
        open_executor(artifact, config)
    assert "lower threads" in str(e.value)


def test_attention_state_is_private_memory(artifact: Artifact) -> None:
    """Shared memory gets huge pages on few kernels, and a fork would write into its parent's."""

    def shared() -> set[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line for line in lines if line.split()[1] == "rw-s"}

    before = shared()
    with infc.LLM(artifact) as llm:
        llm.generate([PROMPT], PARAMS)
        assert shared() <= before


def status_of_child(work: Callable[[], None]) -> int:
    """The exit status of a forked process that does `work`; a failure where it hangs."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the forked process hangs")


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_is_refused_and_ends(artifact: Artifact) -> None:
    with infc.LLM(artifact, threads=2) as llm:
        before = llm.generate([PROMPT], PARAMS)

        def generate() -> None:
            with pytest.raises(InfcError, match="opened before this process was forked"):
                llm.generate([PROMPT], PARAMS)

        assert status_of_child(generate) == 0
        assert status_of_child(llm.close) == 0
        after = llm.generate([PROMPT], PARAMS)
    assert [a.outputs for a in before] == [a.outputs for a in after]


def test_a_closed_executor_refuses(artifact: Artifact) -> None:
    llm = infc.LLM(artifact)
    llm.engine.add_request("a", PROMPT, PARAMS)
    llm.engine.executor.close()
    llm.engine.executor.close()
    with pytest.raises(InfcError, match="the engine is closed"):
        llm.engine.step()


def test_threads_end_with_the_last_reference(artifact: Artifact) -> None:
    def num_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = num_threads()
    llm = infc.LLM(artifact, threads=3, on_note=lambda _: None)
    assert num_threads() == before + 2
    del llm
    gc.collect()
    assert num_threads() == before


def test_weights_are_copied_after_the_first_step_and_change_nothing(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_memory, "PIECE_BYTES", mmap.PAGESIZE)
    monkeypatch.setattr(cpp, "_COPIED_SHARE", 0.0)  # a piece a step
    copied = []

    def note_and_move(source: int, target: int, num_bytes: int) -> None:
        copied.append(target)
        move_pages(source, target, num_bytes)

    monkeypatch.setattr(weight_memory, "move_pages", note_and_move)
    with infc.LLM(artifact, weights="mapped") as llm:
        expected = llm.generate([PROMPT], PARAMS)
        assert not llm.engine.work_ahead()
    with infc.LLM(artifact, weights="copied") as llm:
        llm.generate([PROMPT], replace(PARAMS, max_tokens=1))
        assert not copied
        assert llm.generate([PROMPT], PARAMS)[0].outputs == expected[0].outputs
        assert len(copied) == PARAMS.max_tokens
        assert llm.engine.work_ahead(0.0)
        assert not llm.engine.work_ahead()
        assert len(copied) == -(-artifact.weights_path.stat().st_size // mmap.PAGESIZE)
        assert llm.generate([PROMPT], PARAMS)[0].outputs == expected[0].outputs
    assert not llm.engine.work_ahead()
