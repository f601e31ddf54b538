"""infc through its public face: an artifact opened with the defaults."""

from __future__ import annotations

import itertools
from pathlib import Path

import infc

from ..workloads import Request
from . import OnTokens


class InfcEngine:
    """Requests are fed to the engine under `LLM`, so that no more than asked run at once."""

    version = infc.__version__

    def __init__(self, model: Path, threads: int) -> None:
        self._engine = infc.LLM(model, threads=threads).engine
        self._engine.work_ahead()
        self._names = map(str, itertools.count())

    def generate(self, request: Request, on_tokens: OnTokens) -> None:
        """Answer; the next request is added in the step after one has ended."""
        params = infc.SamplingParams(max_tokens=request.new, ignore_eos=True)
        waiting, running = list(reversed(request.prompts)), 0
        while waiting or running:
            while waiting and running < request.concurrency:
                self._engine.add_request(next(self._names), waiting.pop(), params)
                running += 1
            for output in self._engine.step():
                on_tokens(sum(len(piece.token_ids) for piece in output.outputs))
                running -= output.finished


def load(model: Path, threads: int) -> InfcEngine:
    """Open an artifact."""
    return InfcEngine(model, threads)


def weigh(model: Path) -> int:
    """Bytes of the matrices that products read, scales included."""
    return sum(held.num_bytes for held in infc.inspect(model).program.schemes)
