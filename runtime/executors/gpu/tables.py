"""Block tables on the device, of which a step uploads only what has changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ...scheduling.step import Int32Array

_GAP: Final = 4096
"""Entries between two changes that are rather uploaded once more than skipped by another copy:
asking for one takes about as long as copying 16 KiB."""


class DeviceTable:
    """One group's block table: `rows` rows of `width` blocks at `address`.

    The host has a copy of what the device has, as far as copies that were asked for have run.
    Entries behind a row's context are stale on both sides; nobody reads them.
    """

    def __init__(self, address: int, rows: int, width: int) -> None:
        self.address = address
        # Nothing has been uploaded: no block is equal to what is here.
        self._mirror: Int32Array = np.full((rows, width), -1, np.int32)

    @property
    def num_bytes(self) -> int:
        """Of the whole table."""
        return self._mirror.nbytes

    def changes(self, table: Int32Array) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Addresses, and the bytes to copy there, after which the device has this table.

        The bytes are those of the host's copy: take them before the next call.
        """
        rows, width = table.shape
        known = self._mirror[:rows, :width]
        changed = np.flatnonzero(known != table)  # of one dimension: ten times as fast as of two
        if not len(changed):
            return
        row, column = np.divmod(changed, width)
        known[row, column] = table[row, column]
        places = row * self._mirror.shape[1] + column
        ends = np.flatnonzero(np.diff(places) > _GAP)
        firsts = places[np.concatenate(([0], ends + 1))].tolist()
        lasts = places[np.concatenate((ends, [len(places) - 1]))].tolist()
        flat = self._mirror.reshape(-1)
        for first, last in zip(firsts, lasts, strict=True):
            yield self.address + 4 * first, flat[first : last + 1].view(np.uint8)

    def forget(self) -> None:
        """Take the device to have nothing of it: copies may not have been made."""
        self._mirror.fill(-1)
