"""The two deployments of an application: fronts, which talk HTTP, and engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from ...runtime.server.app import create_app
from ...runtime.server.certificate import read_certificate
from ...runtime.server.settings import ServerSettings
from ...runtime.text.tokenizer import Tokenizer
from .engine import EngineReplica
from .front import RemoteEngines
from .router import PrefixRouter
from .same_artifact import open_same

ENGINE, FRONT = "Engine", "Front"
"""The names of the deployments, as `serve status` and configuration files have them."""

_HEALTH_SECONDS = 2.0
_STATS_SECONDS = 2.0
_LEAST_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """An application, checked: what `app` was asked for."""

    path: str
    identity: str
    vocab_size: int
    options: dict[str, Any]
    settings: ServerSettings
    routing: str
    max_ongoing: int
    num_replicas: int | None
    autoscaling: dict[str, Any] | None
    actor_options: dict[str, Any]
    num_fronts: int
    front_cpus: float


class _Built:
    """The ASGI application of this process, between its making and its use by Ray."""

    app: Any = None


def _built() -> Any:
    return _Built.app


@serve.deployment(name=FRONT)
@serve.ingress(_built)
class FrontReplica:
    """Speaks HTTP, makes tokens of prompts, and asks engines."""

    async def __init__(self, engines: Any, wanted: Wanted) -> None:  # type: ignore[misc]
        artifact = open_same(wanted.path, wanted.identity)  # else tokens would be of another model
        described = await engines.describe.remote()  # waits until there is an engine
        tokenizer = Tokenizer.load(artifact)
        served = RemoteEngines(
            engines,
            described,
            tokenizer,
            identity=wanted.identity,
            vocab_size=wanted.vocab_size,
            hang_seconds=wanted.settings.hang_seconds,
        )
        _Built.app = create_app(
            served,
            tokenizer,
            wanted.settings,
            backend=artifact.manifest.backend,
            certificate=read_certificate(artifact),
        )


def application(wanted: Wanted) -> serve.Application:
    """What `serve.run` takes."""
    settings = wanted.settings
    scale: dict[str, Any] = {"num_replicas": wanted.num_replicas}
    if wanted.autoscaling is not None:
        scale = {"autoscaling_config": wanted.autoscaling}
    engines = serve.deployment(
        EngineReplica,
        name=ENGINE,
        ray_actor_options=wanted.actor_options,
        max_ongoing_requests=wanted.max_ongoing,
        max_queued_requests=settings.max_queue,
        # Streams that take longer are continued by other replicas.
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=_HEALTH_SECONDS,
        health_check_timeout_s=max(_LEAST_TIMEOUT_SECONDS, settings.hang_seconds / 3),
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter,
            request_router_kwargs={"routing": wanted.routing},
            request_routing_stats_period_s=_STATS_SECONDS,
        ),
        **scale,
    ).bind(wanted.path, wanted.identity, wanted.options, settings.hang_seconds)
    front: Any = FrontReplica
    return front.options(
        num_replicas=wanted.num_fronts,
        max_ongoing_requests=settings.max_connections,
        ray_actor_options={"num_cpus": wanted.front_cpus},
        graceful_shutdown_timeout_s=settings.drain_seconds,
    ).bind(engines, wanted)
