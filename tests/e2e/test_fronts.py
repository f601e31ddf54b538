"""What a front does with requests while its engines live: queues, ends, memory, and routing."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from random import Random
from typing import Any

import pytest

from infc.ir.artifact import Artifact
from infc.ir.errors import CapacityError, DrainingError, RequestError, UsageError
from infc.runtime.async_streams import Reader
from infc.runtime.executors.base import HOST
from infc.runtime.memory_plan import BROKER
from infc.runtime.options import RuntimeOptions
from infc.runtime.replicas.front import Front
from infc.runtime.replicas.opening import open_front
from infc.runtime.replicas.process_memory import private_bytes
from infc.runtime.replicas.sizing import ReplicaSizes, size_replicas
from infc.runtime.requests.outputs import RequestOutput, merge_outputs
from infc.runtime.sampling.sampling_params import SamplingParams

from .fronts import (
    PARAMS,
    check,
    compile_bundled,
    eventually,
    opened,
    whole,
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The bundled model."""
    return compile_bundled(tmp_path_factory)


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


def test_any_number_can_be_planned_and_a_front_has_64_at_most(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers on Ray divide a machine of any size, and each starts one engine."""
    monkeypatch.setattr("infc.runtime.limits.available_memory", lambda: 100 << 30)
    assert len(size_replicas(artifact, RuntimeOptions(threads=100), 100).options) == 100
    with pytest.raises(UsageError, match=r"65 engine processes are outside 1\.\.64"):
        open_front(artifact, RuntimeOptions(), 65)


def test_others_plan_with_what_engines_have_not_touched(artifact: Artifact) -> None:
    """Such as the engines of another artifact that are to follow them."""
    before = BROKER.untouched()
    with opened(artifact, 2, runtime={"kv_memory": "64MiB"}) as front:
        planned = BROKER.untouched() - before
        assert 64 << 20 < planned < 128 << 20  # Python, and what it imports, counts as touched
        for pid in (each.pid for each in front.replicas()):
            assert pid is not None and 15 << 20 < private_bytes(pid) < 60 << 20
    assert BROKER.untouched() == before


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
