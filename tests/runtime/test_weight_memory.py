"""Weights in memory of their own: the same bytes at the same place, and when they are copied."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infc.ir.errors import ArtifactError, CapacityError, UsageError
from infc.ir.manifest import FileDigest
from infc.ir.safetensors import write_safetensors
from infc.ir.types import DType, TensorType
from infc.runtime import limits
from infc.runtime.executors import address_space, weight_memory
from infc.runtime.executors.base import WeightPlacement
from infc.runtime.executors.reserve import reserve
from infc.runtime.executors.weight_memory import CopiedWeights, LoadedWeights, open_weights
from infc.runtime.limits import plan_runtime
from infc.runtime.options import RuntimeOptions

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


def opened(path: Path, placement: WeightPlacement) -> Any:
    """The weights; the descriptor that they were opened with is closed again."""
    with open(path, "rb") as file:
        return open_weights(path, file.fileno(), placement)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """More pieces than one: a page each."""
    monkeypatch.setattr(weight_memory, "PIECE_BYTES", mmap.PAGESIZE)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("pieces", [1, 2, 100])
def test_what_the_system_maps_where_pieces_were_made_stays_when_weights_go(
    file: Path, pieces: int
) -> None:
    """A moved page leaves a hole, and the next large block of malloc may lie in it."""
    copied = opened(file, "copied")
    holes = [copied._ranges.made]
    while copied.copy(0.0) and len(holes) < pieces:
        holes.append(holes[-1] + mmap.PAGESIZE)
    taken = [
        address_space._map(hole, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, PRIVATE, -1)
        for hole in holes
    ]
    assert taken == holes
    owned = [copied._ranges.base, copied._ranges.made + copied._ranges.copied]
    copied.close()
    assert [is_mapped(page) for page in taken] == [True] * len(taken)
    assert not is_mapped(owned[0])
    assert pieces == 100 or not is_mapped(owned[1])
    for page in taken:
        address_space.unmap(page, mmap.PAGESIZE)


PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def is_mapped(page: int) -> bool:
    """mincore(2) fails for pages that are not."""
    found = ctypes.c_ubyte()
    address = ctypes.c_void_p(page)
    return bool(ctypes.CDLL(None).mincore(address, ctypes.c_size_t(1), ctypes.byref(found)) == 0)


@pytest.mark.usefixtures("small_pieces")
def test_a_copy_takes_the_place_of_the_file_piece_by_piece(file: Path) -> None:
    mapped, copied = opened(file, "mapped"), opened(file, "copied")
    assert isinstance(copied, CopiedWeights)
    addresses = [copied.address(name) for name in KINDS]
    left = []
    for _ in range(file.stat().st_size // mmap.PAGESIZE + 1):
        for name, kind in KINDS.items():
            contents = [
                ctypes.string_at(w.address(name), kind.num_bytes()) for w in (mapped, copied)
            ]
            assert contents[0] == contents[1] and copied.address(name) % 64 == 0
        left.append(copied.copy(0.0))
    assert [copied.address(name) for name in KINDS] == addresses
    assert left == [True] * (len(left) - 1) + [False] and len(left) > 2
    # Nothing is left of the file: what is written there now is not seen.
    before = ctypes.string_at(addresses[1], KINDS["b"].num_bytes())
    with open(file, "r+b") as written:
        written.seek(-100, 2)
        written.write(b"\0" * 100)
    assert ctypes.string_at(addresses[1], len(before)) == before
    assert ctypes.string_at(mapped.address("b"), len(before)) != before
    with pytest.raises(ArtifactError, match="is not in the file"):
        copied.address("c")
    copied.close()
    assert not copied.copy(1.0)
    copied.close()
    mapped.close()


@pytest.mark.usefixtures("small_pieces")
def test_a_thread_reads_the_same_while_pieces_move(tmp_path: Path) -> None:
    size = 400 * mmap.PAGESIZE
    path = tmp_path / "large.safetensors"
    kind = TensorType(DType.U8, (size,))
    contents = np.random.default_rng(1).integers(0, 256, size).astype(np.uint8)
    write_safetensors(path, [("a", kind)], lambda _: contents)
    copied = opened(path, "copied")
    seen = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(copied.address("a")))
    done, wrong = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            if not np.array_equal(seen, contents):
                wrong.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    while copied.copy(0.0):
        pass
    done.set()
    reader.join()
    assert not wrong
    copied.close()


@pytest.mark.usefixtures("small_pieces")
def test_the_mapped_file_serves_where_the_system_refuses(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    copied = opened(file, "copied")
    before = ctypes.string_at(copied.address("a"), 1000)
    assert copied.copy(0.0)
    monkeypatch.setattr(weight_memory, "move_pages", refuse)
    assert not copied.copy(0.0)
    assert "weights from 0 MiB on stay mapped: [Errno 12]" in caplog.text
    assert ctypes.string_at(copied.address("a"), 1000) == before
    copied.close()
    monkeypatch.setattr(weight_memory, "map_memory_at", refuse)
    with pytest.raises(CapacityError, match="cannot allocate memory for the weights"):
        opened(file, "copied")


@pytest.mark.usefixtures("small_pieces")
def test_a_file_that_shrinks_meanwhile_is_refused(file: Path) -> None:
    weights = opened(file, "copied")
    os.truncate(file, mmap.PAGESIZE)
    with pytest.raises(ArtifactError, match="was truncated"):
        weights.copy(math.inf)


def test_loaded_weights_know_nothing_of_what_becomes_of_the_file(file: Path) -> None:
    mapped, loaded = opened(file, "mapped"), opened(file, "loaded")
    assert isinstance(loaded, LoadedWeights)
    for name in KINDS:
        assert np.array_equal(loaded.array(name), mapped.array(name))
        assert loaded.address(name) % 64 == 0
    before = loaded.array("b").copy()
    with open(file, "r+b") as written:
        written.write(bytes(file.stat().st_size))
    assert np.array_equal(loaded.array("b"), before)
    os.truncate(file, 0)
    assert np.array_equal(loaded.array("b"), before)
    with pytest.raises(ValueError, match="read-only"):
        loaded.array("b")[0] = 1
    loaded.close()
    mapped.close()


def test_loaded_weights_are_never_given_back(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of a checkpoint are, once they were read: the file still has them."""
    monkeypatch.setattr("infc.ir.safetensors._MAX_TOUCHED_BYTES", 0)
    weights = opened(file, "loaded")
    expected = weights.array("b").copy()
    with open(file, "r+b") as written:
        written.write(bytes(file.stat().st_size))
    for _ in range(2):
        assert np.array_equal(weights.tensor("b").numpy(), expected)


