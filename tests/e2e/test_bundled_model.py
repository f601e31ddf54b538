"""The bundled model, compiled as its recipe says: as good as under transformers, and Python."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import infc
from infc.driver.evaluate import evaluate_text
from infc.ir.artifact import Artifact

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny"
TOKENS = 3000
CONTEXT, STRIDE = 512, 256


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Compiled with verification, as a user does it."""
    return infc.compile(TINY / "model.yaml", output=tmp_path_factory.mktemp("tiny") / "artifact")


def test_perplexity_is_that_of_transformers(artifact: Artifact) -> None:
    text = (TINY / "heldout.py.txt").read_text(encoding="utf-8")[: 3 * TOKENS]
    ours = evaluate_text(artifact, text, context_tokens=CONTEXT, stride_tokens=STRIDE)
    theirs = _perplexity(text)
    assert abs(ours.perplexity / theirs - 1) < 0.005


@torch.inference_mode()
def _perplexity(text: str) -> float:
    """transformers' own bfloat16 over the same windows."""
    model = AutoModelForCausalLM.from_pretrained(TINY / "checkpoint", dtype=torch.bfloat16).eval()
    tokens = torch.tensor(AutoTokenizer.from_pretrained(TINY / "checkpoint")(text).input_ids)
    nats, counted, first = 0.0, 0, 1
    for start in range(0, len(tokens), STRIDE):
        end = min(start + CONTEXT, len(tokens))
        logits = model(tokens[None, start : end - 1]).logits[0].float()
        losses = -torch.log_softmax(logits, -1).gather(1, tokens[start + 1 : end, None])[:, 0]
        new = losses[first - start - 1 :]
        nats, counted, first = nats + float(new.sum()), counted + len(new), end
        if end == len(tokens):
            break
    return math.exp(nats / counted)


def test_it_writes_python(artifact: Artifact) -> None:
    params = infc.SamplingParams(max_tokens=48)
    with infc.LLM(artifact) as llm:
        (output,) = llm.generate("class Stack:\n    def __init__(self", params)
    text = output.outputs[0].text
    assert output.outputs[0].finish_reason in ("stop", "length")
    assert "self" in text and ":" in text


def test_every_layer_is_fused(artifact: Artifact) -> None:
    program = (artifact.path / "program.ir").read_text(encoding="utf-8")
    layers = artifact.manifest.model.num_layers
    count = {op: program.count(f"= {op}(") for op in ("rope_kv_write", "linear", "rms_norm")}
    assert count["rope_kv_write"] == layers and count["rms_norm"] == 1
    assert count["linear"] == 4 * layers + 1
    assert program.count("= add_rms_norm(") == 2 * layers
