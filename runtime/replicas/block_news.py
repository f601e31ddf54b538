"""Which blocks an engine's prefix cache has stored and removed since somebody asked."""

from __future__ import annotations

from collections.abc import Sequence

from ...ir.resources import Resource
from ..engine import Engine
from ..scheduling.blocks import BlockPool
from .prefixes import DIGEST_BYTES


class BlockNews:
    """Follows one group: one that keeps all blocks, if there is any."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._group = _group_of(engine.plan.groups)
        self._pool: BlockPool | None = None
        self._known: set[bytes] = set()
        self.take()

    def take(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """The digests of blocks stored since the last time, and of those removed."""
        if self._group is None:
            return (), ()
        before, pool = self._known, self._engine.scheduler.kv.pools[self._group]
        if pool is not self._pool:  # also where a scheduler was given up, and its cache with it
            self._pool, pool.changes = pool, []
            self._known = set()
            return (), tuple(before)
        if not pool.changes:
            return (), ()
        last = {digest[:DIGEST_BYTES]: is_stored for digest, is_stored in pool.changes}
        pool.changes.clear()
        stored = [digest for digest, is_stored in last.items() if is_stored]
        removed = [digest for digest, is_stored in last.items() if not is_stored]
        self._known.update(stored)
        self._known.difference_update(removed)
        return tuple(stored), tuple(removed)


def _group_of(groups: Sequence[Resource]) -> int | None:
    full = (index for index, group in enumerate(groups) if group.reach is None)
    return next(full, 0 if groups else None)
