"""How many blocks a sequence needs in each KV group: full attention and windows."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.errors import ArtifactError
from ...ir.program import KvGroup


def common_block_size(groups: Sequence[KvGroup]) -> int:
    """The block size of all groups; they share one, so that one hash speaks for all of them."""
    sizes = {group.block_size for group in groups}
    if len(sizes) != 1:
        raise ArtifactError(
            f"KV groups must share one block size, this model has {sorted(sizes) or 'no group'}",
            where="manifest.json: kv.groups",
            hint="compile it again with this version",
        )
    return sizes.pop()


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens from position 0 on."""
    return -(-num_tokens // block_size)


def first_visible_block(group: KvGroup, position: int) -> int:
    """Index of the first block that a query at `position` or later can see."""
    if group.window is None:
        return 0
    return max(0, position - group.window + 1) // group.block_size


def window_blocks(group: KvGroup) -> int | None:
    """Blocks that one query can see at most, its own included; None without a window."""
    if group.window is None:
        return None
    return blocks_for(group.window - 1, group.block_size) + 1


def blocks_alone(group: KvGroup, num_tokens: int) -> int:
    """Blocks that a sequence alone needs to reach `num_tokens`, a token a step if it must be."""
    total = blocks_for(num_tokens, group.block_size)
    visible = window_blocks(group)
    return total if visible is None else min(total, visible)


def planned_blocks(
    groups: Sequence[KvGroup], units: int, *, sequences: int, step_tokens: int
) -> tuple[int, ...]:
    """Blocks of each group where full attention has `units`; one more for the null block.

    A windowed group never needs more than the windows of all sequences and one step's tokens.
    """
    counts = []
    for group in groups:
        visible = window_blocks(group)
        count = units
        if visible is not None:
            step = blocks_for(step_tokens, group.block_size)
            count = min(units, sequences * visible + step)
        counts.append(count + 1)
    return tuple(counts)


def planned_bytes(groups: Sequence[KvGroup], num_blocks: Sequence[int]) -> int:
    """Bytes of so many blocks of each group, over all of its layers."""
    return sum(
        count * group.bytes_per_block() for group, count in zip(groups, num_blocks, strict=True)
    )
