"""Frames on a stream socket: a length of four bytes, and so many bytes."""

from __future__ import annotations

import struct

from ...ir.errors import InfcError
from ...ir.sizes import format_size

MAX_FRAME_BYTES = 64 << 20
"""Of one frame: a longer one is refused before any of it is kept."""

_LENGTH = struct.Struct("<I")


class FrameError(InfcError):
    """Bytes that are no frames of this protocol."""


def framed(payload: bytes) -> bytes:
    """The payload as a frame. Raises FrameError for one that no reader would take."""
    if len(payload) > MAX_FRAME_BYTES:
        raise FrameError(
            f"a message of {format_size(len(payload))} exceeds the limit of"
            f" {format_size(MAX_FRAME_BYTES)}"
        )
    return _LENGTH.pack(len(payload)) + payload


class FrameReader:
    """Cuts what arrives into frames; keeps what is not whole yet."""

    __slots__ = ("_begun", "_max_bytes")

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._begun = bytearray()
        self._max_bytes = max_bytes

    @property
    def is_between(self) -> bool:
        """Whether nothing of a frame has arrived that is not whole."""
        return not self._begun

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that are whole now. Raises FrameError for a length beyond the limit."""
        begun = self._begun
        begun += data
        payloads, at = [], 0
        while len(begun) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(begun, at)
            if length > self._max_bytes:
                raise FrameError(
                    f"a frame of {format_size(length)} was announced, beyond the limit of"
                    f" {format_size(self._max_bytes)}"
                )
            end = at + _LENGTH.size + length
            if len(begun) < end:
                break
            payloads.append(bytes(begun[at + _LENGTH.size : end]))
            at = end
        del begun[:at]
        return payloads
