"""transformers with its defaults in bfloat16: sdpa attention, a dynamic cache, static batches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from ..workloads import Request
from . import OnTokens
from .static import batches


class _Counter(BaseStreamer):
    """Hears of the prompt first, and then of each step. For single prompts only: a batch of
    streamed answers is refused by transformers."""

    def __init__(self, on_tokens: OnTokens) -> None:
        self._on_tokens = on_tokens
        self._begun = False

    def put(self, value: torch.Tensor) -> None:
        if self._begun:
            self._on_tokens(value.numel())
        self._begun = True

    def end(self) -> None:
        """Nothing is held back."""


class Transformers:
    """A causal language model."""

    version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def __init__(self, model: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        auto: Any = transformers.AutoModelForCausalLM
        self._model: Any = auto.from_pretrained(model, dtype=torch.bfloat16).eval()
        self._model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(self, request: Request, on_tokens: OnTokens) -> None:
        """Answer, batch by batch; the tokens of a batch of several are counted at its end."""
        for prompts in batches(request):
            ids = torch.tensor(prompts)
            alone = len(prompts) == 1
            answer = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                streamer=_Counter(on_tokens) if alone else None,
                do_sample=False,
                max_new_tokens=request.new,
                min_new_tokens=request.new,
                eos_token_id=None,
                pad_token_id=0,
            )
            if not alone:
                on_tokens(answer[:, ids.shape[1] :].numel())


def load(model: Path, threads: int) -> Transformers:
    """Load a checkpoint."""
    return Transformers(model, threads)


def weigh(model: Path) -> int:
    """Bytes of the checkpoint's tensors; the tied embedding is stored once."""
    return (model / "model.safetensors").stat().st_size
