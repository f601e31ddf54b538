"""`session.json` beside a model in ONNX: what onnxruntime is told, and the oldest that runs it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from .errors import ArtifactError, ToolchainError

ACCURACY: Final = "session.qdq_matmulnbits_accuracy_level"
"""How products by grouped codes read their rows: 4 rounds these to 8 bits, 0 does not."""

OLDEST: Final = "1.31"
"""The first onnxruntime that has all ops of the standard that models are made of."""

OLDEST_GROUPED: Final = "1.32"
"""The first whose `GroupQueryAttention` takes rows of different lengths."""

_VALUES: Final[Mapping[str, frozenset[str]]] = {ACCURACY: frozenset({"0", "4"})}
"""What an artifact may set. Threads and memory are the engine's, whatever an artifact says."""

_HINT: Final = "the artifact is damaged, or of a newer infc: compile it again, or update infc"


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """Entries of onnxruntime's configuration, and the oldest version that runs the model."""

    config: Mapping[str, str]
    oldest: str

    def text(self) -> str:
        """The content of the file."""
        settings = {"config": dict(self.config), "onnxruntime": self.oldest}
        return json.dumps(settings, indent=1, sort_keys=True) + "\n"

    @classmethod
    def parse(cls, text: str, *, where: str) -> SessionSettings:
        """The settings of a file; ArtifactError for anything that this infc does not write."""
        data = json_object(text, where=where)
        if unknown := sorted(data.keys() - {"config", "onnxruntime"}):
            raise _wrong(f"the key {unknown[0]!r} is unknown", where)
        config, oldest = data.get("config"), data.get("onnxruntime")
        if not isinstance(config, dict):
            raise _wrong("config is no object", where)
        for key, value in config.items():
            if key not in _VALUES:
                raise _wrong(f"the setting {key!r} is unknown", where)
            if value not in list(_VALUES[key]):
                raise _wrong(f"{key} is {json.dumps(value)[:80]}", where)
        if not isinstance(oldest, str) or not re.fullmatch(r"[0-9]{1,4}\.[0-9]{1,4}", oldest):
            raise _wrong("onnxruntime is no version", where)
        return cls(config, oldest)


def json_object(text: str, *, where: str) -> dict[str, Any]:
    """The JSON object that a text is; ArtifactError for anything else."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"no JSON: {error}", where) from None
    if not isinstance(data, dict):
        raise _wrong("no JSON object", where)
    return data


def is_older(found: str, needed: str) -> bool:
    """Whether a version is older than another, by their first two numbers."""
    first, second = (
        [int(part) for part in re.findall(r"\d+", text)[:2]] for text in (found, needed)
    )
    return first < second


def install_hint(needed: str) -> str:
    """The command that installs a version that is new enough."""
    return f"pip install 'onnxruntime>={needed}'"


def check_version(found: str, needed: str, who: str) -> None:
    """ToolchainError for an onnxruntime that is older than `who` needs."""
    if is_older(found, needed):
        raise ToolchainError(
            f"onnxruntime {found} is too old, {who} needs {needed} or later",
            hint=install_hint(needed),
        )


def _wrong(problem: str, where: str) -> ArtifactError:
    return ArtifactError(problem, where=where, hint=_HINT)
