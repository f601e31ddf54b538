"""`serve`: from an artifact to a listening server, and down again without cutting anyone off."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ir.artifact import Verification, open_artifact
from ..options import RuntimeOptions
from ..sampling.sampling_params import notes_on_ignored
from .certificate import read_certificate
from .listener import open_listener
from .log import ServerLog
from .log_writer import LOG_WRITER
from .settings import ServerSettings, recommended_defaults

if TYPE_CHECKING:
    from ...ir.manifest import TokenizerFiles

_LAST_LINES_SECONDS = 1.0  # for whoever reads them


def serve(
    artifact_path: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    model_name: str | Sequence[str] | None = None,
    options: RuntimeOptions | None = None,
    verify: Verification = "stamp",
    **settings: Any,
) -> bool:
    """Serves an artifact until a signal, which lets running answers end; a second one does not.

    `port` 0 takes any free one; `model_name`, one or several, is by default the artifact's own;
    `settings` are fields of `ServerSettings`. Prints one line once requests are answered. Raises
    ArtifactError, TargetError, CapacityError, and UsageError for a setting out of range or an
    address that cannot be taken. Whether it was SIGINT that ended it.
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
        from ..async_engine import AsyncEngine
        from ..engine import Engine
        from .app import create_app
        from .process import run_server

        options = replace(options or RuntimeOptions(), max_waiting=chosen.max_queue)
        engine = Engine.open(artifact, options, verify=verify)
        files = artifact.manifest.tokenizer
        for note in (*engine.plan.notes, *_notes_on(files)):
            log.event("note", f"note: {note}")
        recommended = recommended_defaults(files.generation if files else None)
        chosen = replace(chosen, **{k: v for k, v in recommended.items() if k not in settings})
        weights.result()
        async_engine = AsyncEngine(engine)
        try:
            backend = artifact.manifest.backend
            certificate = read_certificate(artifact)
            app = create_app(
                async_engine, engine.tokenizer, chosen, backend=backend, certificate=certificate
            )
            return run_server(app, listener, async_engine, chosen)
        finally:
            async_engine.shutdown(timeout_seconds=5.0)
    finally:
        listener.close()
        LOG_WRITER.flush(_LAST_LINES_SECONDS)


def _notes_on(files: TokenizerFiles | None) -> list[str]:
    if files is None:
        return ["no tokenizer: prompts are token ids, and so are answers, in `token_ids`"]
    return notes_on_ignored(files.generation)


def _name_of(path: Path) -> str:
    return path.resolve().name.removesuffix(".infc")
