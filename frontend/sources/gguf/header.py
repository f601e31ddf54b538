"""The header of a GGUF file, read strictly: every length and offset is checked before it is used.

`gguf.GGUFReader` is not used for it: it loops over whatever lengths a file states, and makes
several arrays for each token of a vocabulary.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ....ir.errors import CheckpointError

if TYPE_CHECKING:
    from mmap import mmap

Value: TypeAlias = int | float | bool | bytes | list[bytes] | NDArray[np.generic]
"""A value of the metadata: texts as UTF-8, arrays of texts as lists, others as numpy arrays."""

AGAIN: Final = "download the file again, or convert the model again"
_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_DEFAULT_ALIGNMENT: Final = 32
_MAX_DIMS: Final = 4
_MAX_TEXTS: Final = 1 << 24  # in one array: far more tokens or merges than any vocabulary has
_TEXT, _ARRAY = 8, 9
# Formats of the other value types, by their numbers in a file.
_SCALARS: Final = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}
_DTYPES: Final = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: the number of its type, its shape (rows first), its place in it."""

    name: str
    type_id: int
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself: metadata by key, tensors by name."""

    metadata: Mapping[str, Value]
    entries: Mapping[str, Entry]


@dataclass(slots=True)
class _Cursor:
    """Reads the header from front to back. `what` is being read, for messages."""

    data: mmap
    path: Path
    at: int = 0
    what: str = "the header"

    def refuse(self, message: str, hint: str | None = AGAIN) -> NoReturn:
        raise CheckpointError(message, where=f"{self.path}: {self.what}", hint=hint)

    def need(self, num_bytes: int) -> int:
        """Moves behind the next bytes and returns where they begin."""
        begin, size = self.at, len(self.data)
        if num_bytes > size - begin:
            self.refuse(
                f"needs {num_bytes} bytes, and {size - begin} are left: truncated, or wrong"
            )
        self.at = begin + num_bytes
        return begin

    def scalar(self, form: str) -> int | float | bool:
        value: int | float | bool
        (value,) = struct.unpack_from(form, self.data, self.need(struct.calcsize(form)))
        return value

    def count(self, form: str = "<Q") -> int:
        return int(self.scalar(form))

    def text(self) -> bytes:
        begin = self.need(self.count())
        return self.data[begin : self.at]

    def name(self) -> str:
        raw = self.text()
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(f"has the name {raw[:40]!r}, which is not UTF-8")

    def value(self) -> Value:
        kind = self.count("<I")
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            self.refuse(f"is of the unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def _array(self) -> Value:
        kind, length = self.count("<I"), self.count()
        if kind == _TEXT:
            if length > _MAX_TEXTS:
                self.refuse(f"has {length} texts, and at most {_MAX_TEXTS} are taken")
            return [self.text() for _ in range(length)]
        if kind not in _DTYPES:
            self.refuse(f"is an array of the unknown type {kind}")
        dtype = np.dtype(_DTYPES[kind])
        begin = self.need(length * dtype.itemsize)
        # A copy: the mapping may be closed while somebody still holds the metadata.
        return np.frombuffer(self.data, dtype, length, begin).copy()


def read_header(data: mmap, path: Path) -> Header:
    """Everything before the data of the tensors.

    Raises CheckpointError, naming file and key or tensor, for whatever is malformed.
    """
    cursor = _Cursor(data, path)
    tensors, pairs = _counts(cursor)
    metadata: dict[str, Value] = {}
    for number in range(pairs):
        cursor.what = f"key {number + 1} of {pairs}"
        key = cursor.name()
        cursor.what = key
        if key in metadata:
            cursor.refuse("occurs twice in the metadata")
        metadata[key] = cursor.value()
    entries: dict[str, Entry] = {}
    for number in range(tensors):
        cursor.what = f"tensor {number + 1} of {tensors}"
        entry = _entry(cursor)
        if entry.name in entries:
            cursor.refuse("occurs twice")
        entries[entry.name] = entry
    return Header(metadata, _placed(entries, cursor, _alignment(metadata, path)))


def _counts(cursor: _Cursor) -> tuple[int, int]:
    if cursor.data[:4] != _MAGIC:
        cursor.refuse("does not begin with GGUF: this is not a GGUF file", hint=None)
    cursor.at = 4
    version = cursor.count("<I")
    if version not in _VERSIONS:
        big = version and not version & 0xFFFF
        said = "is of a big-endian machine" if big else f"is of version {version}"
        cursor.refuse(f"{said}, which is not supported", hint="convert the model again")
    tensors, pairs = cursor.count(), cursor.count()
    left = len(cursor.data) - cursor.at
    # No entry is shorter: an empty name, its type, and one dimension or the smallest value.
    if tensors * 32 + pairs * 13 > left:
        cursor.refuse(
            f"promises {pairs} keys and {tensors} tensors, more than {left} bytes can hold"
        )
    return tensors, pairs


def _alignment(metadata: Mapping[str, Value], path: Path) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or not 1 <= value <= 1 << 20
        or value & (value - 1)
    ):
        raise CheckpointError(
            f"is {value!r}, expected a power of two", where=f"{path}: general.alignment", hint=AGAIN
        )
    return value


def _entry(cursor: _Cursor) -> Entry:
    """A tensor with its offset in the data as place: where the data begin is not known yet."""
    name = cursor.name()
    cursor.what = f"tensor {name}"
    rank = cursor.count("<I")
    if not 1 <= rank <= _MAX_DIMS:
        cursor.refuse(f"has {rank} dimensions, expected 1 to {_MAX_DIMS}")
    # Stored from the innermost dimension outwards.
    shape = tuple(cursor.count() for _ in range(rank))[::-1]
    type_id = cursor.count("<I")
    begin = cursor.count()
    return Entry(name, type_id, shape, begin, begin + _num_bytes(cursor, type_id, shape))


@cache
def _known_types() -> Mapping[int, tuple[str, int, int]]:
    """The element types by their numbers: name, elements of a block, bytes of a block."""
    from gguf.constants import GGML_QUANT_SIZES

    return {kind.value: (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def _num_bytes(cursor: _Cursor, type_id: int, shape: tuple[int, ...]) -> int:
    known = _known_types()
    if type_id not in known:
        cursor.refuse(
            f"is of type {type_id}, which is not known",
            hint="a newer gguf package may know it: pip install --upgrade gguf",
        )
    kind, block, block_bytes = known[type_id]
    elements = 1
    for size in shape:
        elements *= size
    # Nothing takes less than an eighth of a byte an element.
    if min(shape) < 1 or elements > 8 * len(cursor.data):
        cursor.refuse(f"has the shape {list(shape)}, which the file cannot hold")
    if shape[-1] % block:
        cursor.refuse(f"has rows of {shape[-1]}, expected a multiple of {block} for {kind}")
    return elements // block * block_bytes


def _placed(entries: Mapping[str, Entry], cursor: _Cursor, alignment: int) -> dict[str, Entry]:
    """The entries with their places in the file: aligned, apart from each other, inside."""
    start = -(-cursor.at // alignment) * alignment
    size, end = len(cursor.data), 0
    for entry in sorted(entries.values(), key=lambda one: (one.begin, one.end)):
        cursor.what = f"tensor {entry.name}"
        if entry.begin % alignment:
            cursor.refuse(f"begins at {entry.begin}, which is no multiple of {alignment}")
        if entry.begin < end:
            cursor.refuse("overlaps the tensor before it")
        if start + entry.end > size:
            cursor.refuse(f"ends at byte {start + entry.end} of {size}: the file is truncated")
        end = entry.end
    return {
        name: Entry(name, one.type_id, one.shape, start + one.begin, start + one.end)
        for name, one in entries.items()
    }
