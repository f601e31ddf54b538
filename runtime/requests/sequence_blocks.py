"""The blocks of one sequence in every KV group, and the hashes of its full ones."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

_DIGEST_BYTES = 32


class SequenceBlocks:
    """The blocks of one sequence. `ids[g][i]` holds positions `i * block_size ..` in group `g`.

    An id is 0 where the window has passed. `batch_slot` is its row of the block tables, None
    while it holds nothing. `digests` is the chain of hashes of its full blocks so far, kept
    when the blocks are given back. The first `num_taken` blocks were there when it came, and may
    be others' too. Fewer than `steady_tokens` tokens can be stored without
    further ado: no block is to be got or copied for them, and none becomes full.
    """

    __slots__ = (
        "batch_slot",
        "digests",
        "first",
        "ids",
        "num_registered",
        "num_taken",
        "root",
        "steady_tokens",
    )

    def __init__(self, salt: str = "") -> None:
        self.root = blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest()
        self.digests: list[bytes] = []
        self.batch_slot: int | None = None
        self.ids: list[list[int]] = []
        self.first: list[int] = []
        self.num_registered = 0
        self.num_taken = 0
        self.steady_tokens = 0

    def extend_digests(self, tokens: Sequence[int], num_tokens: int, block_size: int) -> None:
        """Hash the full blocks within the first `num_tokens` tokens, each over its parent."""
        digests = self.digests
        for index in range(len(digests), num_tokens // block_size):
            parent = digests[-1] if digests else self.root
            start = index * block_size
            content = array("i", tokens[start : start + block_size]).tobytes()
            digests.append(blake2b(parent + content, digest_size=_DIGEST_BYTES).digest())
