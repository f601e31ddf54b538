"""Which requests take so long to check and build that others shall not wait for it."""

from __future__ import annotations

from collections.abc import Sequence

from ..sampling.sampling_params import SamplingParams
from .resumption import Resumption

_LONG = 4096
"""Characters or tokens: building a request with more takes a thread of its own."""

_MANY = 8
"""Prompts or choices: as above."""

_FEW = 256
"""Tokens that were told of a request that is resumed: as above, as their text is found again."""


def is_long(
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams | None = None,
    resumed: Sequence[Resumption | None] = (),
) -> bool:
    """Whether it takes longer to tokenize, check or build them than others shall wait."""
    if len(prompts) > _MANY or _has_long_lists(params):
        return True
    if any(not isinstance(each, Sequence) or len(each) > _LONG for each in prompts):
        return True
    return any(each is not None and each.num_tokens > _FEW for each in resumed)


def _has_long_lists(params: SamplingParams | None) -> bool:
    """Whether the parameters name so many tokens, or ask for so many choices."""
    if not isinstance(params, SamplingParams):
        return False
    lists = (params.logit_bias, params.allowed_token_ids or (), params.banned_token_ids)
    return params.num_choices > _MANY or any(len(ids) > _LONG for ids in lists)