def test_a_file_that_shrinks_while_it_is_loaded_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(size: int) -> mmap.mmap:
        os.truncate(file, 100)
        return reserve(size)

    monkeypatch.setattr(weight_memory, "reserve", cut)
    with pytest.raises(ArtifactError, match="was truncated"):
        opened(file, "loaded")


SMALL = limits._LEAST_COPIED_BYTES - 1
LARGE = limits._LEAST_COPIED_BYTES


@pytest.mark.parametrize(
    ("wanted", "size", "free", "huge_pages", "ours", "placement"),
    [
        ("auto", LARGE, 2 * LARGE, "madvise", True, "copied"),
        ("auto", LARGE, 2 * LARGE, "always", True, "copied"),
        ("auto", LARGE, 2 * LARGE, "never", True, "mapped"),
        ("auto", LARGE, 2 * LARGE, None, True, "mapped"),
        ("auto", 2 * LARGE, 2 * LARGE, "madvise", True, "mapped"),
        ("auto", 4 * LARGE, 5 * LARGE, "madvise", True, "mapped"),
        ("auto", SMALL, 2 * LARGE, "madvise", True, "loaded"),
        ("auto", SMALL, 2 * LARGE, None, False, "loaded"),
        ("auto", SMALL, SMALL, None, True, "mapped"),
        ("auto", LARGE, 2 * LARGE, "madvise", False, "loaded"),
        ("copied", 1, LARGE, None, True, "copied"),
        ("copied", LARGE, LARGE, "always", False, "loaded"),
        ("mapped", LARGE, 2 * LARGE, "always", True, "mapped"),
        ("mapped", 1, 2 * LARGE, "always", True, "mapped"),
    ],
)
def test_where_weights_lie(
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    size: int,
    free: int,
    huge_pages: str | None,
    ours: bool,
    placement: str,
) -> None:
    monkeypatch.setattr(limits, "huge_page_setting", lambda: huge_pages)
    assert limits.place_weights(wanted, size, free, ours=ours) == placement


def test_weights_that_cannot_lie_anywhere() -> None:
    with pytest.raises(CapacityError, match=r"a copy of the weights takes 128\.0 MiB"):
        limits.place_weights("copied", 2 * LARGE, LARGE, ours=True)
    for wanted, free in (("mapped", 9 * LARGE), ("auto", LARGE)):
        with pytest.raises(ArtifactError, match="belongs to another user or is writable"):
            limits.place_weights(wanted, LARGE, free, ours=False)


def test_the_option_wins_over_the_recipe() -> None:
    compiled = replace(
        manifest(),
        recipe={"runtime": {"weights": "copied"}},
        files={"weights.safetensors": FileDigest(bytes=100, sha256="0")},
    )
    assert plan_runtime(compiled, RuntimeOptions()).weights == "copied"
    plan = plan_runtime(compiled, RuntimeOptions(), weights_are_ours=False)
    assert plan.weights == "loaded"
    assert plan_runtime(compiled, RuntimeOptions(weights="mapped")).weights == "mapped"
    with pytest.raises(UsageError, match="weights is 'mmap'"):
        plan_runtime(compiled, RuntimeOptions(weights="mmap"))
