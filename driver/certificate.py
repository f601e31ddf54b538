"""The certificate of an artifact: what its weights are held in, and what that costs on a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..codegen.registry import get_backend
from ..ir.errors import InfcError, PassError, RequestError, TargetError
from ..ir.resources import is_coded
from ..ir.targets import check_target
from .evidence import (
    MAX_TOKENS,
    Evidence,
    Figures,
    StageEvidence,
    gather_evidence,
    rounded,
    text_budget,
)
from .explain.certificate_text import figures_text
from .held_formats import held_formats
from .texts import Text, TokenText, tokenize

if TYPE_CHECKING:
    from ..ir.artifact import Artifact
    from ..ir.manifest import Manifest
    from ..ir.program import Program
    from ..ir.quantized_pairs import QuantizedPairs
    from ..passes.base import Pass, PassContext
    from ..passes.lossy_stages import LossyRuns, LossyStage
    from ..runtime.text.tokenizer import Tokenizer
    from .progress import Reporter
    from .recipe import AccuracySection

_CALIBRATING = "calibrate-weights"
LEAST_TOKENS = 64
"""Of an evaluation text."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """What was compiled, as the certificate needs it.

    `open` gives the artifact that is being written.
    """

    captured: Program
    final: Program
    passes: tuple[Pass, ...]
    context: PassContext
    lossy: tuple[LossyStage, ...]
    manifest: Manifest
    open: Callable[[], Artifact]

    @property
    def is_lossy(self) -> bool:
        """Whether a pass or the KV cache loses more than the rounding of its element type."""
        return bool(self.lossy) or any(is_coded(group.dtype) for group in self.final.resources)


def evaluation_tokens(
    text: Text, tokenizer: Tokenizer | None, vocab_size: int | None, accuracy: AccuracySection
) -> TokenText | str:
    """The tokens that an artifact is measured on, or why it cannot be; an error if it must be.

    `vocab_size` is the model's; None where it is not known yet.
    """
    problem = "the checkpoint has no tokenizer"
    try:
        if tokenizer is not None:
            return tokenize(
                text,
                tokenizer,
                vocab_size=vocab_size,
                max_tokens=MAX_TOKENS,
                least_tokens=LEAST_TOKENS,
            )
    except (InfcError, RequestError) as error:
        if accuracy.is_bounded:
            raise
        problem = str(error)
    if accuracy.is_bounded:
        raise _not_measured(problem)
    return problem


def certify(
    compiled: Compiled,
    text: TokenText | str,
    accuracy: AccuracySection,
    pairs: QuantizedPairs,
    progress: Reporter,
    default_max_kl: float | None = None,
) -> dict[str, Any]:
    """The certificate as plain data; PassError if the artifact breaks a bound of the recipe.

    `text` is what to measure on, or why nothing is measured. `default_max_kl` is a bound where the
    recipe has none, if the whole model is measured; that it was not checked is said and recorded.
    """
    bounds = {name: value for name, *_ in _BOUNDS if (value := getattr(accuracy, name)) is not None}
    calibration = _calibration_data(compiled.context)
    found: Evidence | str = text if isinstance(text, str) else ""
    if not isinstance(text, str):
        with progress.stage("measure the accuracy"):
            found = _measured(compiled, text, pairs, progress)
    if isinstance(found, Evidence):
        _say(found, text, progress)
        check_bounds(found, accuracy)
        if bounds and (doubt := _doubt(found)):
            progress.remark(f"the bounds were checked on {found.what} alone: {doubt}")
    elif accuracy.is_bounded:
        raise _not_measured(found)
    elif compiled.is_lossy:
        progress.remark(f"the accuracy was not measured: {found}")
    unchecked: dict[str, Any] = {}
    if default_max_kl is not None and accuracy.max_kl is None:
        if reason := _unchecked(found):
            unchecked = {"max_kl": default_max_kl, "reason": reason}
            progress.remark(f"the bound of {default_max_kl:g} for 4 bits was not checked: {reason}")
        elif isinstance(found, Evidence):
            check_default(found, default_max_kl)
            bounds["max_kl"] = default_max_kl
    held = held_formats(compiled.final)
    return {
        "checkpoint": compiled.manifest.checkpoint,
        "against": "the checkpoint in float32",
        "formats": held.as_data(),
        "bits_per_weight": round(held.bits_per_weight, 3),
        "bounds": bounds,
        **({"unchecked": unchecked} if unchecked else {}),
        "calibration": calibration,
        **_evidence_data(found, text),
    }


def _doubt(found: Evidence) -> str:
    """Why figures may say little about the whole artifact; empty if they are its own."""
    if not found.is_whole:
        return "it is another model than the whole, which `infc eval --against source` measures"
    return "" if found.artifact else found.reason or ""


def _unchecked(found: Evidence | str) -> str:
    """Why a bound that nobody asked for is not checked; empty if it can be."""
    if isinstance(found, str):
        return found
    if found.figures is None:
        return found.reason or "nothing ran"
    return "" if found.is_whole else f"only {found.what} were run"


def _calibration_data(context: PassContext) -> dict[str, Any] | None:
    """The text that weights were calibrated on, if they were."""
    calibration = context.calibration
    if calibration is None or not calibration.has_results:
        return None
    return {**calibration.description, "tokens": calibration.tokens}


def _evidence_data(found: Evidence | str, text: TokenText | str) -> dict[str, Any]:
    if isinstance(found, str) or isinstance(text, str) or found.figures is None:
        reason = found if isinstance(found, str) else found.reason
        return {"measured": None, "reason": reason, "figures": None, "passes": []}
    return {
        "measured": "the artifact" if found.artifact else "the program",
        "what": found.what,
        **({"reason": found.reason} if found.reason else {}),
        "evaluation": {**text.as_data(), "tokens": found.tokens},
        "figures": found.figures.as_data(),
        "passes": [stage.as_data() for stage in found.stages],
    }


def _measured(
    compiled: Compiled, text: TokenText, pairs: QuantizedPairs, progress: Reporter
) -> Evidence | str:
    """The evidence, or why there is none: what fails here need not lose the finished artifact."""
    try:
        return _measure(compiled, text, pairs, progress)
    except (InfcError, OSError, MemoryError) as error:
        return str(error) or type(error).__name__


def _measure(
    compiled: Compiled, text: TokenText, pairs: QuantizedPairs, progress: Reporter
) -> Evidence | str:
    from ..passes.lossy_stages import choose_runs

    budget = text_budget(compiled.manifest.main.limits.max_context, text.num_tokens)
    runs = choose_runs(
        compiled.captured,
        compiled.final,
        compiled.passes,
        compiled.context,
        compiled.lossy,
        budget,
    )
    if isinstance(runs, str):
        return runs
    artifact = _artifact_to_run(compiled, runs)
    if isinstance(artifact, str) and not runs.stages:
        return artifact
    return gather_evidence(runs, text, pairs, artifact, progress, budget.window)


def _artifact_to_run(compiled: Compiled, runs: LossyRuns) -> Artifact | str:
    """The artifact, where it can run here and there is something to compare it with."""
    manifest = compiled.manifest
    if not runs.is_whole:
        return f"only {runs.what} were run: the whole model takes too long without being compiled"
    backend = get_backend(manifest.backend, manifest.recipe)
    if backend.interprets and runs.stages:
        return f"the backend {manifest.backend} computes what the program says"
    if backend.device != "cpu" and (reason := backend.unable_here()) is not None:
        return f"it was compiled for another machine: {reason}"
    try:
        check_target(manifest.target.features)
    except TargetError as error:
        return f"it was compiled for another processor: {error.message}"
    return compiled.open()


def check_bounds(found: Evidence, accuracy: AccuracySection) -> None:
    """PassError that names the figure, the bound, the pass and the layer, if a bound is broken."""
    if (figures := found.figures) is None:
        if accuracy.is_bounded:
            raise _not_measured(found.reason or "nothing ran")
        return
    for name, key, spell in _BOUNDS:
        bound, value = getattr(accuracy, name), _figure(figures, key)
        if bound is None or value <= bound:  # NaN is beyond every bound
            continue
        where, origin = _begins(_breaking(found.stages, key, bound), found)
        raise PassError(
            f"{spell(value)} exceeds accuracy.{name}: {bound:g}, measured on {found.what}"
            f" over {figures.tokens} tokens{origin}",
            where=where,
            hint=_hint(found),
        )


def check_default(found: Evidence, max_kl: float) -> None:
    """PassError if the model is further from its source than is accepted by default."""
    figures = found.figures
    if figures is None or figures.kl_mean <= max_kl:
        return
    where, origin = _begins(_breaking(found.stages, "kl_mean", max_kl), found)
    raise PassError(
        f"{_spell_kl(figures.kl_mean)} exceeds {max_kl:g}, which is accepted by default with"
        f" 4 bits, measured on {found.what} over {figures.tokens} tokens{origin}",
        where=where,
        hint="quantize less (int8, or some matrices by quantization.rules), or set accuracy.max_kl",
    )


def _breaking(stages: Sequence[StageEvidence], key: str, bound: float) -> StageEvidence | None:
    """The first pass from which on a bound is exceeded: what a later pass mends does not count."""
    first = None
    for stage in reversed(stages):
        if _figure(stage.figures, key) <= bound:
            break
        first = stage
    return first


def _hint(found: Evidence) -> str:
    if not found.stages:
        return "accept more, or use dtype: float32 and kv_cache.dtype: auto"
    more = "accept more, quantize less"
    if any(stage.name == _CALIBRATING for stage in found.stages):
        return f"{more}, or calibrate on more tokens"
    return f"{more}, or calibrate with quantization.method=gptq"


def _begins(breaking: StageEvidence | None, found: Evidence) -> tuple[str, str]:
    """The pass that exceeded a bound, and in words where its error begins."""
    if breaking is None and not found.stages:
        return "the artifact", "; no pass is lossy: it is the rounding of dtype or kv_cache.dtype"
    # Passes after it may have mended some of its error: layers are those of what was measured.
    last = found.stages[-1]
    stage = breaking or last
    if (place := last.origin()) is None:
        return stage.name, ""
    errors = dict(last.errors)
    places = list(errors)
    before = errors[places[places.index(place) - 1]] if places.index(place) else 0.0
    rise = f"(from {rounded(before)} to {rounded(errors[place])})"
    return stage.name, f"; the error begins in {place}, where it grows most {rise}"


def _figure(figures: Figures, key: str) -> float:
    value = getattr(figures, key)
    assert isinstance(value, float)
    return value


def _spell_kl(value: float) -> str:
    return f"a KL divergence of {rounded(value)}"


def _spell_increase(value: float) -> str:
    return f"a perplexity increase of {rounded(value)}"


_BOUNDS = (
    ("max_kl", "kl_mean", _spell_kl),
    ("max_perplexity_increase", "perplexity_increase", _spell_increase),
)


def _not_measured(reason: str) -> PassError:
    return PassError(
        f"the accuracy cannot be measured: {reason}",
        where="accuracy",
        hint="remove the bounds from the recipe",
    )


def _say(found: Evidence, text: TokenText | str, progress: Reporter) -> None:
    assert not isinstance(text, str)
    for stage in found.stages:
        progress.remark(f"{stage.name} is lossy: {figures_text(stage.figures.as_data())}")
    if found.artifact is not None:
        progress.remark(f"the artifact: {figures_text(found.artifact.as_data())}")
    progress.remark(f"against the checkpoint in float32, on {text.name} ({found.what})")
