"""What `manifest.json` says: frozen dataclasses, and the one text form whose digest is checked."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from .errors import ArtifactError, UsageError
from .manifest_values import check_values
from .manifest_versions import OLDEST, VERSION, to_this_version
from .nearest import did_you_mean
from .plain_data import decode, encode, unknown_keys
from .program import HIDDEN, LOGITS, STEP_INPUTS, ModelSpec, Program, Value
from .resources import Resource
from .shapes import parse_type
from .types import Sym, TensorType, handed_over

FORMAT = "infc-artifact"
MANIFEST_NAME = "manifest.json"
MAIN: Final = "main"
"""The name of the program that is the model's step."""


def folder_of(program: str) -> str:
    """Where in an artifact the files of a program are, with a slash: the main one's at the top."""
    return "" if program == MAIN else f"programs/{program}/"


@dataclass(frozen=True, slots=True)
class TargetMachine:
    """The machine an artifact was built for: a name, and every feature its code may use."""

    name: str
    features: tuple[str, ...]


LEAST_CONTEXT = 2  # a token to read and one to write


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds that were compiled in: tokens, sequences and rows of logits of one step.

    `sizes` are the most of each symbol but T (`step_tokens`) and R (`logit_rows`).
    """

    max_context: int
    step_tokens: int
    max_sequences: int
    logit_rows: int
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Entry:
    """What runs a step: a file of the kind that the backend makes, and the ABI of code."""

    kind: str
    file: str
    abi: int | None = None


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """The file of weights, and the names in the order the code indexes them.

    Those in `shared` are in the file of the main program.
    """

    file: str
    tensors: tuple[str, ...]
    shared: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledProgram:
    """One of an artifact's programs: what runs it, and what it takes and gives.

    `inputs` and `outputs` are the types of arrays by name, as an executor takes and returns them
    (`handed_over`), e.g. `{"logits": "f32[R, 49152]"}`. `resources` are kept between steps, in
    blocks. `rank` is which part of a model's step it is, where several devices compute one.
    """

    entry: Entry
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    limits: Limits
    arena_bytes: int
    weights: WeightsFile
    resources: tuple[Resource, ...]
    rank: int | None = None

    @property
    def further_inputs(self) -> dict[str, TensorType]:
        """The inputs beside those that every step has, by name, sorted."""
        return _further(self.inputs, STEP_INPUTS)

    @property
    def further_outputs(self) -> dict[str, TensorType]:
        """The outputs beside logits and hidden states, by name, sorted."""
        return _further(self.outputs, (LOGITS, HIDDEN))

    @property
    def logits_of_tokens(self) -> bool:
        """Whether there is a row of logits for each token, not for some of them."""
        shape = parse_type(self.outputs[LOGITS]).shape if LOGITS in self.outputs else ()
        return shape[:1] == (Sym("T"),)

    @property
    def vocab_size(self) -> int | None:
        """Elements of a row of logits; None where it gives none."""
        return self._row_width(LOGITS)

    @property
    def hidden_width(self) -> int | None:
        """Elements of a row of hidden states; None where it gives none."""
        return self._row_width(HIDDEN)

    def _row_width(self, name: str) -> int | None:
        shape = parse_type(self.outputs[name]).shape if name in self.outputs else ()
        return shape[-1] if shape and isinstance(shape[-1], int) else None


def _further(types: Mapping[str, str], known: Collection[str]) -> dict[str, TensorType]:
    return {name: parse_type(types[name]) for name in sorted(types) if name not in known}


def input_types(program: Program) -> dict[str, str]:
    """The `inputs` of a CompiledProgram."""
    return {value.name: _handed_over(value) for value in program.inputs}


def output_types(program: Program) -> dict[str, str]:
    """The `outputs` of a CompiledProgram."""
    return {name: _handed_over(value) for name, value in program.named_outputs().items()}


def _handed_over(value: Value) -> str:
    return str(handed_over(value.type))


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Where the tokenizer lies, the ids that begin and end a text, and what templates read.

    `special_tokens` are the tokenizer's own, by the names that templates use (`bos_token`, ...);
    None in artifacts of versions that did not keep them.
    """

    file: str
    bos: int | None
    eos: tuple[int, ...]
    chat_template: str | None
    generation: Mapping[str, Any] | None = None
    special_tokens: Mapping[str, str] | None = None
    tool_template: str | None = None


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size in bytes, and one SHA-256, or for a large file one a chunk."""

    bytes: int
    sha256: str | None = None
    chunk_bytes: int | None = None
    chunks: tuple[str, ...] | None = None

    def plain(self) -> dict[str, Any]:
        """What the manifest has: thousands of lines of null would only hide the rest."""
        pairs = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: item for name, item in pairs if item is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that a reader may rely on; `docs/design/manifest.md` describes each field."""

    infc_version: str
    recipe: Mapping[str, Any]
    model: ModelSpec
    backend: str
    target: TargetMachine
    programs: Mapping[str, CompiledProgram]
    tokenizer: TokenizerFiles | None
    checkpoint: str | None = None
    files: Mapping[str, FileDigest] = dataclasses.field(default_factory=dict)

    @property
    def main(self) -> CompiledProgram:
        """The model's step."""
        return self.programs[MAIN]

    def program(self, name: str) -> CompiledProgram:
        """The program of that name; UsageError with the nearest name where there is none."""
        if name not in self.programs:
            hint = did_you_mean(name, self.programs, f"it has {', '.join(self.programs)}")
            raise UsageError(f"the artifact has no program {name!r}", hint=hint)
        return self.programs[name]

    def with_main(self, **changes: Any) -> Manifest:
        """The manifest with changes of the main program."""
        main = dataclasses.replace(self.main, **changes)
        return dataclasses.replace(self, programs={**self.programs, MAIN: main})

    def shared_bytes(self, program: CompiledProgram) -> int:
        """Bytes of the main program's file of weights, if the program reads any of them there."""
        return self.files[self.main.weights.file].bytes if program.weights.shared else 0

    def weight_files(self) -> tuple[str, ...]:
        """The files of weights of all programs."""
        return tuple(dict.fromkeys(one.weights.file for one in self.programs.values()))

    def to_text(self) -> str:
        """The exact text of `manifest.json`, its own digest included."""
        data = {"format": FORMAT, "version": VERSION, **encode(self)}
        return canonical_json({**data, "digest": _digest_of(data)})


