"""The recipe: every key of `model.yaml` declared once, read strictly, errors with file and line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from ..ir.backends import DEFAULT
from ..ir.errors import RecipeError, UsageError
from ..ir.manifest import LEAST_CONTEXT
from ..ir.schemes import AUTO
from ..ir.sizes import parse_size
from ..runtime.options import MAX_THREADS
from .bundled import bundled_recipes, nearest_name
from .recipe_backends import BackendName, with_section
from .recipe_errors import explain
from .recipe_keys import CountOrAuto, Section, key
from .recipe_quantization import QuantizationSection, scheme_alone
from .texts import BUNDLED, EVALUATION
from .yaml_tree import YamlTree, read_yaml


def _check_passes(value: Any) -> Any:
    if not isinstance(value, (dict, list, str)):
        raise PydanticCustomError("passes", "expected a mapping, a list or a pipeline string")
    return value


def size_or_auto(value: Any) -> Any:
    """Bytes of a text such as `1GiB` or `500 MB`; None for `auto`; others unchanged."""
    if not isinstance(value, str):
        return value
    if value == "auto":
        return None
    try:
        return parse_size(value)
    except ValueError:
        raise PydanticCustomError("size", "not a size such as 1GiB or 500MB") from None


def _exponent(value: Any) -> Any:
    """The number of a text such as `1e-3`, which is none in YAML without a point; others as is."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


_EXPONENT = re.compile(r"\d+[eE][+-]?\d{1,3}")
_BoundOrNone = Annotated[float | None, BeforeValidator(_exponent)]
_SizeOrAuto = Annotated[int | None, BeforeValidator(size_or_auto)]
GGUF = ".gguf"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ONE_OR_MORE = {"ge": 1, "le": 2**31 - 1}


class AccuracySection(Section):
    """How far the artifact's predictions may be from the checkpoint's, on a text."""

    max_kl: _BoundOrNone = key(
        None,
        "The mean KL divergence of the predictions from those of the checkpoint in float32 that is"
        " accepted; a compilation that exceeds it fails.",
        unit="nats",
        gt=0,
    )
    max_perplexity_increase: _BoundOrNone = key(
        None,
        "The relative increase of the perplexity that is accepted, such as 0.01 for 1 %.",
        gt=0,
    )
    evaluation: str = key(
        EVALUATION,
        f"The text to measure on: a file of text or JSONL, relative to this file, or {EVALUATION}.",
        min_length=1,
    )

    @property
    def is_bounded(self) -> bool:
        """Whether there is a bound that the artifact must keep."""
        return self.max_kl is not None or self.max_perplexity_increase is not None


class KvCacheSection(Section):
    """How attention state is kept between steps."""

    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"] = key(
        "auto",
        "Element type of the cache; auto is the same as `dtype`; int8 and fp8 (e4m3, for GPUs) have"
        " one scale per token and KV head.",
    )
    block_size: int = key(32, "Size of a block.", unit="tokens", multiple_of=16, ge=16, le=4096)
    memory: _SizeOrAuto = key(
        None,
        "Memory for the cache; auto is what all sequences need, at most half of the free memory.",
        unit="bytes",
        ge=1,
        le=1 << 50,
    )


class RuntimeSection(Section):
    """The bounds of a step, compiled in, and the defaults of serving."""

    max_context: CountOrAuto = key(
        None,
        "Maximum length of prompt and answer together; auto is the maximum of the model.",
        unit="tokens",
        ge=LEAST_CONTEXT,
        le=_ONE_OR_MORE["le"],
    )
    max_sequences: int = key(
        64, "Maximum number of sequences in a step.", unit="sequences", **_ONE_OR_MORE
    )
    step_tokens: int = key(
        512, "Maximum number of tokens in a step; longer prompts are split.", unit="tokens",
        **_ONE_OR_MORE,
    )  # fmt: skip
    logit_rows: CountOrAuto = key(
        None,
        "Maximum number of rows of logits in a step, at most step_tokens; auto is max_sequences.",
        unit="rows",
        **_ONE_OR_MORE,
    )
    threads: CountOrAuto = key(
        None,
        "Number of threads; auto is one per logical processor.",
        unit="threads",
        ge=1,
        le=MAX_THREADS,
    )
    pin: bool = key(False, "Whether each thread is pinned to a core.")
    itl_target_ms: int = key(
        0,
        "Target for the inter-token latency: while answers are being generated, prompts are split"
        " so that a step takes no longer; 0 for no target.",
        unit="ms",
        ge=0,
        le=3_600_000,
    )
    weights: Literal["auto", "mapped", "copied"] = key(
        "auto",
        "mapped: use the weights in the file, shared between processes; copied: copy them into"
        " huge pages in the background, which is faster; auto: copy them if there are huge pages"
        " and enough memory.",
    )


