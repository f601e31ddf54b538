"""Writing an artifact: all of it is there afterwards, or nothing, whatever happens on the way."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infc.ir.artifact import ArtifactWriter, open_artifact
from infc.ir.errors import ArtifactError
from infc.ir.leftovers import sweep

from .artifacts import fill, manifest, write_artifact

pytestmark = pytest.mark.usefixtures("own_cache")


def write_partly(destination: Path, failure: BaseException) -> None:
    with ArtifactWriter(destination) as writer:
        fill(writer.path)
        raise failure


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_partly(tmp_path / "a", KeyboardInterrupt())
    assert os.listdir(tmp_path) == []


def test_a_failure_keeps_the_old_one(artifact: Path) -> None:
    before = open_artifact(artifact).identity
    with pytest.raises(RuntimeError):
        write_partly(artifact, RuntimeError())
    assert open_artifact(artifact).identity == before
    assert os.listdir(artifact.parent) == [artifact.name]


def test_an_old_artifact_is_replaced(artifact: Path) -> None:
    with ArtifactWriter(artifact) as writer:
        fill(writer.path)
        changed = manifest()
        entry = replace(changed.main.entry, kind="program")
        writer.commit(replace(changed.with_main(entry=entry), backend="reference"))
    assert open_artifact(artifact).manifest.backend == "reference"
    assert os.listdir(artifact.parent) == [artifact.name]


def test_what_is_not_an_artifact_is_never_replaced(tmp_path: Path) -> None:
    place = tmp_path / "precious"
    place.mkdir()
    (place / "thesis.tex").write_text("...")
    with pytest.raises(ArtifactError, match="refusing to replace"), ArtifactWriter(place):
        pass
    assert os.listdir(tmp_path) == ["precious"]
    with pytest.raises(ArtifactError, match="refusing"), ArtifactWriter(place / "thesis.tex"):
        pass
    assert (place / "thesis.tex").read_text() == "..."


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert open_artifact(write_artifact(tmp_path / "out")).manifest.backend == "cpp"


def test_only_one_writes_at_a_time(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "a"):
        with pytest.raises(ArtifactError, match="another process is writing"):
            ArtifactWriter(tmp_path / "a").__enter__()
        with ArtifactWriter(tmp_path / "b"):
            pass
    assert os.listdir(tmp_path) == []


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from infc.ir.artifact import ArtifactWriter\n"
        "with ArtifactWriter(sys.argv[1]) as writer:\n"
        "    (writer.path / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")])
    assert run.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2  # the lock, and what was half written; no artifact
    write_artifact(tmp_path / "b")  # another one: whoever writes here next sweeps
    assert os.listdir(tmp_path) == ["b"]


def test_what_a_living_run_writes_is_not_swept(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "a") as writer:
        write_artifact(tmp_path / "b")
        assert writer.path.is_dir()
        assert sweep(tmp_path) == 0
        fill(writer.path)
        writer.commit(manifest())
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_files_of_the_dead_are_swept_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True).stdout.strip()
    kept = [f".s.json.infc-partial-{os.getpid()}", ".other.lock", ".other.partial-abc", "s.json"]
    for name in (*kept, f".s.json.infc-partial-{dead}", ".a.infc-lock"):
        (tmp_path / name).write_text("")
    assert sweep(tmp_path) == 2
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
    assert sweep(tmp_path / "nowhere") == 0


@pytest.mark.parametrize("again", [False, True])
def test_an_interrupt_leaves_nothing(
    tmp_path: Path, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a second one while it cleans up: the impatient press twice."""
    remove = shutil.rmtree

    def interrupted(*arguments: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        remove(*arguments, **options)

    if again:
        monkeypatch.setattr("shutil.rmtree", interrupted)

    def write() -> None:
        with ArtifactWriter(tmp_path / "a") as writer:
            (writer.path / "half").write_text("x")
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert os.listdir(tmp_path) == []


def test_an_interrupt_while_a_writer_begins_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held back until the directory is made, and raised before the block is entered."""
    make = tempfile.mkdtemp

    def interrupted(**options: Any) -> str:
        made = make(**options)
        signal.raise_signal(signal.SIGINT)
        return str(made)

    monkeypatch.setattr(tempfile, "mkdtemp", interrupted)
    with pytest.raises(KeyboardInterrupt), ArtifactWriter(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tiny_disk() -> Iterator[None]:
    """No file may grow beyond 1000 bytes: what a full disk does, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("tiny_disk")
def test_disk_full(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot write the artifact: File too large"):
        write_artifact(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_unwritable_destination(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write the artifact: Not a directory"):
        write_artifact(tmp_path / "file/a")
    with pytest.raises(ArtifactError, match="cannot write the artifact"):
        write_artifact(Path("/proc/a"))
