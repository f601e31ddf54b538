"""What a front is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..memory_plan import Lease
from ..text.tokenizer import Tokenizer
from .child import Start, start_engine
from .messages import Open
from .routing import LeastLoaded, Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontConfig:
    """What a front knows of the engines that it starts; `orders` has one entry a replica.

    An engine gets requests as long as it has fewer than `most_sequences` completions to compute;
    others wait in the front, `max_waiting` at most. `hung_seconds` is how long an engine may say
    nothing: no step may take so long. `lease` is the memory of all engines; it ends with the front.
    """

    orders: Sequence[Open]
    vocab_size: int
    max_context: int
    max_waiting: int
    most_sequences: int
    block_size: int = 1
    tokenizer: Tokenizer | None = None
    policy: Policy = field(default_factory=LeastLoaded)
    hung_seconds: float = 60.0
    start: Start = start_engine
    lease: Lease | None = None
