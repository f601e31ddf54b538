"""An engine over a model that checks its own cache, for tests that look at what comes out."""

from __future__ import annotations

from infc.runtime.engine import Engine
from infc.runtime.limits import RuntimePlan
from infc.runtime.scheduling.admission import SchedulerLimits
from infc.runtime.text.tokenizer import Tokenizer

from .paged_model import PagedModel, make_group


def make_engine(
    vocab_size: int,
    tokenizer: Tokenizer | None = None,
    *,
    num_blocks: int = 80,
    hidden_width: int | None = None,
    **limits: int,
) -> Engine:
    """Two KV groups, one with a window; 16 tokens and 8 sequences a step, 64 tokens a sequence."""
    groups = (make_group("full", 4, None), make_group("window", 4, 9))
    chosen = {"step_tokens": 16, "max_sequences": 8, "logit_rows": 8, "max_context": 64, **limits}
    plan = RuntimePlan(
        limits=SchedulerLimits(**chosen),
        groups=groups,
        num_blocks=(num_blocks, num_blocks),
        num_threads=1,
        pin=False,
        weights="mapped",
        prefix_reuse=True,
    )
    return Engine(
        PagedModel(groups, plan.num_blocks, vocab_size, hidden_width or 0),
        plan,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        hidden_width=hidden_width,
    )
