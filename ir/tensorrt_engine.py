"""`engine.json` beside an engine of TensorRT: what built it, for which chips and steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from .errors import ArtifactError, ToolchainError
from .extras import TENSORRT

ENGINE_FILE: Final = "model.engine"
FACTS_FILE: Final = "engine.json"
LIBRARIES: Final = ("tensorrt_rtx", "tensorrt")
"""The modules that build and run engines, in the order in which they are looked for."""
SLOTS: Final = "slots"
"""The form of keys and values: a slot for each sequence."""
ALIGNMENT: Final = 256
"""Of the address of an array that an engine is bound to, slots from any of them on included."""

_HINT: Final = "the artifact is damaged, or of a newer infc: compile it again, or update infc"


@dataclass(frozen=True, slots=True)
class StepProfile:
    """The most of a step that one optimization profile of an engine takes.

    `rows` of attention with `queries` tokens each, `tokens` in all, and `logit_rows`. In a `decode`
    profile these are the only sizes; in the others, steps may have fewer of each.
    """

    decode: bool
    rows: int
    queries: int
    tokens: int
    logit_rows: int


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine is.

    `chips` are the targets it was built for. `weights` are the names of its inputs that are
    weights. `facts` are those of its program (`ir/step_facts.py`).
    """

    library: str
    version: str
    chips: tuple[str, ...]
    num_bytes: int
    kv: str
    profiles: tuple[StepProfile, ...]
    weights: tuple[str, ...]
    facts: Mapping[str, Any]

    def text(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def parse(cls, text: str, *, where: str) -> EngineFacts:
        """What a file says; ArtifactError for anything that this infc does not write."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _wrong("is no JSON", where) from error
        names = {one.name for one in fields(cls)}
        if not isinstance(data, dict) or data.keys() != names:
            raise _wrong("does not have the keys of an engine", where)
        for name in ("library", "version", "kv"):
            if not isinstance(data[name], str):
                raise _wrong(f"has a {name} that is no text", where)
        for name in ("chips", "weights"):
            if not _is_list(data[name], str):
                raise _wrong(f"has {name} that are no texts", where)
        has_size = _is_count(data["num_bytes"]) and data["num_bytes"] > 0
        if not has_size or not isinstance(data["facts"], dict):
            raise _wrong("has no size or no facts", where)
        if data["library"] not in LIBRARIES:
            raise _wrong(f"names the library {data['library']!r}", where)
        if data["kv"] != SLOTS:
            raise _wrong(f"keeps keys and values in the form {data['kv']!r}", where)
        if not _is_list(data["profiles"], dict) or not data["profiles"]:
            raise _wrong("has no profiles", where)
        profiles = tuple(_profile(one, where) for one in data["profiles"])
        lists = {name: tuple(data[name]) for name in ("chips", "weights")}
        return cls(**{**data, **lists, "profiles": profiles})

    def check_version(self, library: str, version: str, *, where: str) -> None:
        """ArtifactError for an engine of another library, or of another version of it.

        Engines are not portable between versions: what reads one has to be what wrote it.
        """
        if (library, version) == (self.library, self.version):
            return
        package = self.library.replace("_", "-")
        raise ArtifactError(
            f"the engine was built by {self.library} {self.version}, and here is {library}"
            f" {version}, which does not read it",
            where=where,
            hint=f"pip install '{package}=={self.version}', or compile the model again",
        )

    def check_chip(self, chip: str, name: str, *, where: str) -> None:
        """ArtifactError for a GPU that the engine was not built for."""
        if chip not in self.chips:
            raise ArtifactError(
                f"the engine was built for {', '.join(self.chips)}, this GPU is {chip} ({name})",
                where=where,
                hint=f"compile the model again with --set target={chip}, or add {chip} to"
                " tensorrt.chips",
            )


def import_library() -> tuple[str, Any]:
    """The name and module of what builds and runs engines; ToolchainError where there is none.

    One that is installed and cannot be loaded is named, if there is no other.
    """
    import importlib

    failed: ToolchainError | None = None
    for name in LIBRARIES:
        try:
            return name, importlib.import_module(name)
        except ImportError as error:
            if error.name != name:  # what it needs is missing, not the package
                failed = failed or ToolchainError(
                    f"{name} is installed and cannot be loaded: {error}",
                    hint=f"pip install --force-reinstall {name.replace('_', '-')}",
                )
    raise failed or ToolchainError(
        "engines of TensorRT need tensorrt_rtx, which is not installed", hint=TENSORRT.install
    )


def _profile(data: Mapping[str, Any], where: str) -> StepProfile:
    if data.keys() != {one.name for one in fields(StepProfile)}:
        raise _wrong("has a profile with other keys", where)
    counts = [value for name, value in data.items() if name != "decode"]
    if type(data["decode"]) is not bool or not all(_is_count(one) and one > 0 for one in counts):
        raise _wrong("has a profile with other values", where)
    return StepProfile(**data)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)


def _wrong(problem: str, where: str) -> ArtifactError:
    return ArtifactError(f"what describes the engine {problem}", where=where, hint=_HINT)