class Recipe(Section):
    """How to make an artifact of a model: `model.yaml`."""

    model: str = Field(
        description="The checkpoint: a directory or GGUF file, relative to this file, or a hub id.",
        min_length=1,
    )
    revision: str | None = key(None, "Branch, tag or commit on the hub.", min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto",
        "Type of matrices, and by default of the cache; activations are float32. auto is the type"
        " of the checkpoint (float32 for float16). float16 is for the backends onnx, tensorrt and"
        " reference.",
    )
    backend: BackendName = key(DEFAULT, "Backend that generates the code.")
    target: str = key(
        "native",
        "Instruction set to compile for: native, x86-64-v3, x86-64-v4+vnni+bf16, zen4, ...",
    )
    quantization: Annotated[QuantizationSection, BeforeValidator(scheme_alone)] = Field(
        default=QuantizationSection(), description="Quantization of weights."
    )
    accuracy: AccuracySection = Field(
        default=AccuracySection(), description="Bounds of what compiling may lose."
    )
    kv_cache: KvCacheSection = Field(default=KvCacheSection(), description="The KV cache.")
    passes: Annotated[Any, BeforeValidator(_check_passes)] = key(
        {},
        "Changes to the pipeline: NAME: false disables a pass, NAME: {option: value} configures it,"
        " my_module:MyPass: {after: NAME} adds a pass; a list is applied in order, and a string"
        " replaces the pipeline.",
    )
    runtime: RuntimeSection = Field(default=RuntimeSection(), description="Limits and defaults.")
    trust_remote_code: bool = key(False, "Whether Python code from the checkpoint may run.")

    @property
    def logit_rows(self) -> int:
        """Rows of logits in one step at most: no token gives more than one."""
        wanted = self.runtime.logit_rows or self.runtime.max_sequences
        return min(wanted, self.runtime.step_tokens)


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe, the directory that its relative paths start from, and the lines of its keys."""

    recipe: Recipe
    directory: Path
    tree: YamlTree


_SHORT_FOR: Final[Mapping[tuple[str, ...], str]] = {("quantization",): "scheme"}
"""Sections that a text may stand for, and the key that it is the value of."""


def load_recipe(
    source: str | os.PathLike[str] | Recipe, overrides: Iterable[str] | Mapping[str, Any] = ()
) -> LoadedRecipe:
    """Reads a recipe from a file, or makes the default one for a checkpoint or hub id.

    `source` is a file, a directory with a `model.yaml` or a checkpoint in it, a GGUF file, the
    name of a bundled recipe, or a hub id `org/name`; a file or directory goes before a name.
    `overrides` are assignments `a.b=c`, as given to `--set`, or a mapping of `a.b` to values.
    Raises RecipeError.
    """
    if isinstance(source, Recipe):
        tree, directory = YamlTree(source.model_dump(exclude_unset=True)), Path.cwd()
    else:
        tree, directory = _find(os.fspath(source))
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    for assignment in [overrides] if isinstance(overrides, str) else overrides:
        if not isinstance(assignment, str):
            raise UsageError(f"overrides has {assignment!r}", hint='use "key=value", or a mapping')
        tree.set_from_text(assignment, _SHORT_FOR)
        _settle_scheme(tree, assignment)
        _start_from_here(tree, f"--set {assignment}")
    recipe = _validate(tree)
    _check_quantization(recipe.quantization, tree)
    return LoadedRecipe(recipe, directory, tree)


def _settle_scheme(tree: YamlTree, assignment: str) -> None:
    """Lets an option that gives the scheme replace the one under the other name of the key."""
    section = tree.data.get("quantization")
    names = {"quantization.scheme": "default", "quantization.default": "scheme"}
    other = names.get(assignment.partition("=")[0].strip())
    if other is not None and isinstance(section, dict):
        section.pop(other, None)


_PATHS: Final = (("model",), ("quantization", "calibration", "text"), ("accuracy", "evaluation"))
"""Keys whose value may be a path."""


def _start_from_here(tree: YamlTree, option: str) -> None:
    """Lets the paths that an option has set begin in the working directory.

    Names of bundled texts and hub ids stay as they are, unless there is a file of that name.
    """
    for path in _PATHS:
        if tree.place(path) != option:
            continue
        *outer, key = path
        section: Any = tree.data
        for name in outer:
            section = section.get(name) if isinstance(section, dict) else None
        value = section.get(key) if isinstance(section, dict) else None
        if not isinstance(value, str) or not value or value.startswith("~"):
            continue
        is_name = value in BUNDLED if outer else is_hub_id(value) and not value.endswith(GGUF)
        if not is_name or os.path.lexists(value):
            section[key] = os.path.abspath(value)


def _check_quantization(section: QuantizationSection, tree: YamlTree) -> None:
    """RecipeError for options of a scheme where nothing is quantized."""
    if section.is_used:
        return
    unused = (
        ("rules", section.rules),
        ("skip", section.skip),
        ("head", section.head != "auto"),
        ("attention", section.attention != "auto"),
        ("embedding", section.embedding != "auto"),
        ("method", section.method != AUTO),
        ("channel_scaling", section.channel_scaling != AUTO),
        ("calibration", "calibration" in section.model_fields_set),
    )
    for name, given in unused:
        if given:
            raise RecipeError(
                f"quantization.{name} has no effect, because nothing is quantized",
                where=tree.place(("quantization", name)),
                hint="set scheme: int8, or remove the key",
            )


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, with default, unit and documentation of every key."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(),
    }


# Of a model, and often given where a recipe belongs.
_RECIPE_FILES = frozenset({".yaml", ".yml", ".json"})
_MODEL_FILES = frozenset({GGUF, ".safetensors", ".bin", ".pt", ".pth", ".onnx"})


def _find(source: str) -> tuple[YamlTree, Path]:
    path = Path(source)
    if path.exists() or path.suffix in _RECIPE_FILES:
        return _read(path)
    if source in bundled_recipes():
        return _read(bundled_recipes()[source].path)
    if is_hub_id(source):
        return YamlTree({"model": source}), Path.cwd()
    near = nearest_name(path.name)
    suggestion = f"did you mean {near!r}? " if near else ""
    raise RecipeError(
        "no such file, directory or bundled recipe",
        where=source,
        hint=f"{suggestion}`infc recipe list` shows the recipes, and a hub id reads org/name",
    )


def is_hub_id(text: str) -> bool:
    """Whether text that names no file here is the id of a model on the hub."""
    ending = Path(text).suffix
    return bool(HUB_ID.fullmatch(text)) and ending not in _RECIPE_FILES | _MODEL_FILES | {".infc"}


def _read(path: Path) -> tuple[YamlTree, Path]:
    if path.suffix.lower() == GGUF and not path.is_dir():
        return YamlTree({"model": path.name}), path.parent.resolve()
    if path.is_file() and (path.suffix in _MODEL_FILES or path.name == "config.json"):
        raise RecipeError(
            "this is not a recipe",
            where=str(path),
            hint="use a model.yaml, a checkpoint directory with config.json and safetensors, or a"
            " GGUF file",
        )
    if not path.is_dir():
        # The file itself may be a link (as all are in the hub's cache): its name says where it is.
        return read_yaml(path), path.parent.resolve()
    if (path / "model.yaml").is_file():
        return _read(path / "model.yaml")
    if os.path.lexists(path / "config.json"):
        return YamlTree({"model": "."}), path.resolve()
    if (path / "manifest.json").is_file():
        raise RecipeError(
            "this is a compiled artifact, not a recipe", where=str(path), hint=f"`infc run {path}`"
        )
    raise RecipeError(
        "this directory contains neither a model.yaml nor the config.json of a checkpoint, and is"
        " no artifact either",
        where=str(path),
        hint=_below(path),
    )


def _below(path: Path) -> str | None:
    """What to name instead of a directory that only holds the one that was meant."""
    if (path / "snapshots").is_dir():
        return f"name one of the directories in {path / 'snapshots'}"
    inner = [one.parent for name in ("config.json", "model.yaml") for one in path.glob(f"*/{name}")]
    inner += path.glob(f"*{GGUF}")
    return f"did you mean {inner[0]}?" if len(inner) == 1 else None


def _validate(tree: YamlTree) -> Recipe:
    kind = with_section(Recipe, tree, DEFAULT)
    try:
        return kind.model_validate(tree.data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True)
        # A key that is mistyped is both unknown and missing: what stands there says more.
        details.sort(key=lambda one: one["type"] != "extra_forbidden")
        raise explain(tree, details[0], kind) from None
