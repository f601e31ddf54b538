"""A contestant's process: loads a model once, then answers requests, JSON lines in and out.

    ENVIRONMENT/bin/python -m benchmarks.peers.worker ENGINE MODEL THREADS

The first line out says that the model is loaded; then each request line gets one line back.
Only the standard library and the engine are imported: start and memory are measured.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from .engines import Engine
from .process import peak_rss_bytes
from .workloads import Request

_PR_SET_PDEATHSIG = 1


def answer(engine: Engine, request: Request) -> dict[str, float]:
    """Run one request; seconds to its first token and to its end. Wrong counts are an error."""
    first, count = 0.0, 0

    def on_tokens(arrived: int) -> None:
        nonlocal first, count
        if not count:
            first = time.perf_counter() - start
        count += arrived

    start = time.perf_counter()
    engine.generate(request, on_tokens)
    seconds = time.perf_counter() - start
    if count != request.new_tokens:
        raise RuntimeError(f"{count} tokens came, and {request.new_tokens} were asked for")
    return {"first": first, "seconds": seconds, "tokens": count}


def serve(engine: Engine, lines: Iterator[str], out: TextIO) -> None:
    """Answer until the input ends. An error is an answer too."""
    _send(out, {"version": engine.version})
    for line in lines:
        try:
            reply: dict[str, object] = dict(answer(engine, Request.from_json(json.loads(line))))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        _send(out, {**reply, "peak_rss_bytes": peak_rss_bytes(os.getpid())})


def _send(out: TextIO, message: dict[str, object]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def main() -> None:
    """Load and serve."""
    name, model, threads = sys.argv[1:]
    # A stopped process never sees its input end: it goes when its parent does.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Libraries print where they like; messages have a descriptor that only we know.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    module = importlib.import_module(f".engines.{name}", __package__)
    serve(module.load(Path(model), int(threads)), iter(sys.stdin.readline, ""), out)


if __name__ == "__main__":
    main()
