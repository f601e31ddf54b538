"""Opens what answers requests: an engine in this process, or several in processes of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...ir.artifact import Artifact, Verification
from ..log import LogFormat
from ..options import RuntimeOptions
from .served import ServedEngine

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

END_SECONDS = 5.0


def model_name_of(path: Path) -> str:
    """What the model of an artifact is called where nobody names it."""
    return path.resolve().name.removesuffix(".infc")


class Opened(NamedTuple):
    """An engine, its tokenizer, and what waits until it is ready."""

    engine: ServedEngine
    tokenizer: Tokenizer | None
    wait: Callable[[], None]


def open_served(
    artifact: Artifact,
    options: RuntimeOptions,
    replicas: int,
    ending: contextlib.ExitStack,
    *,
    verify: Verification = "stamp",
    routing: str = "prefix",
    hung_seconds: float = 60.0,
    log_format: LogFormat = "text",
    note: Callable[[str], None] = lambda note: None,
) -> Opened:
    """An engine that `ending` shuts down; `replicas` 0 is one in this process.

    Those in processes of their own start while this one imports what serves.
    """
    if not replicas:
        return _open_engine(artifact, options, ending, verify, note)
    from ..replicas.opening import open_front

    front = open_front(
        artifact,
        options,
        replicas,
        policy=routing,
        hung_seconds=hung_seconds,
        log_format=log_format,
        on_note=note,
    )
    ending.callback(front.shutdown, timeout_seconds=END_SECONDS)
    return Opened(front, front.tokenizer, front.wait_until_open)


def _open_engine(
    artifact: Artifact,
    options: RuntimeOptions,
    ending: contextlib.ExitStack,
    verify: Verification,
    note: Callable[[str], None],
) -> Opened:
    from ..async_engine import AsyncEngine
    from ..engine import Engine

    engine = Engine.open(artifact, options, verify=verify)
    for each in engine.plan.notes:
        note(each)
    served = AsyncEngine(engine)
    ending.callback(served.shutdown, timeout_seconds=END_SECONDS)
    return Opened(served, engine.tokenizer, lambda: None)
