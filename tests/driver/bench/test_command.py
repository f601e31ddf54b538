"""`infc bench`: what is measured where what is asked for, as a table and as JSON."""

from __future__ import annotations

import json
import mmap
import sys
from pathlib import Path
from typing import Any

import pytest

from infc.codegen.cpp import ceilings as probe_module
from infc.driver.bench import run as run_module
from infc.driver.bench import workloads as workloads_module
from infc.driver.bench.ceilings import ceilings_of
from infc.driver.bench.engine_rounds import EngineRounds
from infc.driver.bench.first_token import measure_start
from infc.driver.bench.peak_memory import peak_rss_bytes, reset_peak
from infc.driver.bench.results import WorkloadResult
from infc.driver.bench.workloads import Workload
from infc.driver.cli import run
from infc.ir.artifact import Artifact
from infc.ir.errors import InfcError, ToolchainError
from infc.ir.machine import available_cpus
from infc.ir.roofline import Ceilings


@pytest.fixture(autouse=True)
def _known_ceilings(slow: Ceilings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "ceilings_of", lambda threads, reporter, anew: slow)


def test_all_that_fits_is_measured(compiled: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(compiled.path), "--rounds", "1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [one["workload"]["name"] for one in data["workloads"]] == [
        "decode", "prefill", "batch-32", "batch-8", "shared-prefix",
    ]  # fmt: skip
    assert {one["skipped"] for one in data["workloads"]} == {
        f"{count} tokens do not fit into 128" for count in (160, 513, 192, 416)
    }
    assert data["start"]["prompt_tokens"] == 32
    assert 0 < data["start"]["seconds"]["median"] < 60
    assert data["start"]["peak_rss_bytes"] > 10 << 20
    assert data["peak_rss_bytes"] > 10 << 20
    assert (data["threads"], data["at_once"]) == (available_cpus(), 4)
    assert data["ceilings"]["int8"] == 4e3
    assert run(["bench", str(compiled.path), "--workload", "decode"]) == 0
    out = capsys.readouterr().out
    assert "\nskipped\n  decode: 160 tokens do not fit into 128\n" in out
    assert "\nworkloads\n" not in out


def test_a_workload_of_ones_own(compiled: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--prompt-tokens", "9", "--new-tokens", "4", "--batch", "2", "--rounds", "2"]
    assert run(["bench", str(compiled.path), *sizes, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    (one,) = data["workloads"]
    assert one["workload"]["prompt_tokens"] == 9
    for phase in ("output", "prefill", "decode"):
        assert 0 < one[phase]["tokens_per_second"]["min"] <= one[phase]["tokens_per_second"]["max"]
        assert one[phase]["roofline"]["median"] > 0
    assert data["start"] is None
    assert data["steps"] == []
    assert run(["bench", str(compiled.path), *sizes, "--threads", "1"]) == 0
    captured = capsys.readouterr()
    assert "own          2 × (9 + 4) tokens, 2 at once\n" in captured.out
    assert ", 1 thread\n" in captured.out
    assert captured.err == ""
    most = compiled.manifest.main.limits.max_sequences
    assert run(["bench", str(compiled.path), *sizes, "--batch", str(most + 2)]) == 0
    assert f"note: {most} sequences run at once, so 2 must wait" in capsys.readouterr().err
    assert run(["bench", str(compiled.path), "--new-tokens", "99999"]) == 2
    assert "128 prompt tokens and 99999 new tokens exceed the" in capsys.readouterr().err


def test_what_fails_costs_nothing_but_itself(
    compiled: Artifact, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = [Workload(name=name, prompt_tokens=9, new_tokens=3) for name in ("a", "b", "c")]
    monkeypatch.setattr(workloads_module, "WORKLOADS", tuple(tiny))
    measure = EngineRounds.measure
    for error, status, names in (
        (InfcError("a request failed: why"), 1, {"b": "a request failed: why"}),
        (KeyboardInterrupt(), 130, {"b": "interrupted"}),
    ):

        def failing(self: EngineRounds, workload: Workload, *rest: Any) -> WorkloadResult:
            if workload.name != "b":
                return measure(self, workload, *rest)
            self._engine.add_request("left", [1, 2, 3])
            self._engine.step()
            raise error  # noqa: B023 - called before the next round of the loop

        monkeypatch.setattr(EngineRounds, "measure", failing)
        words = [word for name in "abc" for word in ("--workload", name)]
        assert run(["bench", str(compiled.path), *words, "--rounds", "1", "--json"]) == status
        data = json.loads(capsys.readouterr().out)["workloads"]
        left = {one["workload"]["name"]: one["skipped"] for one in data if one["failed"]}
        assert left == names
        told = [one["workload"]["name"] for one in data if one["output"]]
        assert told == (["a"] if status == 130 else ["a", "c"])


def test_steps_line_by_line(compiled: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(compiled.path), "--ops"]) == 0
    out = capsys.readouterr().out
    assert "\nworkloads\n" not in out
    by_op, by_line = out.split("\nsteps line by line\n")
    assert by_op.count("\n  paged_attention ") == 1
    assert "\n  in all " in by_op
    assert by_line.count("\n  barrier ") > 1
    own = ["--batch", "3", "--prompt-tokens", "70", "--new-tokens", "2", "--rounds", "1"]
    assert run(["bench", str(compiled.path), "--ops", *own, "--json"]) == 0
    decode, prefill = json.loads(capsys.readouterr().out)["steps"]
    assert (decode["batch"], decode["queries"], decode["context"]) == (3, 1, 72)
    assert (prefill["batch"], prefill["queries"]) == (1, 64)


def test_without_a_compiler_there_is_no_roofline(
    small: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(target: object) -> None:
        raise ToolchainError("no C++ compiler was found")

    monkeypatch.setattr(run_module, "ceilings_of", ceilings_of)
    monkeypatch.setattr(probe_module, "build_probe", nothing)
    assert run(["bench", str(small.path), "--prompt-tokens", "5", "--new-tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert (
        captured.err == "note: the limits of this machine are unknown: no C++ compiler was found\n"
    )
    assert "ceilings" not in captured.out
    (row,) = [line for line in captured.out.splitlines() if line.startswith("  own ")]
    assert row.rstrip().endswith("-")


def test_a_workload_that_nobody_knows(small: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(small.path), "--workload", "decod"]) == 2
    assert "unknown workload 'decod' (choose one of: decode, prefill," in capsys.readouterr().err


def test_a_process_that_fails_says_why(small: Artifact) -> None:
    with pytest.raises(
        InfcError, match=r"a new process produced no token: error: .*no such file, directory"
    ):
        measure_start(small.path / "gone", [1, 2], rounds=1)


def test_a_process_that_says_much_is_measured_all_the_same(
    small: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a pipe holds; whoever blocks on it is ended by the time limit."""
    talker = tmp_path / "talker"
    much = 'head -c 1000000 /dev/zero | tr "\\0" e >&2; printf x'
    talker.write_text(f"#!/bin/sh\nexec timeout 20 sh -c '{much}'\n")
    talker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(talker))
    assert 0 < measure_start(small.path, [1, 2], rounds=1).seconds.median < 20


def test_the_peak_begins_anew() -> None:
    with mmap.mmap(-1, 64 << 20) as memory:
        memory[:: mmap.PAGESIZE] = b"\1" * (len(memory) // mmap.PAGESIZE)
    high = peak_rss_bytes()
    if not reset_peak():
        pytest.skip("this kernel does not let a process reset its peak")
    low = peak_rss_bytes()
    assert high is not None
    assert low is not None
    assert low < high - (32 << 20)
