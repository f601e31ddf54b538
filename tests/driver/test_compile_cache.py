"""Compiling again: from the cache, without torch, and all the same where an entry is damaged."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import infc
from infc.driver.cache import ArtifactCache
from infc.ir.artifact import Artifact

from .compiling import Lines, contents


def test_again_from_the_cache(source: Path, tmp_path: Path) -> None:
    progress = Lines()
    first = infc.compile(source / "model.yaml", tmp_path / "one", verify=False, progress=progress)
    assert progress.lines == [line for line in progress.lines if "cache" not in line]
    progress = Lines()
    start = time.perf_counter()
    second = infc.compile(source / "model.yaml", tmp_path / "two", verify=False, progress=progress)
    assert time.perf_counter() - start < 1
    assert progress.lines == [f"{tmp_path / 'two'}: from the cache, which had the same compilation"]
    assert contents(first.path) == contents(second.path)
    # Whatever goes in makes another artifact.
    progress = Lines()
    changed = ["runtime.max_sequences=3"]
    third = infc.compile(
        source / "model.yaml", tmp_path / "two", overrides=changed, verify=False, progress=progress
    )
    assert progress.lines == [line for line in progress.lines if "cache" not in line]
    assert third.manifest.main.limits.max_sequences == 3


def test_a_second_compilation_imports_no_torch(source: Path, tmp_path: Path) -> None:
    infc.compile(source / "model.yaml", tmp_path / "one", verify=False)
    script = (
        "import sys, infc; infc.compile(sys.argv[1], sys.argv[2], verify=False);"
        "print(*{'torch', 'transformers'} & set(sys.modules))"
    )
    places = [str(source / "model.yaml"), str(tmp_path / "two")]
    command = [sys.executable, "-c", script, *places]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_damaged_cache_costs_a_compilation(source: Path, tmp_path: Path, own_cache: Path) -> None:
    first = infc.compile(source / "model.yaml", tmp_path / "one", verify=False)
    good = contents(first.path)
    (kept,) = (own_cache / "artifacts").iterdir()
    weights = kept / "weights.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.unlink()  # not through a hard link into the first artifact
    weights.write_bytes(damaged)
    second = infc.compile(source / "model.yaml", tmp_path / "two", verify=False)
    assert contents(second.path) == good


def test_a_cache_cleared_meanwhile_costs_a_compilation(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infc.compile(source / "model.yaml", tmp_path / "a", verify=False)
    find = ArtifactCache.find

    def find_and_lose(cache: ArtifactCache, key: str, on_remark: object) -> Artifact | None:
        found = find(cache, key)
        assert found is not None
        cache.clear()
        return found

    monkeypatch.setattr(ArtifactCache, "find", find_and_lose)
    infc.compile(source / "model.yaml", tmp_path / "b", verify=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
