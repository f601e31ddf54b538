"""The launches of an artifact for GPUs as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...ir.gpus import LAUNCH_SECONDS
from ...ir.sizes import format_count, format_size
from .amounts import format_seconds
from .facts import LaunchFacts

FORM_HEAD = ("form", ">most tokens", ">launches", ">of a layer", ">outside graphs")


def form_rows(launches: LaunchFacts) -> Iterator[Sequence[str]]:
    """The table of forms, under FORM_HEAD."""
    for form in launches.forms:
        numbers = (form.max_tokens, form.launches, form.layer_launches, form.eager)
        yield (form.name, *map(str, numbers))


def kernel_pairs(launches: LaunchFacts) -> Iterator[tuple[str, str]]:
    """What kernels use, which graphs there will be, and how long a decode step takes at least."""
    size = format_size(launches.image_bytes)
    yield "machine code", f"{format_count(launches.kernels, 'kernel')}, {size}"
    spilled = f"{launches.spilled_bytes} bytes spilled"
    shared = f"{format_size(launches.shared_bytes)} of shared memory a block"
    yield "at most", f"{launches.registers} registers and {spilled} a thread, {shared}"
    if launches.buckets:
        yield "decode graphs", f"for {', '.join(map(str, launches.buckets))} sequences"
    if launches.pieces:
        yield "other graphs", f"of pieces for {', '.join(map(str, launches.pieces))} tokens"
    if launches.decode is not None:
        gaps = f"{format_seconds(launches.decode)}, with {LAUNCH_SECONDS * 1e6:.1f} µs a launch"
        yield "decode step", f"at the ceilings above {gaps}"
