"""CTranslate2's generator, in static batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ctranslate2

from ..workloads import Request
from . import OnTokens
from .static import batches


class CTranslate2:
    """A generator; it takes tokens as text, so ids go through the vocabulary."""

    version = f"ctranslate2 {ctranslate2.__version__}"

    def __init__(self, model: Path, threads: int) -> None:
        self._generator: Any = ctranslate2.Generator(
            str(model), device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads
        )
        self._vocabulary = json.loads((model / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(self, request: Request, on_tokens: OnTokens) -> None:
        """Answer, batch by batch; the shortest length keeps an end from being taken."""

        def on_step(result: Any) -> bool:
            del result
            on_tokens(1)
            return False

        for prompts in batches(request):
            self._generator.generate_batch(
                [[self._vocabulary[t] for t in prompt] for prompt in prompts],
                max_batch_size=0,
                max_length=request.new,
                min_length=request.new,
                sampling_topk=1,
                include_prompt_in_result=False,
                callback=on_step,
            )


def load(model: Path, threads: int) -> CTranslate2:
    """Load a converted folder."""
    return CTranslate2(model, threads)


def weigh(model: Path) -> int:
    """Bytes of the model's file, int8 with a scale a row; the tied embedding is the head too."""
    return (model / "model.bin").stat().st_size
