"""Engines as processes that die, hang, or are killed by a request: no answer changes or is lost.

`benchmarks/replica_kills.py` does more of it, for longer.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.replica_kills import differing, disturb
from infc.ir.artifact import Artifact, open_artifact
from infc.ir.errors import ArtifactError, InfcError
from infc.runtime.log import LogFormat
from infc.runtime.options import RuntimeOptions
from infc.runtime.replicas import child as child_module
from infc.runtime.replicas.child import Child, start_engine
from infc.runtime.replicas.front import Front
from infc.runtime.replicas.opening import open_front
from infc.runtime.requests.outputs import RequestOutput, merge_outputs

from ..runtime.replicas.test_child import wait_for_end
from .fronts import (
    DEADLY,
    FAILING,
    GREEDY,
    HANGING,
    LARGE,
    PARAMS,
    RISKY,
    UNREADABLE,
    VMSTAT,
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
        (2, GREEDY, 60.0),
        pytest.param(1, DEADLY, 60.0, marks=pytest.mark.breadth),
        pytest.param(2, HANGING, 1.0, marks=pytest.mark.breadth),
    ],
)
def test_a_request_that_kills_engines_is_given_up_and_the_others_live(
    artifact: Artifact,
    count: int,
    poison: int,
    hung_seconds: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("oom_kill 7\n")
    monkeypatch.setenv(VMSTAT, str(vmstat))
    monkeypatch.setattr(child_module, "_VMSTAT", vmstat)
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


@pytest.mark.parametrize(
    ("token", "error"), [(FAILING, "InfcError: no such luck"), (LARGE, "MemoryError")]
)
def test_a_step_that_fails_ends_its_requests_only(
    artifact: Artifact, token: int, error: str
) -> None:
    async def run(front: Front) -> RequestOutput:
        with pytest.raises(InfcError, match=f"the step failed: {error}"):
            await whole(front, [5, token, 7], PARAMS)
        assert front.replicas()[0].num_restarts == 0
        return await whole(front, "def f", PARAMS)

    with opened(artifact, 1, start=partial(start_engine, RISKY)) as front:
        answer = asyncio.run(run(front))
    check(artifact, "def f", PARAMS, answer)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_engines_write_their_log_as_the_server_does(
    artifact: Artifact, log_format: LogFormat, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also of what they end with."""

    async def run(front: Front) -> int | None:
        pid = front.replicas()[0].pid
        for token, error in ((FAILING, "the step failed"), (UNREADABLE, "given up")):
            with pytest.raises(InfcError, match=error):
                await whole(front, [5, token, 7], PARAMS)
        return pid

    start = partial(start_engine, RISKY)
    with opened(artifact, 1, start=start, log_format=log_format) as front:
        pid = asyncio.run(run(front))
    own = "replica 0:"  # lines of this process, if a test before has let it write some
    lines = [line for line in capfd.readouterr().err.splitlines() if own not in line]
    if log_format == "text":
        assert lines[0] == f"error: engine process {pid}: a step failed"
        assert "  infc.ir.errors.InfcError: no such luck" in lines
        assert any("reading what the front says failed" in line for line in lines)
        return
    records = [json.loads(line) for line in lines]
    assert records[0]["engine_process"] == pid
    assert [each["message"] for each in records[:2]] == [
        "a step failed",
        "reading what the front says failed",
    ]
    assert {each["level"] for each in records} == {"error"}
    assert "no such luck" in records[0]["exception"]


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
