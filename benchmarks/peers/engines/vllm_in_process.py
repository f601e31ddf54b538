"""vLLM for CPUs, its engine stepped in this process; prefix reuse on."""

from __future__ import annotations

import itertools
import os
from collections import deque
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="2",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
)

import vllm

from ..workloads import MAX_CONTEXT, MAX_REQUESTS, Request
from . import OnTokens

BATCH_TOKENS = 2048


class Vllm:
    """The engine under `vllm.LLM`."""

    version = f"vllm-cpu {vllm.__version__}"

    def __init__(self, model: Path, threads: int) -> None:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
        llm: Any = vllm.LLM(
            str(model),
            dtype="bfloat16",
            max_model_len=MAX_CONTEXT,
            max_num_seqs=MAX_REQUESTS,
            max_num_batched_tokens=BATCH_TOKENS,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
        self._engine = llm.llm_engine
        self._names = map(str, itertools.count())

    def generate(self, request: Request, on_tokens: OnTokens) -> None:
        """Answer; the next request is added in the step after one has ended."""
        params: Any = vllm.SamplingParams(
            temperature=0, max_tokens=request.new, min_tokens=request.new, ignore_eos=True
        )
        waiting = deque(request.prompts)
        seen: dict[str, int] = {}  # tokens of each request that runs
        while waiting or seen:
            while waiting and len(seen) < request.concurrency:
                name = next(self._names)
                prompt = {"prompt_token_ids": list(waiting.popleft())}
                self._engine.add_request(name, prompt, params)
                seen[name] = 0
            for output in self._engine.step():
                count = len(output.outputs[0].token_ids)
                on_tokens(count - seen[output.request_id])
                seen[output.request_id] = count
                if output.finished:
                    del seen[output.request_id]


def load(model: Path, threads: int) -> Vllm:
    """Load a checkpoint."""
    return Vllm(model, threads)


def weigh(model: Path) -> int:
    """Bytes of the checkpoint's tensors; the tied embedding is stored once."""
    return (model / "model.safetensors").stat().st_size
