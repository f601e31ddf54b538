"""Random-weight checkpoints of known shapes, for measuring speed where weights do not matter.

python benchmarks/models.py OUTDIR [--shape 0.5b|1b]
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB_SIZE = 32_000
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


def build(shape: str) -> torch.nn.Module:
    """The model of a shape, weights drawn from seed 0, in bfloat16."""
    torch.manual_seed(0)
    common = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": torch.bfloat16,
    }
    if shape == "0.5b":
        qwen = Qwen2Config(
            hidden_size=896,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            intermediate_size=4864,
            rope_theta=1e6,
            use_sliding_window=False,
            **common,
        )
        return Qwen2ForCausalLM(qwen).to(torch.bfloat16)
    llama = LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=8192,
        rope_theta=5e5,
        **common,
    )
    return LlamaForCausalLM(llama).to(torch.bfloat16)


def artifact_of(checkpoint: Path, scheme: str = "none") -> Path:
    """Where a benchmark puts the artifact of a checkpoint: beside it, one a scheme."""
    suffix = "" if scheme == "none" else f"-{scheme}"
    return checkpoint.with_name(f"{checkpoint.name}{suffix}.artifact")


def make_checkpoint(shape: str, directory: Path) -> Path:
    """Write the checkpoint of a shape into `directory`, unless it is there already."""
    place = directory / f"random-{shape}"
    if not (place / "model.safetensors").exists():
        build(shape).save_pretrained(place)
        train_tokenizer().save_pretrained(place)
    (place / "model.yaml").write_text("model: .\ndtype: bfloat16\n", encoding="utf-8")
    return place


def main() -> None:
    """Make the checkpoints that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=["0.5b", "1b"], default="0.5b")
    options = parser.parse_args()
    print(make_checkpoint(options.shape, options.directory))


if __name__ == "__main__":
    main()
