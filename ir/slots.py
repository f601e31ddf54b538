"""Slots: blocks of keys and values that are so long that a sequence needs only one."""

from __future__ import annotations

from .program import Program
from .resources import KvGroup


def slot_tokens(program: Program) -> int:
    """Tokens of a slot: the longest context, and behind it those of one step.

    Kernels may write there what a sequence does not have. No sequence has more tokens in a step
    than in its context.
    """
    steps = program.symbols["T"].high if "T" in program.symbols else 0
    longest = program.spec.max_context
    return longest + min(steps, longest)


def has_slots(program: Program) -> bool:
    """Whether each group of keys and values lies in slots."""
    groups = [one for one in program.resources if isinstance(one, KvGroup)]
    size = slot_tokens(program)
    return bool(groups) and all(group.block_size >= size for group in groups)
