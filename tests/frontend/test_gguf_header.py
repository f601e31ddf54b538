"""Files that are cut off, or state what cannot be, are refused with the place and at once."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.frontend.sources.gguf.header import Value
from infc.frontend.sources.gguf.tensors import GgufTensors
from infc.frontend.sources.open import open_source
from infc.ir.errors import CheckpointError

from ..gguf_files import make_gguf


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<{len(shape)}Q", *shape[::-1])
    return text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def file(
    *,
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: int = 0,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file of these parts; `counts` are what it says of tensors and keys."""
    stated = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, *stated) + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + b"\0" * data


def array(kind: int, length: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + data


HUGE = 1 << 60
BAD = {
    "empty": (b"", "is empty"),
    "not gguf": (b"PK\x03\x04" + bytes(100), "this is not a GGUF file"),
    "cut magic": (b"GG", "this is not a GGUF file"),
    "cut counts": (b"GGUF" + struct.pack("<I", 3), "the header: needs 8 bytes, and 0 are left"),
    "old version": (file(version=1), "is of version 1, which is not supported"),
    "big-endian": (file(version=3 << 24), "is of a big-endian machine"),
    "many tensors": (file(counts=(HUGE, 0)), "promises 0 keys and 1152921504606846976 tensors"),
    "many keys": (file(counts=(0, HUGE)), "promises 1152921504606846976 keys and 0 tensors"),
    "long key": (
        file(pairs=(struct.pack("<QI", HUGE, 4) + bytes(20),)),
        "key 1 of 1: needs 1152921504606846976 bytes",
    ),
    "key of bytes": (
        file(pairs=(struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1),)),
        "key 1 of 1: has the name .* which is not UTF-8",
    ),
    "unknown type": (file(pairs=(pair("a.b", 77, bytes(8)),)), "a.b: is of the unknown type 77"),
    "twice": (file(pairs=(pair("a", 4, bytes(4)),) * 2), "a: occurs twice in the metadata"),
    "long text": (
        file(pairs=(pair("a", 8, struct.pack("<Q", HUGE)),)),
        "a: needs 1152921504606846976 bytes",
    ),
    "long array": (file(pairs=(pair("a", 9, array(5, HUGE)),)), "a: needs 4611686018427387904 b"),
    "array of bytes": (file(pairs=(pair("a", 9, array(0, HUGE)),)), "a: needs 1152921504606846976"),
    "many texts": (file(pairs=(pair("a", 9, array(8, HUGE)),)), "a: has 1152921504606846976 texts"),
    "array of arrays": (
        file(pairs=(pair("a", 9, array(9, 1, array(0, 1, b"x"))),)),
        "a: is an array of the unknown type 9",
    ),
    "alignment-flag": (
        file(pairs=(pair("general.alignment", 7, b"\x01"),)),
        "general.alignment: is True, expected a power of two",
    ),
    "alignment": (
        file(pairs=(pair("general.alignment", 4, struct.pack("<I", 24)),)),
        "general.alignment: is 24, expected a power of two",
    ),
    "no dimensions": (
        file(tensors=(tensor("x", ()) + bytes(8),)),
        "tensor x: has 0 dimensions, expected 1 to 4",
    ),
    "many dimensions": (
        file(tensors=(text("x") + struct.pack("<I", 1 << 31) + bytes(40),)),
        "tensor x: has 2147483648 dimensions, expected 1 to 4",
    ),
    "unknown format": (
        file(tensors=(tensor("x", (4,), kind=99),), data=64),
        "tensor x: is of type 99, which is not known .*a newer gguf package",
    ),
    "no values": (
        file(tensors=(tensor("x", (4,), kind=26),), data=64),
        "tensor x: is stored as I32, which is not supported",
    ),
    "empty tensor": (file(tensors=(tensor("x", (4, 0)),), data=64), r"has the shape \[4, 0\], whi"),
    "huge tensor": (
        file(tensors=(tensor("x", (1 << 40, 1 << 40)),), data=64),
        "which the file cannot hold",
    ),
    "uneven rows": (
        file(tensors=(tensor("x", (2, 33), kind=8),), data=128),
        "tensor x: has rows of 33, expected a multiple of 32 for Q8_0",
    ),
    "unaligned": (
        file(tensors=(tensor("x", (4,), offset=8),), data=64),
        "tensor x: begins at 8, which is no multiple of 32",
    ),
    "overlap": (
        file(tensors=(tensor("x", (16,)), tensor("y", (4,), offset=32)), data=128),
        "tensor y: overlaps the tensor before it",
    ),
    "same name": (
        file(tensors=(tensor("x", (4,)), tensor("x", (4,), offset=32)), data=128),
        "tensor x: occurs twice",
    ),
    "cut data": (
        file(tensors=(tensor("x", (64,)),), data=128),
        r"tensor x: ends at byte \d+ of \d+: the file is truncated",
    ),
    "far away": (
        file(tensors=(tensor("x", (4,), offset=HUGE),), data=32),
        "tensor x: ends at byte",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_the_place(name: str, tmp_path: Path) -> None:
    data, message = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    started = time.process_time()
    with pytest.raises(CheckpointError, match=message) as caught:
        GgufTensors(path)
    assert str(path) in str(caught.value)
    assert time.process_time() - started < 2


def test_a_file_that_is_not_there_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone.gguf: cannot be read: No such file"):
        GgufTensors(tmp_path / "gone.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(CheckpointError, match=r"pipe.gguf: is not a regular file"):
        GgufTensors(tmp_path / "pipe.gguf")


def test_a_file_without_an_architecture(tmp_path: Path) -> None:
    path = tmp_path / "bare.gguf"
    path.write_bytes(file())
    with pytest.raises(CheckpointError, match=r"bare.gguf: general.architecture: is missing"):
        open_source(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    make_gguf("llama", path, tokenizer=True)
    return path


def test_header_is_what_the_package_reads(whole: Path) -> None:
    reader, tensors = gguf.GGUFReader(whole), GgufTensors(whole)
    fields = {key: one for key, one in reader.fields.items() if not key.startswith("GGUF.")}
    assert {key: _plain(one) for key, one in tensors.header.metadata.items()} == {
        key: one.contents() for key, one in fields.items()
    }
    assert list(tensors.types) == [one.name for one in reader.tensors]
    for one in reader.tensors:
        assert tensors.types[one.name].shape == tuple(int(size) for size in one.shape[::-1])
        assert np.array_equal(tensors.tensor(one.name).numpy(), one.data)


def _plain(value: Value) -> object:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return [one.decode() for one in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


@given(data=st.data())
def test_a_file_cut_anywhere_is_refused(data: st.DataObject, whole: Path) -> None:
    size = whole.stat().st_size
    last = max(one.end for one in GgufTensors(whole).header.entries.values())
    length = data.draw(st.integers(0, min(size, last) - 1))
    path = whole.with_name("cut.gguf")
    path.write_bytes(whole.read_bytes()[:length])
    with pytest.raises(CheckpointError):
        GgufTensors(path)


@given(
    changes=st.lists(st.tuples(st.integers(0, 11_000), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_changed_bytes_give_a_model_or_one_clear_error(
    changes: list[tuple[int, int]], whole: Path
) -> None:
    """Nothing but our own errors, whatever the header says."""
    raw = bytearray(whole.read_bytes())
    for at, value in changes:
        raw[at] = value
    path = whole.with_name("changed.gguf")
    path.write_bytes(raw)
    message = str(path)
    try:
        source = open_source(path)
        source.read_config(allow_remote_code=False, log=lambda _: None)
        source.open_weights()
        source.read_tokenizer(320)
    except CheckpointError as error:
        message = str(error)
    assert str(path) in message
