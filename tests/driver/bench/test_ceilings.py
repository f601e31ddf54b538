"""Ceilings are measured once for a machine, kept, and never taken for those of another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from infc.codegen.cpp import ceilings as probe_module
from infc.driver.bench import ceilings
from infc.driver.bench.ceilings import ceilings_of, known_machine, measure_machine
from infc.driver.cli import run
from infc.driver.progress import Reporter
from infc.ir import machine
from infc.ir.errors import ToolchainError, UsageError

CPUS = 6


class CountingProbe:
    """Stands for the compiled probe: says of each rate how often it was asked before."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []

    def read_rate(self, threads: int, num_bytes: int) -> float:
        self.asked.append(("read", threads, num_bytes))
        return 1e9 * len(self.asked)

    def product_rate(self, kind: str, threads: int) -> float:
        self.asked.append((kind, threads))
        return 1e9 * len(self.asked)


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> CountingProbe:
    """A probe that measures nothing, on a machine of six processors."""
    counting = CountingProbe()
    monkeypatch.setattr(probe_module, "build_probe", lambda target: counting)
    monkeypatch.setattr(ceilings, "available_cpus", lambda: CPUS)
    return counting


def test_what_was_measured_is_found_again(probe: CountingProbe) -> None:
    assert known_machine().ceilings == ()
    measured = measure_machine(Reporter())
    assert [one.threads for one in measured.ceilings] == [1, 2, 4, CPUS]
    assert known_machine() == measured
    asked = len(probe.asked)
    assert ceilings_of(4, Reporter()) == measured.at(4)
    assert len(probe.asked) == asked


def test_another_number_of_threads_is_added(probe: CountingProbe) -> None:
    before = measure_machine(Reporter())
    three = ceilings_of(3, Reporter())
    assert [one.threads for one in known_machine().ceilings] == [1, 2, 3, 4, CPUS]
    assert known_machine().at(3) == three
    assert before.at(4) is not None
    assert known_machine().at(4) == replace(three, threads=4)  # more can do what fewer did
    assert ceilings_of(3, Reporter(), anew=True).read > three.read


def test_the_best_is_kept(probe: CountingProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    best = measure_machine(Reporter(), [1, 2])
    assert known_machine() == best
    with monkeypatch.context() as busy:
        busy.setattr(CountingProbe, "read_rate", lambda *_: 1.0)
        busy.setattr(CountingProbe, "product_rate", lambda *_: 2.0)
        slow = measure_machine(Reporter(), [1, 2, 4])
    assert {one.read for one in slow.ceilings} == {1.0}
    assert known_machine().ceilings[:2] == best.ceilings
    assert known_machine().at(4) == replace(best.ceilings[1], threads=4)
    assert measure_machine(Reporter(), [1]).at(1) == known_machine().at(1)


def test_more_is_read_than_a_cache_holds(
    probe: CountingProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "largest_cache_bytes", lambda: 1 << 30)
    monkeypatch.setattr(ceilings, "available_memory", lambda: 1 << 40)
    measure_machine(Reporter(), [1])
    assert probe.asked[-1] == ("read", 1, 4 << 30)


@pytest.mark.parametrize("what", ["cpu_model", "available_cpus"])
def test_of_another_machine_nothing_is_known(
    what: str, probe: CountingProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_machine(Reporter(), [1])
    assert known_machine().at(1) is not None
    monkeypatch.setattr(ceilings, what, lambda: 5 if what == "available_cpus" else "another")
    assert known_machine().at(1) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"ceilings": [{"threads": 1}]}', "{"])
def test_a_damaged_file_is_measured_over(text: str, probe: CountingProbe, own_cache: Path) -> None:
    measure_machine(Reporter(), [1])
    (kept,) = (own_cache / "machines").iterdir()
    kept.write_text(text)
    assert known_machine().ceilings == ()
    assert ceilings_of(1, Reporter()) == known_machine().at(1)


def test_threads_that_the_machine_has_not(probe: CountingProbe) -> None:
    with pytest.raises(UsageError, match="expected 1 to 6 threads, not 7"):
        ceilings_of(7, Reporter())


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_READ_BYTES", 32 << 20)
    monkeypatch.setattr(ceilings, "largest_cache_bytes", lambda: 0)
    assert run(["bench", "--machine", "--threads", "1", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["cpu"] == machine.cpu_model()
    (one,) = data["ceilings"]
    assert one["threads"] == 1
    assert min(one[kind] for kind in ("read", "fp32", "bf16", "int8")) > 1e8
    assert known_machine().at(1) is not None


def test_the_table(probe: CountingProbe, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--machine", "--threads", "2"]) == 0
    out = capsys.readouterr().out
    assert machine.cpu_model() in out
    assert out.splitlines()[-1].split() == ["2", "4.0", "1", "2", "3"]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def nothing(target: object) -> None:
        raise ToolchainError("no C++ compiler was found")

    monkeypatch.setattr(probe_module, "build_probe", nothing)
    assert run(["bench", "--machine"]) == 5
    assert "no C++ compiler was found" in capsys.readouterr().err


def test_neither_artifact_nor_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench"]) == 2
    assert "no model (name one, or use --machine)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--ops"],
        ["--workload", "decode"],
        ["--batch", "2"],
        ["--rounds", "3"],
        ["--new-tokens", "4"],
    ],
)
def test_nothing_of_an_artifact_is_asked_of_a_machine(
    words: list[str], probe: CountingProbe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "--machine", *words]) == 2
    assert f"{words[0]} needs a model" in capsys.readouterr().err
    assert probe.asked == []


def test_a_cache_that_takes_nothing_is_told(
    probe: CountingProbe, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_cache.write_text("a file where the directory would be")
    assert run(["bench", "--machine", "--threads", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f"note: the measured limits could not be saved in {own_cache}: ")
    assert machine.cpu_model() in captured.out
