"""`serve`: from an artifact to a listening server, and down again without cutting anyone off."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ir.artifact import Verification, open_artifact
from ..sampling_params import ignored_recommendations
from .listener import open_listener

if TYPE_CHECKING:
    from ...ir.manifest import TokenizerFiles
    from ..limits import RuntimeOptions


def serve(
    artifact_path: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    model_name: str | None = None,
    options: RuntimeOptions | None = None,
    verify: Verification = "stamp",
    **settings: Any,
) -> None:
    """Serves an artifact until SIGTERM, which lets running answers end; a second one does not.

    `port` 0 takes any free one; `model_name` is by default the artifact's own name; `settings`
    are fields of `ServerSettings`. Prints one line once requests are answered. Raises
    ArtifactError, TargetError, CapacityError, UsageError for an address that cannot be taken,
    and KeyboardInterrupt after SIGINT.
    """
    listener = open_listener(host, port, has_key=settings.get("api_key") is not None)
    try:
        # The weights are read by threads of their own while this one imports and maps.
        artifact = open_artifact(artifact_path, verify, weights="later")
        weights = artifact.verify_weights()
        from ..async_engine import AsyncEngine
        from ..engine import Engine
        from .app import create_app
        from .process import run_server
        from .settings import ServerSettings, recommended_defaults

        engine = Engine.open(artifact, options, verify=verify)
        files = artifact.manifest.tokenizer
        for note in (*engine.plan.notes, *_notes_on(files)):
            print(f"note: {note}", file=sys.stderr, flush=True)
        chosen = ServerSettings(
            model_name=model_name or _name_of(artifact.path),
            **{**recommended_defaults(files.generation if files else None), **settings},
        )
        weights.result()
        async_engine = AsyncEngine(engine)
        try:
            app = create_app(async_engine, engine.tokenizer, chosen)
            interrupted = run_server(app, listener, async_engine, chosen)
        finally:
            async_engine.shutdown(timeout_seconds=5.0)
    finally:
        listener.close()
    if interrupted:
        raise KeyboardInterrupt


def _notes_on(files: TokenizerFiles | None) -> list[str]:
    if files is None:
        return ["no tokenizer: prompts are token ids, and so are answers, in `token_ids`"]
    return [
        f"the checkpoint recommends {name} {value:g}: not built, ignored"
        for name, value in ignored_recommendations(files.generation).items()
    ]


def _name_of(path: Path) -> str:
    return path.resolve().name.removesuffix(".infc")
