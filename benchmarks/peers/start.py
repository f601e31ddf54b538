"""Starts contestants: workers that stay, and fresh processes timed to their first token."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .client import REPOSITORY, Reply, Worker, WorkerError
from .contestants import Contestant, Workdir
from .process import CpuClock
from .workloads import FIRST_TOKEN, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Starter:
    """Starts them for one shape, with so many threads, and `patience` seconds for an answer."""

    workdir: Workdir
    shape: str
    threads: int
    patience: float

    def worker(self, contestant: Contestant) -> Worker:
        """A process that loads the contestant's model."""
        peer = contestant.peer
        environment = str(self.workdir.environment(peer))
        variables = {k: v.format(environment=environment) for k, v in peer.variables.items()}
        model = self.workdir.model(contestant, self.shape)
        command = [str(self.workdir.python(peer)), "-m", "benchmarks.peers.worker"]
        command += [peer.engine, str(model), str(self.threads)]
        log = self.workdir.logs() / f"{contestant.name}-{self.shape}.log"
        return Worker(command, variables, log, timeout_seconds=self.patience)

    def first_token(self, contestant: Contestant) -> Reply:
        """What a fresh process takes; of infc it is the command that users start."""
        if contestant.is_infc:
            artifact = self.workdir.model(contestant, self.shape)
            return generate_once(artifact, self.threads, FIRST_TOKEN)
        with self.worker(contestant) as fresh:
            return fresh.ask_from_start(FIRST_TOKEN)


def generate_once(artifact: Path, threads: int, request: Request) -> Reply:
    """`infc generate` from the start of its process to its first byte of output, and its memory.

    More tokens than one are asked for: the first may be half a character, which is not written.
    """
    ids = ",".join(map(str, request.prompts[0]))
    command = [sys.executable, "-m", "infc", "generate", str(artifact), "--token-ids", ids]
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--max-tokens=8", "--ignore-eos", f"--threads={threads}"],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=said,
            bufsize=0,
        )
        clock = CpuClock.read(process.pid)
        assert process.stdout is not None
        with process.stdout as output:
            output.read(1)
            seconds = time.perf_counter() - start
            others = clock.share_of_others(CpuClock.read(process.pid))
            output.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
    if process.returncode:
        reason = lines[-1] if lines else "no error message"
        raise WorkerError(f"infc generate ended with status {process.returncode}: {reason}")
    return Reply(seconds, seconds, 1, usage.ru_maxrss * 1024, others)
