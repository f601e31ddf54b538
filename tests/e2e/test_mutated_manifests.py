"""A manifest whose values were changed, with the digest that belongs to them, is no danger."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..runtime.small_artifact import write_small_artifact
from . import mutated_manifests
from .builds import Builds
from .test_invariance import CASES


@pytest.mark.parametrize(
    ("backend", "fields", "least_refused", "least_working"),
    [("cpp", (), 200, 20), ("reference", ("tokenizer", "programs"), 50, 2)],
)
def test_each_change_is_refused_or_works(
    backend: str,
    fields: tuple[str, ...],
    least_refused: int,
    least_working: int,
    builds: Builds,
    tmp_path: Path,
) -> None:
    """In a process of its own, which may not end by a signal nor with another exception."""
    place = tmp_path / "artifact"
    if backend == "cpp":
        shutil.copytree(builds.artifact(CASES[1]).path, place)
    else:
        write_small_artifact(place, generation={"do_sample": True, "temperature": 0.5})
    script = mutated_manifests.__file__
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    names = fields or json.loads((place / "manifest.json").read_text()).keys() - {"digest"}
    command = [sys.executable, "-X", "faulthandler", script, str(place), *sorted(names)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = run.stdout.splitlines()
    assert run.returncode == 0, f"{said[-1:]}: {run.returncode}\n{run.stderr}"
    count = json.loads(said[-1])
    assert count["refused"] > least_refused and count["works"] > least_working
