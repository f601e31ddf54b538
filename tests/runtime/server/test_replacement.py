"""A server whose artifact is replaced by another one on SIGHUP: no request is lost."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

import infc
from infc.ir.artifact import open_artifact
from infc.ir.errors import ArtifactError
from infc.runtime.engine import EngineStats
from infc.runtime.log import ServerLog
from infc.runtime.scheduling.owners import StepTimes
from infc.runtime.server.certificate import read_certificate
from infc.runtime.server.metrics import ServerMetrics
from infc.runtime.server.replacement import Replaceable, Served
from infc.runtime.server.served import ServedEngine
from infc.runtime.server.settings import ServerSettings

from ..replicas.test_child import wait_for_end
from .test_process import RECIPE

BODY: dict[str, Any] = {
    "model": "it",
    "prompt": "def f",
    "max_tokens": 40,
    "temperature": 1.0,
    "seed": 3,
    "ignore_eos": True,
}
LONG = {**BODY, "max_tokens": 900}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The bundled model, and the same with other weights."""
    place = tmp_path_factory.mktemp("artifacts")
    overrides = ((), ("quantization=int8-weights", "quantization.method=nearest"))
    for name, values in zip(("one.infc", "two.infc"), overrides, strict=True):
        infc.compile(RECIPE, output=place / name, overrides=values, verify=False)
    return place / "one.infc", place / "two.infc"


@dataclass
class Server:
    """A serving process, and the lines that it has written so far."""

    popen: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    def wait_for(self, pattern: str, seconds: float = 30) -> str:
        """The next line that has it, of those that nobody waited for."""
        deadline = time.monotonic() + seconds
        while True:
            for index, line in enumerate(self.lines):
                if re.search(pattern, line):
                    del self.lines[: index + 1]
                    return line
            assert time.monotonic() < deadline, (pattern, self.lines)
            time.sleep(0.01)

    def ask(self, **fields: Any) -> str:
        """The text of an answer."""
        answer = httpx.post(f"{self.url}/completions", json={**BODY, **fields}, timeout=60)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def engines(self) -> set[int]:
        """Its engine processes that have opened an artifact."""
        pid = self.popen.pid
        children = "".join(p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/children"))
        found = set()
        for each in children.split():
            with contextlib.suppress(OSError):
                if ".infc" in Path(f"/proc/{each}/maps").read_text():
                    found.add(int(each))
        return found


@contextlib.contextmanager
def served(
    path: Path, *options: str, preexec_fn: Callable[[], None] | None = None
) -> Iterator[Server]:
    """Serves from a process and a session of its own until left."""
    command = [sys.executable, "-m", "infc", "serve", str(path), "--port", "0", *options]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=preexec_fn,
    ) as popen:
        try:
            assert popen.stdout is not None and popen.stderr is not None
            server = Server(popen)
            errors = popen.stderr

            def read() -> None:
                server.lines.extend(line.rstrip("\n") for line in errors)

            threading.Thread(target=read, daemon=True).start()
            ready = popen.stdout.readline().split()
            assert ready[0] == "serving", server.lines
            server.url = ready[-1]
            yield server
        finally:
            popen.kill()


def link(place: Path, artifact: Path) -> None:
    """Let a link be this one from one moment to the next."""
    new = place.with_suffix(".new")
    new.symlink_to(artifact)
    new.rename(place)


def test_another_artifact_takes_over_and_no_answer_is_lost(
    artifacts: tuple[Path, Path], tmp_path: Path
) -> None:
    one, two = artifacts
    place = tmp_path / "model.infc"
    alone = {}
    for artifact in artifacts:
        with served(artifact, "--model-name", "it") as server:
            alone[artifact] = server.ask(), server.ask(max_tokens=LONG["max_tokens"])
    assert alone[one] != alone[two]
    link(place, one)
    is_over = threading.Event()
    with (
        served(place, "--replicas", "2", "--model-name", "it") as server,
        ThreadPoolExecutor(7) as pool,
        contextlib.ExitStack() as failing,
    ):
        failing.callback(is_over.set)
        before = server.engines()
        begun = threading.Barrier(5, timeout=60)
        streams = [pool.submit(_stream, server, begun) for _ in range(4)]
        begun.wait()
        # So that its streams are under way for as long as it takes.
        os.kill(min(before), signal.SIGSTOP)
        answers = []

        def ask_again_and_again() -> None:
            while not is_over.is_set():
                answers.append(server.ask())

        asking = [pool.submit(ask_again_and_again) for _ in range(3)]
        link(place, two)
        server.popen.send_signal(signal.SIGHUP)
        line = server.wait_for("^replaced: ")
        assert open_artifact(two).identity[:12] in line and "to finish" in line
        # What has begun goes on with its own artifact, also where its engine dies.
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert [stream.result() for stream in streams] == [alone[one][1]] * 4
        while alone[two][0] not in answers and not any(each.done() for each in asking):
            time.sleep(0.01)
        is_over.set()
        for each in asking:
            each.result()
        assert set(answers) == {alone[one][0], alone[two][0]}
        assert server.ask() == alone[two][0]
        server.wait_for(f"^the engines of artifact {open_artifact(one).identity[:12]} have ended")
        assert len(server.engines()) == 2 and not server.engines() & before
        page = httpx.get(server.url.removesuffix("/v1") + "/metrics").text
        (total,) = re.findall(r'completions",status="200"\} (\d+)', page)
        assert int(total) >= len(answers) + 2  # also what was answered before
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(20) == 0
        assert all(map(wait_for_end, before))


