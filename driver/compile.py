"""From a recipe to an artifact: every room in turn, or the cache where it has been before."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.artifact import Artifact, ArtifactWriter, open_artifact
from ..ir.errors import ArtifactError
from ..ir.extras import require_compiler
from ..ir.files import check_writable, write_whole
from ..ir.manifest import (
    MAIN,
    Limits,
    Manifest,
    TargetMachine,
    TokenizerFiles,
    canonical_json,
)
from ..ir.sizes import format_size
from ..ir.targets import check_platform
from ..ir.user_cache import make_private
from .added_programs import AddedProgram, ProgramCompiler, check_names
from .cache import LIMIT_VARIABLE, ArtifactCache, checkpoint_identity
from .calibration import check_text, make_calibration
from .compile_job import CompileJob, Dumps, job_key, plan_job, recorded_recipe
from .default_output import changed_keys, keep_another_checkpoint
from .progress import Reporter, as_reporter
from .recipe import Recipe, load_recipe
from .texts import checkpoint_tokenizer
from .workplaces import one_at_a_time, temporary_output

if TYPE_CHECKING:
    from ..codegen.base import CompiledRounding, Emission
    from ..frontend.load import DTypeName
    from ..ir.program import Program
    from ..ir.quantized_pairs import QuantizedPairs
    from ..passes.methods.calibration import Calibration
    from ..passes.methods.feedback import CompiledFeedback
    from ..passes.pipeline import Pipeline
    from ..runtime.text.tokenizer import Tokenizer
    from .certificate import Compiled
    from .optimize import Optimized

_MAX_PAIR_BYTES = 1 << 29
"""How much of the quantised matrices stays in memory from the first run of verification on."""


def compile_model(
    recipe: str | os.PathLike[str] | Recipe,
    output: str | os.PathLike[str] | None = None,
    *,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    force: bool = False,
    verify: bool = True,
    dump_ir_after: str | None = None,
    dump_dir: str | os.PathLike[str] | None = None,
    cache: bool = True,
    progress: Reporter | bool = True,
    programs: Mapping[str, AddedProgram] | None = None,
) -> Artifact:
    """Compiles a model into an artifact, and opens it.

    `recipe` is a `model.yaml`, a checkpoint directory, a GGUF file, a hub id, the name of a bundled
    recipe, or a Recipe; `output` the artifact's directory (by default named after the model, in the
    working directory); `overrides` are assignments such as `runtime.max_context=2048`, or a mapping
    of them. Where no output was named, an artifact of another checkpoint is replaced with `force`
    alone. `verify` checks what each pass did by running the program before and after it.
    `dump_ir_after` names a pass, or `all`: the program after it is written into `dump_dir`.
    `progress` hears of stages and of every choice that was made for you; by default (True) both go
    to stderr as lines, and with False nowhere. `programs` are compiled into the artifact beside the
    model's step, by name; such an artifact is not cached.

    Raises an InfcError that says what was wrong, where, and what to do.
    """
    progress = as_reporter(progress)
    check_platform()
    require_compiler("compiling")
    check_names(programs or {})
    job = plan_job(load_recipe(recipe, overrides), output, verify)
    job = replace(job, programs=programs or {})
    if output is None and not force:
        replaced = keep_another_checkpoint(
            job.output,
            lambda: checkpoint_identity(job.model),
            hint="name another output with -o, or replace it with --force",
        )
        changed = changed_keys(replaced, recorded_recipe(job)) if replaced is not None else []
        if changed:
            names = ", ".join(changed)
            progress.remark(f"replacing {job.output}, which had other options ({names})")
    reusable = cache and dump_ir_after is None
    store = ArtifactCache()
    key = None
    if reusable:
        with progress.stage("look into the cache"):
            store.sweep()
            key = job_key(job, progress)
            found = key is not None and _take(store, key, job, progress)
        if found:
            progress.remark(f"{job.output}: from the cache, which had the same compilation")
            return open_artifact(job.output, "none")  # every digest was right a moment ago
    place = Path(dump_dir) if dump_dir else job.output.with_name(job.output.name + ".dumps")
    if dump_ir_after is not None:
        check_writable(place, "dumps", hint="name another directory with --dump-dir")
    artifact = _write(job, progress, Dumps(dump_ir_after, place))
    _write_timings(job.output, progress)
    if key is not None and (reason := store.add(key, artifact)):
        progress.remark(f"not kept in the cache: {reason}")
    return artifact


def compile_cached(
    model: str | os.PathLike[str] | Recipe,
    *,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    progress: Reporter,
) -> Artifact:
    """Finds the artifact of a model in the cache, or compiles it into the cache.

    The arguments are those of `compile_model`. If the artifact cannot be cached (the cache is
    disabled, or the recipe has a custom pass), it is compiled into a temporary directory that is
    removed when this process ends. Raises the errors of `compile_model`.
    """
    check_platform()
    loaded = load_recipe(model, overrides)
    require_compiler(f"{loaded.recipe.model} is not an artifact, and compiling it")
    store = ArtifactCache()
    job = plan_job(loaded, store.place("new"), verify=True)
    name = recorded_recipe(job)["model"]
    key = job_key(job, progress)
    if key is not None and store.limit_bytes == 0:
        progress.remark(f"not cached: the cache keeps nothing ({LIMIT_VARIABLE})")
        key = None
    if key is None:
        progress.remark(f"compiling {name} for this process only")
        return _write(replace(job, output=temporary_output(store.directory)), progress)
    if found := store.find(key, progress.remark):
        return found

    def wait() -> None:
        progress.remark(f"another process is compiling {name}: waiting for it")

    with one_at_a_time(store.directory, key, wait):
        store.sweep()
        if found := store.find(key):
            return found
        progress.remark(f"compiling {name} (next time, it is taken from the cache)")
        make_private(store.place(key).parent)
        artifact = _write(replace(job, output=store.place(key)), progress)
    store.evict(spare=key)
    return artifact


def _write(job: CompileJob, progress: Reporter, dumps: Dumps | None = None) -> Artifact:
    """Compiles without looking into the cache, and writes the artifact to the output."""
    with ArtifactWriter(job.output) as writer:
        manifest = _build(job, writer, dumps or Dumps(None, Path()), progress)
        with progress.stage("digest and move into place"):
            writer.commit(manifest)
    return open_artifact(job.output, "none")  # its digests are of what was just written


def _take(store: ArtifactCache, key: str, job: CompileJob, progress: Reporter) -> bool:
    """Whether the cache had the artifact, and a copy is in place."""
    cached = store.find(key, progress.remark)
    if cached is None:
        return False
    try:
        with ArtifactWriter(job.output) as writer:
            writer.commit_copy(cached)
    except ArtifactError:
        if cached.path.exists():
            raise
        return False  # another process has just evicted it
    return True


def _build(job: CompileJob, writer: ArtifactWriter, dumps: Dumps, progress: Reporter) -> Manifest:
    """Writes every file of the artifact but the manifest, which it returns."""
    from ..ir.freed_memory import kept_for_reuse
    from ..ir.quantized_pairs import QuantizedPairs
    from ..ir.torch_threads import one_torch_thread
    from .optimize import build_recipe_pipeline, check_dump_name

    with contextlib.ExitStack() as stack:
        with progress.stage("load the compiler"):
            # First what may be refused at once, then seconds of import, shown for what they are.
            pipeline = build_recipe_pipeline(job.loaded, job.plan, job.backend.can_hold)
            check_dump_name(dumps.after, pipeline)
            _check_texts(job)
            compiled = _compiled_rounding(job, stack, progress.remark)
            import torch  # noqa: F401
            import transformers  # noqa: F401
        stack.enter_context(one_torch_thread())
        stack.enter_context(kept_for_reuse())
        pairs = QuantizedPairs(_MAX_PAIR_BYTES, compiled.nearest)
        return _build_files(job, pipeline, writer, dumps, pairs, _feedback(compiled), progress)


def _check_texts(job: CompileJob) -> None:
    """Raises an error for a text that is too short, or a tokenizer that it needs and is missing:
    before the minutes that capturing and calibrating a large model take."""
    from .certificate import evaluation_tokens

    check_text(job.calibration_text, job.loaded, job.model)
    accuracy = job.recipe.accuracy
    if accuracy.is_bounded:
        evaluation_tokens(job.text, checkpoint_tokenizer(job.model), None, accuracy)


def _compiled_rounding(
    job: CompileJob, stack: contextlib.ExitStack, log: Callable[[str], None]
) -> CompiledRounding:
    """Compiled code of the backend, where there is something to quantise."""
    from ..codegen.base import CompiledRounding

    if not job.recipe.quantization.is_used:
        return CompiledRounding()
    return stack.enter_context(job.backend.rounding(log))


def _feedback(compiled: CompiledRounding) -> dict[str, CompiledFeedback]:
    """What methods of quantization use of compiled code, by the names of schemes."""
    from ..ir.schemes import SCHEMES
    from ..passes.methods.feedback import CompiledFeedback

    return {
        name: CompiledFeedback(SCHEMES[name], compiled.nearest[name], fed)
        for name, fed in compiled.feedback.items()
    }


def _build_files(
    job: CompileJob,
    pipeline: Pipeline,
    writer: ArtifactWriter,
    dumps: Dumps,
    pairs: QuantizedPairs,
    rounding: Mapping[str, CompiledFeedback],
    progress: Reporter,
) -> Manifest:
    """As `_build`, once everything is imported."""
    from ..codegen.base import SharedWeights
    from ..ir.text import print_program
    from ..passes.pattern_uses import PatternUses
    from .certificate import certify, evaluation_tokens
    from .optimize import optimize

    directory = writer.path
    patterns = PatternUses() if job.programs else None
    with progress.stage("capture the model"):
        captured = _capture(job, job.recipe.dtype, progress.remark)
    files = _write_tokenizer(job, directory, captured.spec.vocab_size, progress)
    tokenizer = _opened(files, directory) if files is not None else None
    text = evaluation_tokens(job.text, tokenizer, captured.spec.vocab_size, job.recipe.accuracy)
    with contextlib.ExitStack() as stack:
        begun: list[object] = []

        def begin(result: Program) -> None:
            begun.append(stack.enter_context(job.backend.begin(result, job.target, directory)))

        with progress.stage("run the passes"):
            calibration = _calibration(job, captured, directory, stack, rounding, progress)
            optimized = optimize(
                captured,
                pipeline,
                job.target,
                verify=job.verify,
                dump_ir_after=dumps.after,
                dump_dir=dumps.directory,
                progress=progress,
                pairs=pairs,
                on_result=begin,
                calibration=calibration,
                patterns=patterns,
                say_distances=isinstance(text, str),
            )
        program = optimized.program
        job.backend.check(program, job.target)
        with progress.stage("emit code and weights"):
            emission = _emit(job, program, directory, progress, pairs, begun[0])
        (directory / "captured.ir").write_text(print_program(captured), encoding="utf-8")
        (directory / "program.ir").write_text(print_program(program), encoding="utf-8")
        manifest = _manifest(job, program, emission, files)
        if job.programs:
            shared = SharedWeights(program, {one.name: one for one in emission.weights})
            compiler = ProgramCompiler(
                job, pipeline, directory, shared, pairs, calibration, patterns, dumps, progress
            )
            manifest = compiler.add_to(manifest, captured)
        compiled = _compiled(job, captured, pipeline, optimized, manifest, writer)
        if not (job.recipe.accuracy.is_bounded or (job.verify and compiled.is_lossy)):
            text = "nothing was quantized" if job.verify else "verification was switched off"
        certificate = certify(
            compiled,
            text,
            job.recipe.accuracy,
            pairs,
            progress,
            job.recipe.quantization.default_max_kl,
        )
    report = {
        **optimized.report,
        "toolchain": dict(emission.toolchain),
        "certificate": certificate,
    }
    (directory / "report.json").write_text(canonical_json(report), encoding="utf-8")
    return manifest


def _compiled(
    job: CompileJob,
    captured: Program,
    pipeline: Pipeline,
    optimized: Optimized,
    manifest: Manifest,
    writer: ArtifactWriter,
) -> Compiled:
    """What was made, for the certificate."""
    from .certificate import Compiled

    return Compiled(
        captured=captured,
        final=optimized.program,
        passes=tuple(pipeline),
        context=optimized.context,
        lossy=optimized.lossy,
        manifest=manifest,
        open=lambda: writer.preview(manifest),
    )


def _calibration(
    job: CompileJob,
    program: Program,
    directory: Path,
    stack: contextlib.ExitStack,
    rounding: Mapping[str, CompiledFeedback],
    progress: Reporter,
) -> Calibration | None:
    if job.calibration_text is None:
        if job.recipe.quantization.ignores_calibration:
            progress.remark("quantization.calibration has no effect with method: nearest")
        return None
    made = make_calibration(
        job.calibration_text, job.loaded, job.model, program, directory, progress.remark, rounding
    )
    if made is not None:
        stack.callback(made.spill.close)
    return made


def _capture(job: CompileJob, dtype: DTypeName, log: Callable[[str], None]) -> Program:
    from ..frontend.load import load_model

    runtime = job.recipe.runtime
    return load_model(
        job.model,
        dtype=dtype,
        max_context=runtime.max_context,
        step_tokens=runtime.step_tokens,
        logit_rows=job.recipe.logit_rows,
        allow_remote_code=job.recipe.trust_remote_code,
        log=log,
    )


def _emit(
    job: CompileJob,
    program: Program,
    directory: Path,
    progress: Reporter,
    pairs: QuantizedPairs,
    begun: object,
) -> Emission:
    from ..codegen.base import EmitOptions

    def advance(done: int, total: int) -> None:
        progress.advance(done, total, f"{format_size(done)} of {format_size(total)} of weights")

    def wait(what: str) -> None:
        progress.advance(1, 1, f"all weights are written, waiting for {what}")

    options = EmitOptions(
        on_weight=advance, on_wait=wait, pairs=pairs, begun=begun, verify=job.verify
    )
    return job.backend.emit(program, job.target, directory, options)


def _write_tokenizer(
    job: CompileJob, directory: Path, vocab_size: int, progress: Reporter
) -> TokenizerFiles | None:
    from ..frontend.tokenizer import write_tokenizer
    from ..runtime.sampling.sampling_params import notes_on_ignored

    files = write_tokenizer(job.model, directory, vocab_size=vocab_size, log=progress.remark)
    for line in notes_on_ignored(files.generation if files else None):
        progress.remark(line)
    return files if files is None else _checked(files, directory, progress)


def _checked(files: TokenizerFiles, directory: Path, progress: Reporter) -> TokenizerFiles:
    """The tokenizer as serving will open it, without templates that could never be used."""
    tokenizer = _opened(files, directory)
    for field in ("chat_template", "tool_template"):
        name = getattr(files, field)
        if name is None:
            continue
        problem = tokenizer.template_problem(with_tools=field == "tool_template")
        if problem is not None:
            progress.remark(f"{Path(name).name} is left out: {problem}")
            (directory / name).unlink()
            gone: dict[str, Any] = {field: None}
            files = replace(files, **gone)
    return files


def _opened(files: TokenizerFiles, directory: Path) -> Tokenizer:
    from ..runtime.text.tokenizer import Tokenizer

    return Tokenizer.open(directory, files, lambda name: (directory / name).read_text("utf-8"))


def _manifest(
    job: CompileJob, program: Program, emission: Emission, tokenizer: TokenizerFiles | None
) -> Manifest:
    from .. import __version__

    runtime = job.recipe.runtime
    limits = Limits(
        max_context=program.spec.max_context,
        step_tokens=runtime.step_tokens,
        max_sequences=runtime.max_sequences,
        logit_rows=job.recipe.logit_rows,
    )
    return Manifest(
        infc_version=__version__,
        recipe=recorded_recipe(job),
        model=program.spec,
        backend=job.backend.name,
        target=TargetMachine(job.target.name, job.target.features),
        programs={MAIN: emission.compiled(program, limits)},
        tokenizer=tokenizer,
        checkpoint=checkpoint_identity(job.model),
    )


def _write_timings(output: Path, progress: Reporter) -> None:
    """Times go beside the artifact: in it, two compilations would never be equal."""
    path = output.with_name(f"{output.name}.timings.json")
    text = json.dumps({name: round(seconds, 3) for name, seconds in progress.seconds.items()})
    try:
        write_whole(path, text + "\n")
    except OSError as error:
        progress.remark(f"{path}: not written: {error.strerror}")
