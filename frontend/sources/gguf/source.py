"""A GGUF file as a source of the frontend: all of a model in one file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ....ir.errors import CheckpointError
from ....ir.extras import missing_library
from ...checkpoint import Checkpoint
from ...config import make_config
from ..base import SourceTokenizer
from .architectures import architecture_of
from .configs import config_entries
from .expressions import parameter_expressions
from .metadata import Metadata
from .tensors import PLAIN, GgufTensors
from .tokenizer import (
    Vocabulary,
    chat_templates,
    end_tokens,
    read_vocabulary,
    special_texts,
    tokenizer_text,
)
from .unmapped import check_unmapped

_SPLIT = "split.count"


class GgufSource:
    """See `ModelSource`. The file is mapped, and its header read, at once."""

    def __init__(self, path: Path) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise missing_library("gguf", "reading a GGUF file")
        self.path = path
        self._tensors = GgufTensors(path)
        metadata = Metadata(self._tensors.header.metadata, path)
        parts = metadata.optional_count(_SPLIT, low=0)
        if parts is not None and parts > 1:
            raise CheckpointError(
                f"is one of {parts} parts of a model",
                where=str(path),
                hint="put them together: llama-gguf-split --merge FIRST-PART OUT.gguf",
            )
        name = metadata.text("general.architecture")
        self._metadata = replace(metadata, architecture=name)
        self._architecture = architecture_of(self._metadata)
        self._entries: Mapping[str, Any] | None = None

    def read_config(self, *, allow_remote_code: bool, log: Callable[[str], None]) -> Any:
        config = make_config(dict(self._config_entries()), self.path)
        check_unmapped(self._metadata, log)
        return config

    def open_weights(self) -> Checkpoint:
        entries, tensors = self._config_entries(), self._tensors
        parameters = parameter_expressions(
            self._architecture,
            tensors,
            entries["num_attention_heads"],
            entries["num_key_value_heads"],
        )
        formats = tensors.main_formats()
        packed = [name for name in formats if name not in PLAIN]
        return Checkpoint(
            self.path,
            tensors.types,
            dict.fromkeys(tensors.types, tensors),
            parameters,
            stored_as=" and ".join(formats[:2]) if packed else None,
            described_by="its metadata",
            packed=tensors.packed,
        )

    def check_tokenizer(self, vocab_size: int | None) -> None:
        self._vocabulary(vocab_size)

    def read_tokenizer(self, vocab_size: int | None) -> SourceTokenizer | None:
        vocabulary, metadata = self._vocabulary(vocab_size), self._metadata
        if vocabulary is None:
            return None
        bos = vocabulary.id_of(metadata, "bos", 1 if vocabulary.kind == "llama" else None)
        named = {
            "bos_token": bos,
            "eos_token": vocabulary.id_of(metadata, "eos"),
            "pad_token": vocabulary.id_of(metadata, "padding"),
            "unk_token": vocabulary.id_of(metadata, "unknown"),
        }
        return SourceTokenizer(
            text=tokenizer_text(vocabulary, metadata),
            bos=() if bos is None else (bos,),
            eos=end_tokens(vocabulary, metadata),
            special_tokens={k: vocabulary.tokens[i] for k, i in named.items() if i is not None},
            special_texts=special_texts(vocabulary),
            templates=chat_templates(metadata),
            generation={},
        )

    def _config_entries(self) -> Mapping[str, Any]:
        if self._entries is None:
            self._entries = config_entries(self._architecture, self._metadata, self._tensors)
        return self._entries

    def _vocabulary(self, vocab_size: int | None) -> Vocabulary | None:
        return read_vocabulary(self._metadata, vocab_size)
