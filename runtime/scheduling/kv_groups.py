"""How many blocks a sequence needs of each resource, by what the resource keeps."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.errors import ArtifactError
from ...ir.resources import Resource


def common_block_size(groups: Sequence[Resource]) -> int:
    """The block size of all groups; they share one, so that one hash speaks for all of them."""
    sizes = {group.block_size for group in groups}
    if len(sizes) != 1:
        raise ArtifactError(
            f"KV groups must share one block size, this model has {sorted(sizes) or 'no group'}",
            where="manifest.json: resources",
            hint="compile it again with this version",
        )
    return sizes.pop()


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens from position 0 on."""
    return -(-num_tokens // block_size)


def first_visible_block(group: Resource, position: int) -> int:
    """Index of the first block that tokens at `position` and later need."""
    return group.keeps(position) // group.block_size


def most_blocks(group: Resource) -> int | None:
    """Blocks that one token needs at most, its own included; None for all of its sequence."""
    if group.reach is None:
        return None
    return blocks_for(group.reach - 1, group.block_size) + 1


def blocks_alone(group: Resource, num_tokens: int) -> int:
    """Blocks that a sequence alone needs to reach `num_tokens`, a token a step if it must be."""
    total = blocks_for(num_tokens, group.block_size)
    most = most_blocks(group)
    return total if most is None else min(total, most)


def planned_blocks(
    groups: Sequence[Resource], units: int, *, sequences: int, step_tokens: int
) -> tuple[int, ...]:
    """Blocks of each group where what keeps all has `units`; one more for the null block.

    Others never need more than all sequences' last tokens do, and one step's tokens.
    """
    counts = []
    for group in groups:
        most = most_blocks(group)
        count = units
        if most is not None:
            step = blocks_for(step_tokens, group.block_size)
            count = min(units, sequences * most + step)
        counts.append(count + 1)
    return tuple(counts)


def planned_bytes(groups: Sequence[Resource], num_blocks: Sequence[int]) -> int:
    """Bytes of so many blocks of each group, over all of its layers."""
    return sum(
        count * group.bytes_per_block() for group, count in zip(groups, num_blocks, strict=True)
    )
