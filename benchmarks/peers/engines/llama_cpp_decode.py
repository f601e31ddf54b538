"""llama.cpp through `llama_decode`, batched by us as its own server does; GGUF files."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import llama_cpp.llama_cpp as lib
import numpy as np

from ..workloads import MAX_CONTEXT, MAX_REQUESTS, Request
from . import OnTokens

BATCH_TOKENS, MICRO_BATCH_TOKENS = 2048, 512
_PREFIX_SEQUENCE = MAX_REQUESTS  # one more than the requests have


class _Token(NamedTuple):
    id: int
    position: int
    sequence: int
    wanted: bool  # its row of logits


@dataclass(slots=True)
class _Running:
    token: int
    length: int
    left: int


class LlamaCpp:
    """A context of `MAX_REQUESTS` sequences, and one for the prefix that requests share."""

    version = f"llama-cpp-python {llama_cpp.__version__}"

    def __init__(self, model: Path, threads: int) -> None:
        lib.llama_log_set(_silent, None)
        lib.llama_backend_init()
        self._model = _load_model(model)
        params: Any = lib.llama_context_default_params()
        params.n_ctx = (MAX_REQUESTS + 1) * MAX_CONTEXT // 2
        params.n_batch, params.n_ubatch = BATCH_TOKENS, MICRO_BATCH_TOKENS
        params.n_seq_max = MAX_REQUESTS + 1
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self._context: Any = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._memory: Any = lib.llama_get_memory(self._context)
        self._vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._batch: Any = lib.llama_batch_init(BATCH_TOKENS, 0, 1)

    def generate(self, request: Request, on_tokens: OnTokens) -> None:
        """Answer: each step decodes what runs, and takes in whole prompts that still fit."""
        lib.llama_memory_clear(self._memory, False)
        shared = request.shared_prefix
        if shared:  # computed once, and its cache copied: the caller's part of reuse
            self._decode(_prompt(request.prompts[0][:shared], 0, _PREFIX_SEQUENCE))
        waiting = deque(request.prompts)
        free = list(range(request.concurrency))
        running: dict[int, _Running] = {}
        while waiting or running:
            step = [_Token(r.token, r.length, s, True) for s, r in running.items()]
            while waiting and free and len(step) + len(waiting[0]) - shared <= BATCH_TOKENS:
                prompt, sequence = waiting.popleft(), free.pop()
                if shared:
                    lib.llama_memory_seq_cp(self._memory, _PREFIX_SEQUENCE, sequence, 0, shared)
                step += _prompt(prompt[shared:], shared, sequence)
                running[sequence] = _Running(0, len(prompt) - 1, request.new)
            self._decode(step)
            on_tokens(self._take(step, running, free))

    def _take(self, step: Sequence[_Token], running: dict[int, _Running], free: list[int]) -> int:
        """Give each wanted row's likeliest token to its sequence; how many there were."""
        rows = [(row, token.sequence) for row, token in enumerate(step) if token.wanted]
        for row, sequence in rows:
            one = running[sequence]
            one.token = self._likeliest(row)
            one.length += 1
            one.left -= 1
            if not one.left:
                del running[sequence]
                free.append(sequence)
                lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return len(rows)

    def _decode(self, step: Sequence[_Token]) -> None:
        batch = self._batch
        batch.n_tokens = len(step)
        for i, token in enumerate(step):
            batch.token[i], batch.pos[i] = token.id, token.position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, token.sequence
            batch.logits[i] = token.wanted
        if status := lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode gave status {status}")

    def _likeliest(self, row: int) -> int:
        logits = lib.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


def load(model: Path, threads: int) -> LlamaCpp:
    """Load a GGUF file."""
    return LlamaCpp(model, threads)


def weigh(model: Path) -> int:
    """Bytes of all tensors; the embedding of the tied shapes is their head too."""
    lib.llama_log_set(_silent, None)
    lib.llama_backend_init()
    return int(lib.llama_model_size(_load_model(model)))


def _prompt(ids: Sequence[int], start: int, sequence: int) -> list[_Token]:
    last = len(ids) - 1
    wanted = sequence != _PREFIX_SEQUENCE
    return [_Token(t, start + i, sequence, wanted and i == last) for i, t in enumerate(ids)]


def _load_model(path: Path) -> Any:
    params: Any = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    return model


@lib.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    del level, text, data
