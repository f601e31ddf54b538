"""Runs passes that somebody else wrote: errors say where that code is, and where it failed."""

from __future__ import annotations

import inspect
import os
import sysconfig
import traceback
from collections.abc import Callable
from typing import Any, Final

from ..ir.errors import CheckpointError, InfcError, PassError, Terminated, UsageError
from ..ir.program import Program
from .base import Pass, PassContext, PassResult

_LIBRARIES: Final = tuple(
    os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib", "purelib")
)


def failed_at(error: BaseException) -> str | None:
    """The innermost `FILE, line N` that is neither infc's nor a library's; None if there is none.

    Of code that is installed as a library (a plug-in), the innermost line that is not infc's. A
    SyntaxError says itself where it is.
    """
    theirs: list[str] = []
    installed: list[str] = []
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").partition(".")[0] == "infc":
            continue
        name = frame.f_code.co_filename
        if name.startswith("<"):
            continue
        lines = installed if name.startswith(_LIBRARIES) else theirs
        lines.append(f"{name}, line {line}")
    found = theirs or installed
    return found[-1] if found else None


def defined_at(thing: Callable[..., Any] | type) -> str | None:
    """Where a function or class is defined; None for infc's own, and where nobody knows."""
    if (getattr(thing, "__module__", None) or "").partition(".")[0] == "infc":
        return None
    code = getattr(thing, "__code__", None)
    if code is not None:
        return f"{code.co_filename}, line {code.co_firstlineno}"
    try:
        return f"{inspect.getsourcefile(thing)}, line {inspect.getsourcelines(thing)[1]}"
    except (OSError, TypeError):
        return None


def run_guarded(one: Pass, program: Program, context: PassContext) -> PassResult:
    """What a pass gives; PassError (or its UsageError) that says where a user's own code failed.

    CheckpointError of a pass of infc's own: of weights that it read.
    """
    try:
        result = one.run(program, context)
        if not isinstance(result, PassResult):
            raise PassError(f"returns {type(result).__name__} instead of a PassResult")
    except UsageError as error:
        error.where = error.where or pass_title(one, failed_at(error))
        raise
    except Terminated:
        raise
    except (Exception, SystemExit) as error:  # a user's pass may raise anything, and must be named
        # A damaged checkpoint is no fault of a pass that read it.
        if isinstance(error, PassError | CheckpointError) and pass_place(one) is None:
            raise
        text = str(error) if isinstance(error, InfcError) else f"{type(error).__name__}: {error}"
        place = failed_at(error) if pass_place(one) else None
        raise PassError(f"{text} ({place})" if place else text) from error
    if (result.matches == 0) != (result.program is program):
        raise PassError("reports no matches but changed the program, or the reverse")
    return result


def pass_place(one: Pass) -> str | None:
    """Where a pass that is not infc's own is defined."""
    found: str | None = getattr(one, "place", None) or defined_at(type(one))
    return found


def pass_title(one: Pass, place: str | None = None) -> str:
    """A pass for messages: its name, and where it is defined unless it is infc's own."""
    place = (place or pass_place(one)) if pass_place(one) else None
    return f"pass {one.name} ({place})" if place else f"pass {one.name}"
