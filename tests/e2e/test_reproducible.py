"""Two compilations of one recipe give the same bytes, wherever and however they are run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..checkpoints import make_checkpoint


def compile_apart(checkpoint: Path, output: Path, *, hash_seed: int, threads: int) -> None:
    """`infc compile` in a process of its own, with an empty cache: kernels are compiled, too."""
    environment = {
        **os.environ,
        "PYTHONHASHSEED": str(hash_seed),
        "OMP_NUM_THREADS": str(threads),
        "XDG_CACHE_HOME": str(output.parent / "cache"),
    }
    command = [sys.executable, "-m", "infc", "compile", str(checkpoint), "-o", str(output)]
    subprocess.run(
        [*command, "--no-cache", "--set", "kv_cache.block_size=16"],
        env=environment,
        check=True,
        capture_output=True,
        cwd=output.parent,
    )


def files(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.breadth
@pytest.mark.slow
def test_two_compilations_give_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("qwen2", tmp_path / "model", tokenizer=True)
    places = [tmp_path / "a" / "artifact", tmp_path / "a longer name" / "other"]
    for i, place in enumerate(places):
        place.parent.mkdir()
        compile_apart(checkpoint, place, hash_seed=i + 1, threads=i + 1)
    first, second = (files(place) for place in places)
    assert first.keys() == second.keys()
    different = [name for name in first if first[name] != second[name]]
    assert not different
    assert {"code/model.so", "weights.safetensors", "manifest.json"} <= first.keys()
