"""`infc.ray.app`: an artifact as an application of Ray Serve."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ir.artifact import Artifact, open_artifact
from ...ir.errors import UsageError
from ...ir.extras import RAY, missing_library
from ...ir.manifest import MAIN
from ...ir.nearest import did_you_mean
from ...runtime.executors.base import HOST
from ...runtime.limits import memory_kind
from ...runtime.options import RuntimeOptions, check_types
from ...runtime.replicas.routing import policy_of
from ...runtime.server.settings import ServerSettings, recommended_defaults

if TYPE_CHECKING:
    from ray.serve import Application

_PURPOSE = "serving on Ray"
_QUEUED = 4  # requests that wait in each engine, so that it never waits for a front
_RUNTIME = {each.name for each in fields(RuntimeOptions)} - {"max_waiting"}
_SERVER = {each.name for each in fields(ServerSettings)} - {"model_names"}
_TEXTS = {"artifact", "model_name", "api_key", "kv_memory", "routing", "weights", "log_format"}
_NO_LIMIT = 2**31 - 1  # Ray counts who waits


def app(
    artifact: str | os.PathLike[str],
    *,
    num_replicas: int | None = None,
    autoscaling: Mapping[str, Any] | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    actor_options: Mapping[str, Any] | None = None,
    num_fronts: int = 1,
    front_cpus: float = 0,
    routing: str = "prefix",
    model_name: str | None = None,
    **options: Any,
) -> Application:
    """An application for `serve.run`: the routes of `infc serve` over engines in actors.

    `num_replicas` engines (1 by default), or as many as `autoscaling` (Ray's `autoscaling_config`)
    decides by the number of requests, have `num_cpus` and `num_gpus` each, and whatever else
    `actor_options` (Ray's `ray_actor_options`) asks for. `num_fronts` processes speak HTTP.
    `options` are those of an engine (`threads`, `kv_memory`, `max_context`, ...), and settings of
    the server by the names of `infc serve` (`api_key`, `max_queue`, `hang_seconds`, ...). The
    artifact has to be at the same path on all nodes.

    Raises UsageError, ArtifactError, and ToolchainError without the extra `ray`.
    """
    RAY.require(_PURPOSE)
    runtime = {name: value for name, value in options.items() if name in _RUNTIME}
    settings = {name: value for name, value in options.items() if name in _SERVER}
    for name in options.keys() - _RUNTIME - _SERVER:
        raise UsageError(
            f"infc.ray.app has no option {name!r}", hint=did_you_mean(name, _RUNTIME | _SERVER)
        )
    policy_of(routing)
    _check_counts(
        num_replicas, num_fronts, num_cpus=num_cpus, num_gpus=num_gpus, front_cpus=front_cpus
    )
    opened = open_artifact(artifact, "none", weights="later")
    manifest = opened.manifest
    is_host = memory_kind(manifest) == HOST
    if not is_host and not num_gpus:
        raise UsageError(
            "this artifact is for a GPU, and replicas would have none",
            where=str(artifact),
            hint="give num_gpus=1",
        )
    most = manifest.program(MAIN).limits.max_sequences
    if isinstance(wanted := runtime.get("max_sequences"), int):
        most = min(most, wanted)
    scaling = None if autoscaling is None else _autoscaling(autoscaling, num_replicas, most)
    count = 1 if num_replicas is None and scaling is None else num_replicas
    files = manifest.tokenizer
    recommended = recommended_defaults(files.generation if files else None)
    name = model_name or Path(opened.path).resolve().name.removesuffix(".infc")
    chosen = ServerSettings(model_names=(name,), **{**recommended, **settings})
    deployments = _deployments()
    application: Application = deployments.application(
        deployments.Wanted(
            path=str(opened.path.resolve()),
            identity=opened.identity,
            vocab_size=manifest.model.vocab_size,
            options=_engine_options(runtime, opened, num_cpus, several=count != 1),
            settings=chosen,
            routing=routing,
            max_ongoing=most + _QUEUED,
            num_replicas=count,
            autoscaling=scaling,
            actor_options={**(actor_options or {}), "num_cpus": num_cpus, "num_gpus": num_gpus},
            num_fronts=num_fronts,
            front_cpus=front_cpus,
        )
    )
    return application


def build(args: dict[str, Any]) -> Application:
    """The same from a configuration file: `import_path: infc.ray:build`, and `args` as of `app`.

    Values may be texts, as `serve run infc.ray:build artifact=... num_replicas=2` gives them.
    """
    values = {name: value if name in _TEXTS else _read(value) for name, value in args.items()}
    artifact = values.pop("artifact", None)
    if not isinstance(artifact, str):
        raise UsageError(
            "the application has no artifact", hint="give args: {artifact: /path/to/model.infc}"
        )
    return app(artifact, **values)


def _read(value: Any) -> Any:
    """A number or a switch that was given as text."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _check_counts(num_replicas: object, num_fronts: object, **amounts: object) -> None:
    """Raises UsageError for what is no number of processes, or of what they get."""
    for name, count in (("num_replicas", num_replicas), ("num_fronts", num_fronts)):
        if count is not None and (type(count) is not int or count < 1):
            raise UsageError(f"{name} is {count!r}", hint="use an integer of at least 1")
    for name, amount in amounts.items():
        if type(amount) not in (int, float) or not 0 <= float(str(amount)) < float("inf"):
            raise UsageError(f"{name} is {amount!r}", hint="use a number of at least 0")


def _autoscaling(wanted: Mapping[str, Any], num_replicas: int | None, most: int) -> dict[str, Any]:
    """Ray's configuration, checked. By default, more requests than run at once add an engine."""
    if num_replicas is not None:
        raise UsageError(
            "num_replicas and autoscaling cannot be combined",
            hint="give min_replicas and max_replicas in autoscaling",
        )
    import pydantic
    from ray.serve.config import AutoscalingConfig

    known = set(AutoscalingConfig.model_fields)
    for name in wanted.keys() - known:
        raise UsageError(f"autoscaling has no key {name!r}", hint=did_you_mean(name, known))
    values = {"target_ongoing_requests": most, **wanted}
    try:
        AutoscalingConfig(**values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["autoscaling", *map(str, first["loc"])])
        raise UsageError(f"{place}: {first['msg']}") from None
    return values


def _engine_options(
    runtime: dict[str, Any], artifact: Artifact, num_cpus: float, *, several: bool
) -> dict[str, Any]:
    """The options of each engine: the threads that Ray gives it, and weights that all share."""
    options = {**runtime, "max_waiting": _NO_LIMIT}
    if memory_kind(artifact.manifest) == HOST:
        if options.get("threads") is None and num_cpus >= 1:
            options["threads"] = int(num_cpus)
        if several and options.get("weights") is None and artifact.weights_are_ours():
            options["weights"] = "mapped"
    check_types(RuntimeOptions(**options))
    return options


def _deployments() -> Any:
    """Everything that needs Ray Serve; raises ToolchainError where a part of it is missing."""
    try:
        return importlib.import_module(".deployments", __package__)
    except ModuleNotFoundError as error:
        raise missing_library(error.name or "ray", _PURPOSE, RAY) from None
