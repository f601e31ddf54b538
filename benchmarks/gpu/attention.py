"""Paged attention of decode steps by itself, against the bytes a second that a copy moves."""

from __future__ import annotations

from typing import Final

from infc.ir.resources import KvGroup
from infc.ir.roofline import Ceilings

from .setting import Results, Setting
from .steps import Workload, profile, program_of

CONTEXTS: Final = ((8, 8192), (4, 16384), (2, 32640))
"""Sequences and their contexts. All have 268 MB of keys and values in a layer of the 8B shape, five
times what the cache of an H200 holds: a launch is repeated when it is timed by itself."""


def measure_attention(setting: Setting, ceilings: Ceilings) -> Results:
    """Microseconds of one layer's attention, and its bytes a second as a share of a copy's."""
    small = setting.emulated is not None
    shapes = ((2, 40),) if small else CONTEXTS
    workload = Workload("tiny" if small else "8b-attention", "none", shapes, ())
    artifact = workload.artifact(setting)
    program = program_of(artifact)
    (group,) = program.resources
    assert isinstance(group, KvGroup)
    layers = sum(node.op == "paged_attention" for node in program.nodes)
    found: Results = {}
    for batch, context in shapes:
        if setting.left > 3:
            lines = profile(setting, artifact, (batch, context), ceilings)
            line = next(one for name, one in lines.items() if "attend" in name)
            token_bytes = group.bytes_per_block() // group.block_size
            seconds = line["µs"] * 1e-6
            rate = batch * context * token_bytes / max(seconds, 1e-9)
            found[f"{batch} x {context}"] = {
                "µs": round(line["µs"] / layers, 1),
                "GB/s": round(rate / 1e9, 1),
                "of copies": round(rate / ceilings.read, 3),
            }
    return {"attention": found}
