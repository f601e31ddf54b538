"""Setting up the peers: pinned, whole or absent, and a reason for whoever is missing."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from benchmarks.peers.contestants import CONTESTANTS, INFC, PEERS, Peer, Workdir
from benchmarks.peers.install import REQUIREMENTS
from benchmarks.peers.steps import Runner, SetupError, whole_or_absent

NAMED = {contestant.name: contestant for contestant in CONTESTANTS}


@pytest.mark.parametrize("path", sorted(REQUIREMENTS.glob("*.txt")), ids=lambda path: path.stem)
def test_every_requirement_is_pinned(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+-]+", line)] == []


def test_every_peer_takes_part_and_has_its_files() -> None:
    assert {c.peer.name for c in CONTESTANTS} == {p.name for p in (*PEERS, INFC)}
    engines = REQUIREMENTS.parent / "engines"
    for peer in (*PEERS, INFC):
        assert (engines / f"{peer.engine}.py").is_file()
        assert peer.requirements is None or (REQUIREMENTS / peer.requirements).is_file()


def test_who_is_missing_is_told_with_the_reason(tmp_path: Path) -> None:
    workdir, llama = Workdir(tmp_path), NAMED["llama.cpp-q4_0"]
    reason = workdir.missing(llama, "0.5b")
    assert reason == f"llama.cpp is not installed in {tmp_path}/environments/llama.cpp"
    (workdir.environment(llama.peer) / "lib/python3.11/site-packages/llama_cpp").mkdir(parents=True)
    assert workdir.missing(llama, "0.5b") == (
        f"its model {tmp_path}/models/llama.cpp/0.5b-q4_0.gguf is not there"
    )
    workdir.model(llama, "0.5b").parent.mkdir(parents=True)
    workdir.model(llama, "0.5b").touch()
    assert workdir.missing(llama, "0.5b") is None
    assert workdir.missing(NAMED["infc-int4"], "0.5b") is None  # compiling will tell


def test_failed_conversion_leaves_nothing_that_looks_done(tmp_path: Path) -> None:
    output = tmp_path / "models" / "half"

    def fail(partial: Path) -> None:
        partial.mkdir()
        (partial / "some").touch()
        raise SetupError("no")

    with pytest.raises(SetupError):
        whole_or_absent(output, fail)
    assert not output.exists()
    assert whole_or_absent(output, lambda partial: partial.mkdir())
    assert list(output.iterdir()) == []  # nothing of the first try
    assert not whole_or_absent(output, fail)


def test_failed_command_names_its_log(tmp_path: Path) -> None:
    run = Runner(tmp_path / "log", {"GREETING": "hello"})
    code = "import os, sys; print(os.environ['GREETING']); sys.exit(3)"
    with pytest.raises(SetupError, match=r"failed with status 3: .*/log$"):
        run(sys.executable, "-c", code)
    assert "hello" in (tmp_path / "log").read_text()


def test_peers_without_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As benchmarks/quality asks, which has models of its own."""
    asked: list[tuple[str, list[str]]] = []

    def set_up(workdir: Workdir, peer: Peer, shapes: list[str]) -> bool:
        asked.append((peer.name, shapes))
        return True

    # Not imported by name: it brings scripts that are not type-checked.
    setup = importlib.import_module("benchmarks.peers.setup")
    monkeypatch.setattr(setup, "set_up", set_up)
    command = ["setup", str(tmp_path), "--only", "llama.cpp", "--shapes", ""]
    monkeypatch.setattr(sys, "argv", command)
    setup.main()
    assert asked == [("llama.cpp", [])]
