"""What tests of batches share: a file of requests of all kinds, and a process that answers it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

SERVER = """
import os, sys
from pathlib import Path
from infc.ir.artifact import open_artifact
from infc.runtime.batch.run import BatchOptions, run_batch
from infc.runtime.options import RuntimeOptions
for line in sys.stdin:
    artifact, source, output, processes = line.split()
    pid = os.fork()
    if not pid:
        options = BatchOptions(
            source=Path(source), output=Path(output), model_names=("tiny",), seed=3,
            processes=int(processes),
            runtime=RuntimeOptions(threads=1, max_sequences=4, kv_memory="64MiB"),
        )
        run_batch(open_artifact(artifact, "none"), options, progress=False)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""
"""Forks a process for each batch, which has imported everything: 20 of them take seconds. With
few sequences at a time, lines are written from the beginning to the end."""


def body(random: Random, number: int) -> tuple[str, dict[str, Any]]:
    """A route and a body of any kind."""
    fields: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": random.randint(1, 60),
        "temperature": random.choice([0, 0.7, 1.3]),
    }
    if random.random() < 0.2:
        fields |= {"logprobs": True, "top_logprobs": 2} if number % 2 else {"logprobs": 2}
    if random.random() < 0.1:
        fields["n"] = 2
    if random.random() < 0.2:
        fields["stop"] = ["\n\n", "def"]
    if random.random() < 0.1:
        fields["seed"] = number
    if number % 2:
        messages = [{"role": "user", "content": f"Write a class for {number}."}]
        return "/v1/chat/completions", {**fields, "messages": messages}
    prompts = [f"def function_{number}(n):", "import"]
    prompt = prompts if random.random() < 0.1 else prompts[0]
    return "/v1/completions", {**fields, "prompt": prompt}


def write_rows(path: Path, count: int, seed: int = 1) -> Path:
    """Many requests, and some lines that are none."""
    random = Random(seed)
    lines = []
    for number in range(count):
        url, fields = body(random, number)
        row = {"custom_id": f"row {number}", "method": "POST", "url": url, "body": fields}
        lines.append(json.dumps(row))
        if number % 40 == 7:
            wrong = {**row, "custom_id": f"wrong {number}", "body": {**fields, "n": -1}}
            lines += ["{nonsense", "", json.dumps(row), json.dumps(wrong)]
    path.write_text("\n".join(lines) + "\n")
    return path


class BatchProcesses:
    """Runs batches in processes of their own. A context manager."""

    def __init__(self, artifact: Path, processes: int = 0) -> None:
        self._artifact = artifact
        self._processes = processes
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )

    def start(self, source: Path, output: Path) -> int:
        """Begins a batch; its process."""
        assert self._server.stdin is not None
        print(self._artifact, source, output, self._processes, file=self._server.stdin, flush=True)
        return self._answer()

    def wait(self) -> int:
        """Waits for the end of the process; its status, as `os.waitpid` has it."""
        return self._answer()

    def _answer(self) -> int:
        assert self._server.stdout is not None
        return int(self._server.stdout.readline())

    def kill(self, pid: int, output: Path, size: int, seconds: float) -> None:
        """Kills a process some time after its output has a size, unless it has ended by then."""
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            while size > (output.stat().st_size if output.exists() else 0):
                time.sleep(0.002)
                signal.pidfd_send_signal(process, 0)
            time.sleep(seconds)
            signal.pidfd_send_signal(process, signal.SIGKILL)
        except ProcessLookupError:
            pass
        finally:
            os.close(process)

    def __enter__(self) -> BatchProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)
