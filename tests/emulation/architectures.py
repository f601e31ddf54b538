"""Which architectures run in emulation, and which cannot be compiled for a GPU, for the docs."""

from __future__ import annotations

from typing import Final

FEW: Final = ("qwen3", "gemma2", "mixtral")
"""What every run of the tests has; the others run with `--all`."""
DENSE: Final = ("llama", "gemma3_text", "mistral", "phi3")
OTHERS: Final = (*DENSE, "gpt_oss", "deepseek_v3")
EMULATED: Final = (*FEW, *OTHERS)

NOT_COMPILED: Final[dict[str, str]] = {}
"""Small models that infc compiles, but not for a GPU, and the words that it fails with."""
