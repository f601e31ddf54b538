"""`infc compile` killed at random moments: no broken artifact, no process, no litter that stays.

`INFC_KILLS=200 pytest tests/e2e/test_kills.py -s` kills that often; `INFC_KILLS_SEED` chooses when.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from infc.ir.artifact import open_artifact

from ..checkpoints import make_checkpoint

KILLS = int(os.environ.get("INFC_KILLS", "8"))
SEED = int(os.environ.get("INFC_KILLS_SEED", "0"))
STAGES = (
    "start",
    "look into the cache",
    "load the compiler",
    "capture the model",
    "run the passes",
    "emit code and weights",
    "digest and move into place",
    "end",
)
"""What a compilation is doing, in order; all but the first and last end with a line on stderr."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One way to die: by which signal, alone or with the whole group, when (stage, seconds)."""

    signal: signal.Signals
    whole_group: bool
    stage: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where a compilation may leave something: each of its directories, empty at first."""

    root: Path

    @property
    def output(self) -> Path:
        return self.root / "out"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def start(self, name: str, step_tokens: int) -> subprocess.Popen[str]:
        """A compilation that the cache does not know, unless these tokens were used before."""
        command = [sys.executable, "-m", "infc", "compile", str(self.root / "checkpoint")]
        options = ["--no-verify", "--set", f"runtime.step_tokens={step_tokens}"]
        return subprocess.Popen(
            [*command, "-o", str(self.output / name), *options],
            env={
                **os.environ,
                "XDG_CACHE_HOME": str(self.cache),
                "HOME": str(self.root / "home"),
                "TMPDIR": str(self.root / "tmp"),
                "INFC_TEST_PLACE": str(self.root),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def processes(self) -> list[int]:
        """Processes that any compilation here started and that still run."""
        mark = f"INFC_TEST_PLACE={self.root}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def litter(self) -> list[str]:
        """Everything that is neither an artifact, nor its times, nor what a cache is made of."""
        places = [self.root / "tmp", self.root / "home"]
        found = [path for place in places for path in place.rglob("*")]
        kept = [self.output, *(path for path in self.cache.rglob("*") if path.is_dir())]
        found += [path for place in kept for path in place.glob(".*")]
        return sorted(str(path.relative_to(self.root)) for path in found)

    def check_artifacts(self) -> int:
        """Opens every artifact, reading every byte; how many there are."""
        places = [self.output, self.cache / "infc/artifacts"]
        paths = [path for place in places if place.is_dir() for path in place.iterdir()]
        visible = [path for path in paths if path.is_dir() and not path.name.startswith(".")]
        for path in visible:
            open_artifact(path, "full")
        return len(visible)


def plan(random_: random.Random, seconds: list[float]) -> Iterator[Kill]:
    """Kills of every kind, in every stage as often; `seconds` is how long each stage takes."""
    for number in range(KILLS):
        stage = number % len(STAGES)
        yield Kill(
            random_.choice([signal.SIGKILL, signal.SIGINT]),
            random_.random() < 0.5,
            stage,
            random_.random() * seconds[stage],
        )


def run_until(process: subprocess.Popen[str], kill: Kill) -> tuple[int, str]:
    """Kills at the planned moment; the exit status and what was said."""
    assert process.stderr is not None
    said = [process.stderr.readline() for _ in range(kill.stage - 1)] if kill.stage > 1 else []
    time.sleep(kill.seconds)
    if process.poll() is None:
        (os.killpg if kill.whole_group else os.kill)(process.pid, kill.signal)
    said.append(process.communicate(timeout=120)[1])
    return process.returncode, "".join(said)


def wait_for_the_end(place: Place) -> list[int]:
    """What still runs after some seconds."""
    end = time.monotonic() + 20
    while (running := place.processes()) and time.monotonic() < end:
        time.sleep(0.05)
    return running


@pytest.fixture
def place(tmp_path: Path) -> Place:
    for name in ("out", "cache", "home", "tmp"):
        (tmp_path / name).mkdir()
    make_checkpoint("llama", tmp_path / "checkpoint", tokenizer=True, num_hidden_layers=1)
    return Place(tmp_path)


def measure(place: Place) -> list[float]:
    """How long each stage takes, by a compilation that nobody kills."""
    seconds, before = [], time.monotonic()
    with place.start("next", 64) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.partition(":")[0] in STAGES:
                seconds.append(time.monotonic() - before)
                before = time.monotonic()
    assert process.returncode == 0
    # The first line ends two stages at once: what comes before the cache, and looking into it.
    return [seconds[0], *seconds, time.monotonic() - before]


@pytest.mark.breadth
@pytest.mark.slow
def test_killed_at_any_moment(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = measure(place)
    assert len(seconds) == len(STAGES)
    assert place.litter() == []
    counts: Counter[str] = Counter()
    for number, kill in enumerate(plan(random.Random(SEED), seconds)):
        status, said = run_until(place.start(f"model-{number % 3}", 65 + number), kill)
        running = wait_for_the_end(place)
        assert running == [], f"{kill} left processes"
        place.check_artifacts()
        litter = place.litter()
        if kill.signal == signal.SIGINT:
            # While Python itself starts, it tells where it was, and nobody can ask it not to.
            if "Traceback" not in said or "infc/driver" in said:
                assert status in (0, 130, -signal.SIGINT), f"{kill}: {said}"
                assert "Traceback" not in said, f"{kill}: {said}"
            assert litter == [], f"{kill} left litter"
        elif litter:
            counts["swept by the next"] += 1
            with place.start("next", 64) as following:
                assert following.wait(timeout=120) == 0
            assert place.litter() == [], f"{kill}: the next compilation left {litter}"
        counts[f"{kill.signal.name} {'group' if kill.whole_group else 'alone'}"] += 1
        counts[STAGES[kill.stage]] += 1
        counts["too late" if status == 0 else "dead"] += 1
    assert counts["dead"] > KILLS / 2
    with capsys.disabled():
        if "INFC_KILLS" in os.environ:
            print(f"\n{KILLS} kills, {place.check_artifacts()} whole artifacts:", dict(counts))
