"""From an artifact to a front with engines: planned, and started together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...ir.artifact import Artifact
from ...ir.errors import UsageError
from ..executors.base import HOST
from ..log import LogFormat
from ..memory_plan import BROKER, MemoryUse
from ..options import RuntimeOptions
from ..scheduling.kv_groups import common_block_size
from ..text.tokenizer import Tokenizer
from .child import Start, start_engine
from .config import FrontConfig
from .front import Front
from .messages import VERSION, Open, options_as_data
from .process_memory import ProcessMemory
from .routing import Policy, policy_of
from .sizing import MAX_REPLICAS, ReplicaSizes, size_replicas, too_many_threads

_QUEUED = 4  # completions that wait in each engine, so that it never waits for the front
_NO_LIMIT = 2**31 - 1  # the front counts who waits


def open_front(
    artifact: Artifact,
    options: RuntimeOptions,
    count: int,
    *,
    policy: str = "prefix",
    hung_seconds: float = 60.0,
    log_format: LogFormat = "text",
    on_note: Callable[[str], None] = lambda note: None,
    start: Start = start_engine,
) -> Front:
    """Starts `count` engines, and returns at once: `Front.wait_until_open` waits for them.

    Raises UsageError for more than one process watches, and what planning raises, before anything
    is started.
    """
    if not 1 <= count <= MAX_REPLICAS:
        raise UsageError(f"{count} engine processes are outside 1..{MAX_REPLICAS}")
    chosen = policy_of(policy)
    with BROKER.opening():  # others plan with what these will take, also before they touch it
        sizes = size_replicas(artifact, options, count)
        lease = BROKER.lease({HOST: MemoryUse(kv=sizes.host_bytes)})
    try:
        for note in (*sizes.plan.notes, sizes.text, too_many_threads(count)):
            if note is not None:
                on_note(note)
        front = Front(
            FrontConfig(
                orders=_orders(artifact, sizes, chosen, log_format),
                vocab_size=artifact.manifest.model.vocab_size,
                max_context=sizes.plan.limits.max_context,
                max_waiting=options.max_waiting,
                most_sequences=sizes.plan.limits.max_running + _QUEUED,
                block_size=common_block_size(sizes.plan.groups),
                tokenizer=Tokenizer.load(artifact),
                policy=chosen,
                hung_seconds=hung_seconds,
                start=start,
                lease=lease,
            )
        )
    except BaseException:
        lease.end()
        raise
    lease.watch(ProcessMemory(lambda: [each.pid for each in front.replicas()]))
    return front


def _orders(
    artifact: Artifact, sizes: ReplicaSizes, policy: Policy, log_format: LogFormat
) -> list[Open]:
    """What each engine is asked to open."""
    return [
        Open(
            VERSION,
            str(artifact.path.resolve()),
            artifact.identity,
            options_as_data(replace(each, max_waiting=_NO_LIMIT)),
            cpus,
            policy.needs_blocks,
            log_format,
        )
        for each, cpus in zip(sizes.options, sizes.cpus, strict=True)
    ]
