"""llama.cpp's greedy answers to prompts of token ids.

    ENVIRONMENT/bin/python -m benchmarks.quality.llama_greedy MODEL PROMPTS OUT TOKENS THREADS

PROMPTS and OUT are JSON, lists of lists of token ids; every answer has TOKENS ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

from ..peers.engines.llama_cpp_decode import _load_model, _silent


def main() -> None:
    """Answer each prompt alone."""
    model_path, prompts_path, out, tokens, threads = sys.argv[1:]
    prompts: list[list[int]] = json.loads(Path(prompts_path).read_text(encoding="utf-8"))
    lib.llama_log_set(_silent, None)
    lib.llama_backend_init()
    model = _load_model(Path(model_path))
    longest = max(map(len, prompts)) + int(tokens)
    params: Any = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = longest
    params.n_threads = params.n_threads_batch = int(threads)
    context: Any = lib.llama_init_from_model(model, params)
    vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch: Any = lib.llama_batch_init(longest, 0, 1)

    def run(ids: list[int], at: int) -> int:
        """The most likely token after `ids`, which begin at position `at`."""
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, at + i, i == len(ids) - 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if status := lib.llama_decode(context, batch):
            raise SystemExit(f"llama_decode gave status {status}")
        row = lib.llama_get_logits_ith(context, len(ids) - 1)
        return int(np.ctypeslib.as_array(row, (vocab_size,)).argmax())

    answers = []
    for prompt in prompts:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        answer = [run(prompt, 0)]
        while len(answer) < int(tokens):
            answer.append(run(answer[-1:], len(prompt) + len(answer) - 1))
        answers.append(answer)
    Path(out).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
