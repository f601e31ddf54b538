"""The blocks of one replica: those that requests use, and those of prompts that stay behind."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence


class SimulatedCache:
    """Counts blocks, and keeps prompts until their room is needed, the least recently used first.

    `stored` and `removed` collect what a policy is to be told.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.stored: list[bytes] = []
        self.removed: list[bytes] = []
        self._used: Counter[bytes] = Counter()  # blocks of prompts, by who uses them
        self._unused: OrderedDict[bytes, None] = OrderedDict()
        self._own = 0  # blocks that no digest is known of, or not yet

    @property
    def num_used(self) -> int:
        """Blocks that cannot be given to others."""
        return len(self._used) + self._own

    def num_found(self, digests: Sequence[bytes]) -> int:
        """How many blocks of a prompt are here, from its beginning."""
        for index, digest in enumerate(digests):
            if digest not in self._used and digest not in self._unused:
                return index
        return len(digests)

    def take(self, digests: Sequence[bytes], found: int, total: int) -> bool:
        """Use what was found of a prompt, and further blocks, `total` in all; False for no room."""
        again = sum(digest not in self._used for digest in digests[:found])
        if self.num_used + again + total - found > self.num_blocks:
            return False
        for digest in digests[:found]:
            self._unused.pop(digest, None)
            self._used[digest] += 1
        self._own += total - found
        self._make_room()
        return True

    def store(self, digests: Sequence[bytes], found: int) -> int:
        """The rest of a prompt is computed: others may use it. How many blocks that took over."""
        for digest in digests[found:]:
            self._own -= 1
            if digest not in self._used and digest not in self._unused:
                self.stored.append(digest)
            self._unused.pop(digest, None)
            self._used[digest] += 1
        return len(digests) - found

    def free(self, digests: Sequence[bytes], own: int) -> None:
        """A request has ended, which used these blocks, and others of its own."""
        self._own -= own
        # The end of a prompt is needed by fewer than its beginning, and goes first.
        for digest in reversed(digests):
            self._used[digest] -= 1
            if not self._used[digest]:
                del self._used[digest]
                self._unused[digest] = None
        self._make_room()

    def _make_room(self) -> None:
        while self.num_used + len(self._unused) > self.num_blocks:
            self.removed.append(self._unused.popitem(last=False)[0])
