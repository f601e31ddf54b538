"""What a recipe may say about the TensorRT backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

WeightsForm = Literal["embedded", "inputs"]


@dataclass(frozen=True, slots=True)
class TensorrtOptions:
    """The section `tensorrt` of a recipe."""

    chips: list[str] = field(
        default_factory=list,
        metadata={
            "doc": "Further GPUs that the engine is built for, beside `target`: any of `sm_80`,"
            " `sm_86`, `sm_89` and `sm_120`."
        },
    )
    weights: WeightsForm = field(
        default="embedded",
        metadata={
            "doc": "Where weights are: `embedded` in the engine, or `inputs` of it, which lie once"
            " in the artifact's file of weights and are copied to the GPU when it is opened;"
            " TensorRT cannot rearrange those while it builds."
        },
    )
    decode_buckets: list[int] = field(
        default_factory=list,
        metadata={
            "doc": "Numbers of sequences that have an optimization profile and a CUDA graph for"
            " steps of one token each; others are padded to the next. By default 1, 4, 16, ... and"
            " `runtime.max_sequences`."
        },
    )
    chunk_profiles: list[int] = field(
        default_factory=list,
        metadata={
            "doc": "Numbers of tokens up to which steps with prompts have an optimization profile."
            " By default `runtime.step_tokens` alone."
        },
    )
