"""What an engine on Ray tells fronts of itself."""

from __future__ import annotations

from typing import NamedTuple


class Described(NamedTuple):
    """`max_context` tokens a prompt and its answer may have, in blocks of `block_size`."""

    max_context: int
    block_size: int
