"""Opens two artifacts under one engine, and lets both compute what it schedules."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from ...ir.artifact import Artifact, Verification, open_artifact
from ...ir.errors import CapacityError, InfcError, UsageError
from ...ir.manifest import Manifest
from ...ir.sizes import format_size
from ...runtime.engine import Engine
from ...runtime.limits import (
    RuntimePlan,
    copies_weights,
    free_bytes,
    memory_kind,
    step_bytes_of,
)
from ...runtime.sampling.sampling_params import SamplingParams
from ...runtime.scheduling.admission import SchedulerLimits
from ...runtime.scheduling.kv_groups import (
    blocks_alone,
    blocks_for,
    common_block_size,
    planned_bytes,
)
from ..bare_executor import open_bare, usual_threads
from ..texts import EVALUATION, read_text, tokenize
from .layout import Layout
from .paired import Clock, PairedExecutor
from .report import Parity, Side

SEQUENCES: Final = 4
PROMPT_TOKENS: Final = 128
NEW_TOKENS: Final = 32
RANDOM: Final = "random tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityOptions:
    """How many sequences run at once, and how long their prompts are at most; None for usual."""

    sequences: int | None = None
    prompt_tokens: int | None = None


def compare_artifacts(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    options: ParityOptions | None = None,
    *,
    verify: Verification = "stamp",
) -> Parity:
    """Both artifacts on the very same steps of an engine, which takes the tokens of the first.

    Raises UsageError where they cannot run the same steps, and what opening an artifact raises.
    """
    options = options or ParityOptions()
    pair = open_artifact(first, verify), open_artifact(second, verify)
    _check_same_model(pair)
    sequences = _at_least_one("batch", options.sequences, SEQUENCES)
    length, new = _lengths(pair, options.prompt_tokens)
    prompts, text = _prompts(pair[0], sequences, length)
    plan, layouts = _plan(pair, sequences, length + new)
    blocks = [layout.num_blocks(plan.num_blocks) for layout in layouts]
    _check_memory(pair, blocks, plan)
    with ExitStack() as stack:
        executors = [
            stack.enter_context(open_bare(artifact, counts, num_threads=plan.num_threads))
            for artifact, counts in zip(pair, blocks, strict=True)
        ]
        paired = PairedExecutor(executors, [layout.translated for layout in layouts])
        vocab_size = pair[0].manifest.model.vocab_size
        engine = Engine(paired, plan, vocab_size=vocab_size)
        stack.callback(engine.close)
        # What runs for the first time allocates memory and wakes threads.
        _run(engine, prompts[:1], min(2, new), "first")
        paired.start_anew()
        cached = _run(engine, prompts, new, "again")
    return _report(pair, paired, plan, text=text, sequences=sequences, cached=cached)


def _check_same_model(pair: tuple[Artifact, Artifact]) -> None:
    """UsageError where the two cannot take the same tokens, or give none."""
    both = f"{pair[0].path} and {pair[1].path}"
    for artifact in pair:
        main = artifact.manifest.main
        if main.vocab_size is None or main.further_inputs or main.logits_of_tokens:
            raise UsageError(
                "its program does not run steps of tokens that give logits",
                where=str(artifact.path),
                hint="compare artifacts of language models",
            )
    sizes = [artifact.manifest.model.vocab_size for artifact in pair]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"the vocabularies differ: {sizes[0]} tokens and {sizes[1]}",
            where=both,
            hint="compare artifacts of one model",
        )


def _at_least_one(name: str, given: int | None, usual: int) -> int:
    if given is not None and given < 1:
        raise UsageError(f"{name} is {given}, below 1")
    return usual if given is None else given


def _lengths(pair: tuple[Artifact, Artifact], prompt_tokens: int | None) -> tuple[int, int]:
    """Tokens of the longest prompt, and new ones behind it; UsageError where they do not fit."""
    contexts = [artifact.manifest.main.limits.max_context for artifact in pair]
    context = min(contexts)
    new = max(1, min(NEW_TOKENS, context // 4))
    usual = max(1, min(PROMPT_TOKENS, context - new))
    prompt = _at_least_one("tokens", prompt_tokens, usual)
    if prompt + new > context:
        raise UsageError(
            f"{prompt} tokens and {new} new ones do not fit into a context of {context}",
            where=str(pair[contexts.index(context)].path),
            hint=f"compare with --tokens {context - new} or less, or compile it with a longer"
            " runtime.max_context",
        )
    return prompt, new


def _prompts(artifact: Artifact, sequences: int, length: int) -> tuple[list[list[int]], str]:
    """Prompts of different lengths, and what they are made of: text, or random tokens."""
    from ...runtime.text.tokenizer import Tokenizer

    vocab_size = artifact.manifest.model.vocab_size
    lengths = [max(1, length - at * length // (2 * sequences)) for at in range(sequences)]
    total = sum(lengths)
    tokenizer = Tokenizer.load(artifact)
    if tokenizer is None:
        draw = random.Random(length)
        stream, name = [draw.randrange(vocab_size) for _ in range(total)], RANDOM
    else:
        text = tokenize(
            read_text(EVALUATION),
            tokenizer,
            vocab_size=vocab_size,
            max_tokens=total,
            least_tokens=1,
        )
        stream, name = [token for one in text.documents for token in one], text.name
        stream *= -(-total // len(stream))
    starts = np.cumsum([0, *lengths])
    return [stream[a:b] for a, b in pairwise(starts)], name


def _plan(
    pair: tuple[Artifact, Artifact], sequences: int, longest: int
) -> tuple[RuntimePlan, tuple[Layout, Layout]]:
    """A plan within the limits of both, over the blocks of the one that has larger ones."""
    mains = [artifact.manifest.main for artifact in pair]
    host = max(mains, key=lambda main: common_block_size(main.resources))
    groups, limits = host.resources, [main.limits for main in mains]
    layouts = tuple(
        Layout.between(groups, main.resources, longest, str(artifact.path))
        for artifact, main in zip(pair, mains, strict=True)
    )
    count = 1 + (sequences + 1) * blocks_for(longest, common_block_size(groups))
    plan = RuntimePlan(
        limits=SchedulerLimits(
            step_tokens=min(one.step_tokens for one in limits),
            max_sequences=min(sequences + 1, *(one.max_sequences for one in limits)),
            logit_rows=min(one.logit_rows for one in limits),
            max_context=min(one.max_context for one in limits),
        ),
        groups=groups,
        num_blocks=(count,) * len(groups),
        num_threads=min(usual_threads(artifact.manifest) for artifact in pair),
        pin=False,
        weights="loaded",
        prefix_reuse=True,
    )
    return plan, (layouts[0], layouts[1])


def _check_memory(
    pair: tuple[Artifact, Artifact], blocks: Sequence[Sequence[int]], plan: RuntimePlan
) -> None:
    """CapacityError where both do not fit beside each other; weights are mapped if they must be."""
    needed: dict[str, int] = {}
    for artifact, counts in zip(pair, blocks, strict=True):
        manifest, main = artifact.manifest, artifact.manifest.main
        kind = memory_kind(manifest)
        takes = planned_bytes(main.resources, counts)
        takes += step_bytes_of(main, plan.limits.step_tokens, kind)
        takes += _weights_bytes(manifest) if copies_weights(manifest) else 0
        needed[kind] = needed.get(kind, 0) + takes
    for kind, takes in needed.items():
        if takes > (free := free_bytes(kind)):
            raise CapacityError(
                f"both artifacts take {format_size(takes)} of memory, and {format_size(free)} are"
                " free",
                hint="compare with a smaller --batch or --tokens",
            )


def _weights_bytes(manifest: Manifest) -> int:
    return manifest.files[manifest.main.weights.file].bytes


def _run(engine: Engine, prompts: Sequence[Sequence[int]], new: int, salt: str) -> int:
    """Prompts of which every row is read, then one of them again; tokens that it found cached."""
    read = SamplingParams(max_tokens=new, ignore_eos=True, prompt_logprobs=0)
    for at, prompt in enumerate(prompts):
        engine.add_request(f"{salt}-{at}", prompt, read, cache_salt=salt)
    _finish(engine)
    # A prefix that is stored, and two choices that share its last block until they write there.
    more = SamplingParams(max_tokens=min(new, 4), ignore_eos=True, n=2)
    engine.add_request(f"{salt}-shared", prompts[0], more, cache_salt=salt)
    return max(_finish(engine), default=0)


def _finish(engine: Engine) -> list[int]:
    """Run all requests to their ends; tokens that each found cached."""
    found = []
    while engine.has_unfinished:
        for output in engine.step():
            if output.error is not None:
                raise InfcError(f"the first artifact gave no token: {output.error}")
            found.append(output.metrics.num_cached_tokens)
    return found


def _report(
    pair: tuple[Artifact, Artifact],
    paired: PairedExecutor,
    plan: RuntimePlan,
    *,
    text: str,
    sequences: int,
    cached: int,
) -> Parity:
    rows, errors = paired.rows, paired.rows.errors
    first, second = (
        _side(artifact, clock, plan) for artifact, clock in zip(pair, paired.clocks, strict=True)
    )
    return Parity(
        model=pair[0].manifest.model.architecture,
        vocab_size=pair[0].manifest.model.vocab_size,
        text=text,
        sides=(first, second),
        threads=plan.num_threads,
        sequences=sequences,
        steps=paired.steps,
        mixed_steps=paired.mixed_steps,
        cached_tokens=cached,
        rows=len(errors),
        not_finite=int(np.isinf(errors).sum()),
        error_median=float(np.median(errors)),
        error_max=float(errors.max()),
        same_top=int(rows.same.sum()),
        worst=rows.worst(),
        stretches=rows.stretches(),
        prefill_ratio=paired.ratio("prefill"),
        decode_ratio=paired.ratio("decode"),
    )


def _side(artifact: Artifact, clock: Clock, plan: RuntimePlan) -> Side:
    manifest, main = artifact.manifest, artifact.manifest.main
    groups, context = main.resources, main.limits.max_context
    quantization = manifest.recipe.get("quantization") or {}
    scheme = quantization.get("scheme") if isinstance(quantization, dict) else quantization
    kinds = dict.fromkeys(str(getattr(group, "dtype", "-")) for group in groups)
    step_tokens = plan.limits.step_tokens
    return Side(
        path=str(artifact.path),
        identity=artifact.identity,
        backend=manifest.backend,
        target=manifest.target.name,
        matrices=str(scheme) if scheme not in (None, "none") else str(manifest.model.dtype),
        kv_type=", ".join(kinds) or "-",
        block_size=common_block_size(groups),
        prefill=clock.prefill,
        decode=clock.decode,
        weights_bytes=_weights_bytes(manifest),
        step_bytes=step_bytes_of(main, step_tokens, memory_kind(manifest)),
        kv_token_bytes=sum(one.bytes_per_block() // one.block_size for one in groups),
        kv_sequence_bytes=sum(blocks_alone(one, context) * one.bytes_per_block() for one in groups),
    )
