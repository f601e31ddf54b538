"""What is asked of the options of an engine before anything is planned; each refusal names one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir.errors import UsageError

if TYPE_CHECKING:
    from .limits import RuntimeOptions

MAX_THREADS = 1024


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
