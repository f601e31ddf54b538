"""Text that a command is given: a prompt, or a file, which may be a pipe without an end."""

from __future__ import annotations

import codecs
import sys
from contextlib import nullcontext

from ..ir.errors import UsageError

_MAX_FILE_BYTES = 1 << 28


def read_prompt(prompt: str | None, file: str | None = None) -> str:
    """The prompt from the argument, a file, or stdin (if it is `-` or missing).

    UsageError if there is no prompt, if there are two, or if it is not UTF-8 text.
    """
    if file is not None:
        if prompt is not None:
            raise UsageError("there are two prompts", hint="pass either PROMPT or --file")
        return read_file(file)
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise UsageError("no prompt", hint="pass one, pipe one in, or use `infc chat`")
    return read_file("-")


def read_file(file: str, max_bytes: int | None = None) -> str:
    """The contents of a text file, or its first `max_bytes` without a partial last character.

    `-` is stdin. UsageError if it cannot be read, is not UTF-8 text, or holds more than 256 MiB.
    """
    where = "<stdin>" if file == "-" else file
    try:
        with nullcontext(sys.stdin.buffer) if file == "-" else open(file, "rb") as opened:
            # One byte more tells whether the file ends there. A device may have no end.
            data = opened.read((_MAX_FILE_BYTES if max_bytes is None else max_bytes) + 1)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=where) from None
    if max_bytes is None and len(data) > _MAX_FILE_BYTES:
        raise UsageError(f"larger than {_MAX_FILE_BYTES >> 20} MiB", where=where)
    part = data[:max_bytes]
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(part, final=len(part) == len(data))
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 text (byte {error.start})", where=where) from None
