"""Figures of the comparison: each from the round it belongs to, and each goal judged by them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from benchmarks.peers.goals import ANY_PEER, GOALS, SAME_BITS, Goal, Verdict, judge
from benchmarks.peers.report import render, table
from benchmarks.peers.results import (
    START,
    CeilingSample,
    Entrant,
    Results,
    Sample,
    ShapeFacts,
    ShapeRun,
    read_facts,
)
from benchmarks.peers.summary import (
    METRICS,
    Spread,
    best_peer,
    bits_per_weight,
    peak_rss_bytes,
    ratio,
    share,
    spread,
)

DECODE, PREFILL = METRICS["decode"], METRICS["prefill"]
RATES = st.lists(st.floats(1, 1e4), min_size=1, max_size=6)


def decoded(round_: int, contestant: str, rate: float, rss: int = 1) -> Sample:
    """128 tokens, the first after a tenth of a second."""
    return Sample(round_, contestant, "a", 0.1, 0.1 + 127 / rate, 128, rss, 0.0)


def shape_run(**rates: list[float]) -> ShapeRun:
    """Decode rates round by round; every contestant has 8 bits and reads 100 bytes a token."""
    run = ShapeRun("0.5b", ShapeFacts(matrix_elements=100, prefill_operations=512.0 * 10))
    for name, values in rates.items():
        run.entrants[name] = Entrant(8, name.startswith("infc"), "1", 100)
        run.samples += [decoded(r, name, rate) for r, rate in enumerate(values)]
    return run


def figures(found: Spread | None) -> tuple[float, float, float, int]:
    assert found is not None
    return found.median, found.low, found.high, found.count


def test_ratios_are_taken_round_by_round() -> None:
    # The machine halved in round 1 and the medians of the sides come from different rounds.
    run = shape_run(infc=[200, 100, 150], peer=[100, 50, 300])
    assert figures(ratio(run, "infc", "peer", DECODE)) == pytest.approx((2, 0.5, 2, 3))


@given(RATES, RATES)
def test_ratio_the_other_way_round_is_the_inverse(ours: list[float], theirs: list[float]) -> None:
    run = shape_run(infc=ours, peer=theirs)
    one, other = ratio(run, "infc", "peer", DECODE), ratio(run, "peer", "infc", DECODE)
    assert one is not None
    assert other is not None
    assert one.count == other.count == min(len(ours), len(theirs))
    assert one.low == pytest.approx(1 / other.high)
    assert one.high == pytest.approx(1 / other.low)


def test_round_that_one_side_missed_has_no_ratio() -> None:
    run = shape_run(infc=[10, 20], peer=[10])
    run.samples.append(replace(decoded(5, "peer", 1), round=5))
    assert figures(ratio(run, "infc", "peer", DECODE)) == pytest.approx((1, 1, 1, 1))
    assert ratio(run, "infc", "peer", PREFILL) is None


def test_share_is_of_the_best_ceiling_of_the_same_round() -> None:
    run = shape_run(infc=[10, 10])
    reads = [(0, 1000.0), (0, 2000.0), (1, 4000.0)]
    run.ceilings = [CeilingSample(r, "a", read, 0, 0) for r, read in reads]
    # Peaks were measured beside prefill, and say nothing of bandwidth.
    run.ceilings.append(CeilingSample(0, "b", 9e9, 1e3, 2e3))
    assert figures(share(run, "infc", DECODE)) == pytest.approx((0.375, 0.25, 0.5, 2))
    assert share(run, "infc", METRICS["prefix"]) is None


@pytest.mark.parametrize(("bits", "peak"), [(16, 1e3), (8, 2e3), (4, 2e3)])
def test_prefill_is_compared_with_the_peak_of_its_products(bits: int, peak: float) -> None:
    run = shape_run(infc=[])
    run.entrants["infc"] = Entrant(bits, True, "1", 100)
    run.samples = [Sample(0, "infc", "b", 5.0, 5.0, 1, 1, 0.0)]
    run.ceilings = [CeilingSample(0, "b", 0.0, 1e3, 2e3)]
    assert figures(share(run, "infc", PREFILL))[0] == pytest.approx(512 * 10 / 5 / peak)


def test_memory_alone_ends_with_the_first_batch() -> None:
    run = shape_run(infc=[])
    peaks = [("a", 5), ("b", 6), ("c8", 9), ("a", 9)]
    run.samples = [Sample(0, "infc", w, 1, 1, 1, peak, 0) for w, peak in peaks]
    run.samples.insert(0, Sample(0, "infc", START, 1, 1, 1, 100, 0))  # another process
    assert peak_rss_bytes(run, "infc", alone=True) == 6
    assert peak_rss_bytes(run, "infc", alone=False) == 9


def test_best_peer_is_never_ours() -> None:
    run = shape_run(infc=[99], slow=[1], fast=[2], wide=[3])
    run.entrants["wide"] = replace(run.entrants["wide"], bits=16)
    assert best_peer(run, DECODE) == "wide"
    assert best_peer(run, DECODE, 8) == "fast"
    assert best_peer(run, DECODE, 4) is None
    run.samples = [Sample(0, n, START, s, s, 1, 1, 0) for n, s in (("slow", 2.0), ("fast", 1.0))]
    assert best_peer(run, METRICS["start"]) == "fast"


def test_bits_count_what_is_read() -> None:
    run = shape_run(infc=[1])
    run.entrants["infc"] = replace(run.entrants["infc"], weight_bytes=56)
    assert bits_per_weight(run, "infc") == pytest.approx(4.48)


def test_spread_of_nothing_is_none() -> None:
    assert spread([]) is None


@pytest.mark.parametrize(
    ("goal", "measured", "against", "met"),
    [
        (Goal("0.5b", "infc", "decode", "ratio", 2.0, SAME_BITS), 2.5, "peer", True),
        (Goal("0.5b", "infc", "decode", "ratio", 3.0, "peer"), 2.5, "peer", False),
        (Goal("0.5b", "infc", "decode", "ratio", 0.9, ANY_PEER), 1.0, "wide", True),
        (Goal("0.5b", "infc", "decode", "value", 50.0), 50.0, "", True),
        (Goal("0.5b", "infc", "decode", "share", 0.5), None, "", None),
        (Goal("0.5b", "infc", "start", "value", 0.6), 0.7, "", False),
        (Goal("0.5b", "infc", "rss", "memory", 1.0, SAME_BITS), 0.5, "peer", True),
        (Goal("0.5b", "gone", "decode", "ratio", 2.0, SAME_BITS), None, SAME_BITS, None),
    ],
)
def test_goals(goal: Goal, measured: float | None, against: str, met: bool | None) -> None:
    run = shape_run(infc=[50], peer=[20], wide=[50])
    run.entrants["wide"] = replace(run.entrants["wide"], bits=16)
    run.samples = [
        replace(s, peak_rss_bytes=1 if s.contestant == "infc" else 2) for s in run.samples
    ]
    run.samples.append(Sample(0, "infc", START, 0.7, 0.7, 1, 100, 0))
    verdict = judge(goal, run)
    assert replace(verdict, measured=None) == Verdict(goal, None, against, met)
    assert verdict.measured == (None if measured is None else pytest.approx(measured))


def test_every_goal_is_judged_of_a_run_that_measured_all() -> None:
    run = ShapeRun("", ShapeFacts(100, 5120.0))
    bits = {"int4": 4, "q4_0": 4, "int8": 8, "bf16": 16}
    ours = ("infc-int4", "infc-onnx-int4", "infc-int8", "infc-bf16")
    for name in (*ours, "llama.cpp-q4_0", "onnxruntime-int4", "x-int8", "x-bf16"):
        run.entrants[name] = Entrant(bits[name.rsplit("-", 1)[1]], name < "j", "1", 10)
        for workload in ("a", "b", "c8", "c32", "d", START):
            run.samples.append(Sample(0, name, workload, 0.5, 1.0, 8, 10, 0))
    run.ceilings = [CeilingSample(0, w, 1e3, 1e3, 1e3) for w in "ab"]
    assert [judge(goal, run).met for goal in GOALS if judge(goal, run).met is None] == []


def test_results_come_back_from_json_and_are_shown(tmp_path: Path) -> None:
    rates: dict[str, list[float]] = {
        "infc-int8": [80, 90, 100],
        "llama.cpp-q8_0": [40, 45, 25],
    }
    run = shape_run(**rates)
    run.absent["vllm-bf16"] = "vllm is not installed"
    run.failed.append("openvino-int8, decode: it fell over")
    run.ceilings = [CeilingSample(r, "a", 10_000.0, 0, 0) for r in range(3)]
    results = Results({"CPU": "2 × some"}, [run])
    results.write(tmp_path / "deep" / "results.json")
    assert Results.read(tmp_path / "deep" / "results.json") == results
    text = render(results)
    assert "90.0 (80.0–100.0), 90%" in text
    assert "| infc-int8 / llama.cpp-q8_0 | 2.00 (2.00–4.00) |" in text
    assert "* not measured: vllm-bf16: vllm is not installed" in text
    assert "* failed: openvino-int8, decode: it fell over" in text
    # 90 % of bandwidth and 2 × the peer; equal memory is not less; the rest was not measured.
    assert "2 met, 1 not met, 19 not measured." in text


def test_tables_are_aligned() -> None:
    lines = table([["", "long title"], ["name", "1"]]).splitlines()
    assert lines == ["|      | long title |", "|------|------------|", "| name | 1          |"]


def test_facts_of_a_checkpoint(tmp_path: Path) -> None:
    config = {
        "vocab_size": 10,
        "hidden_size": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {"embed": (10, 4), "w": (6, 4), "norm": (4,)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    facts = read_facts(tmp_path, 3)
    assert facts.matrix_elements == 64
    # The head for one row alone; 6 pairs of query and key, in 2 layers of 2 heads of 2.
    assert facts.prefill_operations == 2 * 24 * 3 + 2 * 40 + 4 * 2 * 4 * 6
