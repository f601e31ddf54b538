"""Safetensors files: ours are read by the library and back, damaged ones are refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from infc.ir.errors import CheckpointError
from infc.ir.safetensors import ALIGNMENT, MappedSafetensors, write_safetensors
from infc.ir.torch_types import from_torch, to_torch
from infc.ir.types import DType, TensorType

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
KINDS = st.lists(st.tuples(st.sampled_from(list(DType)), SHAPES), max_size=6)


def fill(kind: TensorType) -> torch.Tensor:
    return torch.randint(0, 2, [int(str(d)) for d in kind.shape]).to(to_torch(kind.dtype))


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    kinds = [(n, TensorType(from_torch(t.dtype), tuple(t.shape))) for n, t in tensors.items()]
    write_safetensors(path, kinds, tensors.__getitem__, {"made_by": "a test"})


@settings(max_examples=50)
@given(KINDS)
def test_what_is_written_is_read(tmp_path_factory: Any, kinds: list[Any]) -> None:
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    tensors = {f"t{i}": fill(TensorType(*kind)) for i, kind in enumerate(kinds)}
    write(path, tensors)
    mapped = MappedSafetensors(path)
    library = load_file(path)
    assert mapped.names() == list(tensors)
    assert mapped.metadata == {"made_by": "a test"}
    for name, tensor in tensors.items():
        assert torch.equal(mapped.tensor(name), tensor)
        assert torch.equal(library[name], tensor)
        assert mapped.array(name).shape == tensor.shape
        if tensor.numel():
            assert mapped.address(name) % ALIGNMENT == 0
    mapped.close()


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 3), "b": torch.randn(5).bfloat16()}
    write(tmp_path / "x", tensors)
    write(tmp_path / "y", tensors)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_files_of_the_library_are_read_wherever_their_tensors_lie(tmp_path: Path) -> None:
    tensors = {"odd": torch.tensor([1, 2, 3], dtype=torch.int8), "f": torch.randn(3)}
    tensors |= {"h": torch.randn(5).bfloat16(), "d": torch.randn(2).double()}
    save_file(tensors, tmp_path / "x.safetensors")
    mapped = MappedSafetensors(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(mapped.tensor(name), tensor)
    bits = mapped.array("h")
    assert bits.dtype == np.uint16
    assert torch.equal(torch.from_numpy(bits.copy()).view(torch.bfloat16), tensors["h"])
    with pytest.raises(ValueError, match="read-only"):
        bits[0] = 1


def test_a_tensor_is_checked_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x"
    kinds = [("a", TensorType(DType.F32, (2,)))]
    for wrong in (torch.zeros(3), torch.zeros(2).half(), np.zeros(2), np.zeros(3, np.float32)):
        with pytest.raises(CheckpointError, match=r"a: is .*, declared f32\[2\]"):
            write_safetensors(path, kinds, lambda name, wrong=wrong: wrong)  # type: ignore[misc]
        assert not path.exists()
    write_safetensors(path, kinds, lambda name: np.array([1, 2], np.float32))
    assert MappedSafetensors(path).tensor("a").tolist() == [1, 2]
    with pytest.raises(CheckpointError, match="name"):
        write_safetensors(path, [("__pad.0", kinds[0][1])], lambda name: torch.zeros(2))


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), place: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": place}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "truncated"),
        (b"\x05\0\0\0\0\0\0\0{}", "truncated"),
        (b"\xff" * 16, "truncated"),
        (raw(b"{oops}"), "not JSON"),
        (raw(b"\xff\xfe"), "not JSON"),
        (raw([1]), "not an object"),
        (raw({"a": 3}), "a: has a header entry"),
        (raw({"a": entry()}, b"\0" * 7), "a: ends at byte 8 of 7: file truncated"),
        (raw({"a": entry()}, b"\0" * 9), "1 bytes after"),
        (raw({"a": entry(place=(4, 12))}, b"\0" * 12), "a: leaves a gap"),
        (raw({"a": entry(), "b": entry(place=(4, 12))}, b"\0" * 12), "b: overlaps"),
        (raw({"a": entry(shape=(3,))}, b"\0" * 8), r"a: holds 8 bytes, F32 \[3\] needs 12"),
        (raw({"a": entry(dtype="Q4")}, b"\0" * 8), "a: has the unknown element type 'Q4'"),
        (raw({"a": entry(shape=(-2,))}, b"\0" * 8), "a: has the malformed shape"),
        (raw({"a": entry(shape=(True, 2))}, b"\0" * 8), "a: has the malformed shape"),
        (raw({"a": entry(place=(8, 0))}, b"\0" * 8), "a: holds -8 bytes"),
        (raw({"a": entry(place="all")}, b"\0" * 8), "a: has malformed offsets"),
        (
            raw(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8),
            "a: occurs twice",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=match) as caught:
        MappedSafetensors(path)
    assert str(path) in str(caught.value)


@given(st.data())
def test_any_damage_to_the_header_is_refused_or_harmless(
    tmp_path_factory: Any, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    write(path, {"a": torch.ones(3), "b": torch.ones(2, 2).half()})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        mapped = MappedSafetensors(path)
        shapes = [mapped.tensor(name).shape for name in mapped.names()]
    except CheckpointError:
        shapes = []
    assert all(len(shape) <= 4 for shape in shapes)


def test_missing_files_and_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        MappedSafetensors(tmp_path / "none")
    write(tmp_path / "x", {"a": torch.ones(1)})
    mapped = MappedSafetensors(tmp_path / "x")
    with pytest.raises(CheckpointError, match="x: b: is not in the file"):
        mapped.tensor("b")
    mapped.close()
    with pytest.raises(CheckpointError, match="closed"):
        mapped.array("a")


def test_what_was_read_does_not_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infc.ir.safetensors._MAX_TOUCHED_BYTES", 3 << 20)
    path = tmp_path / "x.safetensors"
    tensors = {f"t{i}": torch.full((1 << 20,), i, dtype=torch.uint8) for i in range(12)}
    write(path, tensors)
    with_views = MappedSafetensors(path, give_back=True)
    views = []
    most = 0
    for name, expected in tensors.items():
        views.append(with_views.tensor(name))
        assert torch.equal(views[-1], expected)
        most = max(most, mapped_bytes(path))
    assert (1 << 20) <= most <= (5 << 20)
    # What was given back is read again where somebody still looks at it.
    assert all(torch.equal(view, tensors[f"t{i}"]) for i, view in enumerate(views))


def mapped_bytes(path: Path) -> int:
    """Bytes of a mapped file that count as memory of this process."""
    regions = Path("/proc/self/smaps").read_text().split(f"{path}\n")[1:]
    return sum(int(region.split("Rss:")[1].split()[0]) for region in regions) * 1024


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a": torch.tensor([1.0, 2.0])})
    code = (
        "import sys, infc.ir.text, infc.ir.verify, infc.ir.weights, infc.ir.interpret\n"
        "from infc.ir.safetensors import MappedSafetensors\n"
        "print(MappedSafetensors(sys.argv[1]).array('a').tolist(), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[1.0, 2.0] False"
