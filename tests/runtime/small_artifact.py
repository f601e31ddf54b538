"""A small artifact of the reference backend, written by hand: two layers, one with a window."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from infc.ir.artifact import ArtifactWriter
from infc.ir.builder import ProgramBuilder
from infc.ir.manifest import (
    MAIN,
    CompiledProgram,
    Entry,
    Limits,
    Manifest,
    TargetMachine,
    TokenizerFiles,
    WeightsFile,
    input_types,
    output_types,
)
from infc.ir.program import ModelSpec, Program, WeightRef
from infc.ir.resources import KvGroup
from infc.ir.safetensors import write_safetensors
from infc.ir.text import print_program
from infc.ir.types import DType, Sym, TensorType

HIDDEN, HEADS, SIZE, BLOCK, WINDOW, CONTEXT = 16, 2, 8, 4, 6, 96
TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE of about 300 tokens, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|turn|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the hat sat on the mat", "für 你好 🙂"], trainer)
    return tokenizer


def make_program(vocab_size: int) -> Program:
    """Embedding, two attention layers with residuals, and a head."""
    b = ProgramBuilder("small", phase="lowered")
    b.spec = ModelSpec(
        "small", 2, HIDDEN, HEADS, HEADS, SIZE, vocab_size, CONTEXT, (None, WINDOW), 0
    )
    b.resources = (
        KvGroup("full", (0,), HEADS, SIZE, SIZE, "f32", BLOCK),
        KvGroup("window", (1,), HEADS, SIZE, SIZE, "f32", BLOCK, WINDOW),
    )
    tokens, rows = Sym("T"), Sym("R")
    b.symbol("T", 1, 64)
    b.symbol("R", 1, 8)
    ids = b.input("input_ids", TensorType(DType.I64, (tokens,)))
    b.input("positions", TensorType(DType.I64, (tokens,)))
    index = b.input("logits_index", TensorType(DType.I64, (rows,)))

    def weight(name: str, *shape: int) -> WeightRef:
        return b.weight(name, TensorType(DType.F32, shape))

    x = b.emit("embedding", weight("embed", vocab_size, HIDDEN), ids)
    for layer, group in enumerate(b.resources):
        q, k, v = (
            b.emit(
                "reshape",
                b.emit("linear", x, weight(f"{layer}.{name}", HEADS * SIZE, HIDDEN)),
                shape=("T", HEADS, SIZE),
            )
            for name in "qkv"
        )
        b.add("kv_write", (k, v), {"layer": layer, "group": group.name})
        attended = b.emit(
            "paged_attention",
            q,
            layer=layer,
            group=group.name,
            scale=0.35,
            window=group.window,
            value_head_dim=SIZE,
        )
        flat = b.emit("reshape", attended, shape=("T", HIDDEN))
        x = b.emit("add", x, b.emit("linear", flat, weight(f"{layer}.o", HIDDEN, HIDDEN)))
    last = b.emit("take", x, index, dim=0)
    b.output(logits=b.emit("linear", last, weight("head", vocab_size, HIDDEN)), hidden=last)
    return b.build()


def write_small_artifact(
    path: Path,
    *,
    with_tokenizer: bool = True,
    with_template: bool = True,
    generation: Mapping[str, Any] | None = None,
    max_context: int = CONTEXT,
) -> Path:
    """Write the artifact; its weights are random, and spread enough for clear winners."""
    tokenizer = make_tokenizer()
    vocab_size = tokenizer.get_vocab_size()
    program = make_program(vocab_size)
    random = np.random.default_rng(7)
    kinds = [(weight.name, weight.type) for weight in program.weights.values()]
    shapes = {name: [d for d in kind.shape if isinstance(d, int)] for name, kind in kinds}
    with ArtifactWriter(path) as writer:
        write_safetensors(
            writer.path / "weights.safetensors",
            kinds,
            lambda name: random.standard_normal(shapes[name], np.float32) * np.float32(0.4),
        )
        (writer.path / "program.ir").write_text(print_program(program))
        if with_tokenizer:
            (writer.path / "tokenizer").mkdir()
            tokenizer.save(str(writer.path / "tokenizer/tokenizer.json"))
        template = "tokenizer/chat_template.jinja" if with_template else None
        if with_tokenizer and template is not None:
            (writer.path / template).write_text(TEMPLATE)
        main = CompiledProgram(
            entry=Entry("program", "program.ir"),
            inputs=input_types(program),
            outputs=output_types(program),
            limits=Limits(max_context, 16, 4, 4),
            arena_bytes=0,
            weights=WeightsFile("weights.safetensors", tuple(name for name, _ in kinds)),
            resources=program.resources,
        )
        files = TokenizerFiles("tokenizer/tokenizer.json", None, (0,), template, generation)
        writer.commit(
            Manifest(
                infc_version="0.1.0",
                recipe={"kv_cache": {"memory": "1MiB"}, "runtime": {"threads": 1}},
                model=program.spec,
                backend="reference",
                target=TargetMachine("native", ()),
                programs={MAIN: main},
                tokenizer=files if with_tokenizer else None,
            )
        )
    return path
