"""What a program keeps between steps, in blocks: keys and values, latents, or running state.

Whoever plans, shares or frees blocks asks a resource what it keeps; none asks what it is.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from .row_codes import ROW_CODES
from .types import ELEMENT_TYPES, DType

STORED_TYPES: Final = ELEMENT_TYPES | ROW_CODES.keys()
"""What state may consist of: elements of a type, or codes of rows (`ir/row_codes.py`) by name."""


def is_coded(dtype: str) -> bool:
    """Whether stored rows are codes, each row with a float32 scale."""
    return dtype in ROW_CODES


def element_type(dtype: str) -> DType:
    """The type of stored elements, or of codes."""
    return ROW_CODES[dtype].dtype if is_coded(dtype) else DType(dtype)


class _Blocks(ABC):
    """What of a sequence's blocks later tokens need, which follows from how far they reach back."""

    __slots__ = ()
    block_size: int

    @property
    @abstractmethod
    def reach(self) -> int | None:
        """How many positions a token needs, its own included; None for all before it."""

    def plain(self) -> dict[str, Any]:
        """As plain data; `kind` says which it is, and is left out for keys and values."""
        itself: Any = self
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(itself)}
        return fields if itself.kind == KvGroup.kind else {"kind": itself.kind, **fields}

    def keeps(self, position: int) -> int:
        """The first position that tokens at `position` and later still need."""
        reach = self.reach
        return 0 if reach is None else max(0, position - reach + 1)

    def hit_needs(self, num_blocks: int, position: int) -> range | None:
        """Those of a prefix's `num_blocks` blocks that tokens from `position` on need.

        None where it cannot spare any computation.
        """
        return range(self.keeps(position) // self.block_size, num_blocks)


@dataclass(frozen=True, slots=True)
class KvGroup(_Blocks):
    """Paged keys and values of layers of one kind: one block table, one block pool.

    `layers` are those whose keys and values lie in it; others may read them too. Sizes are elements
    per token and KV head; `window` is None for full attention, otherwise a query at position p sees
    positions p - window + 1 .. p. `dtype` is an element type, or i8 or e4m3: keys and values are
    then codes (`ir/row_codes.py`), with a float32 scale a token and KV head.
    """

    name: str
    layers: tuple[int, ...]
    num_kv_heads: int
    key_head_dim: int
    value_head_dim: int
    dtype: str
    block_size: int
    window: int | None = None

    kind: ClassVar[str] = "kv"
    sizes: ClassVar[tuple[str, ...]] = ("num_kv_heads", "key_head_dim", "value_head_dim")

    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers of the group."""
        per_head = (self.key_head_dim + self.value_head_dim) * element_type(self.dtype).size_bytes
        if self.has_scales:
            per_head += 2 * DType.F32.size_bytes
        return len(self.layers) * self.block_size * self.num_kv_heads * per_head

    @property
    def has_scales(self) -> bool:
        """Whether stored keys and values are codes beside scales."""
        return is_coded(self.dtype)

    @property
    def reach(self) -> int | None:
        """How many positions a token needs, its own included: the window; None for all."""
        return self.window


@dataclass(frozen=True, slots=True)
class LatentGroup(_Blocks):
    """Paged latents of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    Each layer keeps one latent of `latent_dim` elements a token, from which all heads' keys and
    values are made, and one rotated key part of `rope_dim` elements, which all heads share. With
    `dtype` i8 or e4m3 each of both is codes, with a float32 scale a token.
    """

    name: str
    layers: tuple[int, ...]
    latent_dim: int
    rope_dim: int
    dtype: str
    block_size: int

    kind: ClassVar[str] = "latent"
    sizes: ClassVar[tuple[str, ...]] = ("latent_dim", "rope_dim")

    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers of the group."""
        per_token = (self.latent_dim + self.rope_dim) * element_type(self.dtype).size_bytes
        if is_coded(self.dtype):
            per_token += 2 * DType.F32.size_bytes
        return len(self.layers) * self.block_size * per_token

    @property
    def reach(self) -> int | None:
        """None: a token needs all positions before it."""
        return None


@dataclass(frozen=True, slots=True)
class StateGroup(_Blocks):
    """State of fixed size that each token updates: convolutions and recurrences, such as Mamba's
    (arXiv 2312.00752).

    A block holds `num_elements` elements a layer: the state behind the last token computed of the
    block's positions. The next block begins with a copy, so a full block stays as a place from
    which another prompt with the same beginning can go on.
    """

    name: str
    layers: tuple[int, ...]
    num_elements: int
    dtype: str
    block_size: int

    kind: ClassVar[str] = "state"
    sizes: ClassVar[tuple[str, ...]] = ("num_elements",)

    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers, whatever its number of positions."""
        return len(self.layers) * self.num_elements * element_type(self.dtype).size_bytes

    @property
    def reach(self) -> int | None:
        """A token needs the state behind the one before it, and makes its own."""
        return 2

    def hit_needs(self, num_blocks: int, position: int) -> range | None:
        """The last of a prefix's `num_blocks` blocks where it ends right before `position`.

        None elsewhere: a state cannot be taken back to an earlier token.
        """
        if position != num_blocks * self.block_size:
            return None
        return range(max(0, num_blocks - 1), num_blocks)


Resource = KvGroup | LatentGroup | StateGroup
"""What a program keeps between steps.

`bytes_per_block()`, `reach` and `keeps(position)` decide how much memory is planned and when
blocks are freed; `hit_needs(num_blocks, position)` which blocks must still be there for a cached
prefix of so many blocks to spare its computation, where the next token is that at `position`
(None: it cannot).
"""

KINDS: Final[Mapping[str, type[Resource]]] = {
    kind.kind: kind for kind in (KvGroup, LatentGroup, StateGroup)
}
"""The kinds of resources by the name that texts and manifests have for them."""
