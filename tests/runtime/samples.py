"""What a request's next token is, by the meaning of its parameters: for tests that compare."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from infc.runtime.requests.request import Request
from infc.runtime.sampling.adjustments import Mask, adjusted_row, gather, packed
from infc.runtime.sampling.sampler import Sample, drawn_token, greatest_token
from infc.runtime.sampling.token_logprobs import raw_logprobs
from infc.runtime.sampling.top_tokens import Logits


def adjusted(raw: Logits, request: Request) -> Logits:
    """The row of logits [V] of the request's next token as it changes it."""
    if request.adjuster is None:
        return raw
    entry = request.adjuster.adjustment(request.token_ids, len(request.token_ids))
    return adjusted_row(raw, gather([0], [entry]), 0)


def sample(raw: Logits, request: Request) -> Sample:
    """The request's next token from its row of logits [V]."""
    token = None
    if greatest_token(raw) is not None:
        token = drawn_token(adjusted(raw, request), request.draw(0, len(request.token_ids)))
    if token is None:
        return Sample(None, error=request.adjuster.error if request.adjuster else None)
    count = request.num_logprobs
    return Sample(token, None if count is None else raw_logprobs(raw, token, count))


class Grammar:
    """A constraint with state: about half of the tokens may follow, by all that came before."""

    def __init__(self, vocab_size: int, as_words: bool = False) -> None:
        self.vocab_size = vocab_size
        self.as_words = as_words
        self.seen: list[int] = []

    def mask(self, output_ids: Sequence[int]) -> NDArray[np.bool_] | Mask:
        kept = len(self.seen)
        assert list(output_ids[:kept]) == self.seen, "not rolled back as it was told"
        self.seen += output_ids[kept:]
        allowed = np.random.default_rng([7, *self.seen]).random(self.vocab_size) < 0.5
        return packed(allowed) if self.as_words else allowed

    def rollback(self, num_tokens: int) -> None:
        assert 0 < num_tokens <= len(self.seen)
        del self.seen[len(self.seen) - num_tokens :]

    def fork(self) -> Grammar:
        return Grammar(self.vocab_size, self.as_words)
