"""Models that also take images are compiled for text, and refused for what is true of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.utils import logging

from infc.frontend.load import load_model
from infc.ir.errors import UnsupportedModelError

from ..checkpoints import spread_weights
from ..configs.base import COMMON, VOCAB_SIZE, WINDOW
from .oracle import ROWS, captured_logits, no_log, prompt, relative_error

TEXT = {**COMMON, "pad_token_id": 0}
GEMMA3 = {
    **TEXT,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# As many layers as the text part: they must not be taken for its own.
IMAGES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_IMAGES = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}

MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **GEMMA3},
        "vision_config": {"model_type": "siglip_vision_model", **IMAGES},
        "image_token_id": 300,
    },
    "gemma4": {
        # Heads of full attention are wider, and each layer has embeddings of its own.
        "text_config": {
            "model_type": "gemma4_text",
            **GEMMA3,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}},
        },
        "image_token_id": 300,
    },
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **IMAGES},
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **TEXT, "head_dim": 16, "sliding_window": None},
        "vision_config": {"model_type": "pixtral", **IMAGES},
    },
    "qwen2_5_vl": {
        "text_config": {"model_type": "qwen2_5_vl_text", **TEXT, "rope_parameters": SECTIONS},
        "vision_config": {"model_type": "qwen2_5_vl_vision", **QWEN_IMAGES},
    },
}


def make_model(kind: str, directory: Path) -> Any:
    """A small random model of that kind, saved to `directory`."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = transformers.AutoConfig.for_model(kind, **MODELS[kind])
    model = transformers.AutoModelForMultimodalLM.from_config(config, attn_implementation="eager")
    spread_weights(model, seed=3)
    model.save_pretrained(directory)
    return model.eval()


@pytest.mark.parametrize("kind", MODELS)
def test_text_alone_gives_the_logits_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    model = make_model(kind, tmp_path)
    lines: list[str] = []
    program = load_model(tmp_path, max_context=64, log=lines.append)
    ids = prompt()
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0][list(ROWS)]
    assert relative_error(captured_logits(program, ids, ROWS), expected) < 1e-5
    assert lines == [f"{kind} is compiled for text alone: its other inputs are left out"]
    spec = program.spec
    assert (spec.architecture, spec.num_layers, spec.hidden_size) == (kind, 4, 64)
    parts = (model.get_decoder(), model.get_output_embeddings())
    tensors = {one for part in parts for one in part.state_dict(keep_vars=True).values()}
    assert spec.num_parameters == sum(one.numel() for one in tensors)
    assert spec.windows == ((WINDOW, None) * 2 if kind.startswith("gemma") else (None,) * 4)


def test_a_text_part_is_checked_as_a_whole_model_is(tmp_path: Path) -> None:
    make_model("llava", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, reason in (
        ({"layer_types": ["conv"] * 4}, "layer 0 of llama is of type conv"),
        ({"quantization_config": {"quant_method": "awq"}}, r"already quantized \(awq\)"),
    ):
        part = {**config["text_config"], **change}
        path.write_text(json.dumps({**config, "text_config": part}))
        with pytest.raises(UnsupportedModelError, match=reason):
            load_model(tmp_path, log=no_log)
