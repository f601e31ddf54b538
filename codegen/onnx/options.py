"""What a recipe may say about the ONNX backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Dialect = Literal["standard", "onnxruntime"]
KvForm = Literal["paged", "slots", "auto"]


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """The section `onnx` of a recipe."""

    dialect: Dialect = field(
        default="standard",
        metadata={
            "doc": "Ops that the model uses: `standard` has those of ONNX (opset 24) alone,"
            " `onnxruntime` its own as well, which are faster there and unknown elsewhere."
        },
    )
    kv: KvForm = field(
        default="paged",
        metadata={
            "doc": "How keys and values are kept: `paged` in blocks of tokens, which requests with"
            " the same beginning share; `slots` in one piece for each sequence, which takes memory"
            " for `runtime.max_context` tokens of each, however short, and for those of a step"
            " behind them; `auto` is `slots` with `dialect: onnxruntime` and a cache in float32, if"
            " slots of all sequences take at most 1 GiB, and else `paged`."
        },
    )
    whole_sequence: bool = field(
        default=False,
        metadata={
            "doc": "Write `sequence.onnx` as well: a model without a cache, which computes a whole"
            " sequence at once and takes nothing but tokens and positions."
        },
    )
