"""What tests of requests that go on in another engine share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infc.runtime.engine import Engine
from infc.runtime.requests.outputs import RequestOutput, merge_outputs
from infc.runtime.requests.resumption import Progress, Resumption
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.text.tokenizer import Tokenizer

from .engines import make_engine
from .small_artifact import make_tokenizer

PROMPT = [3, 4, 5, 6, 7, 8, 9, 10, 11]


@cache
def byte_level() -> Tokenizer:
    return Tokenizer(make_tokenizer())


def engine_of(tokenizer: Tokenizer, **limits: int) -> Engine:
    return make_engine(tokenizer.backend.get_vocab_size(), tokenizer, **limits)


def resumption(outputs: Sequence[RequestOutput]) -> Resumption:
    """What was told, as another process reads it."""
    resumed = Progress(outputs).resumption()
    assert resumed is not None
    read = Resumption.from_data(json.loads(json.dumps(resumed.as_data())))
    assert read == resumed
    return read


def told(parts: Sequence[RequestOutput]) -> tuple[object, ...]:
    """All of an answer but its times."""
    whole = merge_outputs(parts)
    assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
    return whole.outputs, whole.prompt_token_ids, whole.prompt_logprobs, whole.error, whole.seed


def run(engine: Engine, *names: str) -> dict[str, list[RequestOutput]]:
    parts: dict[str, list[RequestOutput]] = {name: [] for name in names}
    while engine.has_unfinished:
        for output in engine.step():
            parts[output.request_id].append(output)
        engine.scheduler.check()
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    return parts


def byte_tokens(text: str) -> list[int]:
    """A token for each byte of a text."""
    alphabet = {ord("Ã"): 0xC3, ord("©"): 0xA9, ord("±"): 0xB1}
    names = {byte: chr(character) for character, byte in alphabet.items()}
    ids = []
    for byte in text.encode():
        token = byte_level().backend.token_to_id(names.get(byte, chr(byte)))
        assert token is not None, text
        ids.append(token)
    return ids


class Script:
    """A constraint that dictates the answer, and must be asked before each token in order."""

    def __init__(self, token_ids: Sequence[int], vocab_size: int) -> None:
        self.token_ids, self.vocab_size = token_ids, vocab_size
        self.num_asked = 0

    def mask(self, output_ids: Sequence[int]) -> NDArray[np.bool_]:
        count = len(output_ids)
        assert self.num_asked in (count, count + 1), "a token was left out"
        self.num_asked = count + 1
        mask = np.zeros(self.vocab_size, np.bool_)
        mask[self.token_ids[count]] = True
        return mask

    def rollback(self, num_tokens: int) -> None:
        raise AssertionError

    def fork(self) -> Script:
        return Script(self.token_ids, self.vocab_size)


def dictated(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    fields: dict[str, Any],
    resumed: Resumption | None = None,
    prompt: Sequence[int] = PROMPT,
) -> list[RequestOutput]:
    """What each step tells of an answer of these tokens, in an engine of its own."""
    engine = engine_of(tokenizer, step_tokens=16 if resumed is None else 9)
    script = Script(token_ids, engine.vocab_size)
    params = SamplingParams(**{"max_tokens": len(token_ids), "ignore_eos": True, **fields})
    engine.add_request("r", prompt, params, constraint=script, resumed=resumed)
    return run(engine, "r")["r"]
