"""A vocabulary without its merges gives the same text, or is not used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tokenizers

from infc.ir.artifact import open_artifact
from infc.runtime.text.decoding import decoding_backend
from infc.runtime.text.tokenizer import Tokenizer

from .small_artifact import write_small_artifact

TINY = Path(__file__).parents[2] / "recipes" / "tiny" / "checkpoint" / "tokenizer.json"


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    """The bundled tokenizer, with a token beside the model's, and a change."""
    file = json.loads(TINY.read_text())
    size = len(file["model"]["vocab"])
    new = {**file["added_tokens"][0], "id": size, "content": "<|new|>", "special": False}
    file["added_tokens"].append(new)
    change(file)
    return json.dumps(file)


def test_it_has_the_tokens_of_the_library() -> None:
    text = changed(lambda file: None)
    library, ours = tokenizers.Tokenizer.from_str(text), decoding_backend(text)
    assert ours is not None
    size = library.get_vocab_size()
    assert library.id_to_token(size - 1) == "<|new|>"
    for token_id in range(size + 3):
        assert ours.id_to_token(token_id) == library.id_to_token(token_id)
    assert ours.id_to_token(-1) is None
    added = {i: (t.content, t.special) for i, t in library.get_added_tokens_decoder().items()}
    assert {i: (t.content, t.special) for i, t in ours.get_added_tokens_decoder().items()} == added


@pytest.mark.parametrize("skip", [False, True])
def test_streams_have_the_same_text(skip: bool) -> None:
    text, draw = changed(lambda file: None), Random(0)
    ours = decoding_backend(text)
    assert ours is not None
    both = [Tokenizer(backend) for backend in (tokenizers.Tokenizer.from_str(text), ours)]  # type: ignore[arg-type]
    assert both[0].special_texts == both[1].special_texts
    assert both[0].special_ids == both[1].special_ids
    for _ in range(20):
        ids = [draw.randrange(4100) for _ in range(50)]
        texts = []
        for tokenizer in both:
            decoder = tokenizer.stream_decoder(skip_special_tokens=skip, context=ids[:10])
            texts.append([*map(decoder.push, ids), decoder.flush()])
        assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
        lambda file: file.update(decoder=None),
        lambda file: file["added_tokens"][-1].update(id=9999),
        lambda file: file["added_tokens"][0].update(id=5),
        lambda file: file["model"].update(type="WordLevel"),
        lambda file: file["model"].update(vocab=[["a", 0.0]]),
        lambda file: file["model"]["vocab"].update({"def": 1}),
        lambda file: file["model"]["vocab"].update({"def": 99999}),
        lambda file: file["model"]["vocab"].update({"def": -1}),
        lambda file: file.update(model=3),
        lambda file: file.update(decoder={}),
    ],
)
def test_anything_else_is_left_to_the_library(change: Callable[[dict[str, Any]], object]) -> None:
    assert decoding_backend(changed(change)) is None
    assert decoding_backend("{") is None


def test_an_artifact_is_opened_without_what_encodes(tmp_path: Path) -> None:
    artifact = open_artifact(write_small_artifact(tmp_path / "small"))
    whole, part = Tokenizer.load(artifact), Tokenizer.load(artifact, only_decodes=True)
    assert whole is not None and part is not None
    assert part.eos_token_ids == whole.eos_token_ids
    ids = whole.encode("def value(self): return 3")
    assert part.text_parts(ids) == whole.text_parts(ids)
