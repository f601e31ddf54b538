"""The block pool: ids, reference counts, hashes and eviction order; no request, no tensor."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

NULL_BLOCK = 0


class BlockPool:
    """Blocks `1 .. num_blocks - 1` of one KV group; block 0 is the null block, never handed out.

    A block is owned (references > 0) or free. A free block keeps its content and its hash until
    it is allocated again, so a later request with the same prefix can take it back. Allocation
    takes free blocks without a hash first, then the least recently used; with `lowest_first`, where
    nothing is ever found again, the one with the lowest number.
    """

    def __init__(self, num_blocks: int, *, lowest_first: bool = False) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs a block beside the null block, got {num_blocks}")
        self.num_blocks = num_blocks
        self._lowest_first = lowest_first
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        # Eviction order, first out first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self.num_evictions = 0
        self.changes: list[tuple[bytes, bool]] | None = None
        """What became findable (True), or no longer is, since somebody put a list here."""

    @property
    def capacity(self) -> int:
        """Blocks that can be owned at once."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now, those with reusable content included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks whose content can be found by hash."""
        return len(self._by_hash)

    def references(self, block: int) -> int:
        """How many owners `block` has."""
        return self._references[block]

    def is_free(self, block: int) -> bool:
        """Whether `block` has no owner."""
        return self._references[block] == 0

    def is_shared(self, block: int) -> bool:
        """Whether writing into `block` could be seen by another owner, now or after a look-up."""
        return self._references[block] > 1 or self._hashes[block] is not None

    def lookup(self, digest: bytes) -> int | None:
        """The block with that content, owned or free; None where there is none."""
        return self._by_hash.get(digest)

    def allocate(self) -> int:
        """A block with one reference and no content. Raises IndexError when none is free."""
        if not self._free:
            raise IndexError("no free block")
        block = min(self._free) if self._lowest_first else next(iter(self._free))
        del self._free[block]
        digest = self._hashes[block]
        if digest is not None:
            self._lose(block, digest)
            self.num_evictions += 1
        self._references[block] = 1
        return block

    def retain(self, block: int) -> None:
        """Add an owner to a block that is owned, or free with its content kept."""
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def release(self, block: int) -> None:
        """Take an owner away; the last one leaves the block free."""
        count = self._references[block] - 1
        assert count >= 0, f"block {block} has no owner"
        self._references[block] = count
        if count == 0:
            self._free[block] = None
            if self._hashes[block] is None:
                self._free.move_to_end(block, last=False)

    def register(self, block: int, digest: bytes) -> bool:
        """Make a full block findable, and say so; what is known already stays where it is."""
        if self._hashes[block] is not None or digest in self._by_hash:
            return False
        self._hashes[block] = digest
        self._by_hash[digest] = block
        if self.changes is not None:
            self.changes.append((digest, True))
        return True

    def forget(self, block: int) -> None:
        """Make the content of `block` unfindable; a free block is then the first to be reused."""
        digest = self._hashes[block]
        if digest is not None:
            self._lose(block, digest)
            if block in self._free:
                self._free.move_to_end(block, last=False)

    def _lose(self, block: int, digest: bytes) -> None:
        del self._by_hash[digest]
        self._hashes[block] = None
        if self.changes is not None:
            self.changes.append((digest, False))

    def check(self, owned: Iterable[int]) -> None:
        """Assert that the pool is sound and that `owned` (once an owner) is all that is owned."""
        expected = Counter(owned)
        assert expected[NULL_BLOCK] == 0, "the null block has an owner"
        for block in range(1, self.num_blocks):
            count = self._references[block]
            assert count == expected[block], f"block {block}: {count} != {expected[block]} owners"
            assert (block in self._free) == (count == 0), f"block {block} free and owned, or lost"
        assert NULL_BLOCK not in self._free
        assert self._references[NULL_BLOCK] == 0
        found = {b: h for b, h in enumerate(self._hashes) if h is not None}
        assert found == {b: h for h, b in self._by_hash.items()}, "hashes and index disagree"
