"""A checkpoint to GGUF in bfloat16, by llama.cpp's own converter.

    python -m benchmarks.peers.to_gguf LLAMA_CPP CHECKPOINT OUT

The converter refuses tokenizers whose hash it does not know; ours was trained by
`benchmarks/models.py`, and is a BPE in the style of GPT-2.
"""

from __future__ import annotations

import importlib
import runpy
import sys


def main() -> None:
    """Teach the converter our tokenizer, and run it."""
    llama_cpp, checkpoint, out = sys.argv[1:]
    sys.path[:0] = [llama_cpp, f"{llama_cpp}/gguf-py"]
    for value in vars(importlib.import_module("conversion.base")).values():
        if isinstance(value, type) and hasattr(value, "get_vocab_base_pre"):
            value.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    script = f"{llama_cpp}/convert_hf_to_gguf.py"
    sys.argv = [script, checkpoint, "--outfile", out, "--outtype", "bf16"]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
