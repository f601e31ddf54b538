"""OpenVINO GenAI's continuous batching over a paged cache, prefix reuse on; exported IR."""

from __future__ import annotations

import itertools
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from ..workloads import MAX_REQUESTS, Request
from . import OnTokens

CACHE_GIB, BATCH_TOKENS = 2, 512


class OpenVino:
    """The pipeline, and the handles of what runs in it."""

    version = f"openvino-genai {openvino_genai.__version__}"

    def __init__(self, model: Path, threads: int) -> None:
        scheduling: Any = openvino_genai.SchedulerConfig()
        scheduling.max_num_seqs = MAX_REQUESTS
        scheduling.cache_size = CACHE_GIB
        scheduling.max_num_batched_tokens = BATCH_TOKENS
        scheduling.enable_prefix_caching = True
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(
            str(model), scheduling, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self._names = itertools.count()

    def generate(self, request: Request, on_tokens: OnTokens) -> None:
        """Answer. Where prompts share a prefix, the first one runs alone.

        The cache of prefixes is asked when a request is added, so it must be filled by then.
        """
        waiting = deque(request.prompts)
        if request.shared_prefix:
            self._run(deque([waiting.popleft()]), request, on_tokens)
        self._run(waiting, request, on_tokens)

    def _run(self, waiting: deque[tuple[int, ...]], request: Request, on_tokens: OnTokens) -> None:
        config = _config(request.new)
        running: list[tuple[Any, int]] = []  # handles, and the tokens that are still to come
        while waiting or running:
            while waiting and len(running) < request.concurrency:
                ids = openvino.Tensor(np.array([waiting.popleft()], dtype=np.int64))
                handle = self._pipeline.add_request(next(self._names), ids, config)
                running.append((handle, request.new))
            self._pipeline.step()
            left = []
            for handle, missing in running:
                came = _read(handle)
                if came:
                    on_tokens(came)
                if came < missing:
                    left.append((handle, missing - came))
            running = left


def load(model: Path, threads: int) -> OpenVino:
    """Load a folder of exported IR."""
    return OpenVino(model, threads)


def weigh(model: Path) -> int:
    """Bytes of the constants; the embedding of the tied shapes is their head too."""
    return (model / "openvino_model.bin").stat().st_size


def _config(new: int) -> Any:
    config: Any = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = new
    config.ignore_eos = True
    config.do_sample = False
    return config


def _read(handle: Any) -> int:
    if not handle.can_read():
        return 0
    return sum(len(output.generated_ids) for output in handle.read().values())
