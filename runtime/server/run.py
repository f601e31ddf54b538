"""`serve`: from an artifact to a listening server, and down again without cutting anyone off."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ir.artifact import Artifact, Verification, open_artifact
from ..log import ServerLog
from ..log_writer import LOG_WRITER
from ..options import RuntimeOptions
from ..sampling.sampling_params import notes_on_ignored
from .certificate import read_certificate
from .hangups import Hangups
from .listener import open_listener
from .opening import END_SECONDS, model_name_of, open_served
from .settings import ServerSettings, recommended_defaults

if TYPE_CHECKING:
    from ...ir.manifest import TokenizerFiles
    from .metrics import ServerMetrics
    from .replacement import Served

_LAST_LINES_SECONDS = 1.0  # for whoever reads them


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
    processes of their own, among which `routing` chooses; then SIGHUP replaces the artifact by the
    one that is at the path by that time. Prints one line once requests are answered. Raises
    ArtifactError, TargetError, CapacityError, and UsageError for a setting out of range or an
    address that cannot be taken. Whether it was SIGINT that ended it.
    """
    names = (model_name,) if isinstance(model_name, str) else tuple(model_name or ())
    path = Path(artifact_path)
    chosen = ServerSettings(model_names=names or (model_name_of(path),), **settings)
    log = ServerLog(chosen.log_format)
    log.take_over()
    order = _Order(
        path=path,
        has_names=bool(names),
        given=frozenset(settings),
        settings=chosen,
        options=replace(options or RuntimeOptions(), max_waiting=chosen.max_queue),
        verify=verify,
        replicas=replicas,
        routing=routing,
        log=log,
    )
    listener = open_listener(host, port, has_key=chosen.api_key is not None, log=log)
    try:
        # The weights are read by threads of their own while this one imports and maps.
        artifact = open_artifact(path, verify, weights="later")
        hangups = Hangups()
        with contextlib.ExitStack() as ending:
            if replicas:  # somebody may ask for another artifact while this one is opened
                ending.enter_context(hangups.remembered())
            served = _open(order, artifact, ending)
            from .process import run_server
            from .replacement import Replaceable

            chosen, engine = served.settings, served.engine
            if not replicas:
                return run_server(served.app, listener, engine, chosen)
            app = Replaceable(served, lambda now: _open_next(order, now), log)
            ending.callback(app.shutdown, timeout_seconds=END_SECONDS)
            return run_server(app, listener, app, chosen, replace=app.replace, hangups=hangups)
    finally:
        listener.close()
        LOG_WRITER.flush(_LAST_LINES_SECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """How to serve, whichever artifact it is."""

    path: Path
    has_names: bool
    """Whether the names of the model were given; else they are the artifact's own."""
    given: frozenset[str]
    """The settings that the artifact has no say in."""
    settings: ServerSettings
    options: RuntimeOptions
    verify: Verification
    replicas: int
    routing: str
    log: ServerLog

    def note(self, text: str) -> None:
        """Write a note into the log."""
        self.log.event("note", f"note: {text}")


def _open(
    order: _Order,
    artifact: Artifact,
    ending: contextlib.ExitStack,
    metrics: ServerMetrics | None = None,
) -> Served:
    """Engines and application of an artifact, whose weights have been verified by then."""
    weights = artifact.verify_weights()
    engine, tokenizer, wait = open_served(
        artifact,
        order.options,
        order.replicas,
        ending,
        verify=order.verify,
        routing=order.routing,
        hung_seconds=order.settings.hang_seconds,
        log_format=order.settings.log_format,
        note=order.note,
    )
    from .app import create_app, metrics_info
    from .metrics import ServerMetrics
    from .replacement import Served

    files = artifact.manifest.tokenizer
    for note in _notes_on(files):
        order.note(note)
    found = recommended_defaults(files.generation if files else None)
    settings = {name: value for name, value in found.items() if name not in order.given}
    if not order.has_names:
        settings["model_names"] = (model_name_of(order.path),)
    chosen = replace(order.settings, **settings)
    weights.result()
    wait()
    backend = artifact.manifest.backend
    info = metrics_info(chosen, backend)
    metrics = metrics or ServerMetrics(engine, info)
    app = create_app(
        engine,
        tokenizer,
        chosen,
        backend=backend,
        certificate=read_certificate(artifact),
        metrics=metrics,
    )
    return Served(artifact.identity, info, app, engine, chosen, metrics)


def _open_next(order: _Order, now: Served) -> Served | None:
    """What is at the path now, with engines beside those there are; None if it is the same.

    It is checked as a whole before any of them starts.
    """
    order.log.event("replacing", f"opening {order.path} once more", path=str(order.path))
    verify: Verification = "full" if order.verify == "full" else "stamp"
    artifact = open_artifact(order.path, verify)
    if artifact.identity == now.identity and now.engine.healthy:
        order.note(f"not replaced: {order.path} is the artifact that is served")
        return None
    with contextlib.ExitStack() as failing:
        served = _open(order, artifact, failing, now.metrics)
        failing.pop_all()
    names = served.settings.model_names
    if names != now.settings.model_names:
        order.note(
            f"the model is called {', '.join(names)} now, after its artifact; --model-name gives it"
            " a name that stays"
        )
    return served


def _notes_on(files: TokenizerFiles | None) -> list[str]:
    if files is None:
        return ["no tokenizer: prompts are token ids, and so are answers, in `token_ids`"]
    return notes_on_ignored(files.generation)
