"""What a batch on Ray is to do with each row: settled before any worker starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, Final

from ...ir.errors import UsageError
from ...runtime.batch.bodies import CHAT, COMPLETIONS

TEXT: Final = "generated_text"
REASON: Final = "finish_reason"
PROMPT_TOKENS: Final = "num_prompt_tokens"
TOKENS: Final = "num_generated_tokens"
ERROR: Final = "error"
COLUMNS: Final = (TEXT, REASON, PROMPT_TOKENS, TOKENS, ERROR)
"""What is added to each row."""

_FORMAT = 1  # of what is written: another one changes answers
_NOT_RETURNED = (
    *("best_of", "logprobs", "model", "n", "prompt_logprobs", "return_token_ids", "stream"),
    *("stream_options", "top_logprobs"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayJob:
    """A batch: which model, and how a row becomes a request.

    `columns` are the columns by the fields of the request that they hold, and `body` has the
    fields that are the same for all. `options` are those of RuntimeOptions. Raises UsageError.
    """

    artifact: str
    identity: str
    model_name: str
    id_column: str
    columns: Mapping[str, str]
    body: Mapping[str, Any]
    seed: int
    most_workers: int
    num_cpus: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [*self.columns, *self.body]
        if twice := [name for name in self.body if name in self.columns]:
            raise UsageError(f"{twice[0]} is given for all rows, and by a column")
        if wrong := [name for name in names if name in _NOT_RETURNED]:
            raise UsageError(
                f"the field {wrong[0]!r} cannot be used: there is one text for each row",
                hint="use `infc batch` or `infc serve`",
            )
        try:
            json.dumps(dict(self.body))
        except (TypeError, ValueError) as error:
            raise UsageError(f"body is not JSON: {error}") from None

    @property
    def url(self) -> str:
        """The route."""
        return CHAT if "messages" in self.columns else COMPLETIONS

    @property
    def digest(self) -> str:
        """Of all that an answer depends on besides its row."""
        left_out = ("artifact", "model_name", "most_workers", "num_cpus", "options")
        parts = {name: value for name, value in asdict(self).items() if name not in left_out}
        parts |= {"columns": dict(self.columns), "body": dict(self.body)}
        context = self.options.get("max_context")
        whole = [_FORMAT, metadata.version("infc"), context, parts]
        return hashlib.blake2b(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def check_columns(self, names: Sequence[str]) -> None:
        """Raises UsageError for a dataset that has other columns than are asked for."""
        for name in (self.id_column, *self.columns.values()):
            if name not in names:
                raise UsageError(f"the dataset has no column {name!r}, but {', '.join(names)}")
        if taken := [name for name in COLUMNS if name in names]:
            raise UsageError(
                f"the dataset has a column {taken[0]!r}, which is for the answers",
                hint="rename it, or leave it out",
            )

    def body_of(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The body of a request; a column that is null is a field that is left out."""
        given = {name: _plain(row[column]) for name, column in self.columns.items()}
        fields = {name: value for name, value in given.items() if value is not None}
        return {"model": self.model_name, **self.body, **fields}


def _plain(value: Any) -> Any:
    """Numbers and lists of Python, where there are numpy's."""
    return value.tolist() if hasattr(value, "tolist") else value


def row_digest(row_id: str) -> int:
    """A number of 64 bits by which a row is found again."""
    return int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=8).digest())
