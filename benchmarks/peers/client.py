"""A worker as the run sees it: started, asked, and stopped between its turns."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .process import CpuClock
from .workloads import Request

REPOSITORY = Path(__file__).resolve().parents[2]


class WorkerError(Exception):
    """A worker answered with an error, died, or did not answer in time."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What one request took, in seconds. `others`: the share of CPU time that others had."""

    first: float
    seconds: float
    tokens: int
    peak_rss_bytes: int
    others: float


class Worker:
    """A process group of its own; whatever its threads do when idle, a stopped one does nothing.

    `log` takes its stderr. Not stopped before `loaded` returns.
    """

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        log: Path,
        *,
        timeout_seconds: float = 300.0,
    ) -> None:
        self._log, self._timeout = log, timeout_seconds
        self._started = time.perf_counter()
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**os.environ, **variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,  # so that select() sees every line that was not read yet
                stderr=stderr,
                start_new_session=True,
            )
        self._clock = CpuClock.read(self.pid)

    @property
    def pid(self) -> int:
        """The process, and its group."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def loaded(self) -> str:
        """Wait until the model is loaded; the version of the library."""
        return str(self._read()["version"])

    def ask(self, request: Request) -> Reply:
        """One request. WorkerError where it fails; the worker then answers others still."""
        before = CpuClock.read(self.pid)
        self._send(request)
        return self._reply(before)

    def ask_from_start(self, request: Request) -> Reply:
        """Instead of `loaded` and `ask`: its times count from the start of the process."""
        self._send(request)
        self.loaded()
        reply = self._reply(self._clock)
        seconds = time.perf_counter() - self._started
        # The message came when the answer was whole; its first token, so much earlier.
        return replace(reply, first=seconds - reply.seconds + reply.first, seconds=seconds)

    def pause(self) -> None:
        """Stop the group, and wait until the process has stopped or ended. It keeps its memory."""
        self._signal(signal.SIGSTOP)
        if self._process.returncode is None:
            os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill the group: nothing in it needs an orderly end."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(OSError):  # what was not flushed goes with the pipe
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:  # else its number may be another's by now
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _send(self, request: Request) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request.to_json()).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise WorkerError(self._why_it_ended()) from None

    def _read(self) -> Any:
        """The next message. Each comes whole: one write, far below what a pipe holds."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], self._timeout)
        if not ready:
            self.close()  # or its late answer would be taken for the next one's
            raise WorkerError(f"no answer in {self._timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._why_it_ended())
        return json.loads(line)

    def _reply(self, before: CpuClock) -> Reply:
        data = self._read()
        others = before.share_of_others(CpuClock.read(self.pid))
        if "error" in data:
            raise WorkerError(data["error"])
        return Reply(**data, others=others)

    def _why_it_ended(self) -> str:
        status = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1].strip() if lines else "nothing"
        return f"the worker ended with status {status}; its last words, in {self._log}: {last}"
