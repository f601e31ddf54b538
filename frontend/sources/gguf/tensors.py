"""The tensors of a mapped GGUF file, widened one at a time from their documented formats."""

from __future__ import annotations

import mmap
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from ....ir.errors import CheckpointError, UnsupportedModelError
from ....ir.formats import GGUF_FORMATS
from ....ir.types import DType, TensorType
from .header import Entry, Header, read_header

if TYPE_CHECKING:
    import torch
    from gguf.constants import GGMLQuantizationType

# What torch reads as it lies. All else that has values is given as float32.
PLAIN: Final = {"F32": DType.F32, "F16": DType.F16, "BF16": DType.BF16}
_CHUNK_BYTES: Final = 1 << 18
"""How much is widened at a time: the intermediate arrays stay in the processor's cache."""


class GgufTensors:
    """A GGUF file mapped read-only, with its header checked.

    Raises CheckpointError for a file that is missing or malformed, UnsupportedModelError for
    tensors whose format has no values here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _map(path)
        self.header: Header = read_header(self._map, path)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._kinds = _kinds(self.header, path)
        self.types: Mapping[str, TensorType] = {
            name: TensorType(PLAIN.get(self._kinds[entry.type_id].name, DType.F32), entry.shape)
            for name, entry in self.header.entries.items()
        }

    def format(self, name: str) -> str:
        """The name of a tensor's format, such as Q4_K."""
        return self._kinds[self.header.entries[name].type_id].name

    def stored(self, name: str) -> str | None:
        """The format of a tensor in lower case; None where its elements are plain numbers."""
        return None if self.format(name) in PLAIN else self.format(name).lower()

    def main_formats(self) -> tuple[str, ...]:
        """The formats of the matrices, that of the most elements first."""
        counts: Counter[str] = Counter()
        for name, entry in self.header.entries.items():
            if len(entry.shape) > 1:
                counts[self.format(name)] += self.types[name].num_elements()
        return tuple(name for name, _ in counts.most_common())

    def packed(self, name: str) -> torch.Tensor:
        """The codes `[..., bytes of a row]` of a tensor in one of `GGUF_FORMATS`, a view.

        Nothing may be written to it. CheckpointError where there is none of that name, or one of
        its scales or minima is no finite number.
        """
        entry = self.header.entries.get(name)
        form = GGUF_FORMATS.get("" if entry is None else str(self.stored(name)))
        if entry is None or form is None:
            raise CheckpointError(f"has no packed tensor {name}", where=str(self.path))
        blocks = self._bytes[entry.begin : entry.end].reshape(-1, form.block_bytes)
        for part in form.parts:
            if part.dtype is DType.F16:
                found = blocks[:, part.offset : part.offset + part.num_bytes].copy()
                if not np.isfinite(found.view("<f2")).all():
                    raise CheckpointError(
                        f"a {part.name} of its blocks is NaN or infinite",
                        where=f"{self.path}: tensor {name}",
                        hint="the file is damaged; download it again",
                    )
        return self._codes(entry)

    def _codes(self, entry: Entry) -> torch.Tensor:
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # see `_view`
            data = torch.from_numpy(self._bytes[entry.begin : entry.end])
        return data.reshape(*entry.shape[:-1], -1)

    def tensor(self, name: str) -> torch.Tensor:
        """The values of a tensor: a view where torch has its type, else a new float32 tensor.

        Nothing may be written to it. CheckpointError where there is none of that name.
        """
        entry = self.header.entries.get(name)
        if entry is None:
            raise CheckpointError(f"tensor {name} is missing", where=str(self.path))
        if self.format(name) in PLAIN:
            return self._view(entry)
        return self._widen(entry)

    def _view(self, entry: Entry) -> torch.Tensor:
        import torch

        from ....ir.torch_types import to_torch

        dtype = to_torch(self.types[entry.name].dtype)
        with warnings.catch_warnings():
            # Torch warns that a read-only buffer must not be written to: nobody does.
            warnings.simplefilter("ignore", UserWarning)
            data = torch.from_numpy(self._bytes[entry.begin : entry.end])
        if data.data_ptr() % dtype.itemsize:  # an alignment of less than an element, in old files
            data = data.clone()
        return data.view(dtype).reshape(entry.shape)

    def _widen(self, entry: Entry) -> torch.Tensor:
        """Block after block: of nothing but the result is there ever a whole copy."""
        import torch
        from gguf.constants import GGML_QUANT_SIZES
        from gguf.quants import dequantize

        kind = self._kinds[entry.type_id]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        raw = self._bytes[entry.begin : entry.end]
        result = torch.empty(entry.shape, dtype=torch.float32)
        values: NDArray[np.float32] = result.numpy().reshape(-1)
        step = _CHUNK_BYTES // block_bytes * block_bytes
        with np.errstate(all="ignore"):  # infinite scales are found in the weight, and named
            for begin in range(0, raw.size, step):
                part = dequantize(raw[None, begin : begin + step], kind).reshape(-1)
                at = begin // block_bytes * block
                values[at : at + part.size] = part
        self._give_back(entry)
        return result

    def _give_back(self, entry: Entry) -> None:
        """What was widened need not stay in memory: its pages are read again when asked for."""
        begin = entry.begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, begin, entry.end - begin)


def _map(path: Path) -> mmap.mmap:
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait
            raise CheckpointError("is not a regular file", where=str(path))
        with open(path, "rb", buffering=0) as file:
            if not os.fstat(file.fileno()).st_size:
                raise CheckpointError("is empty", where=str(path))
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _kinds(header: Header, path: Path) -> dict[int, GGMLQuantizationType]:
    """The formats in use by their numbers, each found to be one that can be widened."""
    from gguf.constants import GGMLQuantizationType

    kinds: dict[int, GGMLQuantizationType] = {}
    for entry in header.entries.values():
        if entry.type_id not in kinds:
            kinds[entry.type_id] = kind = GGMLQuantizationType(entry.type_id)
            if kind.name not in PLAIN and not _has_values(kind):
                raise UnsupportedModelError(
                    f"is stored as {kind.name}, which is not supported",
                    where=f"{path}: tensor {entry.name}",
                    hint="use a file of another quantization, such as Q8_0 or Q4_K_M",
                )
    return kinds


def _has_values(kind: GGMLQuantizationType) -> bool:
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
