"""Which blocks each replica has in its prefix cache, as far as it has told, and who has most."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from ..requests.sequence_blocks import SequenceBlocks

DIGEST_BYTES: Final = 8
"""Of a digest are compared: a collision costs a little time, and changes no answer."""

_MOST_EXPECTED = 1 << 16


def prefix_digests(prompt: Sequence[int], salt: str, block_size: int) -> tuple[bytes, ...]:
    """The digests of the full blocks of a prompt, as every engine of its artifact has them."""
    blocks = SequenceBlocks(salt)
    blocks.extend_digests(prompt, len(prompt), block_size)
    return tuple([digest[:DIGEST_BYTES] for digest in blocks.digests])


class PrefixIndex:
    """The blocks of one replica: those that it has stored, and those that it will soon.

    What requests bring that were just sent there is expected, so that the next ones follow them.
    """

    def __init__(self) -> None:
        self._stored: set[bytes] = set()
        self._expected: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._stored) + len(self._expected)

    def change(self, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        """Take in what the replica has told."""
        self._stored.update(stored)
        for digest in stored:
            self._expected.pop(digest, None)
        for digest in removed:
            self._stored.discard(digest)
            self._expected.pop(digest, None)

    def expect(self, digests: Sequence[bytes]) -> None:
        """A request with this prompt was sent there."""
        for digest in digests:
            if digest not in self._stored:
                self._expected[digest] = None
                self._expected.move_to_end(digest)
        while len(self._expected) > _MOST_EXPECTED:
            self._expected.popitem(last=False)

    def num_found(self, digests: Sequence[bytes]) -> int:
        """How many blocks of a prompt are there, from its beginning."""
        for index, digest in enumerate(digests):
            if digest not in self._stored and digest not in self._expected:
                return index
        return len(digests)

    def clear(self) -> None:
        """The replica has an empty cache."""
        self._stored.clear()
        self._expected.clear()
