"""The bundled tiny model: complete, small, grouped-query, and better than xz on unseen code."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny"
CHECKPOINT = TINY / "checkpoint"
FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The training script as a module: it holds the measuring that the README quotes."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("tiny_train", TINY / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Run as a script it finds `corpus.py` beside itself; so it must here.
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TINY)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.parametrize("name", FILES)
def test_checkpoint_has(name: str) -> None:
    """Every file of a standard Hugging Face directory is there and not empty."""
    assert (CHECKPOINT / name).stat().st_size > 0


def test_weights_are_small_and_bfloat16() -> None:
    """The weights fit into a repository, and their header agrees with the config."""
    path = CHECKPOINT / "model.safetensors"
    assert path.stat().st_size < 12_000_000
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    config = json.loads((CHECKPOINT / "config.json").read_text())
    shape = [config["vocab_size"], config["hidden_size"]]
    assert header["model.embed_tokens.weight"]["shape"] == shape


def test_architecture() -> None:
    """A Llama whose query heads share key and value heads."""
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert 2048 <= config["vocab_size"] <= 4096


def test_ends_at_text_and_at_turn() -> None:
    """Generation stops at the end of a file and at the end of a turn."""
    ends = json.loads((CHECKPOINT / "generation_config.json").read_text())["eos_token_id"]
    added = json.loads((CHECKPOINT / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    assert ends == [ids["<|endoftext|>"], ids["<|im_end|>"]]


def test_chat_template(script: ModuleType) -> None:
    """The template writes ChatML, and opens the answer only when asked."""
    tokenizer = script.AutoTokenizer.from_pretrained(CHECKPOINT)
    turns = [{"role": "user", "content": "Hi"}]
    closed = tokenizer.apply_chat_template(turns, tokenize=False)
    opened = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert closed == "<|im_start|>user\nHi<|im_end|>\n"
    assert opened == closed + "<|im_start|>assistant\n"
    ids = tokenizer(opened, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == opened


def test_tokenizer_is_lossless(script: ModuleType) -> None:
    """Any text comes back byte for byte."""
    tokenizer = script.AutoTokenizer.from_pretrained(CHECKPOINT)
    text = "def f(x):\n\treturn 'naïve – 你好 🙂'  # ,  .\r\n" + " don 't  " * 3
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_predicts_unseen_code_better_than_xz(script: ModuleType) -> None:
    """The held-out module takes fewer bits per byte than xz -9 needs."""
    figures = script.evaluate(CHECKPOINT, TINY / "heldout.py.txt")
    assert 2_000_000 <= figures["parameters"] <= 5_000_000
    assert figures["model_bits_per_byte"] < figures["xz_bits_per_byte"]
