"""onnxruntime-genai on the CPU, in static batches: its plain API has no continuous ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai

from ..workloads import Request
from . import OnTokens
from .static import Prompts, batches


class OnnxRuntime:
    """A model; every batch has a generator of its own."""

    version = f"onnxruntime-genai {onnxruntime_genai.__version__}"

    def __init__(self, model: Path, threads: int) -> None:
        config: Any = onnxruntime_genai.Config(str(model))
        session = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        self._model: Any = onnxruntime_genai.Model(config)

    def generate(self, request: Request, on_tokens: OnTokens) -> None:
        """Answer, batch by batch."""
        for prompts in batches(request):
            generator = self._begin(prompts, request.new)
            for _ in range(request.new):
                generator.generate_next_token()
                on_tokens(len(prompts))
            length = len(generator.get_sequence(0)) - len(prompts[0])
            if length != request.new:
                raise RuntimeError(f"an answer has {length} tokens instead of {request.new}")

    def _begin(self, prompts: Prompts, new: int) -> Any:
        length = len(prompts[0]) + new
        params: Any = onnxruntime_genai.GeneratorParams(self._model)
        params.set_search_options(
            do_sample=False, min_length=length, max_length=length, batch_size=len(prompts)
        )
        generator: Any = onnxruntime_genai.Generator(self._model, params)
        ids = np.array(prompts, dtype=np.int32)
        generator.append_tokens(ids if len(prompts) > 1 else ids[0])
        return generator


def load(model: Path, threads: int) -> OnnxRuntime:
    """Load a folder of the model builder."""
    return OnnxRuntime(model, threads)


def weigh(model: Path) -> int:
    """Bytes of what nodes other than the look-up of embeddings read."""
    import onnx

    graph: Any = onnx.load(str(model / "model.onnx"), load_external_data=False).graph
    used = {name for node in graph.node if node.op_type != "Gather" for name in node.input}
    read = [tensor for tensor in graph.initializer if tensor.name in used]
    return int(sum(np.prod(t.dims) * _element_bytes(t.data_type) for t in read))


def _element_bytes(data_type: int) -> float:
    import onnx

    name = onnx.TensorProto.DataType.Name(data_type)
    if name in ("INT4", "UINT4"):
        return 0.5
    return float(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize)
