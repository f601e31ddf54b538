"""A GGUF file in fewer bits, by llama.cpp's own quantiser.

ENVIRONMENT/bin/python -m benchmarks.peers.quantize_gguf SOURCE OUT q4_0|q4_k_m|q8_0
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import llama_cpp.llama_cpp as lib

TYPES = {
    "q4_0": lib.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_k_m": lib.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q8_0": lib.LLAMA_FTYPE_MOSTLY_Q8_0,
}


def main() -> None:
    """Quantise with the defaults: a head in q6_K beside q4_0, as users have it."""
    source, out, name = sys.argv[1:]
    params: Any = lib.llama_model_quantize_default_params()
    params.ftype = TYPES[name]
    if lib.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp cannot quantise {source} to {name}")


if __name__ == "__main__":
    main()
