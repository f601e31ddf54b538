"""llama.cpp's logits of windows of tokens, written to a file of float32.

    ENVIRONMENT/bin/python -m benchmarks.quality.llama_logits MODEL WINDOWS OUT THREADS

WINDOWS is JSON, a list of lists of token ids; OUT gets a row of logits for each token but the last
of a window.
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
    """Run each window as a sequence of its own."""
    model_path, windows_path, out, threads = sys.argv[1:]
    windows = json.loads(Path(windows_path).read_text(encoding="utf-8"))
    lib.llama_log_set(_silent, None)
    lib.llama_backend_init()
    model = _load_model(Path(model_path))
    longest = max(map(len, windows))
    params: Any = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = longest, longest, min(longest, 512)
    params.n_threads = params.n_threads_batch = int(threads)
    context: Any = lib.llama_init_from_model(model, params)
    vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch: Any = lib.llama_batch_init(longest, 0, 1)
    with Path(out).open("wb") as file:
        for window in windows:
            lib.llama_memory_clear(lib.llama_get_memory(context), True)
            batch.n_tokens = len(window)
            for i, token in enumerate(window):
                batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if status := lib.llama_decode(context, batch):
                raise SystemExit(f"llama_decode gave status {status}")
            for i in range(len(window) - 1):
                row = lib.llama_get_logits_ith(context, i)
                np.ctypeslib.as_array(row, (vocab_size,)).astype(np.float32).tofile(file)


if __name__ == "__main__":
    main()
