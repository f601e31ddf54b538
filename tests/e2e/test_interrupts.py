"""Ctrl-C in the middle of each command: one line, status 130, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infc.ir.artifact import Artifact

from ..checkpoints import make_checkpoint
from .support import compile_checkpoint

COMMANDS: dict[str, tuple[str, ...]] = {
    "chat": (),
    "bench": ("--rounds", "100000", "--prompt-tokens", "8", "--new-tokens", "8"),
    "serve": ("--port", "0"),
    "rebuild": ("--target", "x86-64-v2", "-o", "rebuilt"),
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    place = tmp_path_factory.mktemp("interrupts")
    make_checkpoint("llama", place / "checkpoint", tokenizer=True, num_hidden_layers=1)
    return compile_checkpoint(place / "checkpoint", place / "artifact")


def is_at_work(process: subprocess.Popen[str], place: Path) -> bool:
    """Whether the library is mapped, or something is being written."""
    maps = Path(f"/proc/{process.pid}/maps")
    return "model.so" in maps.read_text() or any(place.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupt_is_one_line_and_leaves_nothing(
    name: str, artifact: Artifact, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "infc", name, str(artifact.path), *COMMANDS[name]]
    place, scratch = tmp_path / "place", tmp_path / "scratch"
    place.mkdir()
    scratch.mkdir()
    process = subprocess.Popen(
        command,
        cwd=place,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 60
        while not is_at_work(process, place) and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.communicate()
    assert said.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in said
    assert list(place.iterdir()) == list(scratch.iterdir()) == []
