"""`serve`: from an artifact to a listening server, and down again without cutting anyone off."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ir.artifact import Artifact, Verification, open_artifact
from ..options import RuntimeOptions
from ..sampling.sampling_params import notes_on_ignored
from .certificate import read_certificate
from .listener import open_listener
from .log import ServerLog
from .log_writer import LOG_WRITER
from .served import ServedEngine
from .settings import ServerSettings, recommended_defaults

if TYPE_CHECKING:
    from ...ir.manifest import TokenizerFiles
    from ..text.tokenizer import Tokenizer

_LAST_LINES_SECONDS = 1.0  # for whoever reads them
_END_SECONDS = 5.0


def serve(
    artifact_path: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    model_name: str | Sequence[str] | None = None,
    options: RuntimeOptions | None = None,
    verify: Verification = "stamp",
    replicas: int = 0,
    routing: str = "prefix",
    **settings: Any,
) -> bool:
    """Serves an artifact until a signal, which lets running answers end; a second one does not.

    `port` 0 takes any free one; `model_name`, one or several, is by default the artifact's own;
    `settings` are fields of `ServerSettings`. The engine runs in this process, or in `replicas`
    processes of their own, among which `routing` chooses. Prints one line once requests are
    answered. Raises ArtifactError, TargetError, CapacityError, and UsageError for a setting out of
    range or an address that cannot be taken. Whether it was SIGINT that ended it.
    """
    names = (model_name,) if isinstance(model_name, str) else tuple(model_name or ())
    chosen = ServerSettings(model_names=names or (_name_of(Path(artifact_path)),), **settings)
    log = ServerLog(chosen.log_format)
    log.take_over()
    listener = open_listener(host, port, has_key=chosen.api_key is not None, log=log)
    try:
        # The weights are read by threads of their own while this one imports and maps.
        artifact = open_artifact(artifact_path, verify, weights="later")
        weights = artifact.verify_weights()
        options = replace(options or RuntimeOptions(), max_waiting=chosen.max_queue)
        notes = _Notes(log)
        with contextlib.ExitStack() as ending:
            if replicas:
                opened = _open_front(artifact, options, replicas, routing, chosen, notes, ending)
            else:
                opened = _open_engine(artifact, options, verify, notes, ending)
            from .app import create_app
            from .process import run_server

            engine, tokenizer, wait = opened
            files = artifact.manifest.tokenizer
            for note in _notes_on(files):
                notes(note)
            recommended = recommended_defaults(files.generation if files else None)
            chosen = replace(chosen, **{k: v for k, v in recommended.items() if k not in settings})
            weights.result()
            wait()
            app = create_app(
                engine,
                tokenizer,
                chosen,
                backend=artifact.manifest.backend,
                certificate=read_certificate(artifact),
            )
            return run_server(app, listener, engine, chosen)
    finally:
        listener.close()
        LOG_WRITER.flush(_LAST_LINES_SECONDS)


class _Notes:
    """Writes notes into the log."""

    def __init__(self, log: ServerLog) -> None:
        self._log = log

    def __call__(self, note: str) -> None:
        self._log.event("note", f"note: {note}")


_Opened = tuple[ServedEngine, "Tokenizer | None", Callable[[], None]]
"""An engine, its tokenizer, and what waits until it is ready."""


def _open_engine(
    artifact: Artifact,
    options: RuntimeOptions,
    verify: Verification,
    note: Callable[[str], None],
    ending: contextlib.ExitStack,
) -> _Opened:
    """In this process."""
    from ..async_engine import AsyncEngine
    from ..engine import Engine

    engine = Engine.open(artifact, options, verify=verify)
    for each in engine.plan.notes:
        note(each)
    served = AsyncEngine(engine)
    ending.callback(served.shutdown, timeout_seconds=_END_SECONDS)
    return served, engine.tokenizer, lambda: None


def _open_front(
    artifact: Artifact,
    options: RuntimeOptions,
    count: int,
    routing: str,
    settings: ServerSettings,
    note: Callable[[str], None],
    ending: contextlib.ExitStack,
) -> _Opened:
    """In processes of their own, which start while this one imports what serves."""
    from ..replicas.opening import open_front

    front = open_front(
        artifact,
        options,
        count,
        policy=routing,
        hung_seconds=settings.hang_seconds,
        on_note=note,
    )
    ending.callback(front.shutdown, timeout_seconds=_END_SECONDS)
    return front, front.tokenizer, front.wait_until_open


def _notes_on(files: TokenizerFiles | None) -> list[str]:
    if files is None:
        return ["no tokenizer: prompts are token ids, and so are answers, in `token_ids`"]
    return notes_on_ignored(files.generation)


def _name_of(path: Path) -> str:
    return path.resolve().name.removesuffix(".infc")
