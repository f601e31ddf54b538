"""Weights in memory of their own: the same bytes as in the file, and when they are copied."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from infc.ir.errors import ArtifactError, CapacityError, UsageError
from infc.ir.manifest import FileDigest
from infc.ir.safetensors import write_safetensors
from infc.ir.types import DType, TensorType
from infc.runtime import limits
from infc.runtime.executors import weight_memory
from infc.runtime.executors.weight_memory import CopiedWeights, open_weights
from infc.runtime.limits import RuntimeOptions, plan_runtime

from ..ir.artifacts import manifest

KINDS = {"a": TensorType(DType.U8, (1000,)), "b": TensorType(DType.F32, (7, 300))}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    made = {"a": rng.integers(0, 256, 1000).astype(np.uint8)}
    made["b"] = rng.standard_normal((7, 300)).astype(np.float32)
    path = tmp_path / "weights.safetensors"
    write_safetensors(path, KINDS.items(), made.__getitem__)
    return path


@pytest.mark.parametrize("grain", [64, 1 << 20])
def test_a_copy_has_the_bytes_of_the_file(
    file: Path, grain: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_memory, "_GRAIN_BYTES", grain)
    mapped, copied = (open_weights(file, copied=copy) for copy in (False, True))
    for name, kind in KINDS.items():
        assert copied.address(name) % 64 == 0 and copied.address(name) != mapped.address(name)
        contents = [ctypes.string_at(w.address(name), kind.num_bytes()) for w in (mapped, copied)]
        assert contents[0] == contents[1]
    with pytest.raises(ArtifactError, match="is not in the file"):
        copied.address("c")
    copied.close()
    mapped.close()


def test_a_file_that_shrinks_meanwhile_is_refused(file: Path) -> None:
    weights = CopiedWeights(file)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2])
    with pytest.raises(ArtifactError, match="was cut short"):
        weights._read(size)


def test_auto_copies_large_weights_where_huge_pages_and_memory_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def copies(weights: str, size: int, free: int, setting: str | None) -> bool:
        monkeypatch.setattr(limits, "huge_page_setting", lambda: setting)
        return limits.copies_weights(weights, size, free)

    size = limits._LEAST_COPIED_BYTES
    assert copies("auto", size, 2 * size, "madvise") and copies("auto", size, 2 * size, "always")
    assert not copies("auto", size, 2 * size, "never") and not copies("auto", size, 2 * size, None)
    assert not copies("auto", size - 1, 2 * size, "madvise")
    assert not copies("auto", 2 * size, 2 * size, "madvise")
    assert copies("copied", 1, size, None) and not copies("mapped", size, 2 * size, "always")
    with pytest.raises(CapacityError, match=r"a copy of the weights takes 128\.0 MiB"):
        copies("copied", 2 * size, size, "madvise")


def test_the_option_wins_over_the_recipe() -> None:
    compiled = replace(
        manifest(),
        recipe={"runtime": {"weights": "copied"}},
        files={"weights.safetensors": FileDigest(bytes=100, sha256="0")},
    )
    assert plan_runtime(compiled, RuntimeOptions()).copy_weights
    assert not plan_runtime(compiled, RuntimeOptions(weights="mapped")).copy_weights
    with pytest.raises(UsageError, match="weights is 'mmap'"):
        plan_runtime(compiled, RuntimeOptions(weights="mmap"))
