"""Prompts that are only read: scores of given text, and embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import InfcError, RequestError
from ..requests.outputs import RequestOutput
from ..requests.pooling import unit
from .prompts import Prompt, as_prompts

if TYPE_CHECKING:
    from ..engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The probability of each token of a text, given the tokens before it.

    `token_ids` are the tokens that were scored, and `context_token_ids` those before them.
    `logprobs` are natural logarithms, computed from the raw logits. A token has rank 1 in `ranks`
    if it was the most likely one; among equally likely tokens, the lowest id comes first.
    """

    context_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]

    @property
    def total(self) -> float:
        """The log-probability of all scored tokens."""
        return math.fsum(self.logprobs)

    @property
    def mean(self) -> float:
        """The mean log-probability a token."""
        return self.total / len(self.logprobs)

    @property
    def perplexity(self) -> float:
        """The exponential of minus the mean; infinite where that is beyond a float."""
        try:
            return math.exp(-self.mean)
        except OverflowError:
            return math.inf

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would have given exactly these tokens."""
        return all(rank == 1 for rank in self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Embedding:
    """The vector of a prompt, float32 [hidden_width]; numpy takes it as an array."""

    prompt_token_ids: tuple[int, ...]
    values: NDArray[np.float32] = field(repr=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False and dtype is not None and np.dtype(dtype) != self.values.dtype:
            raise ValueError(f"an embedding is {self.values.dtype}: {dtype} needs a copy")
        return np.array(self.values, dtype=dtype) if copy else np.asarray(self.values, dtype=dtype)

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """Tokens to read, and the first of them that counts."""

    token_ids: list[int]
    first_scored: int


def as_scored(engine: Engine, prompts: Any, continuations: Any) -> list[ScoredPrompt]:
    """What to read for each prompt, or for each pair of prompt and continuation.

    One prompt goes with many continuations, and many prompts with as many. Raises RequestError
    whose `where` says which one of a list it was.
    """
    contexts = as_prompts(prompts)
    if continuations is None:
        pairs: list[tuple[Prompt, Prompt | None]] = [(prompt, None) for prompt in contexts]
    else:
        ends = as_prompts(continuations)
        if len(contexts) == 1:
            contexts = contexts * len(ends)
        if len(contexts) != len(ends):
            raise RequestError(
                f"{len(ends)} continuations were given for {len(contexts)} prompts",
                field="continuations",
                hint="pass one for each prompt, or a single prompt for all of them",
            )
        pairs = list(zip(contexts, ends, strict=True))
    scored = []
    for index, pair in enumerate(pairs):
        try:
            scored.append(scored_prompt(engine, *pair))
        except RequestError as error:
            if len(pairs) > 1:
                error.where = f"prompts[{index}]"
            raise
    return scored


def scored_prompt(engine: Engine, prompt: Prompt, continuation: Prompt | None) -> ScoredPrompt:
    """The tokens of a prompt, or of prompt and continuation, and where scoring begins.

    Two texts are tokenized as one, as a model would see them: scoring begins at the first token
    that the continuation changes. Token ids are joined as they are.
    """
    if continuation is None:
        ids = engine.encode(prompt)
        if len(ids) < 2:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, and the first has no score", field="prompt"
            )
        return ScoredPrompt(ids, 1)
    context = engine.encode(prompt)
    if isinstance(prompt, str) and isinstance(continuation, str):
        ids = engine.encode(prompt + continuation)
        pairs = zip(context, ids, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(context), len(ids)))
    else:
        if isinstance(continuation, str) and engine.tokenizer is not None:
            continuation = engine.tokenizer.encode(continuation, add_special_tokens=False)
        ids, first = context + engine.encode(continuation), len(context)
    if first >= len(ids):
        raise RequestError("the continuation has no tokens", field="continuations")
    if first == 0:
        raise RequestError("a continuation needs a prompt of at least one token", field="prompt")
    return ScoredPrompt(ids, first)


def as_score(output: RequestOutput) -> Score:
    """The score in an answer; InfcError where it failed."""
    _check(output)
    entries = [entry for entry in output.prompt_logprobs or () if entry is not None]
    ids, count = output.prompt_token_ids, len(entries)
    return Score(
        context_token_ids=ids[:-count],
        token_ids=ids[-count:],
        logprobs=tuple(entry.logprob for entry in entries),
        ranks=tuple(entry.rank for entry in entries),
    )


def as_embedding(output: RequestOutput, *, normalize: bool) -> Embedding:
    """The embedding in an answer; InfcError where it failed."""
    _check(output)
    assert output.embedding is not None
    values = unit(output.embedding) if normalize else output.embedding
    return Embedding(prompt_token_ids=output.prompt_token_ids, values=values)


def _check(output: RequestOutput) -> None:
    reason = output.outputs[0].finish_reason
    if reason != "length":
        raise InfcError(f"a prompt was not read: {output.error or reason}")
