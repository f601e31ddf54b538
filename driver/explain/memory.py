"""What serving an artifact takes, and how many sequences a given memory holds."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.machine import available_memory
from ...ir.manifest import Limits, Manifest
from ...ir.resources import KvGroup, Resource
from ...runtime.limits import handed_over_bytes
from ...runtime.scheduling.kv_groups import blocks_for, planned_blocks, planned_bytes
from .facts import KvGroupFacts, MemoryFacts, StoredFacts


def plan_memory(manifest: Manifest, context: int, memory: int | None = None) -> MemoryFacts:
    """The memory plan for sequences of `context` tokens in `memory` bytes (None: what is free)."""
    budget = available_memory() if memory is None else memory
    groups = group_facts(manifest.main.resources)
    weights = manifest.files[manifest.main.weights.file].bytes
    limits = manifest.main.limits
    logits = handed_over_bytes(manifest.main, limits.step_tokens)
    left = budget - weights - manifest.main.arena_bytes - logits
    most = min(limits.max_sequences, limits.logit_rows, limits.step_tokens)
    batch = _largest_batch(manifest.main.resources, limits, context, left, most)
    return MemoryFacts(
        weights_bytes=weights,
        arena_bytes=manifest.main.arena_bytes,
        logits_bytes=logits,
        groups=groups,
        kv_token_bytes=sum(group.token_bytes for group in groups),
        budget=budget,
        context=context,
        largest_batch=batch,
        batch_kv_bytes=kv_bytes(manifest.main.resources, limits.step_tokens, context, batch),
        max_batch=most,
    )


def group_facts(groups: Sequence[Resource]) -> tuple[KvGroupFacts | StoredFacts, ...]:
    """What each group takes."""
    return tuple(map(_group, groups))


def _group(group: Resource) -> KvGroupFacts | StoredFacts:
    block = group.bytes_per_block()
    if not isinstance(group, KvGroup):
        return StoredFacts(
            name=group.name,
            kind=group.kind,
            layers=group.layers,
            dtype=group.dtype,
            block_size=group.block_size,
            token_bytes=block // group.block_size,
            block_bytes=block,
        )
    return KvGroupFacts(
        name=group.name,
        layers=group.layers,
        num_kv_heads=group.num_kv_heads,
        key_head_dim=group.key_head_dim,
        value_head_dim=group.value_head_dim,
        dtype=group.dtype,
        window=group.window,
        block_size=group.block_size,
        token_bytes=block // group.block_size,
        block_bytes=block,
    )


def _largest_batch(
    groups: Sequence[Resource], limits: Limits, context: int, budget: int, most: int
) -> int:
    for batch in range(most, 0, -1):
        if kv_bytes(groups, limits.step_tokens, context, batch) <= budget:
            return batch
    return 0


def kv_bytes(groups: Sequence[Resource], step_tokens: int, context: int, batch: int) -> int:
    """Bytes of KV that the runtime plans for `batch` sequences of `context` tokens."""
    units = max((batch * blocks_for(context, group.block_size) for group in groups), default=0)
    blocks = planned_blocks(groups, units, sequences=batch, step_tokens=step_tokens)
    return planned_bytes(groups, blocks)
