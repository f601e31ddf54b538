"""Frames: however the bytes arrive, the same payloads; nothing beyond the limit is kept."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.runtime.replicas import frames
from infc.runtime.replicas.frames import FrameError, FrameReader, framed


@given(st.lists(st.binary(max_size=50)), st.data())
def test_payloads_survive_any_cut(payloads: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(framed, payloads))
    reader, found = FrameReader(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += reader.feed(stream[:size])
        stream = stream[size:]
    assert found == payloads
    assert reader.is_between


def test_a_truncated_frame_is_no_payload() -> None:
    reader = FrameReader()
    assert reader.feed(framed(b"whole") + framed(b"not whole")[:-1]) == [b"whole"]
    assert not reader.is_between


@pytest.mark.parametrize("begun", [b"", framed(b"before")])
def test_an_oversized_frame_is_refused_before_it_has_arrived(begun: bytes) -> None:
    reader = FrameReader(max_bytes=100)
    assert reader.feed(framed(bytes(100))) == [bytes(100)]
    with pytest.raises(FrameError, match="beyond the limit"):
        reader.feed(begun + struct.pack("<I", 101))


def test_an_oversized_payload_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 10)
    assert framed(bytes(10))
    with pytest.raises(FrameError, match="exceeds the limit"):
        framed(bytes(11))
