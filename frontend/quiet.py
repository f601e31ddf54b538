"""Silence for libraries whose warnings tell a user nothing that our own errors do not."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, TextIO


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers logs errors alone within; its level is put back afterwards."""
    from transformers.utils import logging as library

    verbosity = library.get_verbosity()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)


def _loggers_of(library: str) -> list[logging.Logger]:
    """A library's logger and those below it: some of torch's have a level of their own."""
    logger = logging.getLogger(library)
    known = list(logging.root.manager.loggerDict.items())
    below = [one for name, one in known if name.startswith(f"{library}.")]
    return [logger, *(one for one in below if isinstance(one, logging.Logger))]


class _OfOtherThreads:
    """A stream that takes nothing from the thread that made it, and passes on what others write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() == self._thread:
            return len(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def quiet_export() -> Iterator[None]:
    """torch.export neither warns, logs nor prints within: what goes wrong comes as an exception."""
    loggers = _loggers_of("torch")
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        quiet: Any = _OfOtherThreads(sys.stderr)  # the graph so far, of hundreds of lines
        with warnings.catch_warnings(), redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
