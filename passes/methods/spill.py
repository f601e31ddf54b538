"""Tensors that a method made, kept in a file until the artifact is written."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ...ir.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Place:
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(slots=True)
class SpillFile:
    """Tensors by key in a file without a name, which is gone with the process.

    What a method makes of a whole model must not stay in memory, and the loaders of weights want
    it again: verification, then the writer. `directory` is where the file lies.
    """

    directory: Path
    _file: IO[bytes] | None = field(default=None, init=False)
    _places: dict[str, _Place] = field(default_factory=dict, init=False)
    _end: int = field(default=0, init=False)

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Keeps a tensor; UsageError where the disk does not take it."""
        import torch

        data = tensor.contiguous()
        view: memoryview = data.reshape(-1).view(torch.uint8).numpy().data
        try:
            if self._file is None:
                # The directory of the output, for which there must be room anyway: /tmp may be RAM.
                self._file = tempfile.TemporaryFile(dir=self.directory)  # noqa: SIM115
            at = self._end
            while view:
                written = os.pwrite(self._file.fileno(), view, at)
                view, at = view[written:], at + written
        except OSError as error:
            raise UsageError(
                f"quantized weights cannot be kept: {error.strerror}", where=str(self.directory)
            ) from error
        self._places[key] = _Place(self._end, at - self._end, data.dtype, tuple(data.shape))
        self._end = at

    def read(self, key: str) -> torch.Tensor:
        """The tensor of that key; CheckpointError where there is none."""
        import torch

        place = self._places.get(key)
        if place is None or self._file is None:
            raise CheckpointError("no method has made this weight", where=key)
        data = bytearray(place.num_bytes)
        view, at = memoryview(data), place.offset
        while view:
            count = os.preadv(self._file.fileno(), [view], at)
            if not count:
                raise CheckpointError("the file of quantized weights ends early", where=key)
            view, at = view[count:], at + count
        if not data:
            return torch.empty(place.shape, dtype=place.dtype)
        return torch.frombuffer(data, dtype=place.dtype).reshape(place.shape)

    def close(self) -> None:
        """Gives the file back."""
        if self._file is not None:
            self._file.close()
