"""Rounds: who has a turn when, that nobody else runs meanwhile, and what a death costs."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.peers.client import Reply, Worker, WorkerError
from benchmarks.peers.contestants import Contestant, Peer
from benchmarks.peers.measure import Plan, Turns
from benchmarks.peers.results import START, CeilingSample, Entrant, ShapeFacts, ShapeRun
from benchmarks.peers.workloads import choose

from .scripted import spinning

QUICK = Peer(name="quick", engine="", module="")
SLOW = Peer(name="slow", engine="", module="", slow_start=True)
CONTESTANTS = [
    Contestant(name="x", peer=QUICK, bits=8),
    Contestant(name="y", peer=SLOW, bits=8),
    Contestant(name="z", peer=QUICK, bits=8),
]


@dataclass
class Scripts:
    """Starts scripts; `answers` are after how many a contestant's ends. Measures ceilings too,
    and who runs while it does."""

    logs: Path
    answers: dict[str, int] = field(default_factory=dict)
    workers: list[Worker] = field(default_factory=list)
    running: list[int] = field(default_factory=list)

    def worker(self, contestant: Contestant) -> Worker:
        log = self.logs / contestant.name
        self.workers.append(spinning(log, self.answers.get(contestant.name)))
        return self.workers[-1]

    def first_token(self, contestant: Contestant) -> Reply:
        if contestant.name == "z":
            raise WorkerError("it does not start")
        return Reply(1.0, 1.0, 1, 1, 0.0)

    def sample(self, round_: int, workload: str) -> CeilingSample:
        states = [Path(f"/proc/{w.pid}/stat").read_text() for w in self.workers if w.is_alive]
        self.running.append(sum(s.rsplit(")", 1)[1].split()[0] != "T" for s in states))
        return CeilingSample(round_, workload, 1.0, 1.0, 1.0)


def measured(scripts: Scripts, *, rounds: int = 2, starts: bool = False) -> ShapeRun:
    run = ShapeRun("0.5b", ShapeFacts(1, 1.0))
    run.entrants = {c.name: Entrant(8, False, "", 1) for c in CONTESTANTS}
    saved: list[int] = []
    plan = Plan(workloads=choose("bd"), rounds=rounds, batch_rounds=1, starts=starts)
    Turns(plan, run, scripts, scripts, lambda: saved.append(len(run.samples))).measure(CONTESTANTS)
    assert len(saved) == rounds
    return run


def test_each_workload_goes_round_before_the_next(tmp_path: Path) -> None:
    scripts = Scripts(tmp_path)
    run = measured(scripts)
    turns = [(s.round, s.workload, s.contestant) for s in run.samples]
    assert turns == [
        *[(0, workload, name) for workload in ("b", "d") for name in ("x", "y", "z")],
        *[(1, "b", name) for name in ("y", "z", "x")],  # d is in the first round only
    ]
    assert [(c.round, c.workload) for c in run.ceilings] == [(r, "b") for r in (0, 0, 0, 1, 1, 1)]
    assert {entrant.version for entrant in run.entrants.values()} == {"1"}
    assert not any(worker.is_alive for worker in scripts.workers)


def test_nobody_runs_outside_of_a_turn(tmp_path: Path) -> None:
    scripts = Scripts(tmp_path)
    measured(scripts)
    assert scripts.running == [0] * 6


def test_who_dies_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    # Two warm-ups, and the first turn with the request before it.
    run = measured(Scripts(tmp_path, {"y": 4}))
    assert [s.contestant for s in run.samples].count("y") == 1
    assert [s.contestant for s in run.samples].count("x") == 3
    [line] = run.failed
    assert line.startswith("y, 32 requests, shared prefix: the worker ended with status 0")


def test_who_does_not_load_has_no_turns(tmp_path: Path) -> None:
    run = measured(Scripts(tmp_path, {"x": 0}))
    assert {s.contestant for s in run.samples} == {"y", "z"}
    assert run.failed[0].startswith("x, loading: ")


def test_slow_ones_start_once(tmp_path: Path) -> None:
    run = measured(Scripts(tmp_path), starts=True)
    starts = [(s.round, s.contestant) for s in run.samples if s.workload == START]
    assert starts == [(0, "x"), (0, "y"), (1, "x")]
    assert run.failed == ["z, start: it does not start"] * 2


def test_too_little_memory_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.measure.available_memory", lambda: 500_000_000)
    run = measured(Scripts(tmp_path))
    assert run.samples == []
    assert run.absent["x"].startswith("0.5 GB of memory are left")
