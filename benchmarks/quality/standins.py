"""A 16-bit stand-in of a model that is only to be had quantized: weights drawn anew in their cells.

A quantized file widened to bfloat16 lies on a grid, and formats that share this grid look better
on it than they are. So each weight gets uniform noise of half a step to either side (seeded), which
is what a 16-bit checkpoint would look like to any rounding.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

_PLAIN: Any = gguf.dequantize
_BLOCK_BYTES = {
    Type.Q4_0: 18,
    Type.Q4_1: 20,
    Type.Q5_0: 22,
    Type.Q5_1: 24,
    Type.Q8_0: 34,
    Type.Q4_K: 144,
    Type.Q6_K: 210,
}


def make_standin(file: Path, place: Path) -> None:
    """Write `place/hf`, a bfloat16 checkpoint, and `place/bf16.gguf`, the same numbers."""
    import transformers

    modules: tuple[Any, ...] = (gguf, gguf.quants)
    for module in modules:
        module.dequantize = _drawn
    try:
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        loader: Any = transformers.AutoModelForCausalLM
        model = loader.from_pretrained(**where, dtype=torch.float32).bfloat16()
        model.is_quantized, model.hf_quantizer = False, None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(place / "hf")
        tokenizer: Any = transformers.AutoTokenizer
        tokenizer.from_pretrained(**where).save_pretrained(place / "hf")
        _write_gguf(file, place / "bf16.gguf")
    finally:
        for module in modules:
            module.dequantize = _PLAIN


def _drawn(data: NDArray[Any], kind: Type) -> NDArray[np.float32]:
    """Dequantized, with noise inside each weight's cell, rounded to bfloat16."""
    value: NDArray[np.float32] = _PLAIN(data, kind)
    if kind in _BLOCK_BYTES:
        seed = zlib.crc32(np.ascontiguousarray(data).view(np.uint8).ravel()[:65536].tobytes())
        step = _steps(data.reshape(-1, _BLOCK_BYTES[kind]), kind)
        noise = np.random.default_rng(seed).random(step.shape, dtype=np.float32) - 0.5
        value = value + (noise * step).reshape(value.shape)
    rounded = torch.from_numpy(np.ascontiguousarray(value)).bfloat16().float().numpy()
    return np.asarray(rounded, np.float32)


def _steps(raw: NDArray[np.uint8], kind: Type) -> NDArray[np.float32]:
    """The distance between neighbouring values of each weight, in order."""
    if kind == Type.Q6_K:
        scales = raw[:, 192:208].view(np.int8).astype(np.float32)
        return np.repeat(np.abs(scales * _halves(raw, 208)), 16, axis=1).ravel()
    if kind == Type.Q4_K:  # eight 6-bit scales, then eight minima
        packed = raw[:, 4:16]
        high = (packed[:, 8:12] & 15) | ((packed[:, 0:4] >> 6) << 4)
        scales = np.concatenate([packed[:, 0:4] & 63, high], axis=1).astype(np.float32)
        return np.repeat(np.abs(scales * _halves(raw, 0)), 32, axis=1).ravel()
    return np.repeat(np.abs(_halves(raw, 0)), 32, axis=1).ravel()


def _halves(raw: NDArray[np.uint8], at: int) -> NDArray[np.float32]:
    return raw[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _write_gguf(source: Path, out: Path) -> None:
    """The same metadata, matrices in bfloat16."""
    reader = gguf.GGUFReader(source)
    architecture: Any = reader.get_field("general.architecture")
    writer = gguf.GGUFWriter(out, architecture.contents())
    made_anew = ("general.architecture", "general.file_type", "general.quantization_version")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in made_anew:
            kind, inner = field.types[0], field.types[-1]
            is_array = kind == gguf.GGUFValueType.ARRAY
            writer.add_key_value(key, field.contents(), kind, inner if is_array else None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        value = np.ascontiguousarray(
            gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32
        )
        if tensor.tensor_type == Type.F32:
            writer.add_tensor(tensor.name, value)
        else:
            halves = (value.view(np.uint32) >> 16).astype(np.uint16)
            writer.add_tensor(tensor.name, halves, raw_dtype=Type.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
