"""The whole pipeline on small checkpoints of every architecture: numbers, structure, phases."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from infc.frontend.load import load_model
from infc.ir.program import Program
from infc.ir.text import parse_program, print_program
from infc.passes.pass_manager import run_pipeline
from infc.passes.pass_report import PipelineReport
from infc.passes.pipeline import build_pipeline

from ..checkpoints import make_checkpoint
from ..plans import PLAN

LAYERS = 4


def compiled(
    arch: str, directory: Path, dtype: str = "float32", **overrides: Any
) -> tuple[Program, PipelineReport]:
    """A small checkpoint through the whole pipeline, verified; `overrides` are of its settings."""
    make_checkpoint(arch, directory / arch, seed=1, **overrides)
    program = load_model(
        directory / arch,
        dtype=dtype,  # type: ignore[arg-type]
        max_context=128,
        step_tokens=64,
        logit_rows=8,
        log=lambda line: None,
    )
    return run_pipeline(program, build_pipeline(plan=PLAN), failure_directory=directory)


EXPECTED = {
    "llama": {"linear": 4 * LAYERS + 1, "rms_norm": 1, "add_rms_norm": 2 * LAYERS},
    "qwen2": {"linear": 4 * LAYERS + 1, "rms_norm": 1, "add_rms_norm": 2 * LAYERS},
    "mistral": {"linear": 4 * LAYERS + 1, "rms_norm": 1, "add_rms_norm": 2 * LAYERS},
    "phi3": {"linear": 4 * LAYERS + 1, "rms_norm": 1, "add_rms_norm": 2 * LAYERS},
    # Two norms of heads a layer.
    "qwen3": {"linear": 4 * LAYERS + 1, "rms_norm": 1 + 2 * LAYERS, "add_rms_norm": 2 * LAYERS},
    # Norms behind attention and feed-forward, before the residual.
    "gemma2": {"linear": 4 * LAYERS + 1, "rms_norm": 1 + 2 * LAYERS, "add_rms_norm": 2 * LAYERS},
    "mixtral": {"linear": 3 * LAYERS + 1, "rms_norm": 1, "moe": LAYERS},
    "glm": {"linear": 4 * LAYERS + 1, "rms_norm": 1, "add_rms_norm": 2 * LAYERS},
    "nemotron": {"linear": 4 * LAYERS + 1, "layer_norm": 1, "add_layer_norm": 2 * LAYERS},
    "gpt2": {"linear": 4 * LAYERS + 1, "layer_norm": 0, "add_layer_norm": 2 * LAYERS + 1},
}
"""Ops that are left, and how many."""

UNFUSED = ("mean", "rsqrt", "pow", "neg", "concat", "transpose", "silu", "cos", "sin", "attention")


@pytest.mark.parametrize("arch", EXPECTED)
def test_everything_is_fused_and_agrees(arch: str, tmp_path: Path) -> None:
    program, report = compiled(arch, tmp_path)
    counts = Counter(node.op for node in program.nodes)
    for op, count in EXPECTED[arch].items():
        assert counts[op] == count, f"{op}: {counts}"
    for op in UNFUSED:
        assert counts[op] == 0, f"{op} is left: {counts}"
    assert counts["paged_attention"] == LAYERS
    writes = "kv_write" if arch == "gpt2" else "rope_kv_write"
    assert counts[writes] == LAYERS
    gated = 0 if arch in ("gpt2", "mixtral", "nemotron") else LAYERS
    assert counts["gated_act"] == gated
    assert program.phase == "planned"
    assert parse_program(print_program(program)) == program
    assert any("paged steps" in line for line in report.phases)
    assert any("run of" in line for line in report.phases)


@pytest.mark.parametrize(
    ("arch", "norm", "norms", "turned"),
    [
        ("gemma2", "add_rms_norm", 2 * LAYERS, LAYERS),
        # Both widen for the rotation; Cohere's norm is spelt out, Olmo's has no weight.
        ("cohere2", "add_layer_norm", LAYERS, LAYERS // 2),
        ("olmo", "add_layer_norm", 2 * LAYERS, LAYERS),
    ],
)
def test_bfloat16_is_verified_without_its_rounding(
    arch: str, norm: str, norms: int, turned: int, tmp_path: Path
) -> None:
    program, _ = compiled(arch, tmp_path, dtype="bfloat16")
    counts = Counter(node.op for node in program.nodes)
    assert counts[norm] == norms
    assert counts["rope_kv_write"] == turned
    assert counts["cast"] == 1, counts  # rows of the embedding


def test_layers_are_grouped_by_window(tmp_path: Path) -> None:
    program, _ = compiled("gemma2", tmp_path)
    groups = {group.reach: group.layers for group in program.resources}
    assert groups == {8: (0, 2), None: (1, 3)}


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        ("llama", "float32"),
        ("gemma3_text", "bfloat16"),  # norms of heads
        ("glm", "float32"),  # neighbours, and a part of each head
        ("phi", "float32"),  # halves, and a part of each head
        ("cohere2", "bfloat16"),  # widened neighbours; layers without a rotation
    ],
)
def test_one_kv_head_is_fused_as_several_are(arch: str, dtype: str, tmp_path: Path) -> None:
    """Its dimension of size 1 is gone early, and with one query head that of the queries too."""
    several, _ = compiled(arch, tmp_path / "several", dtype, num_key_value_heads=2)
    wanted = Counter(node.op for node in several.nodes)
    one, report = compiled(arch, tmp_path / "one", dtype, num_key_value_heads=1)
    counts = Counter(node.op for node in one.nodes)
    assert counts <= wanted  # a transpose of one head is none
    for op in ("linear", "rope_kv_write", "paged_attention"):
        assert counts[op] == wanted[op], f"{op}: {counts}"
    assert any("paged steps" in line for line in report.phases)


def test_one_head_altogether_is_fused_too(tmp_path: Path) -> None:
    program, _ = compiled("llama", tmp_path, num_attention_heads=1, num_key_value_heads=1)
    counts = Counter(node.op for node in program.nodes)
    assert counts["rope_kv_write"] == LAYERS
    assert counts["linear"] == 4 * LAYERS + 1
