"""Parts of the executor by themselves: tables, layouts, parameters, tiles."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.launches import Extent, Integer, Launch, Pointer, Real, TensorMap
from infc.runtime.executors.gpu.arrays import Layout, padded
from infc.runtime.executors.gpu.driver import Function
from infc.runtime.executors.gpu.launching import Places, ReadyLaunch
from infc.runtime.executors.gpu.shapes import _ROWS
from infc.runtime.executors.gpu.staging import GrowingArray, PinnedBuffer
from infc.runtime.executors.gpu.step_arrays import query_tiles
from infc.runtime.executors.gpu.tables import DeviceTable

from .late_driver import LateDriver

ROWS, WIDTH = 7, 900


@given(data=st.data())
def test_changes_of_a_table_make_the_device_equal_to_the_whole(data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    device = np.full((ROWS, WIDTH), -7, np.int32)
    table = DeviceTable(0, ROWS, WIDTH)
    current = np.zeros((ROWS, WIDTH), np.int32)
    for _ in range(data.draw(st.integers(1, 5))):
        rows, width = data.draw(st.integers(1, ROWS)), data.draw(st.integers(1, WIDTH))
        for _ in range(data.draw(st.integers(0, 4))):
            row, column = random.integers(rows), random.integers(width)
            current[row, column : column + random.integers(1, 40)] = random.integers(1, 99)
        if data.draw(st.booleans()):
            random.shuffle(current)
        step = np.ascontiguousarray(current[:rows, :width])
        sent = 0
        for address, content in table.changes(step):
            device.reshape(-1)[address // 4 : address // 4 + len(content) // 4] = content.view(
                np.int32
            )
            sent += len(content)
        assert np.array_equal(device[:rows, :width], step)
        assert sent <= table.num_bytes
        assert not list(table.changes(step)), "nothing is sent twice"


def test_a_new_block_is_one_small_copy() -> None:
    table = DeviceTable(4096, ROWS, 2000)
    blocks = np.arange(ROWS * 2000, dtype=np.int32).reshape(ROWS, 2000)
    assert sum(len(content) for _, content in table.changes(blocks)) == blocks.nbytes
    blocks[2, 3] = blocks[5, 1] = -3
    changes = [
        (address, content.view(np.int32).tolist()) for address, content in table.changes(blocks)
    ]
    assert changes == [(4096 + 4 * 4003, [-3]), (4096 + 4 * 10001, [-3])]
    table.forget()
    assert sum(len(content) for _, content in table.changes(blocks)) == blocks.nbytes


@given(st.integers(0, 3000), st.integers(1, 3000))
def test_padding_reaches_what_it_pads_and_no_limit(size: int, most: int) -> None:
    found = padded(min(size, most), _ROWS, most)
    assert min(size, most) <= found <= most
    assert (found == 0) == (size == 0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5))
def test_tiles_cover_each_query_once(counts: list[int], tile: int) -> None:
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    sequences, rows = query_tiles(starts, tile)
    covered = [
        (b, row)
        for b, first in zip(sequences.tolist(), rows.tolist(), strict=True)
        for row in range(first, min(first + tile, counts[b]))
    ]
    assert covered == [(b, row) for b, count in enumerate(counts) for row in range(count)]
    assert sequences.dtype == rows.dtype == np.int32


def launched(launch: Launch, sizes: dict[str, int], driver: LateDriver | None = None) -> Any:
    places = Places(
        lambda p: None if p.space == "step" else 1000 * (1 + len(p.name)),
        1 << 40,
        lambda name: None,
        lambda name: {"B"},
    )
    function = Function("f", None, 32, 0)
    ready = ReadyLaunch(launch, function, places, driver or LateDriver())
    return ready, ready.call(sizes, Layout({"x": 64}, 128))


def test_parameters_are_aligned_to_their_sizes() -> None:
    matrix = TensorMap(Pointer("arena", ""), "bf16", (Extent(1, "T"), Extent(64)), (8, 32))
    launch = Launch(
        "f",
        (Extent(2, "T", 1, 4), Extent(3)),
        (
            Integer(Extent(1, "T")),
            Pointer("weight", "ab", 24),
            Real(0.5),
            matrix,
            Pointer("step", "x", 8),
            Integer(Extent(-5)),
        ),
        dependent=True,
    )
    driver = LateDriver()
    ready, call = launched(launch, {"T": 6, "B": 1}, driver)
    _, grid, parameters, dependent = call
    assert grid == (4, 3) and dependent and ready.sizes == {"T", "B"}
    descriptor = (1000).to_bytes(8, "little") + bytes(120)
    expected = struct.pack("<i4xQf44x", 6, 3024, 0.5) + descriptor
    assert parameters == expected + struct.pack("<Qi4xQQ", (1 << 40) + 72, -5, 0, 0)
    assert driver.calls == ["descriptor (6, 64)"]
    ready.call({"T": 6, "B": 1}, Layout({"x": 64}, 128))
    assert len(driver.calls) == 1, "equal sizes have equal parameters"


def test_a_descriptor_without_rows_is_no_launch() -> None:
    """As in a step without rows of logits, whose grid may be of one size for all steps."""
    matrix = TensorMap(Pointer("arena", ""), "bf16", (Extent(1, "R"), Extent(64)), (8, 32))
    launch = Launch("f", (Extent(4),), (matrix,))
    driver = LateDriver()
    assert launched(launch, {"R": 0, "B": 1}, driver)[1] is None
    assert driver.calls == []
    assert launched(launch, {"R": 1, "B": 1}, driver)[1] is not None


def test_a_persistent_launch_has_a_block_for_each_processor_at_most() -> None:
    driver = LateDriver()
    processors = driver.device.num_processors
    for blocks in (processors - 1, processors, processors + 40):
        launch = Launch("f", (Extent(blocks),), (), persistent=True)
        assert launched(launch, {}, driver)[1][1] == (min(blocks, processors),)


def test_a_grid_alone_makes_a_launch_depend_on_a_size() -> None:
    ready, call = launched(Launch("f", (Extent(1), Extent(2, "R")), ()), {"R": 3})
    assert call[1] == (1, 6) and ready.sizes == {"R"}


def test_a_launch_of_nothing_is_left_out() -> None:
    _, call = launched(Launch("f", (Extent(1, "T"), Extent(1, "P")), ()), {"T": 6, "P": 0})
    assert call is None


def test_what_grows_keeps_the_room_it_has() -> None:
    driver = LateDriver()
    array = GrowingArray(driver, "bias", 100)
    before = array.address
    assert not array.make_room(256) and array.address == before
    assert array.make_room(257) and array.num_bytes == 512
    assert driver.memory.num_bytes == 512, "the old memory was given back"
    pinned = PinnedBuffer(driver, 100)
    pinned.reserve(1000)
    assert driver.host_bytes == 1000
    one, other = pinned.take(65), pinned.take(500)
    one[:], other[:] = 1, 2
    assert set(one.tolist()) == {1}
    with pytest.raises(AssertionError, match="more than was reserved"):
        pinned.take(1000)
