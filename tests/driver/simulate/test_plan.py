"""`infc plan`: costs from an artifact, traces, and what it prints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from infc.driver.cli import run
from infc.driver.explain.collect import read_program
from infc.driver.simulate import measured as measured_module
from infc.driver.simulate import planned as planned_module
from infc.driver.simulate.costs import roofline_costs
from infc.driver.simulate.measured import measure_costs
from infc.driver.simulate.workload import read_trace
from infc.ir.artifact import open_artifact
from infc.ir.errors import UsageError
from infc.ir.roofline import Ceilings, Roofline, StepShape
from infc.runtime.engine import Engine

from ...runtime.small_artifact import write_small_artifact

CEILINGS = Ceilings(threads=1, read=1e10, fp32=1e11, bf16=2e11, int8=4e11)
LINE: dict[str, Any] = {
    "timestamp": 1500,
    "input_length": 1100,
    "output_length": 5,
    "hash_ids": [7, 8, 9],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of two layers, one of them with a window."""
    return write_small_artifact(tmp_path_factory.mktemp("planned") / "tiny")


def test_costs_are_those_of_the_roofline(tiny: Path) -> None:
    artifact = open_artifact(tiny, "none")
    program, limits = read_program(artifact), artifact.manifest.main.limits
    costs, roofline = roofline_costs(program, limits, CEILINGS), Roofline(program, CEILINGS)
    for tokens in (1, 4, limits.step_tokens):
        alone = roofline.step_seconds(StepShape.of([(tokens, tokens)]))
        assert costs.step(0, 0, tokens) == pytest.approx(alone)
    for batch, context in ((1, 90), (limits.max_sequences, 40), (limits.max_sequences, 90)):
        exact = roofline.step_seconds(StepShape.of([(1, context)] * batch))
        assert costs.step(batch, batch * context) == pytest.approx(exact, rel=0.25)
    exact = roofline.step_seconds(StepShape.of([(8, 64)], rows=1))
    assert costs.step(0, 0, 8, 8 * 56) == pytest.approx(exact, rel=0.25)
    slow = costs.slower(3.0)
    assert slow.step(9, 900, 50, 400) == pytest.approx(3 * costs.step(9, 900, 50, 400))


def test_costs_can_be_measured(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_module, "_ROUNDS", 1)
    engine = Engine.open(tiny)
    try:
        costs = measure_costs(engine)
    finally:
        engine.close()
    assert costs.tokens[0] == 1
    assert list(costs.seconds) == sorted(costs.seconds)
    assert costs.seconds[0] > 0
    assert min(costs.sequence, costs.decode_context, costs.prompt_context) >= 0


def test_command_compares_numbers_of_replicas(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["plan", str(tiny), "--replicas", "1,3", "--requests", "200", "--slowdown", "30"]
    monkeypatch.setattr(planned_module, "known_ceilings", lambda manifest: None)
    assert run(asked) == UsageError.exit_code
    assert "infc bench --machine" in capsys.readouterr().err
    monkeypatch.setattr(planned_module, "known_ceilings", lambda manifest: CEILINGS)
    assert run(asked) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()[3:5]] == ["1", "3"]
    assert "a front is busy all the time at" in text
    assert run([*asked, "--prompt-tokens", "150"]) == 0
    assert "200 of 200 requests are longer than the context of 96" in capsys.readouterr().err
    assert run([*asked, "--json", "--autoscale", "1:4", "--failure-seconds", "3"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [each["requests"] for each in data["outcomes"]] == [200, 200]
    assert data["front"]["replicas"] >= 1
    wrongs = ["--replicas 0", "--replicas x", "--autoscale 3:1", "--rate nan", "--rate 1e-320"]
    for wrong in (each.split() for each in (*wrongs, "--slowdown inf", "--failure-seconds nan")):
        assert run([*asked, *wrong]) == UsageError.exit_code


def test_traces_are_read(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [LINE, {**LINE, "timestamp": 0, "hash_ids": [7, 8, 10]}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    trace = read_trace(path)
    assert [each.at for each in trace.asked] == [0.0, 1.5]
    # Two whole blocks of 512 tokens; the third one is not full.
    assert {each.digests for each in trace.asked} == {(b"7", b"8")}
    assert trace.mean_prompt == 1100
    later = [{**line, "timestamp": line["timestamp"] + 1.7e12} for line in lines]
    path.write_text("\n".join(map(json.dumps, later)))
    assert read_trace(path) == trace, "times count from the first, whatever the clock was"


@pytest.mark.parametrize(
    "line", ["", "{", "[]", '{"timestamp": 1}', json.dumps({**LINE, "hash_ids": ["a"]}),
             json.dumps({**LINE, "output_length": 0}), json.dumps({**LINE, "timestamp": 1e400}),
             json.dumps({**LINE, "timestamp": math.nan}), "\0\xff"],
)  # fmt: skip
def test_what_is_no_trace_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line, encoding="latin-1")
    with pytest.raises(UsageError, match=r"trace\.jsonl"):
        read_trace(path)