def _stream(server: Server, begun: threading.Barrier) -> str:
    """The text of a long answer; its first piece is waited for."""
    body, pieces = {**LONG, "stream": True}, list[str]()
    with httpx.stream("POST", f"{server.url}/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
                if len(pieces) == 1:
                    begun.wait()
    return "".join(pieces)


def test_what_cannot_be_served_replaces_nothing(
    artifacts: tuple[Path, Path], tmp_path: Path
) -> None:
    """Nor does the same artifact; a directory that takes the name of the other one does."""
    one, two = artifacts
    place, damaged = tmp_path / "model.infc", tmp_path / "damaged"
    shutil.copytree(one, place)
    shutil.copytree(two, damaged)
    weights = open_artifact(damaged).weights_path
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)

    def put(source: Path) -> None:
        place.rename(tmp_path / f"away-{time.monotonic()}.infc")
        source.rename(place)

    with served(place, "--replicas", "1") as server:
        name = {"model": "model"}
        expected, engines = server.ask(**name), server.engines()
        server.popen.send_signal(signal.SIGHUP)
        server.wait_for("^note: not replaced: .*/model.infc is the artifact that is served")
        put(damaged)
        server.popen.send_signal(signal.SIGHUP)
        line = server.wait_for("^error: the artifact is not replaced, and served further: ")
        assert (weights.name in line and "digest" in line.lower()) or "SHA" in line, line
        assert (server.ask(**name), server.engines()) == (expected, engines)
        shutil.copytree(two, tmp_path / "good")
        put(tmp_path / "good")
        server.popen.send_signal(signal.SIGHUP)
        server.wait_for("^replaced: model is served from artifact")
        assert server.ask(**name) != expected
        assert not server.engines() & engines


def test_the_model_is_called_as_its_artifact_unless_it_has_a_name(
    artifacts: tuple[Path, Path], tmp_path: Path
) -> None:
    """And a terminal that is closed still ends the server."""
    one, two = artifacts
    place, (ours, theirs) = tmp_path / "model.infc", os.openpty()
    link(place, one)

    def take_terminal() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    with served(place, "--replicas", "1", preexec_fn=take_terminal) as server:
        os.close(theirs)
        link(place, two)
        server.popen.send_signal(signal.SIGHUP)
        server.wait_for("^note: the model is called two now, after its artifact; --model-name")
        server.wait_for("^replaced: two is served")
        models = httpx.get(f"{server.url}/models").json()["data"]
        assert [each["id"] for each in models] == ["two"]
        found = httpx.get(f"{server.url}/models/two").json()
        assert found["certificate"] == read_certificate(open_artifact(two))
        assert server.ask(model="two")
        page = httpx.get(server.url.removesuffix("/v1") + "/metrics").text
        assert 'model_name="two"' in page and 'model_name="one"' not in page
        os.close(ours)
        assert server.popen.wait(20) == 0


def test_asked_while_it_opens_the_first_it_looks_once_more(
    artifacts: tuple[Path, Path], tmp_path: Path
) -> None:
    """The server does not end, as a process does that hears nothing of SIGHUP."""
    one, _ = artifacts
    place = tmp_path / "model.infc"
    link(place, one)
    command = [sys.executable, "-m", "infc", "serve", str(place), "--port", "0", "--replicas", "1"]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as popen:
        try:
            assert popen.stderr is not None
            lines = iter(popen.stderr.readline, "")
            assert next(lines).startswith("note: 1 replica")  # its engine is started then
            popen.send_signal(signal.SIGHUP)
            assert next(lines) == f"opening {place} once more\n"
            assert next(lines).startswith("note: not replaced: ")
        finally:
            popen.kill()


def test_asked_again_meanwhile_it_looks_once_more() -> None:
    """However often it was asked, and whatever was found before."""

    async def run() -> None:
        opened = []

        def open_next(now: Served) -> Served | None:
            opened.append(now)
            if len(opened) == 1:
                time.sleep(0.1)
                raise ArtifactError("not yet", where="here")
            return served_of("second") if now is first else None

        first, log = served_of("first"), Lines()
        app = Replaceable(first, open_next, log)
        app.replace()
        await asyncio.sleep(0.02)
        app.replace()
        app.replace()
        while len(log.lines) < 3:
            await asyncio.sleep(0.005)
        assert log.lines[0].endswith("and served further: here: not yet")
        assert log.lines[1:] == [
            "replaced: second is served from artifact second now",
            "the engines of artifact first have ended",
        ]
        assert opened == [first, first]
        assert first.engine.is_shut and app.num_pending == 0  # type: ignore[attr-defined]

    asyncio.run(run())


class Lines(ServerLog):
    """A log that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def event(self, name: str, text: str, *, level: str = "info", **fields: Any) -> None:
        """As `ServerLog`."""
        self.lines.append(text)


class IdleEngine:
    """One without requests."""

    num_pending = 0
    is_shut = False

    def watch_steps(self, on_step: Callable[[StepTimes], None]) -> None:
        """As `ServedEngine`."""

    def stats(self) -> EngineStats:
        """As `ServedEngine`."""
        return EngineStats(0, 0, 0, 0, 0, 0)

    def shutdown(self, timeout_seconds: float = 30.0) -> None:
        """As `ServedEngine`."""
        self.is_shut = True


METRICS = ServerMetrics(cast("ServedEngine", IdleEngine()), {})


def served_of(name: str) -> Served:
    """Something served of which nobody asks anything."""

    async def app(*_: object) -> None:
        pytest.fail("nobody asks it for anything")

    engine = cast("ServedEngine", IdleEngine())
    METRICS.follow(engine, {})
    settings = ServerSettings(model_names=(name,))
    return Served(name, {"model_name": name}, app, engine, settings, METRICS)
