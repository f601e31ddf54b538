"""`quantization: adopt`: what a GGUF file holds in few bits is in the artifact as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

import infc
from infc.driver.cli import run
from infc.frontend.load import load_model
from infc.ir.program import Node, Program
from infc.ir.schemes import get_scheme
from infc.ir.weights import evaluate_weight
from infc.passes.adopt_formats import AdoptFormats
from infc.passes.base import PassContext
from infc.passes.near_miss import NearMiss
from infc.passes.squeeze_unit_batch import SqueezeUnitBatch

from ..gguf_files import make_gguf

Q4_0, Q4_1 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1
Q5_0, Q8_0 = GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q8_0
QUICK = ["backend=reference", "runtime.max_context=64"]


def mixed(name: str) -> GGMLQuantizationType:
    """Another format for each kind of tensor, as files have them."""
    if "embd" in name or name.startswith("output"):
        return Q8_0
    return Q4_1 if "attn" in name else Q4_0


def coded(program: Program) -> list[tuple[Node, int, int]]:
    """Nodes over codes, the places of these among the operands, and the depths of rows."""
    found = []
    for node in program.nodes:
        if node.op == "scaled_linear":
            found.append((node, 2, int(str(node.inputs[0].type.shape[-1]))))  # type: ignore[union-attr]
        elif node.op == "scaled_embedding":
            found.append((node, 0, int(str(node.attrs["width"]))))
        elif node.op == "scaled_moe":
            found.append((node, 3, int(str(node.output.type.shape[-1]))))
    return found


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "phi3", "gemma3", "gpt_oss"])
def test_every_architecture_keeps_its_rows(name: str, tmp_path: Path) -> None:
    make_gguf(name, tmp_path / "model.gguf", stored=mixed)
    before = load_model(tmp_path / "model.gguf", log=lambda _: None)
    squeezed = SqueezeUnitBatch().run(before, PassContext()).program
    result = AdoptFormats(scheme="adopt").run(squeezed, PassContext())
    nodes = coded(result.program)
    for node, place, depth in nodes:
        codes, scales = (
            evaluate_weight(result.program, str(node.inputs[i]).removeprefix("@"))
            for i in (place, place + 1)
        )
        plain = str(node.inputs[place]).removeprefix("@").removesuffix(".codes")
        form = get_scheme(node.attrs["scheme"]).weight
        assert torch.equal(form.decode(codes, scales, depth), evaluate_weight(squeezed, plain))
    # The experts of gpt_oss are transposed in its model: nothing else has a reason to stay.
    reasons = {miss.reason for miss in result.near_misses if isinstance(miss, NearMiss)}
    assert reasons == ({"transpose changes the inside of its rows"} if name == "gpt_oss" else set())
    left = [node.op for node in result.program.nodes if node.op in ("linear", "moe", "embedding")]
    assert ("moe" in left) == (name == "gpt_oss")
    assert left.count("linear") == (2 if name in ("mixtral", "gpt_oss") else 0), "routers"


def compiled(tmp_path: Path, **options: Any) -> tuple[infc.Artifact, dict[str, Any]]:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 12)
    recipe = {
        "model": "model.gguf",
        "quantization": options,
        "accuracy": {"evaluation": "text.txt"},
    }
    (tmp_path / "model.yaml").write_text(json.dumps(recipe))
    artifact = infc.compile(
        tmp_path / "model.yaml", tmp_path / "out.infc", overrides=QUICK, cache=False
    )
    return artifact, json.loads((artifact.path / "report.json").read_text())


def test_an_artifact_holds_the_blocks_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stored(name: str) -> GGMLQuantizationType:
        return Q5_0 if "ffn_down" in name else mixed(name)

    make_gguf("llama-tied", tmp_path / "model.gguf", tokenizer=True, stored=stored)
    artifact, report = compiled(tmp_path, scheme="adopt")
    formats = {(one["class"], one["format"]) for one in report["certificate"]["formats"]}
    assert {("layers", "q4_0"), ("layers", "q4_1"), ("layers", "int8")} <= formats
    assert ("embeddings and head", "q8_0") in formats
    passes = {one["name"]: one for one in report["passes"]}
    assert all(
        "no kernel for Q5_0" in miss["reason"] for miss in passes["adopt-formats"]["near_misses"]
    )
    assert len(passes["adopt-formats"]["near_misses"]) == 2
    stages = [one["pass"] for one in report["certificate"]["passes"]]
    assert stages == ["adopt-formats", "quantize-weights"]
    assert run(["inspect", str(artifact.path)]) == 0
    assert "q4_1" in capsys.readouterr().out


def test_only_weights_are_adopted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The logits are those of the file's weights in float32."""

    def stored(name: str) -> GGMLQuantizationType:
        return Q5_0 if "ffn_down" in name else mixed(name)

    make_gguf("llama-tied", tmp_path / "model.gguf", tokenizer=True, stored=stored)
    artifact, report = compiled(tmp_path, scheme="adopt-weights")
    assert "they are rounded to int8-weights (" in capsys.readouterr().err
    formats = {(one["class"], one["format"]) for one in report["certificate"]["formats"]}
    names = {"q4_0-weights", "q4_1-weights", "int8-weights"}
    assert {("layers", name) for name in names} <= formats
    assert ("embeddings and head", "q8_0-weights") in formats
    program = (artifact.path / "program.ir").read_text()
    assert "decoded_linear" in program and "quantize_rows" not in program
    adopted = report["certificate"]["passes"][0]
    assert adopted["pass"] == "adopt-formats" and adopted["kl_mean"] < 1e-9


def test_a_program_in_bfloat16_may_have_lost_more(tmp_path: Path) -> None:
    """Its weights were rounded to 16 bits; those that are adopted are not."""
    make_gguf("mixtral", tmp_path / "model.gguf", stored=mixed)
    sets = [*QUICK, "dtype=bfloat16", "quantization=adopt-weights"]
    artifact = infc.compile(
        tmp_path / "model.gguf", tmp_path / "out.infc", overrides=sets, cache=False
    )
    assert "q4_0-weights" in (artifact.path / "program.ir").read_text()


def test_error_feedback_leaves_adopted_matrices_alone(tmp_path: Path) -> None:
    def stored(name: str) -> GGMLQuantizationType:
        return Q5_0 if "ffn_down" in name else mixed(name)

    make_gguf("llama-tied", tmp_path / "model.gguf", tokenizer=True, stored=stored)
    (tmp_path / "calibration.txt").write_text("a text of no great depth, again and again. " * 20)
    calibration = {"text": "calibration.txt", "tokens": 128}
    _, report = compiled(tmp_path, scheme="adopt", method="gptq", calibration=calibration)
    entry = next(one for one in report["passes"] if one["name"] == "calibrate-weights")
    assert {one["matrix"].split(".")[-2] for one in entry["details"]["errors"]} == {"down_proj"}
    reasons = {miss["reason"] for miss in entry["near_misses"]}
    assert reasons == {"its codes are those of the file"}


def test_a_checkpoint_that_is_not_packed_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_gguf("llama", tmp_path / "model.gguf")
    sets = ["--set", QUICK[0], "--set", "quantization=adopt"]
    output = str(tmp_path / "out")
    assert run(["compile", str(tmp_path / "model.gguf"), "-q", *sets, "-o", output]) != 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no matrix of the model is stored in a format of few bits" in error
