"""Engines as processes that die, hang, or are killed by a request: no answer changes or is lost.

`benchmarks/replica_kills.py` does more of it, for longer.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

import infc
from benchmarks.replica_kills import KV_MEMORY, differing, disturb, transcript, undisturbed
from benchmarks.replica_kills import Job as AnyJob
from infc.ir.artifact import Artifact, open_artifact
from infc.ir.errors import ArtifactError, CapacityError, DrainingError, InfcError, RequestError
from infc.runtime.async_streams import Reader
from infc.runtime.executors.base import HOST
from infc.runtime.options import RuntimeOptions
from infc.runtime.replicas.child import Child, start_engine
from infc.runtime.replicas.front import Front
from infc.runtime.replicas.opening import open_front
from infc.runtime.replicas.sizing import ReplicaSizes, size_replicas
from infc.runtime.requests.outputs import RequestOutput, merge_outputs
from infc.runtime.sampling.sampling_params import SamplingParams

from ..runtime.replicas.test_child import wait_for_end

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny"
DEADLY, HANGING, FAILING, UNREADABLE = 4001, 4002, 4003, 4004
"""Tokens: a step with one of them ends its process, never ends, or ends with an error.

There is no memory to read a request with the last one.
"""

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
    if {HANGING} in step.token_ids:
        time.sleep(1000)
    if {FAILING} in step.token_ids:
        raise InfcError("no such luck")
    return launch(self, step)
CppExecutor.launch = risky
main(int(sys.argv[1]), int(sys.argv[2]))
"""
RISKY_TOKENS = (DEADLY, HANGING, FAILING, UNREADABLE)
PARAMS = SamplingParams(
    max_tokens=150, temperature=1.0, seed=5, ignore_eos=True, banned_token_ids=RISKY_TOKENS
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
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


@pytest.mark.parametrize("count", [1, 2])
def test_killed_at_random_moments(artifact: Artifact, count: int) -> None:
    with opened(artifact, count) as front:
        disturbed = disturb(
            front, kills=6, streams=12, seed=count, seconds=(0.0, 0.5), only_streaming=True
        )
        run = asyncio.run(disturbed)
        resumed = sum(each.num_resumed for each in front.replicas())
    assert run.num_kills == 6
    assert len(run.told) >= 12
    assert resumed >= 6
    assert differing(artifact, run) == []


@pytest.mark.parametrize("count", [2, pytest.param(1, marks=pytest.mark.breadth)])
def test_an_engine_that_hangs_is_killed(artifact: Artifact, count: int) -> None:
    async def run(front: Front) -> RequestOutput:
        parts: list[RequestOutput] = []
        async for output in front.generate("def f", PARAMS, "it"):
            parts.append(output)
            if len(parts) == 3:
                pid = front.replicas()[front.replica_of("it") or 0].pid
                assert pid is not None
                os.kill(pid, signal.SIGSTOP)
        assert sum(each.num_restarts for each in front.replicas()) == 1
        return merge_outputs(parts)

    with opened(artifact, count, hung_seconds=0.8) as front:
        output = asyncio.run(run(front))
    check(artifact, "def f", PARAMS, output)


def test_an_idle_engine_is_not_taken_for_one_that_hangs(artifact: Artifact) -> None:
    with opened(artifact, 1, hung_seconds=0.8) as front:
        pid = front.replicas()[0].pid
        time.sleep(2)
        assert front.replicas()[0].pid == pid


@pytest.mark.parametrize(
    ("count", "poison", "hung_seconds"),
    [
        (2, DEADLY, 60.0),
        (1, HANGING, 1.0),
        pytest.param(1, DEADLY, 60.0, marks=pytest.mark.breadth),
        pytest.param(2, HANGING, 1.0, marks=pytest.mark.breadth),
    ],
)
def test_a_request_that_kills_engines_is_given_up_and_the_others_live(
    artifact: Artifact, count: int, poison: int, hung_seconds: float
) -> None:
    prompts = [f"def f{index}(" for index in range(6)]

    async def run(front: Front) -> list[RequestOutput]:
        others = [asyncio.create_task(whole(front, prompt, PARAMS)) for prompt in prompts]
        await asyncio.sleep(0.1)
        with pytest.raises(InfcError, match="given up: the engine that computed it failed"):
            await whole(front, [5, poison, 7], PARAMS)
        answers = await asyncio.gather(*others)
        assert front.healthy
        answers.append(await whole(front, prompts[0], PARAMS))
        return answers

    start = partial(start_engine, RISKY)
    with opened(artifact, count, start=start, hung_seconds=hung_seconds) as front:
        answers = asyncio.run(run(front))
        assert 2 <= sum(each.num_restarts for each in front.replicas()) <= 3
    for prompt, answer in zip([*prompts, prompts[0]], answers, strict=True):
        check(artifact, prompt, PARAMS, answer)


def test_an_engine_that_cannot_read_ends(artifact: Artifact) -> None:
    """And is not taken for one that has nothing to do."""

    async def run(front: Front) -> RequestOutput:
        with pytest.raises(InfcError, match="given up"):
            await asyncio.wait_for(whole(front, [5, UNREADABLE, 7], PARAMS), 20)
        return await whole(front, "def f", PARAMS)

    with opened(artifact, 1, start=partial(start_engine, RISKY)) as front:
        answer = asyncio.run(run(front))
    check(artifact, "def f", PARAMS, answer)


def test_a_request_that_cannot_be_given_to_an_engine_fails(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of waiting for ever."""

    async def run(front: Front) -> None:
        monkeypatch.setattr(front._config.policy, "choose", fail)
        with pytest.raises(InfcError, match="MemoryError"):
            await asyncio.wait_for(whole(front, "def f", PARAMS), 5)
        monkeypatch.undo()
        await whole(front, "def f", PARAMS)

    def fail(*arguments: Any) -> None:
        raise MemoryError

    with opened(artifact, 1) as front:
        asyncio.run(run(front))


def test_two_poisonous_requests_at_once(artifact: Artifact) -> None:
    async def run(front: Front) -> RequestOutput:
        other = asyncio.create_task(whole(front, "def f", PARAMS))
        ends = await asyncio.gather(
            *(whole(front, [5, DEADLY, number], PARAMS) for number in range(2)),
            return_exceptions=True,
        )
        assert all("given up" in str(end) for end in ends)
        return await other

    with opened(artifact, 2, start=partial(start_engine, RISKY)) as front:
        answer = asyncio.run(run(front))
    check(artifact, "def f", PARAMS, answer)


def test_a_step_that_fails_ends_its_requests_only(artifact: Artifact) -> None:
    async def run(front: Front) -> RequestOutput:
        with pytest.raises(InfcError, match="the step failed: InfcError: no such luck"):
            await whole(front, [5, FAILING, 7], PARAMS)
        assert front.replicas()[0].num_restarts == 0
        return await whole(front, "def f", PARAMS)

    with opened(artifact, 1, start=partial(start_engine, RISKY)) as front:
        answer = asyncio.run(run(front))
    check(artifact, "def f", PARAMS, answer)


def test_engines_that_die_at_once_are_given_up(artifact: Artifact) -> None:
    """After some tries; what waits for them fails with the reason."""
    starts = []

    def start() -> Child:
        starts.append(time.monotonic())
        return start_engine() if len(starts) == 1 else start_engine("raise SystemExit(3)")

    async def run(front: Front) -> None:
        pid = front.replicas()[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(InfcError, match="no engine is left: it ended with status 3"):
            await whole(front, "def f", PARAMS)
        assert not front.healthy
        assert front.replicas()[0].state == "given up"
        with pytest.raises(InfcError, match="no engine is left"):
            await front.read(["def f"], PARAMS)

    with opened(artifact, 1, start=start) as front:
        asyncio.run(run(front))
    assert len(starts) >= 5
    assert starts[-1] - starts[1] > 0.5  # later and later


def test_an_engine_that_cannot_be_opened_is_an_error_at_once(artifact: Artifact) -> None:
    front = open_front(artifact, RuntimeOptions(), 1, start=partial(start_engine, "import sys"))
    with pytest.raises(InfcError, match="replica 0: it ended with status 0"):
        front.wait_until_open()
    front.shutdown()


def test_refusals_come_from_the_engine_as_they_are(artifact: Artifact) -> None:
    async def refused(front: Front, prompt: Any, **params: Any) -> None:
        await whole(front, prompt, SamplingParams(**params))

    with opened(artifact, 1) as front:
        with pytest.raises(RequestError, match="the prompt has no tokens"):
            asyncio.run(refused(front, []))
        with pytest.raises(RequestError) as error:
            asyncio.run(refused(front, "x", max_tokens=10**6))
        assert error.value.field == "max_tokens"
        with pytest.raises(RequestError, match="is not a token id"):
            asyncio.run(refused(front, [10**9]))
        with pytest.raises(RequestError, match="banned"):
            asyncio.run(refused(front, "x", banned_token_ids=list(range(4096))))


def test_aborted_requests_end_also_while_no_engine_is_there(artifact: Artifact) -> None:
    async def run(front: Front) -> None:
        outputs = front.generate("def f", PARAMS, "it")
        parts = [await anext(outputs)]
        pid = front.replicas()[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        front.abort("it")
        os.kill(pid, signal.SIGKILL)
        parts += [output async for output in outputs]
        assert merge_outputs(parts).outputs[0].finish_reason == "abort"
        assert front.num_pending == 0
        left = front.generate("def f", PARAMS)
        await anext(left)
        await left.aclose()
        await eventually(lambda: front.num_pending == 0)
        await eventually(lambda: front.stats().num_running == 0)

    with opened(artifact, 1) as front:
        asyncio.run(run(front))


def test_too_many_that_wait_are_refused(artifact: Artifact) -> None:
    async def run(front: Front) -> None:
        pid = front.replicas()[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        readers = [await front.read(["x"], SamplingParams(max_tokens=2)) for _ in range(3)]
        with pytest.raises(CapacityError, match="3 requests already waiting"):
            await front.read(["x"], SamplingParams(max_tokens=2))
        os.kill(pid, signal.SIGCONT)
        for reader in readers:
            while reader.num_open:
                await reader.get()
            reader.close()

    with opened(artifact, 1, runtime={"max_waiting": 3}) as front:
        asyncio.run(run(front))


def test_what_runs_does_not_wait(artifact: Artifact) -> None:
    """Also where nothing is told of it before its end; a batch waits as a whole."""
    params = SamplingParams(max_tokens=400, best_of=4, seed=1, temperature=1.0, ignore_eos=True)

    async def run(front: Front) -> None:
        (replica,) = front._replicas
        readers: list[Reader] = []

        def run_all() -> bool:
            return replica.stats.num_running == 4 * len(readers) and replica.num_queued == 0

        for _ in range(4):
            readers.append(await front.read(["def f"], params, whole=True))
            await eventually(run_all)
        assert front.num_pending == 4
        with pytest.raises(CapacityError, match="0 requests already waiting"):
            await front.read(["x"] * 3, params)
        (await front.read(["x"] * 2, params)).close()
        for reader in readers:
            while reader.num_open:
                await reader.get()
            reader.close()

    with opened(artifact, 1, runtime={"max_waiting": 2}) as front:
        asyncio.run(run(front))


def test_shut_down_it_fails_what_is_pending(artifact: Artifact) -> None:
    async def run(front: Front) -> None:
        outputs = front.generate("def f", PARAMS)
        await anext(outputs)
        await asyncio.to_thread(front.shutdown)
        with pytest.raises(DrainingError, match="the engine was shut down"):
            async for _ in outputs:
                pass

    with opened(artifact, 2) as front:
        asyncio.run(run(front))


def test_drained_it_lets_answers_end(artifact: Artifact) -> None:
    async def run(front: Front) -> RequestOutput:
        answer = asyncio.create_task(whole(front, "def f", PARAMS))
        await eventually(lambda: front.num_pending == 1)
        assert await front.drain(60)
        with pytest.raises(DrainingError):
            await front.read(["x"], PARAMS)
        return await answer

    with opened(artifact, 1) as front:
        answer = asyncio.run(run(front))
    check(artifact, "def f", PARAMS, answer)


def test_a_reader_that_is_behind_misses_nothing(artifact: Artifact) -> None:
    async def run(front: Front) -> RequestOutput:
        reader = await front.read(["def f"], PARAMS, ["it"])
        await eventually(lambda: front.num_pending == 0)
        parts = []
        while reader.num_open:
            parts.append((await reader.get())[1])
        reader.close()
        assert len(parts) == 2  # the first, and all that was joined behind it
        return merge_outputs(parts)

    with opened(artifact, 1) as front:
        output = asyncio.run(run(front))
    check(artifact, "def f", PARAMS, output)


def test_replicas_share_one_copy_of_the_weights(artifact: Artifact) -> None:
    notes: list[str] = []
    with opened(artifact, 2, on_note=notes.append) as front:
        asyncio.run(whole(front, "def f", PARAMS))
        for each in front.replicas():
            maps = Path(f"/proc/{each.pid}/maps").read_text()
            assert str(artifact.weights_path.resolve()) in maps
    (line,) = (note for note in notes if "once for all" in note)
    assert "2 replicas with 1 thread each" in line


def test_engines_end_when_the_front_is_killed(artifact: Artifact) -> None:
    """Also one that is stopped."""
    program = (
        "import sys; from infc.ir.artifact import open_artifact;"
        " from infc.runtime.options import RuntimeOptions;"
        " from infc.runtime.replicas.opening import open_front;"
        " front = open_front(open_artifact(sys.argv[1]), RuntimeOptions(kv_memory='64MiB'), 2);"
        " front.wait_until_open();"
        " print(*(each.pid for each in front.replicas()), flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(artifact.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    os.kill(pids[0], signal.SIGSTOP)
    process.kill()
    process.communicate()
    assert len(pids) == 2
    assert all(map(wait_for_end, pids))


def test_a_successor_that_is_ready_is_logged(
    artifact: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    def lines() -> list[str]:
        return [line for line in caplog.messages if "is ready after" in line]

    async def run(front: Front) -> None:
        pid = front.replicas()[0].pid
        assert pid is not None
        assert not lines()
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: len(lines()) == 1)
        assert f"replica 0: process {front.replicas()[0].pid} is ready after" in lines()[0]

    with opened(artifact, 1) as front:
        asyncio.run(run(front))


def test_an_artifact_that_is_away_for_a_while(artifact: Artifact, tmp_path: Path) -> None:
    """It is opened again once it is back."""
    place = tmp_path / "moved.infc"
    shutil.copytree(artifact.path, place)

    async def run(front: Front) -> None:
        place.rename(tmp_path / "away")
        pid = front.replicas()[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: front.replicas()[0].num_restarts >= 3)
        assert front.healthy
        (tmp_path / "away").rename(place)
        await whole(front, "def f", PARAMS)

    with opened(open_artifact(place), 1) as front:
        asyncio.run(run(front))


def test_another_artifact_in_its_place_is_not_opened(artifact: Artifact) -> None:
    """Its answers would go on with other tokens."""
    front = open_front(replace(artifact, identity="0" * 64), RuntimeOptions(), 1)
    with pytest.raises(ArtifactError, match="was replaced by another one"):
        front.wait_until_open()
    front.shutdown()


def test_memory_is_planned_for_all_of_them(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KV and steps of each, one copy of the weights, and 40 MiB of each process."""

    def sizes(count: int, **options: Any) -> ReplicaSizes:
        return size_replicas(artifact, RuntimeOptions(threads=3, **options), count)

    monkeypatch.setattr("infc.runtime.limits.available_memory", lambda: 400 << 20)
    one, three = sizes(1), sizes(3)
    use = three.plan.memory[HOST]
    assert use.weights == 0 and use.mapped == artifact.weights_path.stat().st_size
    assert 30 << 20 < 3 * use.taken <= (200 - 4 * 40) << 20
    assert use.kv < one.plan.memory[HOST].kv
    assert [each.threads for each in three.options] == [1, 1, 1]
    assert [each.threads for each in sizes(2).options] == [2, 1]
    assert {each.max_context for each in three.options} == {three.plan.limits.max_context}
    assert sizes(2, kv_memory="40MiB").plan.memory[HOST].kv > 39 << 20
    with pytest.raises(CapacityError, match=r"3 replicas take .* and 400.0 MiB are free"):
        sizes(3, kv_memory="90MiB")
    with pytest.raises(CapacityError):
        sizes(3, weights="copied", kv_memory="75MiB")
    text = sizes(3, kv_memory="75MiB").text
    assert "once for all, and 4 processes of 40.0 MiB: 4" in text


def test_pinned_threads_of_replicas_have_processors_of_their_own(artifact: Artifact) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    pinned = size_replicas(artifact, RuntimeOptions(threads=1, pin=True), 2)
    assert pinned.cpus[0] == cpus[: -(-len(cpus) // 2)]
    assert pinned.cpus[1] == (cpus[-(-len(cpus) // 2) :] or cpus[:1])
    assert size_replicas(artifact, RuntimeOptions(threads=1), 2).cpus == ([], [])


def test_requests_follow_their_prefixes(artifact: Artifact) -> None:
    """Of 16 shared prefixes, two replicas find nearly what one with twice their memory finds."""
    rng = Random(0)
    shared = [[rng.randrange(10, 4000) for _ in range(320)] for _ in range(16)]
    prompts = [[*prefix, 7, number] for number in range(8) for prefix in shared]
    params = SamplingParams(max_tokens=2)

    async def num_found(front: Front) -> int:
        order, total = list(prompts), 0
        Random(1).shuffle(order)

        async def work() -> None:
            nonlocal total
            while order:
                answer = await whole(front, order.pop(), params)
                total += answer.metrics.num_cached_tokens

        await asyncio.gather(*(work() for _ in range(4)))
        return total

    found = {}
    for count, policy, memory in (
        (1, "prefix", "22MiB"),
        (2, "prefix", "11MiB"),
        (2, "random", "11MiB"),
    ):
        with opened(artifact, count, policy=policy, runtime={"kv_memory": memory}) as front:
            found[count, policy] = asyncio.run(num_found(front))
    one = found[1, "prefix"]
    assert one >= 0.9 * 320 * (len(prompts) - len(shared))
    assert found[2, "prefix"] >= 0.9 * one
    assert found[2, "random"] < 0.9 * one


def test_requests_wait_where_any_engine_can_take_them(artifact: Artifact) -> None:
    """Not in an engine that has no room; and those that have begun go first."""

    async def run(front: Front) -> None:
        answers = [asyncio.create_task(whole(front, f"def f{i}", PARAMS)) for i in range(24)]
        placed: list[int | None] = []

        def are_placed() -> bool:
            placed[:] = [front.replica_of(f"infc-{i}") for i in range(24)]
            return placed.count(None) <= 8

        await eventually(are_placed)
        assert sorted(index for index in placed if index is not None) == [0] * 8 + [1] * 8
        pid = front.replicas()[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        ends = await asyncio.gather(*answers)
        assert all(end.finished for end in ends)

    with opened(artifact, 2, runtime={"max_sequences": 4}) as front:
        asyncio.run(run(front))
