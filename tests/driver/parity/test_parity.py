"""Two artifacts on the same steps: what is found, and that what is wrong shows where it is."""

from __future__ import annotations

import json
import re
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import infc
from infc.driver.cli import run
from infc.driver.parity import picture
from infc.driver.parity.report import Parity
from infc.driver.parity.run import ParityOptions, compare_artifacts
from infc.ir.artifact import Artifact
from infc.ir.errors import UsageError
from infc.runtime.executors.base import Finished
from infc.runtime.executors.onnxruntime import OnnxruntimeExecutor
from infc.runtime.scheduling.step import Step

from ...checkpoints import make_checkpoint

SMALL = ParityOptions(sequences=2, prompt_tokens=40)


@pytest.fixture(scope="module")
def pages(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The small model in ONNX."""
    return in_onnx(source, tmp_path_factory.mktemp("pages") / "pages")


def in_onnx(source: Path, output: Path, *sets: str) -> Artifact:
    overrides = ["backend=onnx", *sets]
    return infc.compile(
        source / "model.yaml", output, overrides=overrides, cache=False, verify=False
    )


def test_both_compute_what_one_engine_schedules(artifact: Artifact, pages: Artifact) -> None:
    parity = compare_artifacts(artifact.path, pages.path, SMALL)
    assert 0 < parity.error_max < 1e-5
    assert parity.top1 == 1
    assert not parity.not_finite
    assert parity.mixed_steps
    assert parity.cached_tokens
    assert {one.backend for one in parity.sides} == {"reference", "onnx"}
    assert sum(one.rows for one in parity.stretches) == parity.rows > 40 + 30
    assert all(side.prefill.tokens and side.decode.tokens for side in parity.sides)
    assert max(one.error_max for one in parity.stretches) == parity.error_max == parity.worst.error


def test_slots_and_pages_run_the_same_steps(
    source: Path, pages: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever comes first, tables are made for both."""
    slots = in_onnx(source, tmp_path / "slots", "onnx.kv=slots")
    picture = tmp_path / "parity.svg"
    sizes = ["--batch", "2", "--tokens", "40"]
    command = ["inspect", "--compare", str(slots.path), str(pages.path), "--graph", str(picture)]
    assert run([*command, *sizes]) == 0
    text = capsys.readouterr().out
    for part in (
        "error",
        "by position",
        "prefill, tokens/s",
        "cache of a whole context",
        "100.0 %",
    ):
        assert part in text
    drawn = "".join(ElementTree.parse(picture).getroot().itertext())
    assert "A: slots (onnx" in drawn and "B: pages (onnx" in drawn
    both = [pages.path, slots.path]
    assert run(["inspect", "--compare", *map(str, both), "--json", *sizes]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["error_max"] < 1e-5
    assert found["same_top"] == found["rows"]
    assert [Path(side["path"]) for side in found["sides"]] == both


def test_a_context_of_few_tokens_is_compared(source: Path, pages: Artifact, tmp_path: Path) -> None:
    """So few that only one new token fits, and no step decodes."""
    few = in_onnx(source, tmp_path / "few", "runtime.max_context=7")
    parity = compare_artifacts(pages.path, few.path)
    assert parity.error_max < 1e-5 and parity.stretches[-1].last == 5


def test_a_step_that_is_held_up_does_not_change_how_much_faster_one_is(
    pages: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second in one step of one of the two: its tokens per second show it, and nothing else."""
    decoding: list[Step] = []
    launch = OnnxruntimeExecutor.launch

    def slow(executor: OnnxruntimeExecutor, step: Step) -> Finished:
        if step.num_sequences == step.num_tokens == 2:
            decoding.append(step)
            time.sleep(len(decoding) == 20)  # those of the first run do not count
        return launch(executor, step)

    monkeypatch.setattr(OnnxruntimeExecutor, "launch", slow)
    parity = compare_artifacts(pages.path, pages.path, SMALL)
    first, second = (side.decode.tokens_per_second for side in parity.sides)
    assert len(decoding) > 40 and max(first, second) > 2 * min(first, second)
    assert 1 / 3 < parity.decode_ratio < 3


def test_a_picture_has_colors_where_variables_are_unknown() -> None:
    """Renderers that are no browsers leave such declarations out: others stand before them."""
    for found in re.finditer(r"([a-z]+): var\(--[a-z]+\)", picture._STYLE):
        before = picture._STYLE[: found.start()].rstrip()
        assert re.search(rf"{found[1]}: #[0-9a-f]{{6}};$", before), found[0]


def changed(monkeypatch: pytest.MonkeyPatch, artifact: Artifact, other: Artifact) -> Parity:
    """The report where the second gives other logits from position 20 on."""
    launch = OnnxruntimeExecutor.launch

    def damaged(executor: OnnxruntimeExecutor, step: Step) -> Any:
        finished = launch(executor, step)
        late = step.positions[step.logits_index] >= 20
        logits = finished.output.logits.copy()
        logits[late] = np.roll(logits[late], 1, axis=1)
        logits[late & (step.positions[step.logits_index] == 25), 0] = np.nan
        finished.output.logits = logits
        return finished

    monkeypatch.setattr(OnnxruntimeExecutor, "launch", damaged)
    return compare_artifacts(artifact.path, other.path, SMALL)


def test_what_is_wrong_shows_at_its_position(
    artifact: Artifact, pages: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infc.driver.parity.document import parity_json
    from infc.driver.parity.picture import draw
    from infc.driver.parity.text import render_parity

    parity = changed(monkeypatch, artifact, pages)
    for one in parity.stretches:
        assert (one.same_top == one.rows) == (one.error_max < 1e-5) == (one.last < 20), one
    assert 0 < parity.not_finite < parity.rows / 4
    assert parity.worst.position == 25
    assert parity.top1 < 1
    assert json.loads(parity_json(parity))["error_max"] is None
    assert "not finite" in render_parity(parity, width=100, color=False)
    ElementTree.fromstring(draw(parity))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "300"], "300 tokens and 32 new ones do not fit into a context of"),
        (["--batch", "0"], "batch is 0, below 1"),
        (["--layer", "1"], "--layer says nothing about a comparison"),
        (["--memory", "1GiB"], "--memory says nothing about a comparison"),
        (["--graph", "parity.png"], "parity.png: the file name of this picture must end in .svg"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    arguments: list[str], message: str, pages: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    both = str(pages.path)
    assert run(["inspect", "--compare", both, both, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_is_no_artifact_is_named(
    pages: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for pair in ([tmp_path / "none", pages.path], [pages.path, tmp_path]):
        assert run(["inspect", "--compare", *map(str, pair)]) != 0
        error = capsys.readouterr().err
        assert str(tmp_path) in error
        assert error.count("\n") == 1


def test_other_vocabularies_are_refused(pages: Artifact, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", tmp_path / "c", num_hidden_layers=1, vocab_size=328)
    other = infc.compile(
        checkpoint,
        tmp_path / "other",
        overrides=["backend=reference"],
        cache=False,
        verify=False,
    )
    with pytest.raises(UsageError, match=r"the vocabularies differ: \d+ tokens and 328"):
        compare_artifacts(pages.path, other.path, SMALL)
