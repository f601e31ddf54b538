"""The options of an engine, and their checks before anything is planned."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.errors import UsageError

MAX_THREADS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions:
    """Options for opening an artifact; None selects the compiled value.

    `kv_memory` is a number of bytes, a string such as "1GiB", or "auto". The first three options
    can only be lowered, because the memory of a step was planned for the compiled limits.
    """

    max_context: int | None = None
    max_sequences: int | None = None
    step_tokens: int | None = None
    kv_memory: int | str | None = None
    max_waiting: int = 4096
    prefix_reuse: bool = True
    threads: int | None = None
    pin: bool | None = None
    itl_target_ms: int | None = None
    """Target for the inter-token latency in milliseconds; 0 for no target."""
    weights: str | None = None
    """"mapped", "copied", or "auto": small weights are read into memory before the first step,
    and large ones are copied into huge pages if these and enough memory are available."""


def check_types(options: RuntimeOptions) -> None:
    """UsageError for a count that is no whole number, or a switch that is neither True nor False.

    A text such as "no" is true for Python, and True a number: neither may decide anything here.
    """
    for name in ("max_context", "max_sequences", "step_tokens"):
        value = getattr(options, name)
        if value is not None and type(value) is not int:
            raise UsageError(f"{name} is {value!r}", hint="use an integer")
    if type(options.max_waiting) is not int or options.max_waiting < 1:
        raise UsageError(
            f"max_waiting is {options.max_waiting!r}", hint="use an integer of at least 1"
        )
    if options.pin is not None and type(options.pin) is not bool:
        raise UsageError(f"pin is {options.pin!r}", hint="use True, False or None")
    if type(options.prefix_reuse) is not bool:
        raise UsageError(f"prefix_reuse is {options.prefix_reuse!r}", hint="use True or False")


def checked_threads(chosen: object) -> int:
    """A number of threads; UsageError for what is none."""
    if type(chosen) is not int or not 1 <= chosen <= MAX_THREADS:
        raise UsageError(f"threads is {chosen!r}, outside 1..{MAX_THREADS}")
    return chosen