def parse_manifest(text: str, *, where: str) -> Manifest:
    """Reads the text of a manifest, of this version or an older one.

    Raises ArtifactError where it is not one, was made by a newer infc, or differs by a single
    character from what its digest stands for.
    """
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _damaged(f"not valid JSON: {error}", where) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise _damaged("not the manifest of an infc artifact", where)
    version = data.get("version")
    if type(version) is not int or version < OLDEST:
        raise _damaged(f"there is no format version {version!r}", where)
    if version > VERSION:
        what = f"its format has version {version}, and this infc reads up to {VERSION}"
        raise _of_newer_infc(data, what, where)
    digest = data.pop("digest", None)
    try:
        # The text itself must be the canonical one: a changed blank is a change too.
        intact = digest == _digest_of(data) and canonical_json({**data, "digest": digest}) == text
    except (ValueError, RecursionError) as error:  # numbers beyond all bounds, lists in lists ...
        raise _damaged(f"not valid JSON: {error}", where) from None
    if not intact:
        raise _damaged("the text does not match its digest", where)
    del data["format"], data["version"]
    try:
        data = to_this_version(data, version)
        strange = sorted(unknown_keys(Manifest, data))
    except RecursionError as error:
        raise _damaged(str(error), where) from None
    if strange:
        what = f"it has the key {strange[0]!r}, which this infc does not know"
        raise _of_newer_infc(data, what, where)
    try:
        manifest = decode(Manifest, data, "manifest")
        assert isinstance(manifest, Manifest)
        check_values(manifest)
    except (TypeError, ValueError, RecursionError) as error:
        raise _damaged(str(error), where) from None
    return manifest


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and one line break at the end: equal data, equal text."""
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _digest_of(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _of_newer_infc(data: Mapping[str, Any], what: str, where: str) -> ArtifactError:
    """What is whole and cannot be read was written by an infc that knows more."""
    version = data.get("infc_version")
    writer = f" ({version})" if isinstance(version, str) else ""
    return ArtifactError(
        f"made by a newer infc{writer}: {what}",
        where=where,
        hint="open it with that version of infc, or compile the model again with this one",
    )


def _damaged(message: str, where: str) -> ArtifactError:
    return ArtifactError(message, where=where, hint="the artifact is damaged: compile it again")
