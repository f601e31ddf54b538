"""Progress: a bar on a terminal that shows what was really done, plain lines anywhere else."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from infc.driver.progress import LineReporter, Reporter, as_reporter
from infc.driver.rebuild import rebuild_artifact
from infc.ir.errors import UsageError

from ..runtime.small_artifact import write_small_artifact

SCRIPT = """
import sys, time
from infc.driver.progress import make_reporter
reporter = make_reporter(quiet="quiet" in sys.argv)
try:
    with reporter.stage("emit"):
        for done in (1, 4):
            reporter.advance(done, 4, f"{done} MiB of 4 MiB of weights")
            time.sleep(0.3)
        reporter.remark("something was chosen")
        if "fail" in sys.argv:
            raise KeyboardInterrupt
except KeyboardInterrupt:
    pass
"""


def on_a_terminal(*arguments: str) -> str:
    """What the script writes to a terminal on stderr; its stdout must stay empty."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=follower, env=environment
    ) as process:
        os.close(follower)
        shown = b""
        try:
            while piece := os.read(leader, 1 << 16):
                shown += piece
        except OSError:  # how a terminal says that nobody writes any more
            pass
        assert process.stdout is not None
        assert process.stdout.read() == b""
    os.close(leader)
    assert process.returncode == 0
    return shown.decode()


def test_a_bar_on_a_terminal() -> None:
    shown = on_a_terminal()
    assert "emit: 1 MiB of 4 MiB of weights" in shown
    assert "emit: 4 MiB of 4 MiB of weights" in shown
    assert "something was chosen" in shown
    assert re.search(r"  emit: \d\.\d s\s*$", shown)


def test_what_is_interrupted_is_not_called_done() -> None:
    shown = on_a_terminal("fail")
    assert not re.search(r"emit: \d\.\d s", shown)
    assert shown.count("\x1b[?25h") == shown.count("\x1b[?25l") > 0  # the cursor is back


def test_a_long_stage_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there is no terminal: a line in a while, each of what was done by then."""
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    reporter = LineReporter()
    reporter.advance(1, 2, "of no stage")
    with reporter.stage("emit"):
        for done in range(31):
            reporter.advance(done, 31, f"{done} MiB of 31 MiB of weights")
            now += 2
    with reporter.stage("digest"):
        now += 60
    assert capsys.readouterr().err.splitlines() == [
        "emit: 25 %, 8 MiB of 31 MiB of weights",
        "emit: 51 %, 16 MiB of 31 MiB of weights",
        "emit: 77 %, 24 MiB of 31 MiB of weights",
        "emit: 62.0 s",
        "digest: 60.0 s",
    ]


@pytest.mark.parametrize("quiet", [False, True])
def test_lines_where_there_is_no_terminal(quiet: bool) -> None:
    command = [sys.executable, "-c", SCRIPT, *(["quiet"] if quiet else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    if quiet:
        assert lines == []
    else:
        assert lines[0] == "something was chosen"
        assert re.fullmatch(r"emit: \d\.\d s", lines[1])
        assert len(lines) == 2
    assert on_a_terminal("quiet") == ""


def test_an_argument_may_be_true_false_or_a_reporter() -> None:
    own = LineReporter()
    assert as_reporter(own) is own
    assert type(as_reporter(True)) is LineReporter
    assert type(as_reporter(False)) is Reporter
    with pytest.raises(UsageError, match=r"progress is 'yes' .use True, False or"):
        as_reporter("yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(("progress", "first"), [(True, "check the artifact: "), (False, "")])
def test_rebuilding_takes_the_same_argument(
    progress: bool, first: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = write_small_artifact(tmp_path / "a")
    with pytest.raises(UsageError, match="makes the same for every target"):
        rebuild_artifact(place, "x86-64-v3", tmp_path / "b", progress=progress)
    said = capsys.readouterr().err
    assert said.startswith(first) and bool(said) is progress
