"""Evaluation: every token counts once, and chunks and windows give what one pass gives."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.driver.cli import run
from infc.driver.evaluate import (
    Evaluation,
    evaluate_text,
    step_rows,
    window_rows,
    windows,
)
from infc.driver.tally import nats_of
from infc.driver.text_input import read_file
from infc.ir.artifact import open_artifact
from infc.ir.errors import UsageError
from infc.ir.manifest import Limits
from infc.runtime.api.llm import LLM
from infc.runtime.executors.base import Finished
from infc.runtime.scheduling.step import Step, StepOutput

from ..ir.artifacts import manifest
from ..runtime.small_artifact import write_small_artifact

VOCABULARY = 64


@given(st.integers(2, 200), st.integers(2, 50), st.data())
def test_every_token_but_the_first_counts_once(
    count: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context - 1))
    counted: list[int] = []
    for start, first, end in windows(count, context, stride):
        assert start < first < end <= min(start + context, count)
        # Whoever asks for overlap gets it: all but the first window's tokens have a past.
        assert start == 0 or first - start >= context - stride
        counted += range(first, end)
    assert counted == list(range(1, count))


class _Bigrams:
    """An executor whose logits depend on the token of the row, and which checks its steps."""

    depth = 0

    def __init__(self) -> None:
        self.table = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY))
        self.stored: dict[int, int] = {}

    def launch(self, step: Step) -> Finished:
        (table,), (slots,) = step.block_tables, step.slots
        for position, slot, token in zip(step.positions, slots, step.token_ids, strict=True):
            assert table[0][position // 32] * 32 + position % 32 == slot
            assert slot >= 32  # never the null block
            self.stored[int(position)] = int(token)
        assert step.context_lengths.tolist() == [step.positions[-1] + 1]
        logits = self.table[step.token_ids[step.logits_index]].astype(np.float32)
        return Finished(StepOutput(np.zeros(0, np.int32), logits))

    def close(self) -> None: ...


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_chunks_add_up(step_tokens: int, logit_rows: int, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=64))
    first = data.draw(st.integers(1, len(tokens) - 1))
    executor = _Bigrams()
    limits = Limits(64, step_tokens, 4, logit_rows)
    limited = manifest().with_main(limits=limits)
    chunks = window_rows(executor, limited, tokens, first, step_rows(limited))
    nats = sum(nats_of(logits, targets) for logits, targets in chunks)
    table = executor.table.astype(np.float32).astype(np.float64)
    log_p = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    expected = -sum(log_p[tokens[at - 1], tokens[at]] for at in range(first, len(tokens)))
    assert nats == pytest.approx(expected, rel=1e-9)
    assert executor.stored == dict(enumerate(tokens[:-1]))


def test_figures() -> None:
    figures: dict[str, Any] = {"context_tokens": 8, "stride_tokens": 4}
    result = Evaluation(100, 11, 10, 10 * math.log(8), **figures)
    assert result.perplexity == pytest.approx(8)
    assert result.bits_per_byte == pytest.approx(30 / 100)
    assert Evaluation(100, 11, 10, 7500.0, **figures).perplexity == math.inf


def test_a_window_is_evaluated_as_the_python_face_scores_it(tmp_path: Path) -> None:
    artifact = open_artifact(write_small_artifact(tmp_path / "small"))
    text = "the hat sat on the mat and the cat sat on the hat"
    with LLM(artifact) as llm:
        (score,) = llm.score(text)
    found = evaluate_text(artifact, text)
    assert found.num_predicted == len(score.token_ids)
    assert found.perplexity == pytest.approx(score.perplexity, rel=1e-5)


def test_two_artifacts_are_compared_over_the_same_windows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What comes before a token decides how well it is predicted."""
    long = write_small_artifact(tmp_path / "long")
    short = write_small_artifact(tmp_path / "short", max_context=8)
    file = tmp_path / "text"
    file.write_text("the hat sat on the mat and the cat sat on the hat " * 3)
    for one, other in ((long, short), (short, long)):
        assert run(["eval", str(one), str(file), "--against", str(other), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["context_tokens"] == 8
        assert found["against"]["perplexity"] == found["perplexity"]
        assert run(["eval", str(one), str(file), "--against", str(other)]) == 0
        assert "+0.00%" in (out := capsys.readouterr().out)
        assert "in windows of 8 tokens, 4 apart" in out


def test_only_text_is_evaluated(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes("añb".encode())
    assert read_file(str(file), None) == "añb"
    assert read_file(str(file), 2) == "a"  # a character cut in two is left out
    file.write_bytes(b"ok \xff\xfe")
    assert read_file(str(file), 3) == "ok "
    with pytest.raises(UsageError, match=r"not UTF-8 text .byte 3"):
        read_file(str(file), None)
    with file.open("r+b") as opened:
        opened.truncate(1 << 40)  # a hole: more than there is memory for
    assert read_file(str(file), 2) == "ok"
    file.write_bytes("ñ".encode()[:1])
    with pytest.raises(UsageError, match="not UTF-8"):
        read_file(str(file), None)
