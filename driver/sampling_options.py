"""The options of commands that generate, and the parameters they stand for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .threads_option import threads_option

if TYPE_CHECKING:
    from ..ir.artifact import Artifact
    from ..runtime.sampling.sampling_params import SamplingParams

_Function = TypeVar("_Function", bound=Callable[..., Any])

_DEFAULT_TOKENS = 256


def parse_token_ids(
    context: click.Context, option: click.Parameter, text: str | None
) -> tuple[int, ...] | None:
    """The ids of an option such as 1,2,3."""
    if text is None:
        return None
    try:
        ids = tuple(int(number) for part in text.split(",") for number in part.split() or [part])
    except ValueError:
        ids = ()
    if not ids:
        raise click.BadParameter(f"takes numbers such as 1,2,3, not {text!r}", context, option)
    return ids


def _parse_bias(
    context: click.Context, option: click.Parameter, texts: tuple[str, ...]
) -> tuple[tuple[int, float], ...]:
    """Pairs of a token id and a bias for its logit, each written as 42=-1.5."""
    pairs = []
    for text in texts:
        token, _, bias = text.partition("=")
        try:
            pairs.append((int(token), float(bias)))
        except ValueError:
            message = f"takes an id and a number such as 42=-1.5, not {text!r}"
            raise click.BadParameter(message, context, option) from None
    return tuple(pairs)


def _token_ids(name: str, text: str) -> Callable[[_Function], _Function]:
    return click.option(name, callback=parse_token_ids, metavar="1,2,3", help=text)


_OPTIONS = (
    click.option("--temperature", type=float, help="0 always selects the most likely token."),
    click.option(
        "--top-p",
        type=float,
        help="Sample from the most likely tokens with this total probability.",
    ),
    click.option("--top-k", type=int, help="Sample from this many most likely tokens; 0 for all."),
    click.option(
        "--min-p",
        type=float,
        help="Minimum probability of a token, relative to the most likely one.",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        help="Above 1: reduce the probability of tokens in prompt and answer.",
    ),
    click.option(
        "--presence-penalty", type=float, help="Subtracted from the logits of tokens in the answer."
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        help="Subtracted from the logit of a token for each occurrence in the answer.",
    ),
    click.option(
        "--logit-bias",
        callback=_parse_bias,
        multiple=True,
        metavar="ID=NUMBER",
        help="Add to the logit of a token; repeatable.",
    ),
    _token_ids("--allowed-token-ids", "Sample only from these tokens."),
    _token_ids("--banned-token-ids", "Never sample these tokens."),
    click.option("--seed", type=int, help="The same seed gives the same text."),
    click.option(
        "--stop", multiple=True, metavar="TEXT", help="Stop before this text; repeatable."
    ),
    _token_ids("--stop-token-ids", "Stop after any of these tokens."),
    click.option(
        "--min-tokens", type=int, help="Minimum number of tokens before the answer can end."
    ),
    click.option("--ignore-eos", is_flag=True, help="Continue after the end-of-text token."),
    threads_option("by default as in the recipe"),
    click.option(
        "--max-context",
        type=click.IntRange(min=2),
        help="Maximum length of prompt and answer; at most the compiled value.",
    ),
    click.option("--kv-memory", metavar="SIZE", help="Memory for the KV cache, such as 1GiB."),
    click.option(
        "--weights",
        type=click.Choice(["auto", "mapped", "copied"]),
        help="Use weights in the file or copy them; by default as in the recipe.",
    ),
    click.option(
        "--verify",
        type=click.Choice(["stamp", "full", "none"]),
        default="stamp",
        show_default=True,
        help="Which files to check first: changed ones, all, or none.",
    ),
)


def generation_options(default_length: str) -> Callable[[_Function], _Function]:
    """Adds all of them to a command, which takes them as keyword arguments.

    `default_length` says in words how long an answer may be where --max-tokens is not given.
    """
    length = click.option(
        "--max-tokens", type=int, help=f"Maximum length of the answer.  [default: {default_length}]"
    )

    def add(function: _Function) -> _Function:
        options = reversed((length, *_OPTIONS))
        return functools.reduce(lambda inner, option: option(inner), options, function)

    return add


def engine_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Removes the arguments of the engine from `options`, and returns them."""
    names = ("threads", "max_context", "kv_memory", "weights")
    return {"on_note": print_note, **{name: options.pop(name) for name in names}}


def print_note(note: str) -> None:
    """Reports on stderr a setting that had to be changed."""
    click.echo(f"note: {note}", err=True)


def sampling_params(options: Mapping[str, Any], artifact: Artifact) -> SamplingParams:
    """The parameters of a request: what was given, otherwise what the checkpoint recommends.

    Raises RequestError where a value is out of range.
    """
    from ..runtime.sampling.sampling_params import SamplingParams, recommended_sampling

    tokenizer = artifact.manifest.tokenizer
    recommended = recommended_sampling(tokenizer.generation if tokenizer else None)
    given = {name: value for name, value in options.items() if value not in (None, ())}
    return SamplingParams(**{**recommended, **given})


def with_default_length(
    params: SamplingParams, num_prompt_tokens: int, max_context: int
) -> SamplingParams:
    """The parameters with a `max_tokens` where none was given: what fits of 256 or `min_tokens`.

    Only a length that somebody asked for may be refused as too long.
    """
    if params.max_tokens is not None:
        return params
    room = max(1, max_context - num_prompt_tokens)
    return replace(params, max_tokens=min(max(_DEFAULT_TOKENS, params.min_tokens), room))
