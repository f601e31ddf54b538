"""Processes: why one ended, and a spare one that waits."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infc.runtime.replicas import child as child_module
from infc.runtime.replicas.child import Child, SpareProcess, death_of, start_engine
from infc.runtime.replicas.frames import FrameReader
from infc.runtime.replicas.messages import Imported, from_engine


def ended(code: str, number: signal.Signals | None = None) -> Child:
    """A process that has ended: by itself, or by a signal."""
    child = start_engine(code)
    if number is not None:
        child.process.send_signal(number)
    child.connection.close()
    child.process.wait(20)
    return child


@pytest.mark.parametrize(
    ("code", "number", "text", "is_blamed"),
    [
        ("import time; time.sleep(60)", signal.SIGKILL, "SIGKILL", False),
        (
            "import signal, time; signal.pthread_sigmask(signal.SIG_SETMASK, []); time.sleep(60)",
            signal.SIGTERM,
            "SIGTERM",
            False,
        ),
        ("import time; time.sleep(60)", signal.SIGSEGV, "SIGSEGV", True),
        ("import os; os.abort()", None, "SIGABRT", True),
        ("raise SystemExit(3)", None, "status 3", True),
        ("pass", None, "status 0", True),
    ],
)
def test_why_a_process_ended(
    code: str, number: signal.Signals | None, text: str, is_blamed: bool
) -> None:
    death = death_of(ended(code, number))
    assert text in str(death.error)
    assert death.is_blamed == is_blamed


def test_the_kernel_may_have_run_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then what was computed may be the reason, and not whoever sends signals."""
    child = ended("import time; time.sleep(60)", signal.SIGKILL)
    killed = child_module.num_killed_for_memory()
    monkeypatch.setattr(child_module, "num_killed_for_memory", lambda: killed + 1)
    death = death_of(child)
    assert "lack of memory" in str(death.error)
    assert death.is_blamed


def test_a_silent_process_is_blamed() -> None:
    death = death_of(ended("import time; time.sleep(60)", signal.SIGKILL), hung_seconds=3)
    assert "nothing for 3 s" in str(death.error)
    assert death.is_blamed


def test_a_spare_process_is_taken_once_and_a_dead_one_never() -> None:
    started = []

    def start() -> Child:
        started.append(start_engine("import time; time.sleep(60)"))
        return started[-1]

    spare = SpareProcess(start)
    spare.fill()
    spare.fill()
    assert len(started) == 1
    assert spare.take().pid == started[0].pid
    assert spare.take().pid == started[1].pid
    spare.fill()
    started[2].kill()
    started[2].process.wait()
    assert spare.take().pid == started[3].pid
    spare.fill()
    spare.close()
    assert started[4].process.returncode == -signal.SIGKILL
    for each in started:
        each.connection.close()
        each.kill()
        each.process.wait()


def test_a_spare_process_is_there_once_it_has_imported_everything() -> None:
    spare = SpareProcess(start_engine)
    assert not spare.is_there
    spare.fill()
    assert not spare.is_there
    deadline = time.monotonic() + 30
    while not spare.is_there:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child = spare.take()
    assert not spare.is_there
    (payload,) = FrameReader().feed(child.connection.recv(100))
    assert from_engine(payload) == Imported()
    child.connection.close()
    assert child.process.wait(30) == 0


def test_a_spare_process_that_dies_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Child] = []

    def start() -> Child:
        started.append(start_engine("import time; time.sleep(60)"))
        return started[-1]

    spare = SpareProcess(start)
    spare.refill()
    assert not started  # nobody has asked for one yet
    spare.fill()
    monkeypatch.setattr(child_module, "_REFILL_SECONDS", 0.0)
    spare.refill()
    assert len(started) == 1
    started[0].kill()
    started[0].process.wait()
    spare.refill()
    assert len(started) == 2
    spare.close()
    spare.refill()
    assert len(started) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_all_processes_end_no_engine(number: signal.Signals) -> None:
    """Neither while Python starts, nor while it imports, nor later."""
    child = start_engine()
    for _ in range(100):
        child.process.send_signal(number)
        time.sleep(0.005)
    child.connection.close()
    assert child.process.wait(30) == 0


def test_modules_in_the_current_directory_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose name may be one of the standard library."""
    found = tmp_path / "found"
    for name in ("json", "signal", "ctypes", "encodings"):
        (tmp_path / f"{name}.py").write_text(f"open({str(found)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    child = start_engine()
    child.connection.close()  # it ends once it has imported everything
    assert child.process.wait(30) == 0
    assert not found.exists()


def test_a_process_ends_with_the_one_that_started_it() -> None:
    """Whatever it is doing: here, before it has read anything."""
    program = (
        "import os, sys; from infc.runtime.replicas.child import start_engine;"
        " child = start_engine(); print(child.pid, flush=True); input(); os._exit(0)"
    )
    front = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert front.stdout is not None
    pid = int(front.stdout.readline())
    front.kill()
    front.communicate()
    assert wait_for_end(pid)


def wait_for_end(pid: int, seconds: float = 10) -> bool:
    """Whether a process that is no child of this one ends."""

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_a_spare_process_that_is_not_needed_ends_without_a_word(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Whether or not it had said that it was there, when its front closed the connection."""
    child = start_engine()
    child.connection.setblocking(True)
    assert child.connection.recv(1, socket.MSG_PEEK)  # which stays unread
    child.connection.close()
    assert child.process.wait(20) == 0
    assert capfd.readouterr().err == ""
