"""Memory that is freed piece by piece goes back to the system."""

import os

from infc.runtime.freed_memory import give_back_freed
from infc.runtime.replicas.process_memory import private_bytes


def test_what_was_freed_is_given_back() -> None:
    """The last piece of it is still in use, which keeps the C library from giving it back."""
    pieces = [bytes(1 << 10) for _ in range(1 << 16)]
    last = pieces.pop()
    del pieces
    before = private_bytes(os.getpid())
    give_back_freed()
    assert before - private_bytes(os.getpid()) > 50 << 20
    assert len(last) == 1 << 10
