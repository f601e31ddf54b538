"""Safetensors files: a strict mapped reader without torch, and a streaming, aligned writer."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError
from .types import DType, TensorType

if TYPE_CHECKING:
    import torch

ALIGNMENT: Final = 64
"""Bytes at whose multiples our own tensors start in the file, and so in memory when mapped."""

PAD_PREFIX: Final = "__pad."
"""Names of the filler tensors between ours; readers refuse files with gaps."""

_MAX_HEADER = 100_000_000
_MAX_TOUCHED_BYTES = 1 << 29
"""How much of a mapped file may count as this process's memory before pages are given back."""
_NAMES: Final = {
    DType.F64: "F64",
    DType.F32: "F32",
    DType.BF16: "BF16",
    DType.F16: "F16",
    DType.I64: "I64",
    DType.I32: "I32",
    DType.I8: "I8",
    DType.U8: "U8",
    DType.BOOL: "BOOL",
}
_DTYPES: Final = {name: dtype for dtype, name in _NAMES.items()}
_BYTES: Final = {name: dtype.size_bytes for name, dtype in _DTYPES.items()} | {
    "U64": 8,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
_NUMPY: Final = {"F64": "<f8", "F32": "<f4", "BF16": "<u2", "F16": "<f2", "BOOL": "?"} | {
    f"{sign}{bits}": f"<{sign.lower()}{bits // 8}" for sign in "IU" for bits in (8, 16, 32, 64)
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its element type as spelled in the file, shape, place in the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def type(self) -> TensorType:
        """The IR's type; CheckpointError where the IR has no such element type."""
        if self.dtype not in _DTYPES:
            raise CheckpointError(f"has element type {self.dtype}", where=self.name)
        return TensorType(_DTYPES[self.dtype], self.shape)


def element_type(dtype: DType) -> str:
    """How a file spells an element type."""
    return _NAMES[dtype]


def read_header(
    path: Path, handle: int | None = None
) -> tuple[dict[str, Entry], dict[str, str], int]:
    """Entries by name, metadata, and the offset of the data; CheckpointError for a damaged file.

    `handle` is a descriptor of the file where it is open already; `path` then only names it.
    """
    try:
        with _opened(path, handle) as file:
            size = os.fstat(file).st_size
            length = int.from_bytes(os.pread(file, 8, 0), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError("is truncated: the header is incomplete", where=str(path))
            raw = os.pread(file, length, 8)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    entries, metadata = _parse_header(raw, path)
    _check_layout(entries, size - 8 - length, path)
    return entries, metadata, 8 + length


@contextlib.contextmanager
def _opened(path: Path, handle: int | None) -> Iterator[int]:
    """The descriptor given, or one of its own for as long as the block takes."""
    if handle is not None:
        yield handle
        return
    if path.exists() and not (path.is_file() or path.is_dir()):  # opening a pipe would wait
        raise CheckpointError("is not a regular file", where=str(path))
    with open(path, "rb", buffering=0) as file:
        yield file.fileno()


def _refuse(path: Path, message: str, name: str | None = None) -> NoReturn:
    raise CheckpointError(message, where=f"{path}: {name}" if name is not None else str(path))


def _parse_header(raw: bytes, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            _refuse(path, "occurs twice in the header", twice)
        return result

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("has a header that is not JSON", where=str(path)) from error
    if not isinstance(header, dict):
        _refuse(path, "has a header that is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        _refuse(path, "has metadata that is not an object")
    entries = {name: _parse_entry(name, item, path) for name, item in header.items()}
    return entries, {str(key): str(value) for key, value in metadata.items()}


def _natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse_entry(name: str, item: object, path: Path) -> Entry:
    if not isinstance(item, dict):
        _refuse(path, "has a header entry that is not an object", name)
    dtype, shape, place = (item.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BYTES:
        _refuse(path, f"has the unknown element type {dtype!r}", name)
    if not isinstance(shape, list) or not all(_natural(size) for size in shape):
        _refuse(path, f"has the malformed shape {shape!r}", name)
    if not isinstance(place, list) or len(place) != 2 or not all(_natural(at) for at in place):
        _refuse(path, f"has malformed offsets {place!r}", name)
    entry = Entry(name, dtype, tuple(shape), place[0], place[1])
    needed = _BYTES[dtype]
    for size in shape:
        needed *= size
    if entry.end - entry.begin != needed:
        held = entry.end - entry.begin
        _refuse(path, f"holds {held} bytes, {dtype} {shape} needs {needed}", name)
    return entry


def _check_layout(entries: Mapping[str, Entry], data_bytes: int, path: Path) -> None:
    """Tensors lie one after the other, without gap or overlap, and fill the file."""
    at = 0
    for entry in sorted(entries.values(), key=lambda e: (e.begin, e.end)):
        if entry.end > data_bytes:
            _refuse(path, f"ends at byte {entry.end} of {data_bytes}: file truncated", entry.name)
        if entry.begin != at:
            what = "overlaps the tensor before it" if entry.begin < at else "leaves a gap before it"
            _refuse(path, what, entry.name)
        at = entry.end
    if at != data_bytes:
        _refuse(path, f"has {data_bytes - at} bytes after its last tensor")


class MappedSafetensors:
    """A safetensors file mapped read-only; tensors are views, read when touched.

    `handle` is a descriptor of the file where it is open already; it may be closed afterwards.
    Pages of tensors that were read long ago are given back if `give_back` is set, so that reading
    a file from end to end does not count all of it as memory. Views stay valid: their pages are
    read again from the file. So it is only for mapped files, not for subclasses that copy them.
    """

    def __init__(
        self, path: Path | str, handle: int | None = None, *, give_back: bool = False
    ) -> None:
        self.path = Path(path)
        self._gives_back = give_back
        try:
            with _opened(self.path, handle) as file:
                self.entries, self.metadata, self._start = read_header(self.path, file)
                self._map = self._take(file)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(self._map, np.uint8)
        self._bytes.flags.writeable = False
        self._touched_bytes = 0

    def _take(self, handle: int) -> mmap.mmap:
        """The memory in which the file's bytes are seen, from its first on."""
        return mmap.mmap(handle, 0, access=mmap.ACCESS_READ)

    def names(self) -> list[str]:
        """The tensors' names in file order, without filler."""
        ordered = sorted(self.entries.values(), key=lambda entry: (entry.begin, entry.end))
        return [entry.name for entry in ordered if not entry.name.startswith(PAD_PREFIX)]

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def entry(self, name: str) -> Entry:
        """What the header says of a tensor; CheckpointError where there is none."""
        found = self.entries.get(name)
        if found is None:
            raise CheckpointError("is not in the file", where=f"{self.path}: {name}")
        return found

    def _view(self, entry: Entry) -> NDArray[np.uint8]:
        if self._bytes is None:
            raise CheckpointError("is closed", where=str(self.path))
        return self._bytes[self._start + entry.begin : self._start + entry.end]

    def array(self, name: str) -> NDArray[Any]:
        """A read-only numpy view; bfloat16 as uint16."""
        entry = self.entry(name)
        if entry.dtype not in _NUMPY:
            raise CheckpointError(f"has element type {entry.dtype}", where=f"{self.path}: {name}")
        view = self._view(entry)
        self._touch(view.nbytes)
        return view.view(_NUMPY[entry.dtype]).reshape(entry.shape)

    def address(self, name: str) -> int:
        """Where the tensor's first byte is mapped; valid until `close`."""
        return int(self._view(self.entry(name)).ctypes.data)

    def tensor(self, name: str) -> torch.Tensor:
        """A torch view of the mapped bytes (a copy where they are not aligned for their type).

        Nothing may be written to it.
        """
        import torch

        from .torch_types import to_torch

        entry = self.entry(name)
        dtype = to_torch(entry.type.dtype)
        view = self._view(entry)
        self._touch(view.nbytes)
        if not view.size:
            return torch.empty(entry.shape, dtype=dtype)
        if view.ctypes.data % entry.type.dtype.size_bytes:
            view = view.copy()
        with warnings.catch_warnings():
            # Torch warns that a read-only buffer must not be written to: nobody does.
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(view).view(dtype).reshape(entry.shape)

    def _touch(self, num_bytes: int) -> None:
        self._touched_bytes += num_bytes
        if self._gives_back and self._touched_bytes > _MAX_TOUCHED_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched_bytes = num_bytes

    def close(self) -> None:
        """Unmap the file; where views are still held, when the last of them goes."""
        self._bytes = None
        try:
            self._map.close()
        except BufferError:
            return


def layout(kinds: Iterable[tuple[str, TensorType]], metadata: Mapping[str, str]) -> bytes:
    """The header of a file with these tensors, filler among them, its length in front.

    The data behind it starts at a multiple of the alignment, as does every tensor.
    """
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    at, pads = 0, 0
    for name, kind in kinds:
        if name in header or name.startswith(PAD_PREFIX):
            raise CheckpointError("cannot be written under this name", where=name)
        if gap := -at % ALIGNMENT:
            filler = {"dtype": "U8", "shape": [gap], "data_offsets": [at, at + gap]}
            header[f"{PAD_PREFIX}{pads}"] = filler
            pads, at = pads + 1, at + gap
        size = kind.num_bytes()
        header[name] = {
            "dtype": _NAMES[kind.dtype],
            "shape": list(kind.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path | str,
    kinds: Iterable[tuple[str, TensorType]],
    produce: Callable[[str], torch.Tensor | NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file of these tensors in this order, asking for one at a time.

    `produce(name)` gives a torch tensor or a numpy array (bfloat16 as uint16) of the declared
    type. The same tensors give the same bytes. CheckpointError where one is of another type;
    OSError where the disk refuses. A file that could not be finished is removed.
    """
    order = list(kinds)
    head = layout(order, metadata or {})
    target = Path(path)
    try:
        with open(target, "wb") as file:
            file.write(head)
            at = 0
            for name, kind in order:
                file.write(b"\0" * (-at % ALIGNMENT))
                at += -at % ALIGNMENT
                at += file.write(_raw(produce(name), name, kind))
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _raw(tensor: Any, name: str, kind: TensorType) -> memoryview:
    """The bytes of a tensor in row-major order, after a check of its type."""
    if isinstance(tensor, np.ndarray):
        array = np.ascontiguousarray(tensor)
        fits = array.dtype == np.dtype(_NUMPY[_NAMES[kind.dtype]])
    else:
        import torch

        from .torch_types import to_torch

        fits = tensor.dtype == to_torch(kind.dtype)
        array = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    if not fits or tuple(tensor.shape) != kind.shape:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise CheckpointError(f"is {found}, declared {kind}", where=name)
    raw: NDArray[np.uint8] = array.reshape(-1).view(np.uint8)
    return raw.data
