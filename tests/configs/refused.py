"""Models that infc refuses."""

from __future__ import annotations

from .base import COMMON, GPT, VOCAB_SIZE, Refused

REFUSED: dict[str, Refused] = {
    "lfm2": Refused(
        "lfm2",
        {**COMMON, "layer_types": ["conv", "full_attention"] * 2},
        "layer 0 of lfm2 is of type conv",
    ),
    "mamba": Refused(
        "mamba",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        "mamba has no attention heads",
    ),
    "bloom": Refused(
        "bloom",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        "bloom computes attention outside",
    ),
    "codegen": Refused("codegen", {**GPT, "rotary_dim": 16}, "codegen computes attention outside"),
}
