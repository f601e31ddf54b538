"""Trained models compile, answer sensibly, and give the likelihoods that transformers gives."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import infc
from infc.driver.evaluate import evaluate_text
from infc.ir.artifact import Artifact
from infc.ir.text import parse_program

from ..e2e.support import teacher_forced
from .packaged import GEMMA3, QWEN_CODER, SMOLLM2, NotFetchedError, PackagedModel

pytestmark = [pytest.mark.models, pytest.mark.slow]

BUILT = Path(__file__).resolve().parents[2] / "build/models"
ROOT = Path(os.environ.get("INFC_TEST_MODELS", BUILT))
TEXT = (
    "The Thames rises at Thames Head in Gloucestershire and flows through Oxford, Reading, Henley "
    "and Windsor before it reaches London. Its tides are felt as far as Teddington, where the "
    "first lock stands; below it the river is navigable by large vessels as far as the Pool."
)


SMALL = ["runtime.max_context=1024", "runtime.step_tokens=128", "runtime.max_sequences=4"]


def compiled(model: PackagedModel, place: Path) -> tuple[Path, Artifact]:
    """The checkpoint, and its artifact in the checkpoint's own type."""
    try:
        checkpoint = model.directory(ROOT)
    except NotFetchedError as error:
        pytest.skip(f"not to be had from the package registry: {error}")
    return checkpoint, infc.compile(checkpoint, place, overrides=SMALL, cache=False)


def nats_of_transformers(checkpoint: Path, text: str, **options: str) -> float:
    """The total negative log-likelihood of a text, in float32; `options` say what is read."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, **options
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        log_p = torch.log_softmax(model(ids).logits[0].double(), dim=-1)
    return -float(log_p[:-1].gather(1, ids[0, 1:, None]).sum())


def test_smollm2_chats(tmp_path: Path) -> None:
    checkpoint, artifact = compiled(SMOLLM2, tmp_path / "smollm2")
    with infc.LLM(artifact, kv_memory="64MiB") as llm:
        params = llm.recommended_params(max_tokens=24)
        question = [{"role": "user", "content": "What is the capital of France?"}]
        first = llm.chat(question, params).outputs[0]
        said = [*question, {"role": "assistant", "content": first.text}]
        second = llm.chat([*said, {"role": "user", "content": "And of Italy?"}], params).outputs[0]
    assert "Paris" in first.text and first.finish_reason == "stop"
    assert "Rome" in second.text
    expected = nats_of_transformers(checkpoint, TEXT)
    assert evaluate_text(artifact, TEXT).nats == pytest.approx(expected, rel=0.01)


def test_gemma_goes_on_with_a_text(tmp_path: Path) -> None:
    checkpoint, artifact = compiled(GEMMA3, tmp_path / "gemma")
    with infc.LLM(artifact, kv_memory="64MiB") as llm:
        (answer,) = llm.generate(
            ["The capital of France is Paris. The capital of Italy is"],
            llm.recommended_params(max_tokens=8),
        )
    assert "Rome" in answer.outputs[0].text
    expected = nats_of_transformers(checkpoint, TEXT)
    assert evaluate_text(artifact, TEXT).nats == pytest.approx(expected, rel=0.01)
    # One key-value head: its projections are one product, its rotation is part of the write.
    program = parse_program((artifact.path / "program.ir").read_text())
    counts = Counter(node.op for node in program.nodes)
    assert counts["linear"] == 4 * 18 + 1
    assert counts["rope_kv_write"] == 18


@pytest.mark.parametrize(
    ("model", "dtype", "error", "question", "answer"),
    [
        (SMOLLM2, "float32", 1e-5, "What is the capital of France?", "Paris"),
        # In float32, its artifact would take 2.4 GB of the disk.
        (QWEN_CODER, "bfloat16", 5e-3, "Write a Python function that adds two numbers.", "def "),
        (GEMMA3, "float32", 1e-5, None, ""),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_file_is_the_model_that_transformers_reads_in_it(
    model: PackagedModel,
    dtype: str,
    error: float,
    question: str | None,
    answer: str,
    tmp_path: Path,
) -> None:
    """Matrices in Q4_1, Q5_0, Q8_0, Q4_K and Q6_K, as they were published."""
    try:
        file = model.file(ROOT)
    except NotFetchedError as reason:
        pytest.skip(f"not to be had from the package registry: {reason}")
    sets = [*SMALL, f"dtype={dtype}"]
    artifact = infc.compile(file, tmp_path / "artifact", overrides=sets, cache=False)
    if question is not None:
        with infc.LLM(artifact, kv_memory="64MiB") as llm:
            params = infc.SamplingParams(max_tokens=48)
            chat = llm.chat([{"role": "user", "content": question}], params)
        assert answer in chat.outputs[0].text
    expected = nats_of_transformers(file.parent, TEXT, gguf_file=file.name)
    assert evaluate_text(artifact, TEXT).nats == pytest.approx(expected, rel=error)


def test_adopted_weights_give_the_logits_of_what_the_file_says(tmp_path: Path) -> None:
    """Q4_1 and Q8_0 as they lie, against transformers over the dequantised numbers in float32."""
    try:
        file = SMOLLM2.file(ROOT)
    except NotFetchedError as reason:
        pytest.skip(f"not to be had from the package registry: {reason}")
    sets = [*SMALL, "dtype=float32", "quantization=adopt-weights", "runtime.logit_rows=32"]
    artifact = infc.compile(file, tmp_path / "artifact", overrides=sets, cache=False)
    program = parse_program((artifact.path / "program.ir").read_text())
    schemes = {node.attrs.get("scheme") for node in program.nodes} - {None}
    assert schemes == {"q4_1-weights", "q8_0-weights"}
    ids = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)(
        TEXT
    ).input_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    (rows,) = teacher_forced(artifact, [ids])
    error = np.abs(rows - expected).max(-1) / np.abs(expected).max(-1)
    assert error.max() < 1e-5
