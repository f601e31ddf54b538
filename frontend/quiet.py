"""Silence for libraries whose warnings tell a user nothing that our own errors do not."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_EXPORT_LOGGERS = ("torch.export", "torch.fx", "torch._dynamo", "torch._subclasses.fake_tensor")


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


@contextmanager
def quiet_export() -> Iterator[None]:
    """torch.export neither warns nor logs within: what goes wrong comes as an exception."""
    loggers = [logging.getLogger(name) for name in _EXPORT_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
