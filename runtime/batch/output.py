"""The output file: whole lines in the order of the input, continued where it was cut off."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ...ir.errors import UsageError
from ...ir.files import sync
from .bodies import BodyAnswer
from .rows import RowError

_BEGIN_BYTES = 1 << 13  # of a line, which hold all that stands in front of a body
_PIECE_BYTES = 1 << 20
_SYNC_SECONDS = 1.0


def line_begin(name: str) -> bytes:
    """What the line of a row begins with."""
    return f'{{"id":"batch_req_{name}",'.encode()


def answer_line(name: str, custom_id: str, answer: BodyAnswer) -> bytes:
    """The line of a row that was a request, refused or not."""
    begin = f'"custom_id":{json.dumps(custom_id)},"response":{{"status_code":{answer.status},'
    request = f'"request_id":"req_{name}","body":'
    parts = (line_begin(name), begin.encode(), request.encode(), answer.body)
    return b"".join((*parts, b'},"error":null}\n'))


def error_line(name: str, error: RowError) -> bytes:
    """The line of a row that was none."""
    fields = {
        "custom_id": error.custom_id,
        "response": None,
        "error": {"code": error.code, "message": error.message},
    }
    rest = json.dumps(fields, separators=(",", ":"))[1:]
    return line_begin(name) + rest.encode() + b"\n"


@dataclass(frozen=True, slots=True)
class WrittenLine:
    """A line that is there: how it begins, and where it ends; `whole` unless it was cut off."""

    begin: bytes
    end: int
    whole: bool

    @property
    def has_answer(self) -> bool:
        """Whether the row was answered, neither refused nor wrong."""
        # In a string, quotes are escaped: this cannot stand in a `custom_id`.
        return b'"response":{"status_code":200,' in self.begin

    def is_of(self, name: str) -> bool:
        """Whether it is the line of a row, or what is left of it."""
        expected = line_begin(name)
        if self.whole:
            return self.begin.startswith(expected)
        # After a power cut, the end may be zeros.
        begin = self.begin.rstrip(b"\0")[: len(expected)]
        return expected.startswith(begin)


class OutputFile:
    """A file that one process at a time continues. A context manager.

    Raises UsageError where it cannot be written, or another process has it.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():  # a pipe or a device has no end to go on from
            raise UsageError("is not a regular file", where=str(path), hint="choose another output")
        self.path = path
        self._synced = time.monotonic()
        try:
            self._file = open(  # noqa: SIM115 - closed by __exit__
                os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0
            )
        except OSError as error:
            raise _not_writable(path, error) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sync(path.absolute().parent)
        except BlockingIOError:
            self._file.close()
            raise UsageError(
                "another process is writing this file", where=str(path), hint="wait until it ends"
            ) from None
        except OSError as error:
            self._file.close()
            raise _not_writable(path, error) from None

    def written(self) -> Iterator[WrittenLine]:
        """The lines that are there."""
        end = 0
        with open(self._file.fileno(), "rb", closefd=False) as file:
            file.seek(0)
            while begin := file.readline(_BEGIN_BYTES):
                end += len(begin)
                last = begin
                while not last.endswith(b"\n") and (rest := file.readline(_PIECE_BYTES)):
                    end += len(rest)
                    last = rest
                yield WrittenLine(begin, end, last.endswith(b"\n"))

    def cut(self, end: int) -> None:
        """Drop what is behind `end`, where the next line is written."""
        with self._explained():
            self._file.truncate(end)
            self._file.seek(end)

    def append(self, line: bytes) -> None:
        """Write a line; about every second, wait until all are on the disk."""
        with self._explained():
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
            if time.monotonic() - self._synced >= _SYNC_SECONDS:
                self.sync()

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        with self._explained():
            os.fdatasync(self._file.fileno())
        self._synced = time.monotonic()

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _not_writable(self.path, error) from None


def _not_writable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot be written: {error.strerror or error}", where=str(path))
