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
    from ..runtime.sampling_params import SamplingParams

_Function = TypeVar("_Function", bound=Callable[..., Any])

_DEFAULT_TOKENS = 256


def parse_token_ids(
    context: click.Context, option: click.Parameter, text: str | None
) -> tuple[int, ...] | None:
    """The ids of an option such as 1,2,3."""
    if text is None:
        return None
    try:
        ids = tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        ids = ()
    if not ids:
        raise click.BadParameter(f"takes numbers such as 1,2,3, not {text!r}", context, option)
    return ids


def _parse_bias(
    context: click.Context, option: click.Parameter, texts: tuple[str, ...]
) -> tuple[tuple[int, float], ...]:
    """Pairs of a token id and what is added to its logit, each written as 42=-1.5."""
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
    click.option("--temperature", type=float, help="0 always takes the likeliest token."),
    click.option("--top-p", type=float, help="Keep the likeliest tokens of this total."),
    click.option("--top-k", type=int, help="Keep this many tokens; 0 keeps all."),
    click.option(
        "--min-p", type=float, help="Keep tokens at least this many times as likely as the best."
    ),
    click.option(
        "--repetition-penalty", type=float, help="Above 1 shuns tokens of prompt and answer."
    ),
    click.option(
        "--presence-penalty", type=float, help="Taken from every token that the answer holds."
    ),
    click.option(
        "--frequency-penalty", type=float, help="Taken from a token each time the answer holds it."
    ),
    click.option(
        "--logit-bias",
        callback=_parse_bias,
        multiple=True,
        metavar="ID=NUMBER",
        help="Added to a token's logit; repeatable.",
    ),
    _token_ids("--allowed-token-ids", "Choose among these tokens only."),
    _token_ids("--banned-token-ids", "Never choose these tokens."),
    click.option("--seed", type=int, help="The same seed gives the same text."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable."),
    _token_ids("--stop-token-ids", "End after one of these tokens."),
    click.option("--min-tokens", type=int, help="Do not end before so many tokens."),
    click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-text token."),
    threads_option("as the recipe says if not given"),
    click.option(
        "--max-context",
        type=click.IntRange(min=2),
        help="Longest sequence, at most the compiled one.",
    ),
    click.option("--kv-memory", metavar="SIZE", help="Memory for attention state, such as 1GiB."),
    click.option(
        "--weights",
        type=click.Choice(["auto", "mapped", "copied"]),
        help="Where weights lie; as the recipe says if not given.",
    ),
    click.option(
        "--verify",
        type=click.Choice(["stamp", "full", "none"]),
        default="stamp",
        show_default=True,
        help="Which files are read whole first: changed ones, all, none.",
    ),
)


def generation_options(default_length: str) -> Callable[[_Function], _Function]:
    """Adds all of them to a command, which takes them as keyword arguments.

    `default_length` says in words how long an answer may be where --max-tokens is not given.
    """
    length = click.option(
        "--max-tokens", type=int, help=f"Longest answer, in tokens.  [default: {default_length}]"
    )

    def add(function: _Function) -> _Function:
        options = reversed((length, *_OPTIONS))
        return functools.reduce(lambda inner, option: option(inner), options, function)

    return add


def engine_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Takes out of `options` what the engine is opened with, beside the artifact."""
    names = ("threads", "max_context", "kv_memory", "weights")
    return {"on_note": print_note, **{name: options.pop(name) for name in names}}


def print_note(note: str) -> None:
    """Say on stderr what had to be decided otherwise than asked."""
    click.echo(f"note: {note}", err=True)


def sampling_params(options: Mapping[str, Any], artifact: Artifact) -> SamplingParams:
    """The parameters of a request: what was given, else what the checkpoint recommends.

    Raises RequestError where a value is out of range.
    """
    from ..runtime.sampling_params import SamplingParams, recommended_sampling

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
