"""Random-weight checkpoints of known shapes, for measuring speed where weights do not matter.

python benchmarks/models.py OUTDIR [--shape 135m|0.5b|1b|8b]
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from infc.ir.safetensors import write_safetensors
from infc.ir.types import DType, TensorType

VOCAB_SIZE = 32_000
SHAPES = ("135m", "0.5b", "1b", "8b")
"""Those of SmolLM2-135M, Qwen2.5-0.5B, Llama-3.2-1B and Llama-3.1-8B, but for the vocabulary."""
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB_SIZE entries, trained on the Python standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts][:600]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(p) for p in files], trainer)
    missing = VOCAB_SIZE - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<|pad_{i}|>" for i in range(missing)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], bos_token=special[0]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def config_of(shape: str) -> PretrainedConfig:
    """The configuration of a shape."""
    common = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": shape != "8b",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": torch.bfloat16,
    }
    if shape == "0.5b":
        return Qwen2Config(
            hidden_size=896,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            intermediate_size=4864,
            rope_theta=1e6,
            use_sliding_window=False,
            **common,
        )
    hidden, layers, heads, groups, intermediate = {
        "135m": (576, 30, 9, 3, 1536),
        "1b": (2048, 16, 32, 8, 8192),
        "8b": (4096, 32, 32, 8, 14336),
    }[shape]
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=hidden // heads,
        intermediate_size=intermediate,
        rope_theta=5e5,
        **common,
    )


def build(shape: str) -> torch.nn.Module:
    """The model of a shape, weights drawn from seed 0, in bfloat16."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(shape)).to(torch.bfloat16)


def write_large(shape: str, place: Path) -> None:
    """A checkpoint as `build` would give it, but for the numbers; one tensor at a time."""
    config = config_of(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = {name: tensor.shape for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)

    def draw(name: str) -> torch.Tensor:
        shape = tensors[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        rows = torch.empty(shape, dtype=torch.bfloat16)
        for part in rows.split(1024):
            part.copy_(0.02 * torch.randn(part.shape, generator=generator))
        return rows

    place.mkdir(parents=True, exist_ok=True)
    kinds = [(name, TensorType(DType.BF16, tuple(shape))) for name, shape in tensors.items()]
    write_safetensors(place / "model.safetensors", kinds, draw, {"format": "pt"})
    config.architectures = [type(model).__name__]
    config.save_pretrained(place)


def artifact_of(checkpoint: Path, scheme: str = "none") -> Path:
    """Where a benchmark puts the artifact of a checkpoint: beside it, one a scheme."""
    suffix = "" if scheme == "none" else f"-{scheme}"
    return checkpoint.with_name(f"{checkpoint.name}{suffix}.artifact")


def make_checkpoint(shape: str, directory: Path) -> Path:
    """Write the checkpoint of a shape into `directory`, unless it is there already."""
    place = directory / f"random-{shape}"
    if not (place / "model.safetensors").exists():
        if shape == "8b":
            write_large(shape, place)
        else:
            build(shape).save_pretrained(place)
        train_tokenizer().save_pretrained(place)
    (place / "model.yaml").write_text("model: .\ndtype: bfloat16\n", encoding="utf-8")
    return place


def main() -> None:
    """Make the checkpoints that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    options = parser.parse_args()
    print(make_checkpoint(options.shape, options.directory))


if __name__ == "__main__":
    main()
