"""Artifacts of the shapes of known models, with no weights but their sizes: made in seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from infc.codegen.base import EmitOptions
from infc.codegen.triton import backend as triton_backend
from infc.codegen.triton.backend import Generated, LaunchBuild, TritonBackend, generate
from infc.codegen.triton.options import TritonOptions
from infc.frontend.load import load_model
from infc.ir.artifact import Artifact, ArtifactWriter, open_artifact
from infc.ir.manifest import MAIN, Limits, Manifest, TargetMachine
from infc.ir.program import Program, Weight, vocabulary_size
from infc.ir.safetensors import layout
from infc.ir.targets import Target
from infc.ir.text import print_program
from infc.ir.types import DType, TensorType
from infc.passes.pass_manager import run_pipeline
from infc.passes.pipeline import build_pipeline, parse_pipeline

STEP_TOKENS: Final = 8192
SEQUENCES: Final = 256
CONTEXT: Final = 32768


def config_of(shape: str) -> PretrainedConfig:
    """Llama-3.2-1B, Llama-3.1-8B, parts of it, or what an emulation can run."""
    hidden, layers, heads, groups, intermediate, vocabulary = {
        "tiny": (256, 2, 8, 2, 512, 512),
        "1b": (2048, 16, 32, 8, 8192, 128_256),
        "8b": (4096, 32, 32, 8, 14336, 128_256),
        "8b-attention": (4096, 1, 32, 8, 512, 512),
        "8b-layers": (4096, 4, 32, 8, 14336, 512),
    }[shape]
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=shape != "8b",
        max_position_embeddings=CONTEXT,
        dtype=torch.bfloat16,
    )


def make_artifact(
    shape: str,
    scheme: str,
    target: Target,
    folder: Path,
    *,
    step_tokens: int = STEP_TOKENS,
    options: TritonOptions | None = None,
) -> Artifact:
    """The artifact of a shape; its files of weights are holes, which take no space."""
    options = options or TritonOptions()
    kind = "-invariant" if options.batch_invariant else ""
    place = folder / f"{shape}-{scheme}-{target.name}{kind}"
    if not (place / "manifest.json").exists():
        program = make_program(shape, scheme, target, folder, step_tokens=step_tokens)
        with holes_for_weights():
            write_artifact(program, generate(program, target, options), target, place)
    return open_artifact(place)


def make_program(
    shape: str, scheme: str, target: Target, folder: Path, *, step_tokens: int = STEP_TOKENS
) -> Program:
    """The planned program of a shape."""
    captured = load_model(
        _checkpoint(shape, folder), dtype="bfloat16", step_tokens=step_tokens,
        logit_rows=min(SEQUENCES, step_tokens), log=lambda _: None,
    )  # fmt: skip
    passes: dict[str, Any] = {}
    if scheme != "none":
        passes["quantize-weights"] = {"scheme": scheme}
    plan = parse_pipeline(TritonBackend().plan_passes(target)).passes
    program, _ = run_pipeline(captured, build_pipeline(passes, plan=plan), verify=False)
    return program


def _checkpoint(shape: str, folder: Path) -> Path:
    place = folder / f"checkpoint-{shape}"
    config = config_of(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    place.mkdir(parents=True, exist_ok=True)
    kinds = [
        (name, TensorType(DType.BF16, tuple(tensor.shape)))
        for name, tensor in model.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    ]
    _write_holes(place / "model.safetensors", kinds, {"format": "pt"})
    config.architectures = [type(model).__name__]
    config.save_pretrained(place)
    return place


@contextmanager
def holes_for_weights() -> Iterator[None]:
    """Artifacts that are written meanwhile have holes for weights."""

    def holes(_: Program, weights: Sequence[Weight], path: Path, __: EmitOptions) -> None:
        _write_holes(path, [(one.name, one.type) for one in weights], {})

    with mock.patch.object(triton_backend, "write_weights", holes):
        yield


def write_artifact(program: Program, made: Generated, target: Target, place: Path) -> None:
    """The artifact of these launches of a program, within `holes_for_weights`."""
    bounds = {name: bound.high for name, bound in program.symbols.items()}
    limits = Limits(program.spec.max_context, bounds["T"], SEQUENCES, bounds["R"])
    with ArtifactWriter(place) as writer:
        with LaunchBuild(program, made, target, writer.path) as build:
            build.kernels.start()
            emission = build.finish(EmitOptions())
        text = print_program(program)
        (writer.path / "program.ir").write_text(text, encoding="utf-8")
        writer.commit(
            Manifest(
                infc_version="0",
                recipe={},
                model=replace(program.spec, vocab_size=vocabulary_size(program) or 0),
                backend="triton",
                target=TargetMachine(target.name, target.features),
                programs={MAIN: emission.compiled(program, limits)},
                tokenizer=None,
            )
        )


def _write_holes(path: Path, kinds: list[tuple[str, TensorType]], metadata: dict[str, str]) -> None:
    head, end = layout(kinds, metadata), 0
    for _, kind in kinds:
        end = -(-end // 64) * 64 + kind.num_bytes()
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + end)
