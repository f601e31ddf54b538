"""From the start of a fresh process to its first token."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ...ir.errors import InfcError
from .results import Spread, StartResult

PROMPT_TOKENS = 32
_NEW_TOKENS = 4  # a token may be a part of a character, which is held back


def measure_start(
    artifact: Path,
    prompt: list[int],
    *,
    rounds: int,
    threads: int | None = None,
    on_round: Callable[[int, int], None] | None = None,
) -> StartResult:
    """Runs `infc generate` so many times, after once that does not count, and takes its times."""
    measured = []
    for number in range(rounds + 1):
        if on_round is not None:
            on_round(number, rounds + 1)
        one = _first_token(artifact, prompt, threads)
        if number:
            measured.append(one)
    return StartResult(
        prompt_tokens=len(prompt),
        seconds=Spread.of([seconds for seconds, _ in measured]),
        peak_rss_bytes=max(num_bytes for _, num_bytes in measured),
    )


def _first_token(artifact: Path, prompt: list[int], threads: int | None) -> tuple[float, int]:
    """Seconds to the first byte of output, and the peak of resident memory in bytes."""
    ids = ",".join(map(str, prompt))
    command = [sys.executable, "-m", "infc", "generate", str(artifact), "--token-ids", ids]
    command += ["--max-tokens", str(_NEW_TOKENS), "--ignore-eos"]
    command += [] if threads is None else ["--threads", str(threads)]
    with tempfile.TemporaryFile() as said:  # a pipe that nobody reads meanwhile would fill
        start = time.perf_counter()
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said
        ) as process:
            assert process.stdout is not None
            first = process.stdout.read(1)
            seconds = time.perf_counter() - start
            process.stdout.read()
            _, status, use = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        errors = said.read().decode(errors="replace")
    if process.returncode or not first:
        raise InfcError(f"a new process produced no token: {errors.strip() or 'no error message'}")
    return seconds, use.ru_maxrss * 1024
