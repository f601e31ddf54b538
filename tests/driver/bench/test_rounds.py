"""Workloads on an engine: what is asked of it, and that the figures are of what it did."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from infc.driver.bench.engine_rounds import EngineRounds
from infc.driver.bench.results import Percentiles, Phase, Spread
from infc.driver.bench.workloads import WORKLOADS, Workload, find_workload
from infc.driver.explain.collect import read_program
from infc.ir.artifact import Artifact
from infc.ir.errors import UsageError
from infc.ir.roofline import Ceilings, Roofline
from infc.runtime.api.llm import LLM


@pytest.fixture
def llm(small: Artifact) -> Iterator[LLM]:
    """An engine of four sequences and 16 tokens a step."""
    with LLM(small) as opened:
        yield opened


@pytest.fixture
def rounds(llm: LLM, small: Artifact, slow: Ceilings) -> EngineRounds:
    """What measures on it."""
    return EngineRounds(llm.engine, Roofline(read_program(small), slow))


def quiet(done: int, total: int) -> None:
    """Hears of rounds."""


def test_one_request_has_two_phases(rounds: EngineRounds) -> None:
    heard: list[tuple[int, int]] = []
    workload = Workload(name="w", prompt_tokens=20, new_tokens=5)
    result = rounds.measure(workload, 3, lambda done, total: heard.append((done, total)))
    assert heard == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert (result.rounds, result.skipped, result.preemptions) == (3, None, 0)
    assert result.steps == 2 + 4  # a prompt in two chunks
    assert result.output is not None
    assert result.prefill is not None
    assert result.decode is not None
    first = 20 / result.prefill.tokens_per_second.median
    rest = 4 / result.decode.tokens_per_second.median
    assert 5 / result.output.tokens_per_second.max <= 20 / result.prefill.tokens_per_second.min + (
        4 / result.decode.tokens_per_second.min
    )
    assert result.ttft is not None
    assert result.ttft.p50 == pytest.approx(first, rel=0.5)
    assert result.tpot is not None
    assert result.tpot.p50 == pytest.approx(rest / 4, rel=0.5)
    assert result.host_step_microseconds is not None
    assert 0 < result.host_step_microseconds < 1e6 * result.ttft.p99


def test_the_roofline_is_of_the_steps_in_a_phase(
    rounds: EngineRounds, llm: LLM, small: Artifact, slow: Ceilings
) -> None:
    workload = Workload(name="w", prompt_tokens=7, new_tokens=3)
    result = rounds.measure(workload, 1, quiet)
    from infc.ir.roofline import StepShape

    roofline = Roofline(read_program(small), slow)
    shapes = [StepShape.of([(7, 7)]), StepShape.of([(1, 8)]), StepShape.of([(1, 9)])]
    needed = [roofline.step_seconds(shape) for shape in shapes]

    def seconds(phase: Phase | None, num_tokens: int) -> float:
        assert phase is not None
        assert phase.roofline is not None
        return phase.roofline.median * num_tokens / phase.tokens_per_second.median

    assert seconds(result.prefill, 7) == pytest.approx(needed[0])
    assert seconds(result.decode, 2) == pytest.approx(sum(needed[1:]))
    assert seconds(result.output, 3) == pytest.approx(sum(needed))


def test_no_more_run_at_once_than_the_workload_says(
    rounds: EngineRounds, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    step = llm.engine.step

    def counted() -> object:
        nonlocal most
        outputs = step()
        stats = llm.engine.stats()
        most = max(most, stats.num_running + stats.num_waiting)
        return outputs

    monkeypatch.setattr(llm.engine, "step", counted)
    workload = Workload(name="w", requests=6, prompt_tokens=9, new_tokens=4, concurrency=2)
    result = rounds.measure(workload, 1, quiet)
    assert most == 2
    assert result.prefill is None
    assert result.decode is None
    assert result.output is not None
    assert result.itl is not None


def test_a_shared_prefix_is_computed_once(rounds: EngineRounds) -> None:
    sizes = {"requests": 6, "prompt_tokens": 2, "new_tokens": 2, "concurrency": 1}
    shared = rounds.measure(Workload(name="s", shared_tokens=40, **sizes), 2, quiet)
    alone = rounds.measure(Workload(name="a", **{**sizes, "prompt_tokens": 42}), 2, quiet)
    # In chunks of 16: three for the first, then one for each; or three for each.
    assert (shared.steps, alone.steps) == (3 + 1 + 5 * 2, 6 * 4)


def test_rounds_share_no_prefix_and_repeat() -> None:
    workload = Workload(name="w", requests=3, shared_tokens=8, prompt_tokens=4, new_tokens=1)
    first, again, other = (workload.prompts(seed, 1000) for seed in (1, 1, 2))
    assert first == again
    assert len({tuple(prompt[:8]) for prompt in first}) == 1
    assert len({tuple(prompt) for prompt in first}) == 3
    assert first[0][:8] != other[0][:8]
    assert {len(prompt) for prompt in first} == {12}
    assert workload.context == 13


def test_workloads_by_name() -> None:
    assert find_workload("batch-8").concurrency == 8
    assert len({one.name for one in WORKLOADS}) == len(WORKLOADS) == 5
    with pytest.raises(
        UsageError, match=r"unknown workload 'decod' \(choose one of: decode, .*, start\)"
    ):
        find_workload("decod")


def test_percentiles_are_of_what_was_measured() -> None:
    assert Percentiles.of([]) is None
    assert Percentiles.of([3.0]) == Percentiles(p50=3, p90=3, p99=3)
    hundred = [float(i) for i in range(100, 0, -1)]
    assert Percentiles.of(hundred) == Percentiles(p50=50, p90=90, p99=99)
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(median=2, min=1, max=3)
