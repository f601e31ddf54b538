"""Python itself, set so that no thread waits long for the interpreter's lock."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from typing import Final

from ..freed_memory import give_back_freed

_SWITCH_SECONDS: Final = 0.0005


def leave_out_of_collections() -> None:
    """What is there now is not looked at by later garbage collections."""
    gc.freeze()


def collect_whole() -> None:
    """Collect what was left out as well, where much of it has become garbage."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    give_back_freed()


@contextlib.contextmanager
def short_waits() -> Iterator[None]:
    """Within, threads wait less for each other.

    - The event loop gives the lock up for each piece that it reads from a socket, and gets it back
      after the switch interval where another thread computes: at Python's 5 ms, one round over 20
      connections would take 100 ms.
    - A full garbage collection visits every object while no other thread can run: 75 ms and more
      with the modules of a server. What is there now is left out of them.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    if "torch" in sys.modules:  # what compiling left as garbage would stay as long as the server
        gc.collect()
    gc.freeze()
    give_back_freed()
    try:
        yield
    finally:
        gc.unfreeze()
        sys.setswitchinterval(before)
